"""The phone's proxy: counted work is the work that is done, memory is imposed, and how warm the machine is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from bench.instruments import Clock
from bench.profile import Instruments
from mebp_mlx import proxy, train
from mebp_mlx.config import TrainConfig
from mebp_mlx.data import Batch
from mebp_mlx.engine import make_engine, roofline
from mebp_mlx.engine.job import job_for
from mebp_mlx.engine.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.engine.roofline import Rates, Work, count
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.runtime import phone as phones
from mebp_mlx.runtime.phone import DEVICES, thermal_state
from tests.runs import arguments, events, tokenize_here, write_home
from tests.tiny import CONFIGS, random_batch, write_model

PHONE = DEVICES["a17-pro"]


def _executed_flops(engine: Any, batch: Batch) -> float:
    """Of products with the frozen matrices of blocks, as a step really makes them."""
    clock = Clock()
    instruments = Instruments(clock)
    try:
        engine.step(batch, step=0, micro=0, n_labels=batch.n_labels, sink=lambda _: None)
    finally:
        instruments.remove()
        engine.close()
    return sum(clock.flops.values())


@pytest.mark.parametrize("saved", [SAVE_PRODUCTS, SAVE_INPUTS, frozenset({"x", "q", "v", "g"}), frozenset({"x", "a"})])
@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("more", [{}, {"num_layers": 1}, {"keys": ["self_attn.v_proj", "mlp.down_proj"]}], ids=str)
def test_counted_products_are_those_that_a_step_makes(
    tmp_path: Path, name: str, saved: frozenset[str], more: Any, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the LoRA pairs' (rank 0) and attention's own: the frozen matrices', forward, again and backward."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS[name], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2, **more)
    tokens, targets = random_batch(seed, 2, 21, model.spec.V)
    batch = Batch(tokens, targets, rows=("", ""), n_labels=int((targets != -100).sum()))
    plan = Plan(saved=saved)
    job = dataclasses.replace(job_for(model, lora, 2, 21), rank=0)
    monkeypatch.setattr(roofline._Counter, "attention", lambda *_: Work())
    counted = count(job, plan)
    executed = _executed_flops(make_engine("mebp", model, lora, plan=plan), batch)
    assert counted["forward"].flops + counted["backward"].flops == pytest.approx(executed), f"seed {seed}"
    assert counted["head"].flops == 4 * 2 * 21 * model.spec.D * model.spec.V


def test_a_zeroth_order_step_is_its_forward_passes(tmp_path: Path, seed: int) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2)
    job = job_for(model, lora, 1, 16, engine="fzoo")
    passes = len(make_estimator("fzoo", lora, seed=0, eps=0.1).probes)
    one, all_of_them = count(job, Plan(), 1), count(job, Plan(), passes)
    assert passes == 9 and set(one) == {"forward", "head"}
    assert all(all_of_them[phase].flops == pytest.approx(9 * work.flops) for phase, work in one.items())
    saved = count(job_for(model, lora, 1, 16), Plan())
    assert saved["forward"].flops == one["forward"].flops and saved["forward"].arena_bytes > 0


@pytest.mark.parametrize("T, window", [(1, 3), (5, 3), (3, 3), (7, None)])
def test_attention_counts_the_pairs_that_may_see_each_other(
    tmp_path: Path, T: int, window: int | None, seed: int
) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen2"], seed=seed))
    layer = dataclasses.replace(model.spec.layers[0], window=window)
    job = job_for(model, mebp_mlx.init_lora(model, rank=1), 1, T)
    pairs = sum(1 for q in range(T) for k in range(q + 1) if window is None or q - k < window)
    found = roofline._Counter(job, Plan()).attention(layer, 2)
    assert found.flops == 4 * pairs * model.spec.H * model.spec.head_dim


def test_the_roofline_is_the_slower_of_both() -> None:
    rates = Rates(flops=10.0, memory_bytes=2.0)
    assert rates.bound_s(Work(100, 10)) == 10 and rates.bound_s(Work(10, 10)) == 5
    assert roofline.bound_s({"a": Work(100, 10), "b": Work(10, 10)}, rates) == 15


def test_training_as_a_phone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, before = write_home(tmp_path / "home"), mx.set_cache_limit(1 << 30)
    tokenize_here(home, monkeypatch)
    monkeypatch.setattr(proxy, "run_child", lambda *_, **__: {"flops": 1e9, "memory_bytes": 1e9})
    monkeypatch.setattr(train, "thermal_state", lambda: "serious")
    try:
        assert train.main([*arguments(home, tmp_path / "out"), "--device", "a17-pro"]) == 0
    finally:
        assert mx.set_cache_limit(before) <= PHONE.cache_bytes
    text = capsys.readouterr().out
    for part in ("budget 1,000 MB", "no wired memory", "projected  A17 Pro", "s there", "51.2 GB/s", "not measured on"):
        assert part in text, part
    reports = events(tmp_path / "out", "train")
    assert {event["thermal"] for event in reports} == {"serious"}
    assert [e["text"].split(":")[0] for e in events(tmp_path / "out", "notice")] == ["thermal state serious"]
    for more, code in ((["--memory-budget", "5MB"], 3), (["--engine", "whole-graph"], 2), (["--device", "a18"], 2)):
        out = tmp_path / f"other-{more[0]}"
        assert train.main([*arguments(home, out), "--device", "a17-pro", *more]) == code
    mx.set_cache_limit(before)


def test_a_budget_of_ones_own_wins() -> None:
    assert TrainConfig(device="a17-pro").budget_bytes == PHONE.budget_bytes
    assert TrainConfig(device="a17-pro", memory_budget="200MB").budget_bytes == 200_000_000
    assert TrainConfig(device="a17-pro", memory_budget="none").budget_bytes is None
    for budget_bytes, text in ((200_000_000, "budget 200 MB"), (None, "no budget in bytes")):
        assert text in proxy.impose(PHONE, budget_bytes)


class _Objc:
    """As much of the Objective-C runtime as is asked for; each function takes attributes, as ctypes' do."""

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
    rates = proxy.host_rates()
    assert rates is not None and np.isfinite(rates.flops) and rates.flops > 1e8 and rates.memory_bytes > 1e8
