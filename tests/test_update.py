"""Block-by-block updates equal the optimizer's update of the whole tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mebp_mlx
from mebp_mlx.testing.tiny import CONFIGS, randomize_lora, write_model
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.training.update import Updater

_SCHEDULE = optim.join_schedules([optim.linear_schedule(0, 1e-2, 3), optim.cosine_decay(1e-2, 20)], [4])
OPTIMIZERS = {
    "sgd": lambda: optim.SGD(1e-2, momentum=0.9),
    "adam": lambda: optim.Adam(1e-2, bias_correction=True),
    "adamw with a schedule": lambda: optim.AdamW(_SCHEDULE),
    "lion": lambda: optim.Lion(1e-3),
    "muon": lambda: optim.Muon(1e-2),
    "adafactor": lambda: optim.Adafactor(1e-2, relative_step=False, scale_parameter=False),
}


def _lora(tmp_path: Path, seed: int) -> Any:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=0))
    lora = mebp_mlx.init_lora(model, rank=3)
    randomize_lora(lora, seed)
    return lora


def _gradients(lora: Any, rng: np.random.Generator) -> dict[str, mx.array]:
    return {n: mx.array(rng.standard_normal(p.shape), mx.float32) for n, p in lora.parameters().items()}


def _blocks(gradients: dict[str, mx.array]) -> list[dict[str, mx.array]]:
    actual: dict[str, dict[str, mx.array]] = {}
    for name, g in gradients.items():
        actual.setdefault(".".join(name.split(".")[:3]), {})[name] = g
    return list(reversed(actual.values()))


@pytest.mark.parametrize("is_lazy", [False, True])
def test_an_update_in_place_keeps_the_parameters_memory(tmp_path: Path, is_lazy: bool, seed: int) -> None:
    """But not while a lazy graph may still read the old values."""
    lora = _lora(tmp_path, seed)
    updater = Updater(optim.SGD(1.0), lora, in_place=True, is_lazy=is_lazy)
    before = lora.parameters()
    updater.begin_step()
    mx.eval(updater.sink(_gradients(lora, np.random.default_rng(seed))))
    updater.end_step()
    assert all((value is before[name]) != is_lazy for name, value in lora.parameters().items())


@pytest.mark.parametrize(
    "how",
    [{}, {"park": True}, {"in_place": True}, {"is_lazy": True, "in_place": True}, {"is_lazy": True, "gather": True}],
    ids=["one by one", "parked", "in place", "lazy", "lazy, gathered"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_one_step_for_any_number_of_blocks(
    tmp_path: Path, name: str, how: dict[str, bool], seed: int
) -> None:
    lora, rng = _lora(tmp_path, seed), np.random.default_rng(seed)
    expected, whole = {name: value + 0 for name, value in lora.parameters().items()}, OPTIMIZERS[name]()
    mx.eval(expected)  # an update in place overwrites the parameters' own memory
    updater = Updater(OPTIMIZERS[name](), lora, **how, arena_dir=tmp_path)
    for _ in range(6):
        gradients = _gradients(lora, rng)
        expected = whole.apply_gradients(gradients, expected)
        updater.begin_step()
        for block in _blocks(gradients):
            mx.async_eval(updater.sink(block))
        updater.end_step()
    assert updater.optimizer.step.item() == 6
    for key, value in lora.parameters().items():
        assert mx.array_equal(value, expected[key]).item(), (key, seed)
    kept, wanted = (dict(tree_flatten(state)) for state in (updater.state(), whole.state))
    assert set(kept) == set(wanted)
    for key, value in kept.items():
        assert np.array_equal(value, wanted[key]), (key, seed)


def test_a_sink_returns_the_arrays_to_evaluate(tmp_path: Path, seed: int) -> None:
    """A lazy update returns the block's new values and states, and the step; otherwise nothing is left to evaluate."""
    lora, rng = _lora(tmp_path, seed), np.random.default_rng(seed)
    for how in ({}, {"park": True}, {"park": True, "is_lazy": True}):
        updater = Updater(optim.AdamW(1e-2), lora, **how, arena_dir=tmp_path)
        updater.begin_step()
        assert [updater.sink(block) for block in _blocks(_gradients(lora, rng))] == [[]] * 3
        updater.end_step()
    updater = Updater(optim.AdamW(1e-2), lora, is_lazy=True)
    updater.begin_step()
    for block in _blocks(_gradients(lora, rng)):
        actual, state = updater.sink(block), updater.optimizer.state
        wanted = [lora.parameters()[name] for name in block]
        wanted += [array for name in block for _, array in tree_flatten(state[name])] + [state["step"]]
        assert len(actual) == len(wanted)
        assert all(np.array_equal(mine, its) for mine, its in zip(actual, wanted, strict=True)), seed
    gathering = Updater(optim.AdamW(1e-2), lora, gather=True)
    gathering.begin_step()
    (block, *_), more = _blocks(_gradients(lora, rng)), _blocks(_gradients(lora, rng))[0]
    gathering.sink(block)
    for name, actual in zip(more, gathering.sink(more), strict=True):
        assert np.array_equal(actual, block[name] + more[name]), (name, seed)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_after_a_lazy_step_no_gradient_is_held(tmp_path: Path, clip: float | None, seed: int) -> None:
    """Nor old values: accumulated gradients are applied at the end of the step, not when they are next read."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=0))
    lora, rng = mebp_mlx.init_lora(model, rank=100), np.random.default_rng(seed)
    updater = Updater(optim.AdamW(1e-2), lora, is_lazy=True, gather=True, max_grad_norm=clip)
    mx.synchronize()
    before = mx.get_active_memory()
    for _ in range(2):
        updater.begin_step()
        for block in _blocks(_gradients(lora, rng)):
            mx.async_eval(updater.sink(block))
        del block
        updater.end_step()
        mx.synchronize()
        lora_bytes = sum(value.nbytes for value in lora.parameters().values())
        assert mx.get_active_memory() - before <= 0.01 * lora_bytes


def test_offloaded_state_is_not_in_memory(tmp_path: Path) -> None:
    lora = _lora(tmp_path, 0)
    updater = Updater(optim.AdamW(1e-2), lora, park=True, arena_dir=tmp_path)
    assert updater.parked_bytes >= 2 * sum(p.nbytes for p in lora.parameters().values())
    updater.sink(_gradients(lora, np.random.default_rng(0)))
    held = [value for _, value in tree_flatten(updater.optimizer.state) if isinstance(value, mx.array)]
    assert sum(value.nbytes for value in held) <= 64  # the step and the learning rate
    assert Updater(PlainSGD(1e-2), lora, park=True, arena_dir=tmp_path).parked_bytes == 0


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_uses_the_global_norm(tmp_path: Path, limit: float, seed: int) -> None:
    lora, rng = _lora(tmp_path, seed), np.random.default_rng(seed)
    start, gradients = lora.parameters(), _gradients(lora, rng)
    true_norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients.values()))
    updater = Updater(optim.SGD(1.0), lora, max_grad_norm=limit)
    updater.begin_step()
    for block in _blocks(gradients):
        updater.sink(block)
    norm = updater.end_step()
    assert norm is not None and abs(norm - true_norm) <= 1e-5 * true_norm
    for key, value in lora.parameters().items():
        moved = np.asarray(start[key] - value, np.float64)
        want = np.asarray(gradients[key], np.float64) * min(1.0, limit / true_norm)
        assert np.abs(moved - want).max() <= 1e-5, (key, seed)


def test_accumulation_adds_micro_batches(tmp_path: Path, seed: int) -> None:
    lora, rng = _lora(tmp_path, seed), np.random.default_rng(seed)
    start = lora.parameters()
    parts = [_gradients(lora, rng) for _ in range(3)]
    updater = Updater(optim.SGD(1.0), lora, gather=True)
    updater.begin_step()
    for part in parts:
        for block in _blocks(part):
            updater.sink(block)
    assert all(mx.array_equal(lora.parameters()[n], start[n]).item() for n in start)
    updater.end_step()
    for key, value in lora.parameters().items():
        want = start[key] - (parts[0][key] + parts[1][key] + parts[2][key])
        assert mx.abs(value - want).max().item() <= 1e-5, (key, seed)
    assert updater.optimizer.step.item() == 1
