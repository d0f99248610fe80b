"""best/ holds the adapters with the lowest validation loss, and --patience ends a run, also after interruptions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx import train
from mebp_mlx.training import saving
from mebp_mlx.training.best import Best
from mebp_mlx.training.trainer import Trainer
from tests.runs import arguments, contents, events, interrupt_at, refused

pytestmark = pytest.mark.usefixtures("tokens_made_here")
FALLING_THEN_RISING = {0: 5.0, 2: 4.0, 4: 3.9, 6: 4.2, 8: 4.1, 10: 1.0, 12: 0.5}


@pytest.fixture
def losses_as_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validations run as usual, but report the losses of FALLING_THEN_RISING."""
    evaluate = Trainer.evaluate

    def listed(self: Trainer, kind: str, iteration: int, *more: Any) -> float | None:
        actual = evaluate(self, kind, iteration, *more)
        return actual if actual is None or kind != "valid" else FALLING_THEN_RISING[iteration]

    monkeypatch.setattr(Trainer, "evaluate", listed)


def options(home: Path, out: Path, *more: str) -> list[str]:
    return arguments(home, out, "--steps-per-eval", "2", "--iters", "12", "--save-every", "100", *more)


def same_files(ours: Path, theirs: Path) -> None:
    for name in (
        "adapters.safetensors",
        "adapter_config.json",
        "best/adapters.safetensors",
        "best/adapter_config.json",
    ):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    a, b = (mx.load(str(folder / "checkpoint.safetensors")) for folder in (ours, theirs))
    assert a.keys() == b.keys() and all(np.array_equal(np.array(a[name]), np.array(b[name])) for name in a)


def test_best_holds_the_adapters_of_that_iteration(home: Path, tmp_path: Path, losses_as_listed: None) -> None:
    out, until = tmp_path / "out", tmp_path / "until"
    assert train.main(options(home, out, "--save-best", "--iters", "8")) == 0
    assert train.main(options(home, until, "--iters", "4")) == 0
    assert (out / "best/adapters.safetensors").read_bytes() == (until / "adapters.safetensors").read_bytes()
    assert json.loads((out / "best/adapter_config.json").read_text())["iters"] == 4
    assert not (until / "best").exists()


@pytest.mark.parametrize("more, last", [(["--patience", "2"], 8), (["--patience", "1"], 6),
                                        (["--patience", "2", "--min-delta", "0.2"], 6),
                                        (["--patience", "3"], 12)])  # fmt: skip
def test_patience_ends_the_run(
    home: Path, tmp_path: Path, losses_as_listed: None, more: list[str], last: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(options(home, out, *more, "--test")) == 0
    assert events(out, "end")[0]["iter"] == events(out, "test")[0]["iter"] == events(out, "save")[-1]["iter"] == last
    said = capsys.readouterr().out
    assert ("stopped early: " in said) == (last < 12)
    if last == 12:
        return
    before = contents(out)
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    assert "nothing to do" in (said := capsys.readouterr().out) and "stopped early" in said
    assert contents(out) == before
    assert train.main(["--resume", "--adapter-path", str(out), "--patience", "9"]) == 0
    assert events(out, "end")[-1]["iter"] == 12


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
def test_a_resumed_run_keeps_count(
    home: Path, tmp_path: Path, losses_as_listed: None, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Interrupted before, during and after the best validation, and during worse ones."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(options(home, whole, "--patience", "2")) == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, at)
        assert train.main(options(home, parts, "--patience", "2")) == 130
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    same_files(parts, whole)
    assert [e["iter"] for e in events(parts, "valid")] == [e["iter"] for e in events(whole, "valid")] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("missing", [["adapters.safetensors"], ["adapter_config.json"], []])
def test_an_interrupted_save_of_best_is_completed(
    home: Path, tmp_path: Path, losses_as_listed: None, monkeypatch: pytest.MonkeyPatch, missing: list[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(options(home, whole, "--save-best", "--iters", "8")) == 0
    save = saving.save_adapters

    def stop_in_best(folder: Path, lora: Any, iteration: int, *more: Any) -> None:
        if folder.name == "best" and iteration == 4:
            if missing != []:
                save(folder, lora, iteration, *more)
                for name in missing:
                    (folder / name).unlink()
            raise KeyboardInterrupt
        save(folder, lora, iteration, *more)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_adapters", stop_in_best)
        assert train.main(options(home, parts, "--save-best", "--iters", "8")) == 130
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    same_files(parts, whole)


def test_an_interrupted_save_of_best_is_completed_for_a_finished_run(
    home: Path, tmp_path: Path, losses_as_listed: None
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(options(home, whole, "--save-best", "--iters", "4")) == 0
    shutil.copytree(whole, parts)
    (parts / "best/adapters.safetensors").unlink()
    assert train.main(["--resume", "--adapter-path", str(parts)]) == 0
    same_files(parts, whole)


def test_patience_needs_validations(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, options(home, tmp_path / "out", "--patience", "1", "--val-batches", "0"))
    assert said.startswith("--patience: no validation is run")


def test_a_loss_lower_by_less_than_min_delta_is_not_better() -> None:
    best = Best(min_delta=0.1, patience=2)
    assert [best.observe(loss, i) for i, loss in enumerate((3.0, 2.95, 2.85, float("nan"), 2.80))] == [
        True, False, True, False, False,
    ]  # fmt: skip
    assert best.is_exhausted and best.loss == 2.85
