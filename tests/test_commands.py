"""Every form of the commands (console scripts, `mebp-mlx COMMAND`, `python -m`), and the package's interface."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mebp_mlx
from mebp_mlx.__main__ import COMMANDS, main
from tests.runs import ROOT


def test_the_list_of_commands_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert main(argv) == 0
        printed = capsys.readouterr().out
        assert all(name in printed and what in printed for name, what in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_version_and_its_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tomllib = pytest.importorskip("tomllib")
    with pytest.raises(SystemExit) as ended:
        main([name, "--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"mebp_mlx {mebp_mlx.__version__}\n"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module = f"mebp_mlx.{name}" + (".__main__" if name in ("doctor", "export") else "")  # folders
    assert scripts[f"mebp_mlx.{name}"] == f"{module}:main"
    assert callable(importlib.import_module(module).main)
    assert scripts.keys() == {"mebp-mlx", *(f"mebp_mlx.{each}" for each in COMMANDS)}


def test_an_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: trian: no such command") and "train" in line


def test_the_package_runs_and_shows_its_interface() -> None:
    done = subprocess.run([sys.executable, "-m", "mebp_mlx", "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"mebp_mlx {mebp_mlx.__version__}\n")
    assert dir(mebp_mlx) == sorted(mebp_mlx.__all__)
    assert all(getattr(mebp_mlx, name) for name in mebp_mlx.__all__)


def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "mebp_mlx.train"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
