"""Child processes: answers, progress, and every way to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import ChildFailure, run_child
from mebp_mlx.weights import hub

# Child processes

CHILD = """
import os, sys, time
print("printed before", flush=True)
from mebp_mlx.errors import UserError
from mebp_mlx.system.child import answer

def work(request, progress):
    print("what libraries print", file=sys.stderr)
    os.write(1, b"and on stdout\\n")
    if request.get("wrong"):
        raise UserError("--flag: is wrong")
    if request.get("crash"):
        raise RuntimeError("deep inside")
    if request.get("signal"):
        os.kill(os.getpid(), request["signal"])
    if request.get("sleep"):
        try:
            progress("asleep")
            time.sleep(60)
        except KeyboardInterrupt:
            open(request["sleep"], "w").close()
            raise
    progress(1)
    progress({"two": 2})
    return {"offline": os.environ.get("HF_HUB_OFFLINE"), **request}

answer(work)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return ["a_child"]


def test_a_child_answers_and_reports_progress(child: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    states: list[Any] = []
    reply = run_child(child, {"text": "é\n"}, offline=True, on_progress=states.append)
    assert reply == {"offline": "1", "text": "é\n"} and states == [1, {"two": 2}]
    assert run_child(child, {}, offline=False) == {"offline": None}
    assert capfd.readouterr() == ("", "")
    run_child(child, {}, offline=True, pass_stderr=True)
    assert capfd.readouterr() == ("", "what libraries print\nand on stdout\n")


def test_how_children_fail(child: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--flag: is wrong$"):
        run_child(child, {"wrong": True}, offline=True)
    with pytest.raises(ChildFailure, match=r"(?s)python -m a_child failed \(exit status 1\): .*deep inside"):
        run_child(child, {"crash": True}, offline=True)
    with pytest.raises(ChildFailure, match=rf"killed by signal {signal.SIGKILL:d}"):
        run_child(child, {"signal": signal.SIGKILL}, offline=True)
    with pytest.raises(KeyboardInterrupt):
        run_child(child, {"signal": signal.SIGINT}, offline=True)
    with pytest.raises(ChildFailure, match="No module named no_such_child"):
        run_child(["no_such_child"], {"long": "x" * 1_000_000}, offline=True)
    with pytest.raises(TimeoutError, match=r"a_child took more than 0\.5 s"):
        run_child(child, {"sleep": str(tmp_path / "never")}, offline=True, timeout_s=0.5)


def test_an_interrupted_parent_lets_its_child_clean_up(child: list[str], tmp_path: Path) -> None:
    def interrupt(_state: Any) -> None:
        raise KeyboardInterrupt

    started_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_child(child, {"sleep": str(tmp_path / "cleaned")}, offline=True, on_progress=interrupt)
    assert (tmp_path / "cleaned").exists() and time.monotonic() - started_s < 30


def test_a_request_may_be_an_argument(child: list[str]) -> None:
    root = str(Path(hub.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], root])}
    command = [sys.executable, "-m", *child]
    for request, status in (({"a": 1}, 0), ({"wrong": True}, 2)):
        done = subprocess.run([*command, json.dumps(request)], env=environment, capture_output=True, text=True)
        assert done.returncode == status
        assert json.loads(done.stdout.splitlines()[-1]).keys() <= {"a", "offline", "error"}
