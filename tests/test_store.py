"""Kept values: in memory first, then in the file, written one block later if a block is one graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import base as engine_base
from mebp_mlx.engine.arena import Arena
from mebp_mlx.engine.backprop import BackpropEngine, kept_bytes
from mebp_mlx.engine.base import Store
from mebp_mlx.errors import UserError
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Barrier, Plan
from mebp_mlx.system.pages import PAGE_BYTES
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, write_model

ONE_PAGE = (PAGE_BYTES // 4,)  # a float32 array that fills a page


def _value(number: float) -> mx.array:
    return mx.full(ONE_PAGE, number)


def _holds(store: Store, layer: int, name: str, number: float) -> bool:
    actual = store.get(layer, name, 0)
    return actual is not None and np.array_equal(actual, _value(number))


@pytest.mark.parametrize("memory_bytes", [None, 4 * PAGE_BYTES])
@pytest.mark.parametrize("grain", ["op", "block"])
def test_there_is_no_file_if_everything_fits(
    tmp_path: Path, grain: str, memory_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_base, "Arena", None)  # creating one would fail
    store = Store(Barrier(grain), memory_bytes, tmp_path)
    store.reserve(4 * PAGE_BYTES, PAGE_BYTES)
    arrays = [_value(n) for n in range(4)]
    for layer, array in enumerate(arrays):
        assert store.put(layer, "x", 0, array)
        store.write_behind()
        assert store.get(layer, "x", 0) is array
    assert (store.held_bytes, store.written_bytes, store.read_bytes) == (4 * PAGE_BYTES, 0, 0)
    store.clear()
    assert store.held_bytes == 0 and store.get(0, "x", 0) is None
    store.close()


def test_memory_first_then_the_file(tmp_path: Path) -> None:
    store = Store(Barrier("op"), 2 * PAGE_BYTES, tmp_path)
    for _ in range(2):  # a cleared store works like a new one
        store.clear()
        store.reserve(4 * PAGE_BYTES, PAGE_BYTES)
        assert store.arena is not None and store.arena.capacity_bytes == 3 * PAGE_BYTES  # one block more than the rest
        assert [store.put(layer, "x", 0, _value(layer)) for layer in range(4)] == [True, True, False, False]
        assert store.held_bytes == store.written_bytes == 2 * PAGE_BYTES
        assert all(_holds(store, layer, "x", layer) for layer in range(4))
        assert store.read_bytes == 2 * PAGE_BYTES
        assert store.get(1, "y", 0) is None and store.get(1, "x", 1) is None and store.get(4, "x", 0) is None
    store.close()
    assert store.arena is None


@pytest.mark.parametrize("size, held", [(1, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 2)])
def test_room_is_counted_in_whole_pages(tmp_path: Path, size: int, held: int) -> None:
    store = Store(Barrier("op"), 2 * PAGE_BYTES, tmp_path)
    assert store.put(0, "x", 0, mx.zeros(size, mx.uint8))
    assert store.held_bytes == held * PAGE_BYTES


def test_a_block_that_is_one_graph_is_written_when_the_next_is_submitted(tmp_path: Path) -> None:
    barrier = Barrier("block")
    store = Store(barrier, 0, tmp_path)
    store.reserve(3 * PAGE_BYTES, PAGE_BYTES)
    written = []
    for layer in range(3):
        array = _value(layer)
        assert store.put(layer, "x", 0, array)  # in use until written, so its memory must not be reused
        assert store.get(layer, "x", 0) is array
        barrier.block()
        store.write_behind()
        written.append(store.written_bytes // PAGE_BYTES)
    assert written == [0, 1, 2]
    assert store.read_bytes == 0
    store.write_behind()  # after the head
    assert store.written_bytes == 3 * PAGE_BYTES and store._arrays == {}
    assert all(_holds(store, layer, "x", layer) for layer in range(3)) and store.read_bytes == 3 * PAGE_BYTES
    store.close()


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_taken_values_belong_to_the_caller(tmp_path: Path, memory_bytes: int | None) -> None:
    store = Store(Barrier("op"), memory_bytes, tmp_path)
    store.reserve(2 * PAGE_BYTES, PAGE_BYTES)
    store.put(0, "g.0", 0, _value(7))
    store.put(0, "g.0", 1, _value(8))
    taken = store.take(0, "g.0", 0)
    assert taken is not None and np.array_equal(taken, _value(7))
    assert store.take(0, "u.0", 0) is None
    # The memory is no longer referenced; the file has its own copy.
    again = store.get(0, "g.0", 0)
    assert again is None if memory_bytes is None else again is not taken and np.array_equal(again, taken)
    assert np.array_equal(store.get(0, "g.0", 1), _value(8))
    store.close()


def test_a_forgotten_block_is_not_in_memory(tmp_path: Path) -> None:
    store = Store(Barrier("op"), None, tmp_path)
    for layer in range(3):
        store.put(layer, "x", 0, _value(layer))
    store.forget(1)
    assert store.get(1, "x", 0) is None and _holds(store, 0, "x", 0) and _holds(store, 2, "x", 2)


def test_a_larger_batch_needs_a_larger_file_and_a_full_disk_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    class Watched(Arena):
        def __init__(self, capacity_bytes: int, folder: Any = None):
            made.append(capacity_bytes)
            super().__init__(capacity_bytes, folder)

    monkeypatch.setattr(engine_base, "Arena", Watched)
    store = Store(Barrier("op"), PAGE_BYTES, tmp_path)
    for n_pages in (3, 2, 5):
        store.reserve(n_pages * PAGE_BYTES, PAGE_BYTES)
    assert made == [3 * PAGE_BYTES, 5 * PAGE_BYTES]
    with pytest.raises(UserError, match="--arena-dir"):
        store.reserve(1 << 60, 1 << 40)
    store.close()


@pytest.mark.parametrize("saved", [SAVE_PRODUCTS, SAVE_INPUTS], ids=["products", "inputs"])
@pytest.mark.parametrize("grain", ["op", "stage", "tile", "block"])
@pytest.mark.parametrize(
    "name, weights", [("gemma3_text", "decompressed"), ("qwen2", "packed"), ("lfm2", "packed"), ("qwen3_5", "packed")]
)
def test_a_step_keeps_the_predicted_bytes(
    tmp_path: Path, name: str, weights: str, grain: str, saved: frozenset[str], seed: int
) -> None:
    """In memory, in the file, and in both: the bytes that the plan predicted, to the page."""
    model = mebp_mlx.open_model(
        write_model(tmp_path / "model", packed_config(name), quantization={"group_size": 32, "bits": 4}),
        "float32",
        weights,
    )
    lora = mebp_mlx.init_lora(model, rank=2, dropout=0.1)
    tokens, targets = random_batch(seed, 2, 150, model.spec.V)
    batch = type("Batch", (), {"tokens": tokens, "targets": targets})
    n_labels = int((targets != -100).sum())
    for memory_bytes in (None, 0, 300_000):
        plan = Plan(grain, saved, kept_bytes=memory_bytes, weight_block_bytes=1, token_block=64, query_block=17)
        counted = sum(kept_bytes(model, plan, lora, 0, 2, 150))
        engine = BackpropEngine(model, lora, plan=plan)
        engine.step(batch, step=0, micro=0, n_labels=n_labels, sink=lambda g: None)  # type: ignore[arg-type]
        store = engine.store
        used = 0 if store.arena is None else store.arena._used
        assert store.held_bytes + used == counted, memory_bytes
        assert store.held_bytes <= (counted if memory_bytes is None else memory_bytes)
        assert store._arrays == {}
        engine.close()


@pytest.mark.parametrize("grain", ["op", "block"])
def test_blocks_with_different_packing_keep_different_sizes(tmp_path: Path, grain: str, seed: int) -> None:
    """The MLP's width is split according to its weights' packing, and every part fills its own pages."""
    config = packed_config("qwen2") | {"intermediate_size": 1088}
    quantization = {"group_size": 32, "bits": 4, "model.layers.1.mlp.down_proj": False}
    folder = write_model(tmp_path / "model", config, seed=seed, quantization=quantization)
    model = mebp_mlx.open_model(folder, "float32", "packed")
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 1, 9, model.spec.V)
    for memory_bytes in (None, 0):
        plan = Plan(grain, kept_bytes=memory_bytes, weight_block_bytes=64 << 10)
        mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)


def test_a_batch_longer_than_the_reserved_one_gets_its_own_space(tmp_path: Path, seed: int) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2)
    engine = BackpropEngine(model, lora, plan=Plan("op", kept_bytes=0), arena_dir=tmp_path)
    engine.reserve(1, 10)
    for T in (10, 700, 300):
        tokens, targets = random_batch(seed, 2, T, model.spec.V)
        batch = type("Batch", (), {"tokens": tokens, "targets": targets})
        engine.step(batch, step=0, micro=0, n_labels=9, sink=lambda g: None)  # type: ignore[arg-type]
    engine.close()
