"""An interrupted or killed run resumes bit for bit; a different run is refused."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import train
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.export.adapters import save_adapters
from mebp_mlx.ops.plan import Plan
from mebp_mlx.system.footprint import PeakMeter
from mebp_mlx.training import checkpoint, run
from mebp_mlx.training import log as run_log
from mebp_mlx.training import train as training_train
from mebp_mlx.training.folder import CHECKPOINT
from mebp_mlx.training.optimizers import make_optimizer
from mebp_mlx.training.trainer import Trainer
from mebp_mlx.training.update import Updater
from tests.runs import (
    FILES,
    arguments,
    child,
    contents,
    events,
    interrupt_at,
    listen_to_signals,
    losses,
    refused,
)

pytestmark = pytest.mark.usefixtures("tokens_made_here")


VARIANTS: dict[str, list[str]] = {
    "adam": [],
    "schedule, dropout, accumulation, clipping": [
        "--lr-decay",
        "cosine",
        "--warmup",
        "2",
        "--dropout",
        "0.2",
        "--grad-accumulation-steps",
        "2",
        "--max-grad-norm",
        "0.1",
    ],
    "sgd": ["--optimizer", "sgd", "--dropout", "0.1"],
    "mezo": ["--engine", "mezo", "--zo-eps", "0.01", "--grad-accumulation-steps", "2"],
    "kzoo": ["--engine", "kzoo", "--kzoo-seeds", "3"],
    "kzoo pro": ["--engine", "kzoo", "--kzoo-seeds", "5", "--kzoo-pro", "--grad-accumulation-steps", "2"],
    "hizoo": ["--engine", "hizoo", "--hizoo-alpha", "1e-3"],
    "fzoo": ["--engine", "fzoo", "--fzoo-samples", "3", "--dropout", "0.1"],
}


@pytest.mark.parametrize("more", VARIANTS.values(), ids=VARIANTS.keys())
def test_interrupted_and_resumed_equals_uninterrupted(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    length = ["--iters", "12", "--seed", "5"]
    assert train.main(arguments(home, whole, *length, *more)) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        assert train.main(arguments(home, parts, *length, *more)) == 130
    assert events(parts, "interrupted")[-1]["iter"] == 6
    assert {path.name for path in parts.iterdir()} == FILES
    # The run's options are saved, so they need not be given again.
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert losses(parts) == losses(whole)
    ours, theirs = (mx.load(str(folder / "checkpoint.safetensors")) for folder in (parts, whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array(ours[name]).tobytes() == np.array(theirs[name]).tobytes(), name


def pass_the_budget_at(patch: pytest.MonkeyPatch, iteration: int) -> None:
    """Makes the measured peak exceed any budget from the end of the given iteration on."""
    passed = False
    advance = run_log.RunLog.advance

    def advance_and_pass(self: run_log.RunLog, now: int) -> None:
        nonlocal passed
        advance(self, now)
        passed = passed or now >= iteration

    patch.setattr(run_log.RunLog, "advance", advance_and_pass)
    patch.setattr(PeakMeter, "peak_bytes", property(lambda self: 10**12 if passed else 10**6))


@pytest.mark.parametrize("engine", ["mebp", "mezo"])
def test_a_run_over_budget_saves_stops_with_3_and_is_resumed_exactly(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--engine", engine, "--memory-budget", "4GB", "--steps-per-report", "4"]
    assert train.main(arguments(home, whole, *more)) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        pass_the_budget_at(patch, 3)
        assert train.main(arguments(home, parts, *more)) == 3
    (line,) = capsys.readouterr().err.splitlines()
    predicted = json.loads((parts / "run.json").read_text())["plan"]["predicted_peak_bytes"]
    for part in ("--memory-budget", "4000.0 MB", "1000000.0 MB", f"{predicted / 1e6:.1f} MB was predicted"):
        assert part in line, part
    assert "--over-budget warn" in line and "iteration 3 of 6 is saved" in line and str(parts) in line
    assert [e["iter"] for e in events(parts, "notice")] == [3] and [e["iter"] for e in events(parts, "save")] == [3]
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    for name in ("adapters.safetensors", "checkpoint.safetensors"):
        ours, theirs = (mx.load(str(folder / name)) for folder in (parts, whole))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert np.array(ours[key]).tobytes() == np.array(theirs[key]).tobytes(), key


def test_a_run_over_budget_may_only_warn(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        pass_the_budget_at(patch, 3)
        assert train.main(arguments(home, tmp_path / "warned", "--over-budget", "warn")) == 0
        assert capsys.readouterr().out.count("was exceeded: the footprint reached 1000000.0 MB") == 1
        assert train.main(arguments(home, tmp_path / "free", "--memory-budget", "none")) == 0
    with monkeypatch.context() as patch:
        pass_the_budget_at(patch, 6)  # in the last iteration nothing is left to stop, but the notice is still printed
        assert train.main(arguments(home, tmp_path / "last")) == 3
    assert "iteration 6 of 6 is saved" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "last").iterdir()} == FILES


def test_a_checkpoint_is_loaded_one_parameter_at_a_time(home: Path, tmp_path: Path) -> None:
    """Otherwise a resumed run could exceed a budget that the run kept: optimizer state is two copies of LoRA."""
    model = mebp_mlx.open_model(home / "model")
    config = train.TrainConfig(rank=2000)
    lora, optimizer = mebp_mlx.init_lora(model, rank=2000), make_optimizer(config, 9)
    optimizer.init(lora.parameters())
    mx.eval(optimizer.state)
    saved = checkpoint.Checkpoint(lora.parameters(), optimizer.state, 0, config.to_dict(), {})
    checkpoint.save_checkpoint(tmp_path, saved)
    fresh, again = mebp_mlx.init_lora(model, rank=2000, seed=1), make_optimizer(config, 9)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    checkpoint.restore(checkpoint.load_checkpoint(tmp_path), fresh, again, None)
    largest = max(value.nbytes for value in fresh.parameters().values())
    assert mx.get_peak_memory() - before <= 3 * largest, (mx.get_peak_memory() - before, largest)
    for name, value in lora.parameters().items():
        assert (fresh.parameters()[name] == value).all().item(), name
    assert again.state.keys() == optimizer.state.keys()


def test_a_save_takes_no_memory(home: Path, tmp_path: Path) -> None:
    """Optimizer state goes from its file to the new one; only one array at a time is in memory."""
    model = mebp_mlx.open_model(home / "model")
    config = train.TrainConfig(rank=4000)
    lora, optimizer = mebp_mlx.init_lora(model, rank=4000), make_optimizer(config, 9)
    updater = Updater(optimizer, lora, park=True, arena_dir=tmp_path)
    largest, whole = max(value.nbytes for value in lora.parameters().values()), updater.parked_bytes
    assert whole > 30 * largest
    mx.synchronize()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # otherwise memory that was freed before would hide new allocations
        ctypes.CDLL(None).malloc_trim(0)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    with PeakMeter() as meter:
        before_bytes = meter.peak_bytes
        state = checkpoint.Checkpoint(lora.parameters(), updater.state(), 0, config.to_dict(), {})
        checkpoint.save_checkpoint(tmp_path, state)
        save_adapters(tmp_path, lora, 0, {}, copy=True)
    assert mx.get_peak_memory() - before <= largest, (mx.get_peak_memory() - before, largest)
    assert meter.peak_bytes - before_bytes <= 3 * largest, (meter.peak_bytes - before_bytes, largest)
    assert (tmp_path / CHECKPOINT).stat().st_size > whole


def test_an_offloaded_run_is_resumed_exactly(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_updater, parked = run.make_updater, []

    def offload(config: Any, lora: Any, plan: Plan | None, *more: Any) -> Updater:
        assert plan is not None
        updater = make_updater(config, lora, dataclasses.replace(plan, offload_state=True), *more)
        parked.append(updater.parked_bytes)
        return updater

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(home, whole)) == 0
    monkeypatch.setattr(run, "make_updater", offload)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert train.main(arguments(home, parts, "--save-every", "2")) == 130
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    assert len(parked) == 2 and all(parked)
    for name in ("adapters.safetensors", "checkpoint.safetensors"):
        ours, theirs = (mx.load(str(folder / name)) for folder in (parts, whole))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert np.array(ours[key]).tobytes() == np.array(theirs[key]).tobytes(), key


@pytest.mark.parametrize("budget", ["none", "4GB"])
def test_a_resumed_run_uses_its_previous_plan(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str
) -> None:
    """Other block sizes change the last bits; the test uses a plan that no version would choose today."""
    out, taken = tmp_path / "out", []
    make_engine = training_train.make_engine

    def watched(*args: Any, plan: Plan, **how: Any) -> Any:
        taken.append(plan)
        return make_engine(*args, plan=plan, **how)

    monkeypatch.setattr(training_train, "make_engine", watched)
    assert train.main(arguments(home, out, "--iters", "3", "--memory-budget", budget)) == 0
    record = json.loads((out / "run.json").read_text())
    assert Plan.from_dict(record["plan"]) == taken[0]
    odd = dataclasses.replace(taken[0], saved=frozenset({"x", "v"}), query_block=33, token_block=192, kept_bytes=20_000)
    (out / "run.json").write_text(json.dumps(record | {"plan": record["plan"] | odd.to_dict()}))
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", "6"]) == 0
    assert taken[1:] == [odd]
    again = json.loads((out / "run.json").read_text())
    assert Plan.from_dict(again["plan"]) == odd
    # An unknown record does not stop the run.
    (out / "run.json").write_text(json.dumps(again | {"plan": {"token_block": 64}}))
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", "9"]) == 0
    assert taken[2] == taken[0]


def test_a_longer_run_continues_where_a_shorter_one_ended(home: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(home, whole, "--iters", "8")) == 0
    assert train.main(arguments(home, parts, "--iters", "4")) == 0
    assert train.main(arguments(home, parts, "--iters", "8", "--resume")) == 0
    assert (parts / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    assert [e for e in losses(parts) if e[0] == "train"] == [e for e in losses(whole) if e[0] == "train"]


def test_an_interrupt_during_accumulation_drops_the_update(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partly accumulated gradients are dropped, and recomputed after --resume."""
    more = ["--iters", "9", "--grad-accumulation-steps", "3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(home, whole, *more)) == 0
    step = BackpropEngine.step

    def step_and_kill(self: BackpropEngine, batch: Any, **given: Any) -> float:
        if (given["step"], given["micro"]) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, **given)

    with monkeypatch.context() as patch:
        listen_to_signals(patch)
        patch.setattr(BackpropEngine, "step", step_and_kill)
        assert train.main(arguments(home, parts, *more)) == 143  # 128 + SIGTERM
    assert events(parts, "interrupted")[-1]["iter"] == 3
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    assert (parts / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()


def test_ctrl_c_in_a_child_saves_and_exits_130(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = arguments(home, out, "--iters", "100000", "--save-every", "100000")
    process = child(
        "-m", "mebp_mlx.train", *argv, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if " loss " in line and "valid" not in line:
            break
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, (lines, rest, errors)
    assert "a second signal" in errors and "Traceback" not in errors
    assert "--resume" in errors
    done = events(out, "interrupted")[0]["iter"]
    assert {path.name for path in out.iterdir()} == FILES
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", str(done + 2)]) == 0
    assert [e["iter"] for e in events(out, "train")] == list(range(1, done + 3))


def test_a_second_ctrl_c_stops_at_once_without_saving(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = BackpropEngine.step

    def step_and_kill(self: BackpropEngine, batch: Any, **given: Any) -> float:
        for _ in range(2 if given["step"] == 4 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, **given)

    listen_to_signals(monkeypatch)
    monkeypatch.setattr(BackpropEngine, "step", step_and_kill)
    out = tmp_path / "out"
    assert train.main(arguments(home, out, "--save-every", "2")) == 130
    assert [e["iter"] for e in events(out, "save")] == [2, 4]
    assert "interrupted" in capsys.readouterr().err


def test_a_killed_run_resumes_from_its_last_save(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(home, whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "report", lambda self, iteration, window: 1 / (5 - iteration))
        with pytest.raises(ZeroDivisionError):  # a bug leaves its traceback
            train.main(arguments(home, parts, "--save-every", "2"))
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    assert (parts / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()


def test_resuming_a_finished_run_is_reported(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert train.main(arguments(home, out)) == 0
    before = contents(out)
    capsys.readouterr()
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(out) == before


def test_a_second_run_in_the_same_folder_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(arguments(home, out)) == 0
    before = contents(out)
    message = refused(capsys, arguments(home, out, "--seed", "1"))
    assert "--adapter-path" in message and "--resume" in message
    message = refused(capsys, arguments(home, out, "--resume", "--rank", "5"))
    assert message.startswith("--rank:") and "has 4, not 5" in message
    message = refused(capsys, arguments(home, out, "--resume", "--learning-rate", "0.5"))
    assert message.startswith("--learning-rate:")
    assert contents(out) == before


def test_resume_needs_the_same_rows(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "data", tmp_path / "data")
    argv = arguments(home, tmp_path / "out", "--data", str(tmp_path / "data"))
    assert train.main(argv) == 0
    with open(tmp_path / "data" / "train.jsonl", "a") as file:
        file.write('{"text": "one row more"}\n')
    assert refused(capsys, [*argv, "--resume", "--iters", "9"]).startswith("--data:")
    shutil.copytree(home / "data", tmp_path / "moved")
    assert train.main([*argv, "--data", str(tmp_path / "moved"), "--resume", "--iters", "9"]) == 0


def test_resume_without_a_saved_run_is_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, arguments(home, tmp_path / "none", "--resume")).startswith("--resume: nothing is saved")
    assert not (tmp_path / "none").exists()
