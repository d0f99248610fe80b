"""Barriers: the evaluations of every grain, and the number of waits in a step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mebp_mlx
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import Pass
from mebp_mlx.ops import plan as plan_module
from mebp_mlx.ops.cross_entropy import cross_entropy
from mebp_mlx.ops.plan import GRAINS, Barrier, Plan
from mebp_mlx.testing.tiny import packed_config, random_batch, randomize_lora, write_model


class Recorded:
    """Records evaluations in order: ("wait" | "submit", the arrays' names)."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.calls: list[tuple[str, str]] = []
        self.names: dict[int, str] = {}
        self.kept: list[mx.array] = []  # an id is unique while its array lives
        plain_eval, plain_async_eval = mx.eval, mx.async_eval

        def recorded(kind: str, run: Any) -> Any:
            def call(*arrays: mx.array) -> None:
                self.calls.append((kind, "".join(self.names.get(id(array), "?") for array in arrays)))
                run(*arrays)

            return call

        class Recording:
            eval = staticmethod(recorded("wait", plain_eval))
            async_eval = staticmethod(recorded("submit", plain_async_eval))

        patch.setattr(plan_module, "mx", Recording)

    def array(self, name: str) -> mx.array:
        made = mx.zeros(2) + 1
        self.names[id(made)] = name
        self.kept.append(made)
        return made


def _walk(grain: str | None, patch: pytest.MonkeyPatch) -> tuple[Barrier, list[tuple[str, str]]]:
    """Two blocks of two tiles, each with a piece p, a value v and an output t."""
    barrier, recorded = Barrier(grain), Recorded(patch)
    for block in "ab":
        for tile in "12":
            barrier.piece(recorded.array(f"p{block}{tile} "))
            barrier.value(recorded.array(f"v{block}{tile} "))
            barrier.tile(recorded.array(f"t{block}{tile} "))
        barrier.block()
    barrier.finish()
    return barrier, recorded.calls


def test_every_grain_evaluates_at_its_barriers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [f"{block}{tile} " for block in "ab" for tile in "12"]
    barrier, calls = _walk("op", monkeypatch)
    assert calls == [("wait", f"{kind}{tile}") for tile in tiles for kind in "pvt"]
    assert (barrier.n_waits, barrier.n_submissions, barrier.is_lazy) == (12, 0, False)
    barrier, calls = _walk("stage", monkeypatch)
    assert calls == [("wait", f"{kind}{tile}") for tile in tiles for kind in "vt"]
    assert (barrier.n_waits, barrier.n_submissions, barrier.is_lazy) == (8, 0, False)
    barrier, calls = _walk("tile", monkeypatch)
    assert calls == [
        ("submit", "ta1 "),
        *[("submit", "ta2 "), ("wait", "ta1 ")],
        *[("submit", "tb1 "), ("wait", "ta2 ")],
        *[("submit", "tb2 "), ("wait", "tb1 ")],
    ]
    assert (barrier.n_waits, barrier.n_submissions, barrier.is_lazy) == (3, 4, True)
    barrier, calls = _walk("block", monkeypatch)
    assert calls == [
        *[("submit", "ta1 "), ("submit", "ta2 ")],
        *[("submit", "tb1 "), ("submit", "tb2 "), ("wait", "ta1 ta2 ")],
    ]
    assert (barrier.n_waits, barrier.n_submissions, barrier.is_lazy) == (1, 4, True)
    barrier, calls = _walk(None, monkeypatch)
    assert calls == [] and barrier.is_lazy and barrier.n_waits == 0


def test_submitted_arrays_may_be_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, recorded = Barrier("block"), Recorded(monkeypatch)
    barrier.tile(recorded.array("a"))
    barrier.finish()
    barrier.block()
    barrier.tile(recorded.array("b"))
    barrier.block()
    assert [call for call in recorded.calls if call[0] == "wait"] == []
    barrier.block()
    assert recorded.calls[-1] == ("wait", "b")


def test_an_unknown_grain_is_refused() -> None:
    with pytest.raises(ValueError, match="grain 'row' is none of op, stage, tile, block"):
        Barrier("row")


B, T = 2, 150  # three tiles


def _as_on_a_gpu(tmp_path: Path, seed: int, V: int = 1000) -> tuple[Any, Any, Any]:
    """A GPU's defaults on the CPU: bfloat16, packed weights."""
    config = packed_config("qwen3") | {"vocab_size": V, "num_hidden_layers": 4}
    quantization = {"group_size": 32, "bits": 4}
    folder = write_model(tmp_path / "model", config, seed=seed, quantization=quantization, dtype=mx.bfloat16)
    model = mebp_mlx.open_model(folder, "bfloat16", "packed")
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, B, T, V, "none")
    return model, lora, type("Batch", (), {"tokens": tokens, "targets": targets})


def _plan(grain: str, **more: Any) -> Plan:
    return Plan(grain, weight_block_bytes=None, token_block=64, query_block=64, **more)


@pytest.mark.parametrize("logits_block_bytes", [8 << 20, 64_000])
def test_a_step_waits_once_per_block_and_pass(tmp_path: Path, logits_block_bytes: int, seed: int) -> None:
    model, lora, batch = _as_on_a_gpu(tmp_path, seed)
    plan = _plan("block", head_block_bytes=None, logits_block_bytes=logits_block_bytes)
    n_chunks = math.ceil(model.spec.V / plan.vocabulary_chunk(B * T, 0, 2))
    assert n_chunks == (1 if logits_block_bytes > 10**6 else 11)
    engine = BackpropEngine(model, lora, plan=plan)
    for step in range(2):
        before, submitted = engine.barrier.n_waits, engine.barrier.n_submissions
        engine.step(batch, step=step, micro=0, n_labels=B * T, sink=lambda g: None)
        # The loss is one more wait.
        assert engine.barrier.n_waits - before <= 2 * model.spec.L + n_chunks + 1
        # One wait per tile of the forward and the backward pass, and per chunk of the head.
        assert engine.barrier.n_submissions - submitted == 2 * 3 * model.spec.L + n_chunks
    before = engine.barrier.n_waits
    engine.evaluate(batch)
    # Fewer waits would hold more memory: a chunk's logits and a block's values live until it is evaluated.
    assert model.spec.L + n_chunks - 1 <= engine.barrier.n_waits - before <= model.spec.L + n_chunks + 1
    engine.close()


def test_no_grain_waits_less_than_a_coarser_one(tmp_path: Path, seed: int) -> None:
    model, lora, batch = _as_on_a_gpu(tmp_path, seed)
    waits = []
    for grain in GRAINS:
        engine = BackpropEngine(model, lora, plan=_plan(grain))
        engine.step(batch, step=0, micro=0, n_labels=B * T, sink=lambda g: None)
        waits.append(engine.barrier.n_waits)
        engine.close()
    assert waits == sorted(waits, reverse=True) and waits[0] > 3 * waits[1] > 9 * waits[3], waits


@pytest.mark.parametrize("need_dx", [True, False])
@pytest.mark.parametrize("grain", ["tile", "block"])
def test_at_most_two_chunks_of_logits_exist(tmp_path: Path, grain: str, need_dx: bool, seed: int) -> None:
    """For any vocabulary size: a chunk is submitted when the previous one is complete."""
    model, lora, batch = _as_on_a_gpu(tmp_path, seed, V=16_000)
    plan = _plan(grain, head_block_bytes=None, logits_block_bytes=600_000)
    work = Pass(model, plan, lora)
    peaks = {}
    for max_chunks in (3, None):
        x = [mx.random.normal((B, stop - start, model.spec.D)).astype(mx.bfloat16) for start, stop in plan.tiles(T)]
        mx.eval(x)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        actual = cross_entropy(work, x, batch.targets, need_dx, max_chunks=max_chunks)
        mx.synchronize()
        peaks[max_chunks] = mx.get_peak_memory() - before
        del actual
    assert peaks[None] <= 1.2 * peaks[3], peaks


@pytest.mark.parametrize("grain", ["tile", "block"])
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, grain: str, seed: int) -> None:
    """If kept values are in the file, at most two blocks are in progress, for any number of blocks."""
    peaks = []
    for n_layers in (3, 8):
        config = packed_config("qwen3") | {"num_hidden_layers": n_layers}
        quantization = {"group_size": 32, "bits": 4}
        folder = write_model(tmp_path / str(n_layers), config, quantization=quantization, dtype=mx.bfloat16)
        model = mebp_mlx.open_model(folder, "bfloat16", "packed")
        lora = mebp_mlx.init_lora(model, rank=2)
        tokens, targets = random_batch(seed, 2, 192, model.spec.V, "none")
        batch: Any = type("Batch", (), {"tokens": tokens, "targets": targets})
        engine = BackpropEngine(model, lora, plan=_plan(grain, kept_bytes=0), arena_dir=tmp_path)
        most = 0
        for step in range(2):
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            engine.step(batch, step=step, micro=0, n_labels=2 * 192, sink=lambda g: None)
            mx.synchronize()
            most = max(most, mx.get_peak_memory() - before)
        peaks.append(most)
        engine.close()
    assert peaks[1] <= 1.2 * peaks[0], peaks
