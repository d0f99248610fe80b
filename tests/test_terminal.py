"""Printing never ends a command: closed pipes, full devices, terminals without Unicode."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.runs import FILES, ROOT, arguments

pytestmark = pytest.mark.usefixtures("tokens_made_here")


def run(
    home: Path, out: Path, shell: str, more: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Writes the command's exit code to $OUT.code, because a pipe returns that of its last command."""
    command = [
        sys.executable,
        "-m",
        "mebp_mlx.train",
        *arguments(home, out, "--iters", "2", "--val-batches", "0", *more),
    ]
    line = f'{{ "$@" ; echo $? > {out}.code; }} {shell}'
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["/bin/sh", "-c", line, "sh", *command], capture_output=True, text=True, env=given)


@pytest.mark.parametrize("shell", ["| true", "| head -1", "> /dev/full", "> /dev/full 2>&1", ">&- 2>&-"])
def test_a_run_ends_with_any_reader(home: Path, tmp_path: Path, shell: str) -> None:
    if "/dev/full" in shell and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    out = tmp_path / "out"
    process = run(home, out, shell)
    assert (tmp_path / "out.code").read_text() == "0\n", process.stderr
    assert {path.name for path in out.iterdir()} == FILES
    assert "Traceback" not in process.stderr and "Exception ignored" not in process.stderr


def test_a_terminal_without_unicode(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mod\u00e8le").symlink_to(home / "model")
    more = ["--model", str(tmp_path / "mod\u00e8le")]
    process = run(home, tmp_path / "out", "", more, PYTHONIOENCODING="ascii")
    assert (tmp_path / "out.code").read_text() == "0\n", process.stderr
    assert "mod\\xe8le" in process.stdout
