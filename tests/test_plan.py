"""Plans are measured, monotone, within their budgets, and close to a process's real peak."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import train
from mebp_mlx.config import TrainConfig
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.errors import BudgetError
from mebp_mlx.ops.plan import GRAINS, SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner import search
from mebp_mlx.planner.probe import Probe, probe
from mebp_mlx.planner.search import MARGIN, Planned, Prediction, choose, ladder, predict
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.footprint import footprint_bytes
from mebp_mlx.testing.synth import model_config
from mebp_mlx.testing.synth import write_model as write_shape
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, relative_error, write_model
from mebp_mlx.training.folder import recorded_plan
from mebp_mlx.training.log import RunLog
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.training.report import BudgetWatch, plan_record
from mebp_mlx.training.setup import Sizes as LongestRows
from mebp_mlx.training.setup import make_plan
from mebp_mlx.training.update import Updater
from tests.runs import arguments, tokenize_here, write_home

MB = 1_000_000


@pytest.fixture(scope="module")
def real_blocks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two blocks of real shapes with a small vocabulary, for tests that do not depend on the head's cost."""
    home = tmp_path_factory.mktemp("blocks")
    for shape in ("qwen2.5-0.5b", "gemma3-1b"):
        write_shape(model_config(shape, 2) | {"vocab_size": 16_384}, home / shape)
    return {shape: home / shape for shape in ("qwen2.5-0.5b", "gemma3-1b")}


def _workload(folder: Path, B: int = 1, T: int = 512, **more: Any) -> Workload:
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model)
    more.setdefault("make_updater", lambda part, plan: Updater(PlainSGD(learning_rate=1e-4), part))
    return Workload(model, lora, B, T, **more)


def _named_budget(error: BudgetError) -> int:
    actual = re.search(r"smallest workable budget is ([0-9.]+)MB", str(error))
    assert actual is not None, str(error)
    return round(float(actual[1]) * MB)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures each plan only once, because a probe's results vary slightly."""
    known: dict[Plan, Probe] = {}

    def once(workload: Workload, plan: Plan, arena_dir: Any = None) -> Probe:
        if plan not in known:
            known[plan] = probe(workload, plan, arena_dir)
        return known[plan]

    monkeypatch.setattr(search, "probe", once)


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(("shape", "B", "T"), [("qwen2.5-0.5b", 1, 256), ("gemma3-1b", 2, 130)])
def test_budgets_are_kept_and_smaller_ones_never_cost_more(
    real_blocks: dict[str, Path], shape: str, B: int, T: int
) -> None:
    workload = _workload(real_blocks[shape], B, T, state_bytes=20 * MB)
    peak = choose(workload).predicted.peak_bytes
    with pytest.raises(BudgetError) as refused:
        choose(workload, 10 * MB)
    smallest = _named_budget(refused.value)
    budget, before = math.ceil(peak * (1 + MARGIN)), None
    while budget >= smallest:
        actual = choose(workload, budget)
        assert actual.predicted.peak_bytes * (1 + MARGIN) <= budget, (budget, actual)
        if before is not None:
            assert actual.plan.token_block <= before.plan.token_block
            if actual.plan.token_block == before.plan.token_block:
                assert actual.predicted.peak_bytes <= before.predicted.peak_bytes
                assert actual.predicted.arena_bytes >= before.predicted.arena_bytes
        budget, before = int(budget * 0.93), actual
    assert before is not None
    least = choose(workload, smallest)
    assert least.predicted.peak_bytes * (1 + MARGIN) <= smallest
    assert least.plan.offload_state
    with pytest.raises(BudgetError):
        choose(workload, int(smallest * 0.99))


@pytest.mark.usefixtures("steady")
def test_a_budget_takes_the_largest_pieces_that_fit(real_blocks: dict[str, Path]) -> None:
    workload = _workload(real_blocks["qwen2.5-0.5b"])
    plans = ladder(workload)
    sizes = [(plan.token_block, plan.query_block, plan.logits_block_bytes) for plan in plans]
    assert sizes == sorted(sizes) and len(set(sizes)) > 2
    least = choose(workload, smallest=True).predicted.peak_bytes * (1 + MARGIN)
    actual = [choose(workload, math.ceil(least * factor)).plan for factor in (1, 1.2, 1.5, 2, 10)]
    taken = [(plan.token_block, plan.query_block, plan.logits_block_bytes) for plan in actual]
    assert taken == sorted(taken) and taken[-1] == sizes[-1] and set(taken) <= set(sizes)
    assert choose(workload).plan == dataclasses.replace(plans[-1], kept_bytes=None, offload_state=False)
    assert choose(workload, smallest=True).plan == plans[0]


def test_a_known_plan_is_taken_if_it_fits(real_blocks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses invented peaks, because this process's memory could hide the difference between two plans."""
    monkeypatch.setattr(search, "probe", lambda _, plan, __: Probe({"backward": plan.token_block * MB}, 0, 1000))
    workload = _workload(real_blocks["qwen2.5-0.5b"], T=256)
    known = dataclasses.replace(ladder(workload)[1], saved=SAVE_INPUTS, kept_bytes=12345)
    for budget in (None, 1000 * MB):
        assert choose(workload, budget, known=known).plan == known
    roomy = Plan(token_block=2048, query_block=2048, logits_block_bytes=256 << 20, weight_block_bytes=None)
    assert choose(workload, 2100 * MB, known=roomy).plan == roomy
    assert choose(workload, 2000 * MB, known=roomy).plan != roomy


@pytest.mark.usefixtures("steady")
def test_arena_budget_trades_saved_values_for_recomputation(real_blocks: dict[str, Path]) -> None:
    workload = _workload(real_blocks["qwen2.5-0.5b"], T=256, state_bytes=MB)
    with pytest.raises(BudgetError, match="--arena-budget") as refused:
        choose(workload, smallest=True, arena_budget_bytes=1)
    inputs = _named_budget(refused.value)
    full = choose(workload, smallest=True).predicted.arena_bytes
    known, saved = full, SAVE_PRODUCTS
    for budget in (full, full - 1, full // 2, full // 4, inputs):
        actual = choose(workload, smallest=True, arena_budget_bytes=budget)
        assert actual.predicted.arena_bytes <= min(budget, known)
        assert actual.plan.saved <= saved and (actual.plan.saved < SAVE_PRODUCTS or budget == full)
        known, saved = actual.predicted.arena_bytes, actual.plan.saved
    assert saved - {"d"} == SAVE_INPUTS and 0 <= inputs - known <= 100_000  # d is not kept
    with pytest.raises(BudgetError, match="--arena-budget"):
        choose(workload, smallest=True, arena_budget_bytes=known - 1)


def test_long_sequences_and_more_state_take_more_but_little(real_blocks: dict[str, Path]) -> None:
    """Measured, so exact only up to the noise of a busy machine."""

    def peak(T: int, **more: Any) -> int:
        workload = _workload(real_blocks["qwen2.5-0.5b"], T=T, **more)
        return choose(workload, smallest=True).predicted.peak_bytes

    model = mebp_mlx.open_model(real_blocks["qwen2.5-0.5b"])
    estimator = make_estimator("mezo", mebp_mlx.init_lora(model), seed=0, eps=1e-2)
    start_bytes = footprint_bytes()
    # From small to large, because a process never frees all of its memory.
    peaks = [peak(128, estimator=estimator), peak(128), peak(128, T_eval=512), peak(1024)]
    noise = 15 * MB
    assert all(later >= earlier - noise for earlier, later in pairwise(peaks)), peaks
    assert peaks[-1] < start_bytes + 250 * MB, peaks


@pytest.mark.quick
def test_memory_outside_the_probe_is_added() -> None:
    """Kept values of further blocks, optimizer state in memory, and all gradients if they are accumulated."""

    class Five:
        L = 5

    class Model:
        spec = Five()

    actual = Probe({"forward": 100, "head": 90, "backward": 110, "update": 80}, 0, 40)
    workload: Any = Workload(Model(), None, 1, 1, state_bytes=7, make_updater=lambda *_: None)  # type: ignore[arg-type]

    def peaks(plan: Plan, **more: Any) -> Prediction:
        given: Any = dataclasses.replace(workload, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Workload, "first_trained", 1)
            patch.setattr(Workload, "lora_bytes", 1000)
            return predict(given, plan, actual)

    everything = peaks(Plan(kept_bytes=None))
    assert everything.phases == {"forward": 147, "head": 137, "backward": 157, "update": 127}
    assert (everything.kept_bytes, everything.written_bytes, everything.arena_bytes) == (40, 0, 0)
    assert (everything.peak_phase, everything.peak_bytes) == ("backward", 157)
    partly = peaks(Plan(kept_bytes=15, offload_state=True))
    assert partly.phases == {"forward": 115, "head": 105, "backward": 125, "update": 95}
    assert (partly.kept_bytes, partly.written_bytes, partly.arena_bytes) == (40, 25, 32)
    assert peaks(Plan(kept_bytes=0), gathers=True).phases == {
        "forward": 107,
        "head": 97,
        "backward": 1117,
        "update": 1087,
    }


def test_a_probe_changes_nothing(tmp_path: Path, seed: int) -> None:
    """Parameters and optimizer state do not change, and no array is left."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["gemma3_text"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=3, dropout=0.1)
    randomize_lora(lora, seed)
    before = {name: np.array(value) for name, value in lora.parameters().items()}
    for estimator in (None, make_estimator("hizoo", lora, seed=0, eps=1e-2)):
        make_updater = None if estimator is not None else lambda part, plan: Updater(PlainSGD(learning_rate=1e9), part)
        workload = Workload(model, lora, 2, 150, 200, make_updater=make_updater, estimator=estimator)
        for plan in ladder(workload):
            mx.synchronize()
            held = mx.get_active_memory()
            actual = probe(workload, plan, tmp_path)
            mx.synchronize()
            assert mx.get_active_memory() - held <= 4096
            phases = {"forward", "head"} if estimator is not None else {"forward", "head", "backward", "update"}
            assert set(actual.phases) == phases and min(actual.phases.values()) > 0
            assert (actual.kept_bytes > 0) == (estimator is None)
    assert all(np.array_equal(value, before[name]) for name, value in lora.parameters().items())


@pytest.mark.quick
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("arena_budget", [None, 0])
def test_gradients_are_the_same_with_the_smallest_plan(
    tmp_path: Path, name: str, arena_budget: int | None, seed: int
) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path, CONFIGS[name], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=3)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 150, model.spec.V)
    workload = Workload(model, lora, *tokens.shape)
    if arena_budget == 0:
        with pytest.raises(BudgetError) as refused:
            choose(workload, arena_budget_bytes=1)
        arena_budget = _named_budget(refused.value)
    plan = choose(workload, smallest=True, arena_budget_bytes=arena_budget).plan
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    expected_loss, expected = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=Plan())
    assert relative_error(loss, expected_loss) <= 1e-6, f"seed {seed}"
    for parameter, gradient in expected.items():
        assert relative_error(grads[parameter], gradient) <= 3e-5, f"{parameter}, seed {seed}"


@pytest.mark.quick
def test_a_plan_is_restored_from_its_record(tmp_path: Path) -> None:
    """Through JSON, with any other entries in the record; an incomplete record gives no plan."""
    rng = np.random.default_rng(0)
    names = sorted(SAVE_PRODUCTS)
    for grain in GRAINS:
        plan = Plan(
            grain,
            frozenset(names[: int(rng.integers(1, 9))]),
            checkpoint=bool(rng.integers(2)),
            kept_bytes=int(rng.integers(0, 9)) or None,
            weight_block_bytes=int(rng.integers(0, 9)) or None,
            head_block_bytes=None,
            logits_block_bytes=int(rng.integers(1 << 20)),
            token_block=int(rng.integers(64, 512)),
            query_block=int(rng.integers(16, 512)),
            offload_state=bool(rng.integers(2)),
        )
        workload: Any = None  # it depends only on the numbers
        record = json.loads(json.dumps(plan_record(Planned(workload, plan, Prediction({"head": 5}), None))))
        assert Plan.from_dict(record) == plan and Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        (tmp_path / "run.json").write_text(json.dumps({"plan": record}))
        assert recorded_plan(tmp_path) == plan
        for missing in plan.to_dict():
            less = {name: entry for name, entry in record.items() if name != missing}
            with pytest.raises(KeyError, match=missing):
                Plan.from_dict(less)
            (tmp_path / "run.json").write_text(json.dumps({"plan": less}))
            assert recorded_plan(tmp_path) is None
    for text in ('{"plan": null}', "{}", "[]", "{", ""):
        (tmp_path / "run.json").write_text(text)
        assert recorded_plan(tmp_path) is None
    (tmp_path / "run.json").unlink()
    assert recorded_plan(tmp_path) is None


def test_dry_run_and_budgets_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = write_home(tmp_path)
    tokenize_here(home, monkeypatch)
    out = tmp_path / "out"
    assert train.main(arguments(home, out, "--dry-run", "--memory-budget", "4GB")) == 0
    shown = capsys.readouterr().out
    for word in ("forward", "head", "backward", "update", "<- peak", "arena", "written", "kept", "parameters"):
        assert word in shown, word
    assert not out.exists()
    assert train.main(arguments(home, out, "--dry-run", "--memory-budget", "1MB")) == 3
    line = capsys.readouterr().err
    assert "smallest workable budget" in line and not out.exists()
    for engine in ("mebp", "mezo"):
        folder = tmp_path / engine
        assert train.main(arguments(home, folder, "--memory-budget", "4GB", "--engine", engine)) == 0
        record = json.loads((folder / "run.json").read_text())["plan"]
        assert record["predicted_peak_bytes"] == max(record["predicted_bytes"].values())
        assert record["arena_bytes"] == 0  # everything fits in memory
        assert (record["kept_in_memory_bytes"] > 0) == (engine == "mebp")
        assert "predicted peak" in capsys.readouterr().out
    assert train.main(arguments(home, tmp_path / "w", "--engine", "whole-graph", "--dry-run")) == 2


def test_the_smallest_footprint_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = write_home(tmp_path)
    tokenize_here(home, monkeypatch)
    peaks = {}
    for budget in ("none", "min"):
        out = tmp_path / budget
        assert train.main(arguments(home, out, "--memory-budget", budget, "--iters", "1")) == 0
        record = json.loads((out / "run.json").read_text())["plan"]
        peaks[budget] = record["predicted_peak_bytes"]
        assert (record["arena_bytes"] > 0) == (record["kept_in_memory_bytes"] == 0) == (budget == "min")
        assert "budget" not in capsys.readouterr().out.splitlines()[-1]
    assert peaks["min"] <= peaks["none"]
    model = mebp_mlx.open_model(home / "model")
    planned = plan_of(TrainConfig(memory_budget="min"), model, 300)
    assert planned is not None and planned.budget_bytes is None
    roomy = plan_of(TrainConfig(memory_budget="none"), model, 300)
    assert roomy is not None and planned.predicted.peak_bytes < roomy.predicted.peak_bytes
    assert planned.plan.offload_state and not roomy.plan.offload_state


def plan_of(config: TrainConfig, model: Any, T: int) -> Planned | None:
    """make_plan's plan for two rows of T tokens."""
    return make_plan(config, model, mebp_mlx.init_lora(model), LongestRows(2, T), None)


def test_a_dry_run_needs_no_tokenizer(
    real_blocks: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(real_blocks["gemma3-1b"]), "--adapter-path", str(tmp_path / "out"), "--dry-run"]
    command += ["--max-seq-length", "256", "--batch-size", "1", "--optimizer", "adamw"]
    assert train.main([*command, "--memory-budget", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert "contains no tokenizer" in shown and "plan for 1 x 255 tokens" in shown and "<- peak" in shown
    assert train.main([*command, "--memory-budget", "20MB"]) == 3
    assert "smallest workable budget" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.quick
def test_an_exceeded_budget_is_reported_once(tmp_path: Path) -> None:
    class Meter:
        peak_bytes = 90 * MB

    job: Any = None  # it depends only on the numbers
    planned = Planned(job, Plan(), Prediction({"head": 80 * MB}), 100 * MB)
    with RunLog(tmp_path, n_iters=10) as log:
        watch = BudgetWatch(planned, Meter(), log, stop=False)  # type: ignore[arg-type]
        stops = BudgetWatch(planned, Meter(), log, stop=True)  # type: ignore[arg-type]
        assert not watch.look(1) and not stops.look(1)
        Meter.peak_bytes = 120 * MB
        assert not watch.look(2) and not watch.look(3)
        assert not BudgetWatch(None, Meter(), log, stop=True).look(4)  # type: ignore[arg-type]
        n_bytes = (tmp_path / "log.jsonl").stat().st_size
        assert stops.look(5) and stops.look(6)
        assert (tmp_path / "log.jsonl").stat().st_size <= 2 * n_bytes
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["iter"], e["budget_bytes"], e["peak_bytes"]) for e in events] == [
        (2, 100 * MB, 120 * MB),
        (5, 100 * MB, 120 * MB),
    ]
    assert "120" in events[0]["text"] and "exceeded" in events[0]["text"]


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("500MB", 500 * MB), ("1.5GB", 1500 * MB), ("1GB", 1000 * MB), ("1 KiB", 1024), ("123456B", 123456)],
)
def test_sizes(text: str, n_bytes: int) -> None:
    assert train.TrainConfig.from_args(["--memory-budget", text]).memory_budget == n_bytes


@pytest.mark.quick
@pytest.mark.parametrize("text", ["much", "-1GB", "1TBX", "", "0", "0MB", "nano", "500", "1.2.3MB", "MB"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(mebp_mlx.UserError, match="--memory-budget"):
        train.TrainConfig.from_args([f"--memory-budget={text}"])


def test_a_probe_that_leaves_products_out_sees_the_same_memory(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = packed_config("qwen2") | {"intermediate_size": 4096, "num_hidden_layers": 2}
    model = mebp_mlx.open_model(write_model(tmp_path / "model", config, seed=seed))
    workload = Workload(model, mebp_mlx.init_lora(model, rank=2), 1, 150)
    plan = Plan("op", weight_block_bytes=1, token_block=64)
    left_out = []
    probing: Any = sys.modules[probe.__module__]
    zeros = probing._Zeros
    monkeypatch.setattr(probing, "_Zeros", lambda *shape: left_out.append(shape) or zeros(*shape))
    sampled = probe(workload, plan)
    n_left_out = len(left_out)
    monkeypatch.setattr(probing, "_is_sampled", lambda *_: True)
    assert probe(workload, plan).arrays_bytes == sampled.arrays_bytes
    assert n_left_out > 100 and len(left_out) == n_left_out
