"""MeZO's estimate is the directional derivative along its noise, and the parameters are never moved."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import mebp_mlx
from mebp_mlx.engine.zeroth_order import MezoEngine, gaussian
from tests.tiny import CONFIGS, random_batch, randomize_lora, write_model


class _Batch(NamedTuple):
    tokens: np.ndarray
    targets: np.ndarray


def _setup(tmp_path: Path, seed: int, dropout: float = 0.0) -> tuple:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2, scale=1.0, dropout=dropout)
    randomize_lora(lora, seed, spread=0.1)
    batch = _Batch(*random_batch(seed, 2, 9, model.spec.V))
    return model, lora, batch, int((batch.targets != -100).sum())


def test_estimate_is_the_slope_along_the_noise(tmp_path: Path, seed: int) -> None:
    model, lora, batch, n_labels = _setup(tmp_path, seed)
    before = lora.parameters()
    _, exact = mebp_mlx.loss_and_grads(model, lora, batch.tokens, batch.targets)
    engine = MezoEngine(model, lora, seed=seed, eps=2e-3)
    for step in range(3):
        estimate: dict[str, mx.array] = {}
        loss = engine.step(batch, step=step, micro=0, n_labels=n_labels, sink=estimate.update)
        noise = {n: np.asarray(gaussian((seed, step), n, p.shape), np.float64) for n, p in before.items()}
        slope = sum(float((np.asarray(exact[n], np.float64) * z).sum()) for n, z in noise.items())
        for name, z in noise.items():
            np.testing.assert_allclose(np.asarray(estimate[name]), slope * z, rtol=5e-2, atol=5e-2 * np.abs(z).max())
        assert abs(loss - mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item()) <= 1e-2 * loss
    after = lora.parameters()
    assert all(mx.array_equal(before[n], after[n]).item() for n in before)


def test_noise_is_regenerated_and_differs_by_step_and_name() -> None:
    a = gaussian((1, 2), "x.lora_a", (40, 5))
    assert mx.array_equal(a, gaussian((1, 2), "x.lora_a", (40, 5))).item()
    for parts, name in (((1, 3), "x.lora_a"), ((2, 2), "x.lora_a"), ((1, 2), "x.lora_b"), ((12,), "x.lora_a")):
        other = gaussian(parts, name, (40, 5))
        correlation = (a * other).mean().item()
        assert abs(correlation) < 0.4


def test_both_passes_share_dropout(tmp_path: Path, seed: int) -> None:
    """With a tiny eps the two losses would differ wildly if their masks did."""
    model, lora, batch, n_labels = _setup(tmp_path, seed, dropout=0.5)
    estimate: dict[str, mx.array] = {}
    MezoEngine(model, lora, seed=seed, eps=1e-3).step(batch, step=0, micro=0, n_labels=n_labels, sink=estimate.update)
    largest = max(float(mx.abs(g).max()) for g in estimate.values())
    assert largest <= 100.0, f"seed {seed}"
