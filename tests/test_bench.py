"""Benches: percentiles, tables and files; learning curves; contestants with equal losses."""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import __main__ as command
from bench import case, families, learning, micro, phases, plan_check, profile, projection, report
from bench.case import Stepper, add_memory_budget, plan_line
from bench.instruments import Clock, Phases
from mebp_mlx.errors import NonFiniteLoss, UserError
from mebp_mlx.ops.plan import SAVE_INPUTS, Plan
from mebp_mlx.planner.work import Rates, bound_s
from mebp_mlx.system.footprint import footprint_bytes
from mebp_mlx.system.phone import DEVICES
from mebp_mlx.testing.tiny import CONFIGS, packed_config, write_model
from tests.runs import tokenize_here, write_home


def test_spread_is_numpys_percentiles(seed: int) -> None:
    for n in (1, 2, 3, 10):
        values = np.random.default_rng(seed).normal(size=n)
        expected = np.percentile(values, [50, 20, 80])
        assert np.allclose(list(report.spread(values.tolist(), 9).values()), expected, atol=1e-8), f"seed {seed}"


def test_files_hold_the_rows_once_and_a_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = report.parser("some", "A bench.")
    parser.add_argument("--data", type=Path)
    options = parser.parse_args(["--out", str(tmp_path / "new"), "--quick", "--data", "/home/somebody/texts"])
    rows = [{"shape": "a", "step_s": {"median": 1.5, "p20": 1.0}}, {"shape": "b", "extra": 2, "plan": {"saved": ["x"]}}]
    report.publish("some", options, rows, efficiency=0.5)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    text = (tmp_path / "new" / "some.json").read_text()
    context = json.loads(text)
    assert printed == {**context, "rows": rows}
    assert context["machine"]["mlx"] and context["date"] and "commit" in context and context["efficiency"] == 0.5
    assert context["settings"] == {"quick": True, "data": "texts"} and len(text.splitlines()) < 25
    assert context["command"] == "python -m bench some --out new --quick --data texts"
    with open(tmp_path / "new" / "some.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"shape": "a", "step_s.median": "1.5", "step_s.p20": "1.0", "extra": "", "plan.saved": ""},
            {"shape": "b", "step_s.median": "", "step_s.p20": "", "extra": "2", "plan.saved": '["x"]'},
        ]
    assert report.read(tmp_path / "new", "some") == (rows, context)


def test_rows_are_restored_from_their_files(tmp_path: Path) -> None:
    row = {"none": None, "true": True, "inf": math.inf, "number": -0.25, "text": "2 blocks", "all": "all", "n": 3}
    report.publish("some", argparse.Namespace(out=tmp_path), [row])
    assert report.read(tmp_path, "some")[0] == [row]


@pytest.mark.parametrize("name", [*command.RESULTS])
def test_committed_results_draw_their_picture(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    results = Path(report.ROOT) / "bench" / "results"
    for suffix in ("csv", "json"):
        (tmp_path / f"{name}.{suffix}").write_bytes((results / f"{name}.{suffix}").read_bytes())
    command.draw([name, "--out", str(tmp_path)])
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000 and (results / f"{name}.png").is_file()
    assert {path.suffix for path in results.iterdir()} == {".csv", ".json", ".png"}


@pytest.mark.parametrize("name", [*command.BENCHES])
def test_every_bench_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: python -m bench")


def test_the_list_names_every_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in command.BENCHES)


MISTAKES = ["no_such", "step --shapes qwen9", "head --tokens 0", "draw versus --out no", "plan_check --case"]


@pytest.mark.parametrize("arguments", [mistake.split() for mistake in MISTAKES])
def test_a_users_mistake_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith("error: ")


def test_tables_align_numbers_on_the_right() -> None:
    assert report.table(["what", "n"], [["a", 1_000], ["long", None]]) == "what      n\na     1,000\nlong      -"


def test_a_case_of_the_step_table(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", CONFIGS["qwen2"])
    for engine in ("mebp", "fzoo"):
        actual = case.measure(folder, 12, 3, engine=engine, optimizer="sgd", rank=2, memory_budget="min")
        assert actual["peak_mb"] >= actual["before_mb"] > 1 and actual["n_steps"] == 3
        assert 0 < actual["step_s"]["p20"] <= actual["step_s"]["median"] <= actual["step_s"]["p80"]
        assert actual["plan"]["kept_bytes"] == 0 and "grain op" in plan_line(actual["plan"])
    actual = case.measure(folder, 12, 2, forwards=True, optimizer="adamw", rank=2, memory_budget="none")
    assert actual["ratio"]["median"] > 0 and actual["forward_peak_mb"] > 1 and not actual["plan"]["offload_state"]


def test_a_stepper_takes_a_known_plan_and_refuses_an_impossible_budget(tmp_path: Path) -> None:
    folder, plan = write_model(tmp_path / "model", CONFIGS["qwen2"]), Plan(saved=SAVE_INPUTS, kept_bytes=0)
    stepper = Stepper(folder, 12, known=plan, batch_size=2, memory_budget="none")
    assert stepper.planned is not None and stepper.planned.plan == plan
    first = stepper.step(0)
    assert stepper.batch.tokens.shape == (2, 12) and stepper.step(1) != first  # the loss has fallen
    stepper.close()
    with pytest.raises(UserError, match="--memory-budget"):
        Stepper(folder, 12, memory_budget="1MB")


@pytest.mark.parametrize(("text", "is_right"), [("80MB", True), ("min", True), ("none", True), ("80", False)])
def test_a_memory_budget_is_the_trainers(text: str, is_right: bool, capsys: pytest.CaptureFixture[str]) -> None:
    parser = report.Parser("some", None)
    add_memory_budget(parser)
    assert parser.parse_args([]).memory_budget == "min"
    if is_right:
        assert parser.parse_args(["--memory-budget", text]).memory_budget == text
        return
    with pytest.raises(SystemExit):
        parser.parse_args(["--memory-budget", text])
    assert "did you mean 80MB" in capsys.readouterr().err


@pytest.mark.parametrize("blocks", plan_check.BLOCKS)
def test_a_case_of_the_plan_check(tmp_path: Path, blocks: str) -> None:
    folder = write_model(tmp_path / "model", CONFIGS["qwen2"])
    actual = plan_check.measure(str(folder), plan_check.Case("any", 70, 2, "adamw", blocks=blocks))
    assert actual["predicted"].keys() == {"forward", "head", "backward", "update"}
    assert actual["peak"] >= actual["planning"] and actual["predicted_peak"] == max(actual["predicted"].values())
    assert actual["measured"].keys() == {"forward", "head", "backward"}
    assert all(actual["before"] < n_bytes <= actual["peak"] for n_bytes in actual["measured"].values())


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
def test_the_profiles_products_are_those_of_a_step(tmp_path: Path, name: str) -> None:
    """All matrices are trained and all products kept: each matrix has one forward and one backward product."""
    folder = write_model(tmp_path / "model", CONFIGS[name])
    stepper = Stepper(folder, 70, known=Plan(token_block=64), memory_budget="none", rank=2)
    clock = Clock()
    instruments = profile.Instruments(clock)
    try:
        assert math.isfinite(stepper.step(0))
    finally:
        instruments.remove()
    layers = [layer.linears for layer in stepper.model.spec.layers]
    sizes = [{short: linear.in_dims * linear.out_dims for short, linear in linears.items()} for linears in layers]
    not_made = sum(sizes[0][short] for short in "qkv")  # the lowest block's input gets no gradient
    expected = 2 * 70 * (2 * sum(sum(each.values()) for each in sizes) - not_made)
    assert sum(clock.flops.values()) == pytest.approx(expected)
    assert min(clock.seconds[stage] for stage in ("store: put", "store: get", "weights: norms", "update")) > 0
    stepper.close()


def test_wraps_ignore_a_graph_that_is_only_counted(tmp_path: Path) -> None:
    stepper = Stepper(write_model(tmp_path / "model", CONFIGS["qwen2"]), 12, memory_budget="none")
    seen: list[str] = []
    phases = Phases(lambda phase, run: (seen.append(phase), run())[1])
    try:
        stepper.engine.reserve(1, 24)  # counts what a block keeps
        assert seen == []
        stepper.step(0)
    finally:
        phases.remove()
    n_layers = stepper.model.spec.L
    layers = [*(f"f{n}" for n in range(n_layers)), "head", *(f"b{n}" for n in reversed(range(n_layers)))]
    assert seen == ["emb", *layers]
    stepper.close()


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> learning.Task:
    home = write_home(tmp_path / "home")
    tokenize_here(home, monkeypatch)
    parser = argparse.ArgumentParser()
    learning.add_options(parser, grid_passes=6)
    arguments = ["--model", str(home / "model"), "--data", str(home / "data"), "--batch-size", "2", "--seeds", "2"]
    return learning.Task(parser.parse_args([*arguments, "--max-seq-length", "32", "--eval-batches", "2"]))


def test_learning_curves_start_equal_and_count_their_passes(task: learning.Task) -> None:
    """LoRA's B starts at zero, so before the first step every method and seed has the frozen model's loss."""
    rows = [row for name in learning.METHODS for row in task.curves(name, 1e-4, 2, 2)]
    starts = {(row["loss"], row["accuracy"]) for row in rows if row["step"] == 0}
    assert len(starts) == 1
    for row in rows:
        assert row["passes"] == row["step"] * learning.METHODS[row["method"]].passes
        assert math.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1
    ends = {name: {r["loss"] for r in rows if r["method"] == name and r["step"] == 2} for name in learning.METHODS}
    assert all(len(losses) == 2 for losses in ends.values())  # runs differ by seed
    assert len(learning.summary(rows, list(learning.METHODS)).splitlines()) == 1 + len(learning.METHODS)


def test_a_rate_is_the_best_of_its_trials(task: learning.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, math.inf, 1.0, 2.0, 4.0])
    monkeypatch.setattr(task, "run", lambda *args: iter([{"loss": next(losses), "step": args[3]}]))
    trials = task.choose_rate("hizoo", 30)
    assert [trial["steps"] for trial in trials] == [10] * 5  # of three passes each
    assert learning.best_rate(trials, "hizoo") == learning.METHODS["hizoo"].rates[2]


def test_the_curve_of_a_diverging_run_ends(task: learning.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> float:
        raise NonFiniteLoss("loss is nan")

    monkeypatch.setattr("mebp_mlx.engine.zeroth_order.ZerothOrderEngine.step", fails)
    assert [row["loss"] for row in task.run(learning.METHODS["mezo"], 1.0, 0, 5, task.valid, [5])] == [math.inf]


@pytest.mark.parametrize("n_steps", [1, 2, 99, 100, 1000])
def test_marks_are_in_order_and_have_both_ends(n_steps: int) -> None:
    marks = learning.marks_up_to(n_steps)
    assert marks == sorted(set(marks)) and marks[0] == 0 and marks[-1] == n_steps
    assert (100 in marks) == (n_steps >= 100) and len(marks) <= 30


def test_all_contestants_have_the_same_losses(tmp_path: Path) -> None:
    """With the same rows, initial values and optimizer, all contestants have the same loss in the fourth step."""
    command = [sys.executable, "-m", "bench.versus", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert rows[0]["case"] == "ours" and len(rows) == 5
    losses = np.array([[row["first_loss"], row["last_loss"]] for row in rows])
    assert not (np.ptp(losses, axis=0) > 2e-4).any(), losses
    assert all(row["peak_mb"] > rows[0]["peak_mb"] for row in rows[1:])


@pytest.mark.parametrize("name", phases.CASES)
def test_phases_are_in_order_and_add_up_to_the_step(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model", CONFIGS["qwen2"] | {"num_hidden_layers": 3})
    budget = f"{footprint_bytes() // 1_000_000 + 80}MB"  # memory of earlier tests in this process
    actual = phases.measure(folder, 24, 3, rank=2, memory_budget=budget, **phases.CASES[name][1])
    backward = [] if name == "mezo" else ["b2", "b1", "b0"]
    names = [row["phase"] for row in actual["phases"]]
    assert names == ["emb", "f0", "f1", "f2", "head", *backward]
    whole = sum(row["ms"]["median"] for row in actual["phases"])
    assert 0.5 * actual["step_ms"]["median"] <= whole <= 1.3 * actual["step_ms"]["median"]
    for row in actual["phases"]:
        assert row["end_mb"] <= row["peak_mb"] <= actual["peak_mb"] + 0.1
        assert min(row["split_ms"].values()) >= 0 < row["split_ms"]["compute"]
    saved = sum(row["split_ms"]["save"] for row in actual["phases"])
    assert (saved == 0) == (name == "mezo")  # without a backward pass nothing is kept


def test_the_page_of_phases_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_module(module: str, folder: Path, *how: object) -> dict[str, Any]:
        words = [str(word) for word in how]
        flags = {name: words[words.index(f"--{name}") + 1] for name in ("engine", "saved") if f"--{name}" in words}
        return phases.measure(folder, 16, 1, rank=2, **flags)

    monkeypatch.setattr(report, "run_module", run_module)
    models = tmp_path / "models"
    write_model(models / "qwen2.5-0.5b-2", CONFIGS["qwen2"] | {"num_hidden_layers": 2})
    phases.main(["--quick", "--models", str(models), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "per_layer.html").read_text()
    assert "http" not in page and " src=" not in page and "/*DATA*/" not in page
    data = json.loads(page.partition("const data = ")[2].partition(";\n")[0])
    with open(tmp_path / "out" / "per_layer.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == [row["phase"] for row in data["rows"]] and len(rows) == 6 + 6 + 4
    assert {"ms.median", "ms.p20", "split_ms.decompress", "peak_mb", "arrays_mb"} <= rows[0].keys()


def test_packed_and_decompressed_products_are_both_timed(tmp_path: Path) -> None:
    quantization = {"group_size": 32, "bits": 4}
    folder = write_model(tmp_path / "model", packed_config("qwen2"), quantization=quantization)
    rows = micro.compare(folder, [1, 5], repeats=2)
    assert [row["matrix"] for row in rows[::2]] == ["q", "k", "v", "o", "gate", "up", "down", "head"]
    for row in rows:
        assert row["decompress_ms"]["median"] > 0 and row["packed_ms"]["median"] > 0


def test_all_continues_after_a_failing_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "RESULTS", {"not_there": ("none", "no such bench")} | command.RESULTS)
    monkeypatch.setitem(command.BENCHES, "not_there", ("none", "no such bench"))
    arguments = ["--only", "not_there", "projection", "--quick", "--out", str(tmp_path)]
    assert command.run_all(arguments) == 1
    printed = capsys.readouterr().out
    actual = json.loads(printed.splitlines()[-1])
    assert [row["works"] for row in actual["rows"]] == [False, True]
    assert "failed (2)" in printed and "A17 Pro" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"projection.csv", "projection.json"}


def test_the_projections_errors_are_those_of_the_measurements() -> None:
    """It is exact for the case of its calibration; bench/MEASUREMENTS.md quotes these figures."""
    workloads = {shape: projection.workloads_of(shape, 256) for shape in report.PAPER}
    phone = DEVICES["a17-pro"]
    rates = Rates(phone.flops[2], phone.bandwidth)
    shape, engine = projection.CALIBRATED_BY
    efficiency = projection.efficiency_of(workloads[shape], rates)
    assert efficiency == bound_s(projection.counted(workloads[shape], engine, "the paper's"), rates) / 2.68
    rows = [projection.row_of(s, e, workloads[s], rates, efficiency) for s in workloads for e in projection.ENGINES]
    errors = {(row["shape"], row["engine"]): row["error"] for row in rows}
    assert abs(errors.pop((shape, engine))) < 1e-3 and 0.04 < efficiency < 0.05
    assert 0.2 < np.mean(np.abs(list(errors.values()))) < 0.3 and max(errors.values()) == errors["qwen2.5-3b", "mezo"]
    for row in rows:  # saved values are not recomputed
        assert row["ours_s"] == pytest.approx(row["paper_policy_s"]) or row["ours_s"] < row["paper_policy_s"]


def test_families_keeps_every_row_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row is in the file as soon as it is measured; a case that fails is a row too."""
    plan = {"predicted_peak_bytes": 50_000_000, "arena_bytes": 0}

    def measured(module: str, *arguments: object, **_: object) -> dict[str, Any]:
        if module == "bench.parity":
            return {"largest_relative_error": {"a": {"saved inputs": 1e-6, "saved products": 2e-6}}}
        if "lfm2" in str(arguments[0]):
            raise KeyboardInterrupt
        if "--plan-only" in arguments:
            return {"error": "--memory-budget: too little"}
        return {"peak_mb": 51.0, "first_step_s": 1.0, "n_lora_parameters": 1_500_000, "plan": plan}

    monkeypatch.setattr(report, "run_module", measured)
    with pytest.raises(KeyboardInterrupt):
        families.main(["--shapes", "qwen3-0.6b", "lfm2.5-1.2b", "--layers", "1", "--out", str(tmp_path)])
    line = "| qwen3 | qwen3-0.6b | 0.17 G | 1.5 M | 50 | --memory-budget: too little | - | 51 | passed | 2.0e-06 |"
    assert line in capsys.readouterr().out.splitlines()
    (row,), _ = report.read(tmp_path, "families")
    assert (row["shape"], row["peak_mb"], row["gradient_error"]) == ("qwen3-0.6b", 51.0, 2e-6)
