"""Long rows: exact gradients, fast planning, and attention's outputs kept first."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import kept_bytes, kept_shapes
from mebp_mlx.engine.base import Pass
from mebp_mlx.engine.whole_graph import _masked_loss_sum
from mebp_mlx.model.lora import Adapter, pairs_of
from mebp_mlx.ops import cross_entropy as head
from mebp_mlx.ops.plan import SAVE_ATTENTION, SAVE_EVERYTHING, SAVE_INPUTS, SAVE_PRODUCTS, Barrier, Plan
from mebp_mlx.planner import probe as probing
from mebp_mlx.planner import search
from mebp_mlx.planner.probe import probe
from mebp_mlx.planner.search import choose, ladder
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.pages import page_ceil
from mebp_mlx.testing.reference import largest_error
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.training.update import Updater

# As in a long row's plan: a tile is a small part of the row, and a query block a small part of a tile.
LONG = Plan(token_block=128, query_block=16, saved=SAVE_ATTENTION)


def _opened(folder: Path, name: str, seed: int, **changes: Any) -> tuple[Any, Any]:
    config = CONFIGS[name] | changes
    model = mebp_mlx.open_model(write_model(folder / "model", config, seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2, scale=2.0)
    randomize_lora(lora, seed)
    return model, lora


def _step(name: str, model: Any, lora: Any, batch: Any, **how: Any) -> tuple[float, dict[str, mx.array]]:
    engine, grads = make_engine(name, model, lora, **how), {}
    loss = engine.step(batch, step=0, micro=0, n_labels=int((batch.targets != -100).sum()), sink=grads.update)
    engine.close()
    return loss, grads


def _batch(seed: int, B: int, T: int, V: int, masking: str) -> Any:
    tokens, targets = random_batch(seed, B, T, V, masking)
    return type("Batch", (), {"tokens": tokens, "targets": targets})


@pytest.mark.parametrize("saved", [SAVE_ATTENTION, SAVE_INPUTS], ids=["attention", "inputs"])
def test_gradients_equal_autograd_at_2048_tokens(tmp_path: Path, saved: frozenset[str], seed: int) -> None:
    model, lora = _opened(tmp_path, "qwen2", seed, num_hidden_layers=1)
    batch = _batch(seed, 1, 2048, model.spec.V, "holes")
    actual = _step("mebp", model, lora, batch, plan=dataclasses.replace(LONG, saved=saved))
    expected = _step("whole-graph", model, lora, batch)
    assert largest_error(*actual, *expected) <= 3e-5, f"seed {seed}"


def test_gradients_equal_float64_differences_at_8192_tokens(tmp_path: Path, seed: int) -> None:
    """Along the sum of the gradient and a random direction, from two float64 losses on each side."""
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    model, lora = _opened(tmp_path, "qwen2", seed, num_hidden_layers=1, **small)
    batch = _batch(seed, 1, 8192, model.spec.V, "none")
    _, grads = _step("mebp", model, lora, batch, plan=dataclasses.replace(LONG, token_block=1024, query_block=256))
    gradient = {name: np.asarray(g, np.float64) for name, g in grads.items()}
    size = np.sqrt(sum((g**2).sum() for g in gradient.values()))
    rng = np.random.default_rng(seed)
    model.dtype = mx.float64

    def loss(direction: dict[str, np.ndarray], step: float) -> float:
        moved = {n: np.asarray(p, np.float64) + step * direction[n] for n, p in lora.parameters().items()}
        pairs = pairs_of({name: mx.array(value, mx.float64) for name, value in moved.items()})
        plan = Plan(weight_block_bytes=None, token_block=1024, query_block=512)
        work = Pass(model, plan, Adapter(pairs, lora.scale, 0.0), Barrier("op"))
        x = work.embed(batch.tokens)
        for layer in model.spec.layers:
            x = work.forward(layer, x)
        h = head.final_norm(model)(mx.concatenate(x, axis=1))
        logits = model.row_block(model.spec.head, 0, model.spec.V).matmul(h)
        assert logits.dtype == mx.float64
        return _masked_loss_sum(logits, batch.targets).item() / batch.targets.size

    direction = {name: g / size + rng.standard_normal(g.shape) / 10 for name, g in sorted(gradient.items())}
    length = np.sqrt(sum((d**2).sum() for d in direction.values()))
    unit = {name: d / length for name, d in direction.items()}
    near, far = (loss(unit, step) - loss(unit, -step) for step in (0.02, 0.04))
    slope = (8 * near - far) / (12 * 0.02)  # a fourth-order formula
    actual = sum((gradient[name] * d).sum() for name, d in unit.items())
    assert abs(actual - slope) <= 1e-5 * size, f"seed {seed}"


@pytest.mark.parametrize("masking", ["ragged", "holes", "prompt"])
def test_groups_of_rows_do_not_change_the_heads_gradients(
    tmp_path: Path, masking: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = _opened(tmp_path, "gemma2", seed, num_hidden_layers=2)
    batch = _batch(seed, 2, 330, model.spec.V, masking)
    batch.targets[:, 130:195] = -100  # one tile has no label
    expected = _step("whole-graph", model, lora, batch)
    for n_rows, grain in ((1, "op"), (100, "block"), (4096, "op")):
        monkeypatch.setattr(head, "ROWS", n_rows)
        actual = _step("mebp", model, lora, batch, plan=Plan(grain, token_block=64))
        assert largest_error(*actual, *expected) <= 3e-5, f"{n_rows} rows, seed {seed}"
        evaluated = make_engine("mebp", model, lora, plan=Plan(token_block=64)).evaluate(batch)
        assert evaluated.n_labels == (batch.targets != -100).sum()
        assert abs(evaluated.loss_sum / evaluated.n_labels - expected[0]) <= 1e-5 * expected[0], f"seed {seed}"


@pytest.mark.parametrize("n_rows", [[], [5], [4096, 1], [0, 0, 0], [9000, 9000], [512] * 17, [4000, 96, 1, 0, 4095]])
def test_groups_hold_every_tile_once(n_rows: list[int]) -> None:
    groups = head._groups(n_rows)
    assert sum(groups) == len(n_rows) and (not n_rows or min(groups) > 0)
    first = 0
    for n_tiles in groups:
        assert n_tiles <= 1 or sum(n_rows[first : first + n_tiles]) <= head.ROWS
        first += n_tiles


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "lfm2", "qwen3_5"])
@pytest.mark.parametrize("T", [64, 130, 500])
def test_kept_bytes_of_a_long_row_are_counted_on_tiles_of_each_length(
    tmp_path: Path, name: str, T: int, seed: int
) -> None:
    model, lora = _opened(tmp_path, name, seed)
    for saved in (SAVE_INPUTS, SAVE_ATTENTION, SAVE_PRODUCTS, SAVE_EVERYTHING):
        plan = Plan(token_block=64, query_block=48, saved=saved)
        work = Pass(model.unread(), plan, lora, Barrier(None))
        whole = [kept_shapes(work, layer, 2, T).kept.values() for layer in model.spec.layers]
        expected = [sum(page_ceil(int(np.prod(s)) * d.size) for s, d in shapes) for shapes in whole]
        assert kept_bytes(model, plan, lora, 0, 2, T) == expected


def _workload(model: Any, lora: Any, T: int, **more: Any) -> Workload:
    return Workload(model, lora, 1, T, make_updater=lambda part, _: Updater(PlainSGD(learning_rate=1e-4), part), **more)


@pytest.mark.parametrize("grain", ["op", "block"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "qwen3_5"])
def test_a_probe_that_skips_tiles_measures_the_memory_of_all(
    tmp_path: Path, name: str, grain: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = _opened(tmp_path, name, seed)
    workload, plan = _workload(model, lora, 1000), Plan(grain, token_block=64, query_block=32, saved=SAVE_ATTENTION)
    some = probe(workload, plan, tmp_path)
    monkeypatch.setattr(probing, "WHOLE_TILES", 1000)
    every = probe(workload, plan, tmp_path)
    assert some.kept_bytes == every.kept_bytes and some.phases.keys() == every.phases.keys()
    if grain == "op":  # a lazy graph's memory on the CPU varies at random
        assert abs(some.arrays_bytes / every.arrays_bytes - 1) <= 0.02, (some, every)


def test_long_rows_keep_attentions_outputs_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 GB and 5 GB scaled down to this model."""
    model, lora = _opened(tmp_path, "qwen2", 0, num_hidden_layers=2)

    def saved(T: int, budget: int | None = None) -> frozenset[str]:
        workload = _workload(model, lora, T)
        return search._saved(workload, ladder(workload)[0], budget)

    monkeypatch.setattr(search, "ARENA_BUDGET_BYTES", 1_000_000)
    monkeypatch.setattr(search, "LONG_ROWS_BYTES", 2_500_000)
    assert saved(100) == SAVE_PRODUCTS
    assert saved(2000) - {"d"} == SAVE_ATTENTION  # more than 1 MB, less than 2.5
    assert saved(4500) - {"d"} == SAVE_INPUTS
    assert saved(2000, 1_100_000) - {"d"} == SAVE_INPUTS
    with pytest.raises(mebp_mlx.errors.BudgetError, match="--arena-budget"):
        choose(_workload(model, lora, 6000))


def test_chunks_of_the_vocabulary_are_as_large_as_a_gpus_budget_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With invented peaks; never at the expense of kept values, and no larger than useful."""
    model, lora = _opened(tmp_path, "qwen2", 0, vocab_size=50_000)
    workload, mb = _workload(model, lora, 256), 1_000_000

    def made_up(_: Workload, plan: Plan, __: Any) -> probing.Probe:
        phases = dict.fromkeys(("forward", "backward", "update"), 60 * mb)
        return probing.Probe(phases | {"head": 50 * mb + 6 * plan.logits_block_bytes}, 0, 1000)

    monkeypatch.setattr(search, "on_gpu", lambda: True)
    monkeypatch.setattr(search, "probe", made_up)
    monkeypatch.setattr(search, "footprint_bytes", lambda: 1000 * mb)  # no candidate appears twice as large as another
    plain, whole = ladder(workload)[-1].logits_block_bytes, 256 * 50_000 * 4
    sizes = []
    for budget in (109 * mb, 130 * mb, 200 * mb, 300 * mb, 10_000 * mb, None):
        found = choose(workload, budget)
        sizes.append(found.plan.logits_block_bytes)
        assert budget is None or found.predicted.peak_bytes * (1 + search.MARGIN) <= budget
        if budget is not None and plain < sizes[-1] < whole:  # the largest size
            assert found.predicted.peak_bytes * (1 + search.MARGIN) > budget - mb
    assert sizes == sorted(sizes) and sizes[0] - plain < mb and sizes[-1] == whole and len(set(sizes)) == 5, sizes
    assert choose(workload, 300 * mb, smallest=True).plan.logits_block_bytes < plain


def test_long_rows_on_a_gpu_wait_tile_by_tile_and_reach_the_largest_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that does not grow with block sizes (rows, kept values of unfinished blocks) does not end the search."""
    model, lora = _opened(tmp_path, "qwen2", 0)
    monkeypatch.setattr(search, "on_gpu", lambda: True)
    short, long = (ladder(_workload(model, lora, T)) for T in (1024, 16_384))
    assert [plan.grain for plan in short] == ["op", "tile", "tile", "block"]
    assert [plan.grain for plan in long] == ["op", "tile", "tile", "tile"]
    assert [plan.token_block for plan in long] == [plan.token_block for plan in short]
    mb = 1_000_000
    start_bytes = search.footprint_bytes()
    monkeypatch.setattr(search, "footprint_bytes", lambda: start_bytes)

    def made_up(_: Workload, plan: Plan, __: Any) -> probing.Probe:
        peak = start_bytes + (300 * plan.is_lazy + plan.token_block // 10) * mb
        kept_bytes = 140 * mb * model.spec.L
        return probing.Probe(dict.fromkeys(("forward", "head", "backward", "update"), peak), 0, kept_bytes)

    monkeypatch.setattr(search, "probe", made_up)
    budget = int((start_bytes + 500 * mb) * (1 + search.MARGIN))
    assert choose(_workload(model, lora, 16_384), budget).plan.token_block == 512
