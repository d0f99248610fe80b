"""A child process that receives JSON lines while this process works; this process waits only for its start and end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .child import child_environment, one_line

Take = Callable[[dict[str, Any]], None]


class Feed:
    """Runs `python -m ARGUMENTS`, which must call `serve`, in a session of its own, so that Ctrl-C does not reach it.

    problem: one line that describes a failure, or None.
    """

    def __init__(self, arguments: Sequence[str], request: dict[str, Any]) -> None:
        self.problem: str | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=child_environment(offline=False, quiet=True),
            start_new_session=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        os.set_blocking(self._input, False)

    def started(self, timeout_s: float) -> bool:
        """Waits for the child's answer to its request; returns whether it is ready."""
        deadline_s = time.monotonic() + timeout_s
        answer: dict[str, Any] = {"error": f"did not start within {timeout_s:g} s"}
        while select.select([self._output], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
            line = self._output.readline()
            if not line.startswith(b"{") and line:
                continue
            answer = json.loads(line) if line else {"error": "ended before it started"}
            break
        self.problem = answer.get("error")
        return self.problem is None

    def send(self, message: dict[str, Any]) -> bool:
        """Sends a message. Returns False and sets `problem` if the child is gone or does not read its input."""
        line = json.dumps(message).encode() + b"\n"  # short enough for an atomic write to a pipe
        try:
            os.write(self._input, line)
        except BlockingIOError:
            self.problem = "does not read its input"
        except OSError:
            self.problem = "has ended"
        else:
            return True
        return False

    def close(self, timeout_s: float) -> None:
        """Lets the child finish its messages; kills it after the timeout. May be called twice."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.problem = f"did not end within {timeout_s:g} s"
            self._process.kill()
            self._process.wait()
        self._output.close()


def serve(open_: Callable[[dict[str, Any]], tuple[Take, Callable[[], None]]]) -> NoReturn:
    """The child's side: open_(request) returns two functions, one called with each message, one after the last."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries' output goes to stderr
    try:
        take, finish = open_(json.loads(sys.stdin.readline()))
    except Exception as error:
        answers.write(json.dumps({"error": one_line(error)}) + "\n")
        answers.flush()
        sys.exit(1)
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        with contextlib.suppress(ValueError):  # an incomplete line from a killed parent
            take(json.loads(line))
    finish()
    sys.exit(0)
