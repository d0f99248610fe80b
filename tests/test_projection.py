"""The phone proxy: counted work equals executed work, memory limits, and the thermal state."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import train
from mebp_mlx.config import TrainConfig
from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.ops.plan import SAVE_EVERYTHING, SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner import projection, work
from mebp_mlx.planner.work import Rates, Work, count, nodes_of
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system import phone as phones
from mebp_mlx.system.phone import DEVICES, thermal_state
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, write_model
from mebp_mlx.training import trainer
from tests.runs import arguments, events, tokenize_here, write_home

PHONE = DEVICES["a17-pro"]


class Executed:
    """Counts the operations of executed matrix products, in MLX's functions and in numpy's attention."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.flops, self.packed = 0.0, 0.0
        matmul, addmm, quantized = mx.array.__matmul__, mx.addmm, mx.quantized_matmul

        def times(x: mx.array, w: mx.array) -> mx.array:
            actual = matmul(x, w)
            self.flops += 2.0 * actual.size * x.shape[-1]
            return actual

        def plus(c: mx.array, x: mx.array, w: mx.array) -> mx.array:
            self.flops += 2.0 * x.size * w.shape[-1]
            return addmm(c, x, w)

        def packed(x: mx.array, *rest: Any, **how: Any) -> mx.array:
            actual = quantized(x, *rest, **how)
            self.packed += 2.0 * actual.size * x.shape[-1]
            return actual

        patch.setattr(mx.array, "__matmul__", times)
        patch.setattr(mx, "addmm", plus)
        patch.setattr(mx, "quantized_matmul", packed)


@pytest.mark.parametrize(
    "saved", [SAVE_PRODUCTS, SAVE_EVERYTHING, SAVE_INPUTS, frozenset({"x", "q", "v", "g"}), frozenset({"x", "a"})]
)
@pytest.mark.parametrize(
    "name, packed", [("qwen2", True), ("qwen3", False), ("gemma3_text", False), ("gemma4_text", False)]
)
@pytest.mark.parametrize("more", [{}, {"num_layers": 1}, {"keys": ["self_attn.v_proj", "mlp.down_proj"]}], ids=str)
def test_counted_products_equal_those_of_a_step(
    tmp_path: Path,
    name: str,
    packed: bool,
    saved: frozenset[str],
    more: Any,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of frozen matrices, LoRA pairs, attention and the head; forward, recomputed and backward.

    Exact if no product is executed twice with the same inputs, because an exported graph merges equal parts. Otherwise
    it lacks the scores of recomputed attention and products with r columns.
    """
    quantization = {"group_size": 32, "bits": 4} if packed else None
    folder = write_model(tmp_path / "model", packed_config(name), seed=seed, quantization=quantization)
    model = mebp_mlx.open_model(folder, "float32", "packed" if packed else "decompressed")
    lora = mebp_mlx.init_lora(model, rank=2, **more)
    tokens, targets = random_batch(seed, 2, 150, model.spec.V, "none")
    batch = Batch(tokens, targets, rows=("", ""), n_labels=targets.size)
    plan = Plan(saved=saved, token_block=64, query_block=50, kept_bytes=0)
    counted = count(Workload(model, lora, 2, 150), plan)
    engine = make_engine("mebp", model, lora, plan=plan)
    engine.reserve(2, 150)  # counts kept bytes on a separate graph
    executed = Executed(monkeypatch)
    engine.step(batch, step=0, micro=0, n_labels=batch.n_labels, sink=lambda _: None)
    written_bytes = engine.store.written_bytes
    engine.close()
    assert (executed.packed > 0) is packed
    actual, made = sum(phase.flops for phase in counted.values()), executed.flops + executed.packed
    makes_unused = name == "gemma4_text" and more  # numpy's attention: gradients of keys that are constants
    if saved >= SAVE_PRODUCTS and "keys" not in more and not makes_unused:
        assert actual == made
    else:
        assert 0.9 * made <= actual <= made
    assert counted["head"].flops == 4 * 2 * 150 * model.spec.D * model.spec.V
    assert counted["backward"].arena_bytes >= written_bytes > 0.5 * counted["forward"].arena_bytes


def test_a_zeroth_order_step_counts_its_forward_passes(tmp_path: Path, seed: int) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2)
    actual = {}
    for name, passes in (("mezo", 2), ("hizoo", 3), ("fzoo", 9)):
        estimator = make_estimator(name, lora, seed=0, eps=0.1)
        assert len(estimator.probes) == passes
        actual[name] = count(Workload(model, lora, 1, 16, estimator=estimator), Plan())
        assert set(actual[name]) == {"forward", "head"}
        assert all(
            work.flops == pytest.approx(passes / 2 * actual["mezo"][p].flops) for p, work in actual[name].items()
        )
        assert all(work.arena_bytes == 0 for work in actual[name].values())
    exact = count(Workload(model, lora, 1, 16), Plan(kept_bytes=0))
    assert 2 * exact["forward"].flops == pytest.approx(actual["mezo"]["forward"].flops)
    assert exact["forward"].arena_bytes == exact["backward"].arena_bytes > 0
    assert exact["head"].flops == pytest.approx(
        actual["mezo"]["head"].flops
    )  # two products, compared with one product twice
    assert count(Workload(model, lora, 1, 16), Plan(kept_bytes=None))["forward"].arena_bytes == 0


def test_counting_evaluates_nothing(tmp_path: Path) -> None:
    """The graph is only built and inspected: no weight is read, no array is allocated."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", packed_config("qwen2")))
    lora = mebp_mlx.init_lora(model, rank=2)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert count(Workload(model, lora, 4, 2048), Plan())["forward"].flops > 1e9
    assert mx.get_peak_memory() - before <= 1_000_000


def test_a_graphs_products_and_bytes_are_counted() -> None:
    def run(x: mx.array, w: mx.array) -> list[mx.array]:
        return [mx.exp(x @ w), mx.addmm(x[:, :2], x, w)]

    nodes = nodes_of(run, mx.zeros((3, 5)), mx.zeros((5, 2)))
    products = {node.name: node for node in nodes if node.flops}
    assert set(products) == {"Matmul", "AddMM"} and {node.flops for node in products.values()} == {60.0}
    assert products["Matmul"].n_bytes == 4 * (15 + 10 + 6)


@pytest.mark.parametrize("T, window", [(1, 3), (5, 3), (3, 3), (7, None)])
def test_attention_counts_the_pairs_that_may_see_each_other(
    tmp_path: Path, T: int, window: int | None, seed: int
) -> None:
    """Exact to the key; checked for each query."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    layer = dataclasses.replace(model.spec.layers[0], window=window)
    lora = mebp_mlx.init_lora(model, rank=1)
    pairs = sum(1 for q in range(T) for k in range(q + 1) if window is None or q - k < window)

    def flops(query_block: int) -> float:
        counter = work._Counter(Workload(model, lora, 1, T), Plan(query_block=query_block))
        return counter.forward(layer).flops

    square = 4 * T * T * model.spec.H * model.spec.head_dim
    at_most = 4 * sum(min(T, q + 1) for q in range(T)) * model.spec.H * model.spec.head_dim
    assert 4 * pairs * model.spec.H * model.spec.head_dim == square - (flops(T) - flops(1)) <= at_most


def test_the_roofline_is_the_slower_of_both() -> None:
    rates = Rates(flops=10.0, memory_bytes=2.0)
    assert rates.bound_s(Work(100, 10)) == 10 and rates.bound_s(Work(10, 10)) == 5
    assert work.bound_s({"a": Work(100, 10), "b": Work(10, 10)}, rates) == 15


def test_training_as_a_phone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, before = write_home(tmp_path / "home"), mx.set_cache_limit(1 << 30)
    tokenize_here(home, monkeypatch)
    monkeypatch.setattr(projection, "run_child", lambda *_, **__: {"flops": 1e9, "memory_bytes": 1e9})
    monkeypatch.setattr(trainer, "thermal_state", lambda: "serious")
    try:
        assert train.main([*arguments(home, tmp_path / "out"), "--device", "a17-pro"]) == 0
    finally:
        assert mx.set_cache_limit(before) <= PHONE.cache_bytes
    text = capsys.readouterr().out
    for part in (
        "budget 1,000 MB",
        "no wired memory",
        "projected  A17 Pro",
        "s on the phone",
        "51.2 GB/s",
        "not measured on",
    ):
        assert part in text, part
    reports = events(tmp_path / "out", "train")
    assert {event["thermal"] for event in reports} == {"serious"}
    assert [e["text"].split(":")[0] for e in events(tmp_path / "out", "notice")] == ["thermal state serious"]
    for more, code in ((["--memory-budget", "5MB"], 3), (["--engine", "whole-graph"], 2), (["--device", "a18"], 2)):
        out = tmp_path / f"other-{more[0]}"
        assert train.main([*arguments(home, out), "--device", "a17-pro", *more]) == code
    mx.set_cache_limit(before)


def test_an_explicit_budget_overrides_the_devices() -> None:
    assert TrainConfig(device="a17-pro").budget_bytes == PHONE.budget_bytes
    assert TrainConfig(device="a17-pro", memory_budget="200MB").budget_bytes == 200_000_000
    assert TrainConfig(device="a17-pro", memory_budget="none").budget_bytes is None
    for budget_bytes, text in ((200_000_000, "budget 200 MB"), (None, "no budget in bytes")):
        assert text in projection.impose(PHONE, budget_bytes)


class _Objc:
    """The used part of the Objective-C runtime; each function accepts attributes, like ctypes functions."""

    def __init__(self, state: int):
        def function(run: Any) -> Any:
            def call(*given: Any) -> Any:
                return run(*given)

            return call

        self.objc_getClass = function(lambda name: {b"NSProcessInfo": 11}[name])
        self.sel_registerName = function(lambda name: {b"processInfo": 1, b"thermalState": 2}[name])
        self.objc_msgSend = function(lambda receiver, selector: {(11, 1): 22, (22, 2): state}[receiver, selector])


def test_thermal_states_are_the_documented_ones() -> None:
    loaded: list[str] = []

    def load(state: int) -> Any:
        return lambda path: loaded.append(path) or _Objc(state)

    assert [thermal_state("darwin", load(n)) for n in range(4)] == list(phones.THERMAL_STATES)
    assert any("Foundation" in path for path in loaded) and any("libobjc" in path for path in loaded)
    assert thermal_state("darwin", load(9)) is None and thermal_state("linux", load(0)) is None

    def missing(path: str) -> Any:
        raise OSError(path)

    assert thermal_state("darwin", missing) is None


def test_this_machines_rates_are_measured() -> None:
    rates = projection.host_rates()
    assert rates is not None and np.isfinite(rates.flops) and rates.flops > 1e8 and rates.memory_bytes > 1e8
