"""Zeroth-order estimates: directional derivatives along regenerated noise, whose mean converges to the gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import zeroth_order as zo
from mebp_mlx.engine.base import WholeBatch
from mebp_mlx.engine.zeroth_order import Estimator, ZerothOrderEngine, gaussian, make_estimator
from mebp_mlx.model.lora import Lora
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.training.update import Updater

NAMES = ["mezo", "kzoo", "hizoo", "fzoo"]


def _setup(
    tmp_path: Path, seed: int, dropout: float = 0.0, keys: list[str] | None = None
) -> tuple[Any, Lora, WholeBatch]:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2, scale=1.0, dropout=dropout, keys=keys)
    randomize_lora(lora, seed, spread=0.1)
    return model, lora, WholeBatch(*random_batch(seed, 2, 9, model.spec.V))


def _estimate(model: Any, lora: Lora, batch: WholeBatch, estimator: Estimator, seed: int, step: int) -> Any:
    """Returns (loss, {name: estimate}) of one step."""
    actual: dict[str, mx.array] = {}
    engine = ZerothOrderEngine(model, lora, estimator, seed=seed)
    loss = engine.step(batch, step=step, micro=0, n_labels=batch.n_labels, sink=actual.update)
    return loss, actual


def _flat(values: dict[str, mx.array]) -> np.ndarray:
    return np.concatenate([np.asarray(values[name], np.float64).ravel() for name in sorted(values)])


@pytest.mark.parametrize("name", ["mezo", "kzoo"])
def test_the_estimate_is_the_directional_derivative_along_the_noise(tmp_path: Path, name: str, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    before = lora.parameters()
    _, exact = mebp_mlx.loss_and_grads(model, lora, batch.tokens, batch.targets)
    estimator = make_estimator(name, lora, seed=seed, eps=2e-3, n_seeds=3)
    for step in range(3):
        loss, actual = _estimate(model, lora, batch, estimator, seed, step)
        noise = {n: np.asarray(estimator.direction(0, n, p.shape), np.float64) for n, p in before.items()}
        slope = sum(float((np.asarray(exact[n], np.float64) * z).sum()) for n, z in noise.items())
        for n, z in noise.items():
            np.testing.assert_allclose(np.asarray(actual[n]), slope * z, rtol=5e-2, atol=5e-2 * np.abs(z).max())
        assert abs(loss - mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item()) <= 1e-2 * loss


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_many_estimates_converges_to_the_gradient(tmp_path: Path, name: str, seed: int) -> None:
    """For d parameters and n directions the cosine is about sqrt(n / (n + d)), which grows with the root of n."""
    model, lora, batch = _setup(tmp_path, seed, keys=["self_attn.v_proj"])
    _, exact = mebp_mlx.loss_and_grads(model, lora, batch.tokens, batch.targets)
    truth, n_steps = _flat(exact), 160
    samples = 4
    estimator = make_estimator(name, lora, seed=seed, eps=2e-3, n_seeds=10**6, alpha=1e-6, n_samples=samples)
    total, n_directions = np.zeros(len(truth)), samples if name == "fzoo" else 1
    for step in range(n_steps):
        total += _flat(_estimate(model, lora, batch, estimator, seed, step)[1])
        n = (step + 1) * n_directions
        if step + 1 in (n_steps // 4, n_steps):
            cosine = float(total @ truth / np.linalg.norm(total) / np.linalg.norm(truth))
            expected = math.sqrt(n / (n + len(truth)))
            # fzoo divides each step by its deviation, which lowers the cosine slightly.
            assert 0.6 * expected <= cosine <= 1.35 * expected, f"seed {seed}, n {n}: {cosine} for {expected}"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_never_move(tmp_path: Path, name: str, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    before = {n: np.array(p) for n, p in lora.parameters().items()}
    estimator = make_estimator(name, lora, seed=seed, eps=1e-2, n_samples=2)
    for step in range(2):
        _estimate(model, lora, batch, estimator, seed, step)
    assert all(np.array_equal(np.asarray(p), before[n]) for n, p in lora.parameters().items())


def test_hizoo_without_curvature_is_mezo(tmp_path: Path, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    actual = [
        _estimate(model, lora, batch, make_estimator(name, lora, seed=seed, eps=1e-2, alpha=0.0), seed, 4)[1]
        for name in ("mezo", "hizoo")
    ]
    assert all(mx.array_equal(actual[0][n], actual[1][n]).item() for n in actual[0]), f"seed {seed}"


def test_hizoo_follows_its_equations(tmp_path: Path, seed: int) -> None:
    """Two steps, compared with float64; the losses are those of the perturbed parameters."""
    model, lora, batch = _setup(tmp_path, seed)
    eps, alpha, start = 3e-2, 0.1, lora.parameters()
    estimator = make_estimator("hizoo", lora, seed=seed, eps=eps, alpha=alpha)
    H = {n: np.ones(p.shape) for n, p in start.items()}
    for step in range(2):
        z = {n: np.asarray(gaussian((seed, step), n, p.shape), np.float64) for n, p in start.items()}
        losses = []
        for amount in (0.0, eps, -eps):
            moved = {n: mx.array(np.asarray(p) + amount * z[n] / np.sqrt(H[n]), mx.float32) for n, p in start.items()}
            lora.update(moved)
            losses.append(mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item())
        lora.update(start)
        bend = abs(losses[1] + losses[2] - 2 * losses[0]) / (2 * eps**2)
        slope = (losses[1] - losses[2]) / (2 * eps)
        H = {n: (1 - alpha) * h + alpha * bend * h * z[n] ** 2 for n, h in H.items()}
        _, actual = _estimate(model, lora, batch, estimator, seed, step)
        for n in actual:
            np.testing.assert_allclose(
                np.exp(np.asarray(estimator.state()[n])), H[n], rtol=2e-2, err_msg=f"seed {seed}"
            )
            expected = slope * z[n] / np.sqrt(H[n])
            np.testing.assert_allclose(np.asarray(actual[n]), expected, rtol=5e-2, atol=1e-3 * np.abs(expected).max())


def test_hizoo_keeps_what_the_published_alpha_adds(tmp_path: Path, seed: int) -> None:
    """A thousand steps of 1e-8 have an effect, although each would be lost if added to 1 in float32."""
    _, lora, _ = _setup(tmp_path, seed, keys=["self_attn.v_proj"])
    estimator = make_estimator("hizoo", lora, seed=seed, eps=1.0, alpha=1e-8)
    name, value = next(iter(lora.parameters().items()))
    for step in range(1000):
        estimator.begin(step)
        estimator.observe(np.array([0.0, 2.0, 2.0]))  # curvature 2
        estimator.gradient(name, value.shape)
    mean = float(np.asarray(estimator.state()[name]).mean())
    assert abs(mean - 1e-5) <= 3e-6, f"seed {seed}: {mean}"  # 1000 a (2 E z^2 - 1)


@pytest.mark.parametrize("pro", [False, True])
def test_kzoos_state_is_its_start_and_k_numbers(tmp_path: Path, pro: bool, seed: int) -> None:
    """Up to the rounding of float32 sums: a few ulps per step."""
    model, lora, batch = _setup(tmp_path, seed)
    start, rate, n_steps = lora.parameters(), 1e-3, 12
    estimator = make_estimator("kzoo", lora, seed=seed, eps=1e-2, n_seeds=5, pro=pro)
    assert isinstance(estimator, zo.SeedPool)
    updater = Updater(PlainSGD(learning_rate=rate), lora)
    engine = ZerothOrderEngine(model, lora, estimator, seed=seed)
    for step in range(n_steps):
        updater.begin_step()
        engine.step(batch, step=step, micro=0, n_labels=batch.n_labels, sink=updater.sink)
        updater.end_step()
    assert estimator.counts.sum() == n_steps and (estimator.counts > 1).any()
    rebuilt = zo.rebuild(start, estimator.sums, seed, rate)
    for n, value in lora.parameters().items():
        moved = np.abs(np.asarray(value) - np.asarray(start[n])).max()
        difference = np.abs(np.asarray(rebuilt[n]) - np.asarray(value)).max()
        assert moved > 0 and difference <= 4e-7 * n_steps * max(moved, np.abs(np.asarray(value)).max()), f"seed {seed}"


def test_kzoo_pro_prefers_large_slopes(seed: int) -> None:
    pool = zo.SeedPool(seed, 1e-2, 4, pro=True)
    assert np.allclose(pool.probabilities(), 0.25)
    pool.magnitudes, pool.counts = np.array([6.0, 0, 10, 0], np.float32), np.array([2.0, 0, 1, 0], np.float32)
    weights = np.exp([0.3, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(pool.probabilities(), weights / weights.sum())
    pool.chosen = 1
    pool.observe(np.array([1e9, 0.0]))
    assert pool.magnitudes[1] == zo.HISTORY_CLIP


def test_fzoo_is_invariant_to_the_scale_of_the_loss(tmp_path: Path, seed: int) -> None:
    _, lora, _ = _setup(tmp_path, seed)
    losses = np.random.default_rng(seed).normal(3, 0.1, 9)
    actual = []
    for factor in (1.0, 1e-3, 64.0):
        estimator = make_estimator("fzoo", lora, seed=seed, eps=1e-2)
        estimator.begin(0)
        estimator.observe(factor * losses)
        actual.append({n: np.array(estimator.gradient(n, p.shape)) for n, p in lora.parameters().items()})
    for other in actual[1:]:
        for n, value in actual[0].items():
            np.testing.assert_allclose(other[n], value, rtol=1e-5, atol=1e-6)
    estimator.observe(np.full(9, 2.0))  # a constant loss has derivative zero
    assert not np.asarray(estimator.gradient(n, value.shape)).any()


def test_fzoo_follows_its_equation(tmp_path: Path, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    eps, start = 1e-2, lora.parameters()
    _, actual = _estimate(model, lora, batch, make_estimator("fzoo", lora, seed=seed, eps=eps, n_samples=3), seed, 2)
    u = [{n: np.asarray(zo.signs((seed, 2, i), n, p.shape)) for n, p in start.items()} for i in range(3)]
    assert all(set(np.unique(x)) == {-1.0, 1.0} for x in u[0].values())
    losses = [mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item()]
    for one in u:
        lora.update({n: mx.array(np.asarray(p) + eps * one[n], mx.float32) for n, p in start.items()})
        losses.append(mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item())
    differences = np.array(losses[1:]) - losses[0]
    for n in actual:
        expected = sum(d * one[n] for d, one in zip(differences, u, strict=True)) / (3 * np.std(losses[1:]))
        np.testing.assert_allclose(np.asarray(actual[n]), expected, rtol=2e-2, atol=2e-3, err_msg=f"seed {seed}")


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_make_one_estimate(tmp_path: Path, name: str, seed: int) -> None:
    """Two halves of a batch, followed by a batch without labels, give the estimate of the whole batch."""
    model, lora, _ = _setup(tmp_path, seed)
    tokens, targets = random_batch(seed, 4, 9, model.spec.V)
    whole = WholeBatch(tokens, targets)
    loss, expected = _estimate(model, lora, whole, make_estimator(name, lora, seed=seed, eps=1e-2), seed, 1)
    engine = ZerothOrderEngine(model, lora, make_estimator(name, lora, seed=seed, eps=1e-2), seed=seed)
    parts = [WholeBatch(tokens[:1], targets[:1]), WholeBatch(tokens[1:], targets[1:])]
    parts.append(WholeBatch(tokens[:1], np.full_like(targets[:1], -100)))
    calls: list[dict[str, mx.array]] = []
    total = 0.0
    for micro, part in enumerate(parts):
        total += engine.step(part, step=1, micro=micro, n_labels=whole.n_labels, sink=calls.append)
    actual = {n: g for call in calls for n, g in call.items()}
    assert len(calls) == model.spec.L and actual.keys() == expected.keys()
    assert abs(total - loss) <= 1e-5 * loss
    largest = max(float(mx.abs(g).max()) for g in expected.values())
    assert max(float(mx.abs(actual[n] - g).max()) for n, g in expected.items()) <= 2e-2 * largest, f"seed {seed}"


def test_noise_is_regenerated_and_differs_by_step_and_name() -> None:
    a = gaussian((1, 2), "x.lora_a", (40, 5))
    assert mx.array_equal(a, gaussian((1, 2), "x.lora_a", (40, 5))).item()
    for parts, name in (((1, 3), "x.lora_a"), ((2, 2), "x.lora_a"), ((1, 2), "x.lora_b"), ((12,), "x.lora_a")):
        other = gaussian(parts, name, (40, 5))
        correlation = (a * other).mean().item()
        assert abs(correlation) < 0.4


@pytest.mark.parametrize("name", NAMES)
def test_all_passes_share_dropout(tmp_path: Path, name: str, seed: int) -> None:
    """With a tiny eps, different masks would give very different losses."""
    model, lora, batch = _setup(tmp_path, seed, dropout=0.5)
    engine = ZerothOrderEngine(model, lora, make_estimator(name, lora, seed=seed, eps=1e-3), seed=seed)
    engine.step(batch, step=0, micro=0, n_labels=batch.n_labels, sink=lambda g: None)
    assert np.ptp(engine._losses) <= 0.1, f"seed {seed}"


def test_an_unknown_engine_is_refused(tmp_path: Path) -> None:
    _, lora, _ = _setup(tmp_path, 0)
    with pytest.raises(ValueError, match="unknown zeroth-order engine 'spsa'"):
        make_estimator("spsa", lora, seed=0, eps=1e-2)


def test_an_update_holds_no_second_copy_of_the_parameters(tmp_path: Path, seed: int) -> None:
    """Old values are freed block by block as the new ones are computed."""
    model = mebp_mlx.open_model(write_model(tmp_path / "wide", CONFIGS["qwen2"] | {"num_hidden_layers": 6}, seed=seed))
    lora = mebp_mlx.init_lora(model, rank=512)
    lora_bytes = sum(value.nbytes for value in lora.parameters().values())
    updater = Updater(PlainSGD(learning_rate=1e-4), lora)
    engine = ZerothOrderEngine(model, lora, make_estimator("mezo", lora, seed=seed, eps=1e-2), seed=seed)
    batch = WholeBatch(*random_batch(seed, 1, 5, model.spec.V))
    active: list[int] = []

    def sink(gradients: dict[str, mx.array]) -> None:
        updater.sink(gradients)
        active.append(mx.get_active_memory())

    for step in range(2):
        updater.begin_step()
        engine.step(batch, step=step, micro=0, n_labels=batch.n_labels, sink=sink)
        updater.end_step()
    assert max(active) - mx.get_active_memory() <= 0.5 * lora_bytes, f"seed {seed}"


@pytest.mark.parametrize("name", NAMES)
def test_a_reported_loss_is_at_the_weights_or_names_its_point(tmp_path: Path, name: str, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    estimator = make_estimator(name, lora, seed=seed, eps=0.1)
    engine = ZerothOrderEngine(model, lora, estimator)
    at_weights = engine.evaluate(batch).loss_sum / batch.n_labels
    loss = engine.step(batch, step=0, micro=0, n_labels=batch.n_labels, sink=lambda _: None)
    if estimator.loss_at is None:
        assert abs(loss - at_weights) <= 1e-6 * at_weights
    else:
        assert estimator.loss_at == "mean of both sides" and abs(loss - at_weights) > 1e-6 * at_weights
