"""Weights truncated during a run, and fatal signals: one line, and the last save is complete."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
from pathlib import Path

import pytest

import mebp_mlx
from mebp_mlx import train
from mebp_mlx.system import last_line
from mebp_mlx.system.last_line import LastLine
from tests.runs import arguments, child, events, losses, refused

pytestmark = pytest.mark.usefixtures("tokens_made_here")

# A run that saves every iteration and calls `act` after iteration 3. argv: the weight file, then the options.
_RUN = """
import os, signal, sys
from mebp_mlx import train
from mebp_mlx.weights.safetensors import MappedWeights
from mebp_mlx.training import log
file, seen = sys.argv[1], []
{act}
advance = log.RunLog.advance
def advance_and_act(self, now):
    advance(self, now)
    seen.append(now)
    if now == 3:
        act()
log.RunLog.advance = advance_and_act
sys.exit(train.main(sys.argv[2:]))
"""
CUT_BETWEEN = "def act(): os.truncate(file, os.path.getsize(file) // 2)"
CUT_WITHIN = """
check = MappedWeights.check_sizes
def check_and_cut(self):
    check(self)
    if 4 in seen:  # iteration 4 is saved: the check of the next pass has just been made
        os.truncate(file, 0)
advance_4 = log.RunLog.event
def event(self, name, **fields):
    advance_4(self, name, **fields)
    if name == "save" and fields["iter"] == 4:
        MappedWeights.check_sizes = check_and_cut
log.RunLog.event = event
def act(): pass
"""


def run_in_child(home: Path, tmp_path: Path, act: str, *more: str) -> tuple[int, list[str], Path, Path]:
    """(exit code, lines on stderr, the folder of the run, its model)."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(home / "model", model)
    argv = arguments(home, out, "--model", str(model), "--save-every", "1", "--val-batches", "0", *more)
    process = child("-c", _RUN.format(act=act), str(model / "model.safetensors"), *argv)
    printed, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    assert process.returncode != 0, printed
    return process.returncode, err.splitlines(), out, model


def resumes_exactly(home: Path, tmp_path: Path, out: Path, model: Path) -> None:
    """With the original weights, the resumed run equals an uninterrupted one."""
    shutil.copy(home / "model" / "model.safetensors", model)
    assert train.main(["--resume", "--adapter-path", str(out)]) == 0
    whole = tmp_path / "whole"
    assert train.main(arguments(home, whole, "--save-every", "1", "--val-batches", "0")) == 0
    assert (out / "adapters.safetensors").read_bytes() == (whole / "adapters.safetensors").read_bytes()
    assert losses(out)[-1] == losses(whole)[-1]


def test_weights_cut_between_two_passes_are_reported_with_their_sizes(home: Path, tmp_path: Path) -> None:
    code, lines, out, model = run_in_child(home, tmp_path, CUT_BETWEEN)
    n_bytes = (home / "model" / "model.safetensors").stat().st_size
    (line,) = lines
    assert code == 2, lines
    file = model / "model.safetensors"
    assert line == (
        f"error: {file}: was {n_bytes} bytes, is {n_bytes // 2} bytes: cut short while it was in use; "
        f"the last good state is saved in {out}"
    )
    # Iteration 3 used complete weights, but the run cannot know this, so the last save is from before.
    assert [e["iter"] for e in events(out, "save")] == [1, 2]
    resumes_exactly(home, tmp_path, out, model)


def test_weights_cut_before_the_first_save(home: Path, tmp_path: Path) -> None:
    code, (line,), out, _ = run_in_child(home, tmp_path, CUT_BETWEEN, "--save-every", "100")
    assert code == 2 and line.endswith("cut short while it was in use; nothing is saved yet"), line
    assert not (out / "checkpoint.safetensors").exists()


def test_weights_cut_within_a_pass_leave_one_line_about_the_signal(home: Path, tmp_path: Path) -> None:
    code, lines, out, model = run_in_child(home, tmp_path, CUT_WITHIN)
    n_bytes = (home / "model" / "model.safetensors").stat().st_size
    (line,) = lines
    assert code == -signal.SIGBUS, lines
    assert line == (
        f"error: Bus error: {model / 'model.safetensors'} was {n_bytes} bytes, is 0 bytes: cut short while it was in "
        f"use; the last save, {out / 'checkpoint.safetensors'}, is intact"
    )
    assert [e["iter"] for e in events(out, "save")] == [1, 2, 3, 4]
    resumes_exactly(home, tmp_path, out, model)


@pytest.mark.parametrize(
    ("number", "parts"),
    [
        (signal.SIGSEGV, ("Segmentation fault", "out of memory")),
        (signal.SIGABRT, ("Aborted", "out of memory")),
        (signal.SIGBUS, ("Bus error", "a mapped file was cut short, or the disk is full or gone")),
        (signal.SIGFPE, ("Floating", "a fault outside Python")),
    ],
)
def test_a_fatal_signal_leaves_one_line(
    home: Path, tmp_path: Path, number: signal.Signals, parts: tuple[str, ...]
) -> None:
    code, (line,), out, _ = run_in_child(home, tmp_path, f"def act(): os.kill(os.getpid(), {int(number)})")
    assert code == -number
    for part in (*parts, f"the last save, {out / 'checkpoint.safetensors'}, is intact"):
        assert part in line, line


def test_a_cut_file_is_not_kept_as_weights(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A truncated file is refused when a model is opened; a file that only grew still holds the same model."""
    shutil.copytree(home / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    model = mebp_mlx.open_model(tmp_path / "model")
    assert model.weights.file_bytes == {file: file.stat().st_size}
    model.weights.check_sizes()
    with open(file, "ab") as more:
        more.write(b"x" * 100)
    model.weights.check_sizes()
    os.truncate(file, 1000)
    with pytest.raises(mebp_mlx.UserError, match=r"is 1000 bytes: cut short"):
        model.weights.check_sizes()
    assert "model.safetensors" in refused(capsys, arguments(home, tmp_path / "out", "--model", str(file.parent)))


def test_without_a_fault_there_is_no_line(home: Path, tmp_path: Path) -> None:
    process = child("-m", "mebp_mlx.train", *arguments(home, tmp_path / "out"))
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")


def test_the_shell_ends_with_the_context_and_a_handler_in_use_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = faulthandler.is_enabled()
    faulthandler.enable()
    with LastLine(tmp_path / "save", {}) as line:
        assert line._shell is None and faulthandler.is_enabled()
    assert faulthandler.is_enabled()
    faulthandler.disable()
    try:
        with LastLine(tmp_path / "save", {}) as line:
            shell = line._shell
            assert shell is not None and shell.poll() is None and faulthandler.is_enabled()
        assert shell.returncode == 0 and not faulthandler.is_enabled()

        def no_shell(*_: object, **__: object) -> None:
            raise OSError("no such shell")

        monkeypatch.setattr(last_line.subprocess, "Popen", no_shell)
        with LastLine(tmp_path / "save", {}):
            assert not faulthandler.is_enabled()
    finally:
        if before:
            faulthandler.enable()
