"""--report-to: numbers reach every service, whose library stays outside the training process; no failure ends a run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from mebp_mlx import train
from mebp_mlx.config import TrainConfig
from tests.runs import arguments, child, contents, events, refused

pytestmark = pytest.mark.usefixtures("tokens_made_here")

# A library named `{name}` that writes each call into a file.
_LIBRARY = """
import json, os
def _note(*what):
    with open(os.environ["SEEN"], "a") as file:
        file.write(json.dumps(["{name}", *what]) + chr(10))
def init(**how):
    {at_init}
    _note("init", how["project"], how["config"]["rank"], os.getpid())
    return Run()
def log(numbers, step):
    {at_log}
    _note("log", numbers, step)
def finish():
    _note("finish")
class Run:
    log = staticmethod(log)
    finish = staticmethod(finish)
class SummaryWriter:
    def __init__(self, folder):
        _note("init", folder, 4, os.getpid())
    def add_scalar(self, name, value, step):
        _note("log", {{name: value}}, step)
    def close(self):
        _note("finish")
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that this test's libraries write to. The libraries are in tmp_path/libraries."""
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "libraries"))
    monkeypatch.syspath_prepend(str(tmp_path / "libraries"))
    return tmp_path / "seen"


def library(tmp_path: Path, name: str, at_init: str = "pass", at_log: str = "pass") -> None:
    (tmp_path / "libraries").mkdir(exist_ok=True)
    (tmp_path / "libraries" / f"{name}.py").write_text(_LIBRARY.format(name=name, at_init=at_init, at_log=at_log))


def test_every_number_reaches_every_service_in_its_own_process(home: Path, tmp_path: Path, seen: Path) -> None:
    libraries = ["wandb", "tensorboardX", "trackio", "swanlab"]
    for name in libraries:
        library(tmp_path, name)
    out, imported = tmp_path / "out", set(sys.modules)
    more = ["--report-to", "wandb,tensorboard", "trackio", "swanlab", "--project-name", "mine", "--test"]
    assert train.main(arguments(home, out, *more)) == 0
    assert not set(libraries) & (set(sys.modules) - imported)
    calls = [json.loads(line) for line in seen.read_text().splitlines()]
    wanted = {(e["event"], e["iter"]): e["loss"] for e in events(out) if e["event"] in ("train", "valid", "test")}
    for name in libraries:
        own = [call[1:] for call in calls if call[0] == name]
        assert own[0][1] == (f"{out}/tensorboard" if name == "tensorboardX" else "mine")
        assert own[0][2] == 4 and own[0][3] != os.getpid() and own[-1] == ["finish"]
        logged = {
            (key.partition("/")[0], step): value
            for _, numbers, step in own[1:-1]
            for key, value in numbers.items()
            if key.endswith("/loss")
        }
        assert logged == wanted


def test_a_missing_library_is_reported_before_anything_happens(
    home: Path, tmp_path: Path, seen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "wandb")
    said = refused(capsys, arguments(home, tmp_path / "out", "--report-to", "wandb", "trackio"))
    assert said == "--report-to trackio: trackio is not installed; pip install trackio"
    assert not seen.exists() and not (tmp_path / "out").exists()


def test_a_service_that_does_not_start_is_one_line(
    home: Path, tmp_path: Path, seen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "wandb", at_init="raise RuntimeError('no login,' + chr(10) + 'see the docs')")
    said = refused(capsys, arguments(home, tmp_path / "out", "--report-to", "wandb"))
    assert said == "--report-to wandb: no login, see the docs"
    assert contents(tmp_path / "out") == {}


def test_a_service_that_ends_is_reported_once_and_the_run_continues(
    home: Path, tmp_path: Path, seen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "wandb", at_log="os._exit(1) if step else None")
    library(tmp_path, "trackio")
    out = tmp_path / "out"
    assert train.main(arguments(home, out, "--report-to", "wandb", "trackio", "--iters", "12")) == 0
    assert events(out)[-1]["event"] == "end"
    assert capsys.readouterr().out.count("note: --report-to wandb: ") <= 1
    steps = [json.loads(line)[-1] for line in seen.read_text().splitlines() if '"trackio", "log"' in line]
    assert steps[-1] == 12


def test_ctrl_c_does_not_reach_a_service(home: Path, tmp_path: Path, seen: Path) -> None:
    """A terminal sends its signal to the whole process group; the child is not in ours."""
    library(tmp_path, "wandb", at_log="import time; time.sleep(0.2)")
    libraries = str(tmp_path / "libraries")
    script = (
        f"import os, signal, sys\nsys.path.insert(0, {libraries!r})\nos.environ['PYTHONPATH'] = {libraries!r}\n"
        "from mebp_mlx import train\nfrom mebp_mlx.training.log import RunLog\n"
        "advance = RunLog.advance\ndef act(self, now):\n    advance(self, now)\n"
        "    now == 2 and os.killpg(os.getpgrp(), signal.SIGINT)\nRunLog.advance = act\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\nsys.exit(train.main(sys.argv[1:]))"
    )
    process = child("-c", script, *arguments(home, tmp_path / "out", "--report-to", "wandb"), start_new_session=True,
                    cwd=tmp_path)  # fmt: skip
    _, error = process.communicate()
    assert process.returncode == 130, error
    calls = [json.loads(line)[1:] for line in seen.read_text().splitlines()]
    assert calls[-1] == ["finish"] and calls[-2][-1] == 2


def test_mlx_lms_older_key_names_the_project(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("wandb: mine\n")
    config = TrainConfig.from_args(["-c", str(tmp_path / "c.yaml")])
    assert (config.report_to, config.project_name) == (("wandb",), "mine")
    assert TrainConfig.from_args(["--wandb", "mine"]) == config.replace(config=None)
    (tmp_path / "c.yaml").write_text("wandb: null\nreport_to: null\n")
    assert TrainConfig.from_args(["-c", str(tmp_path / "c.yaml")]).report_to is None
