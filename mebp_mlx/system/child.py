"""Child processes, for libraries that are too large for the training process.

`run_child` runs a module of this package in a child process; the child calls `answer`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import UserError, memory_errors_told


class ChildFailure(RuntimeError):
    """A child process ended without an answer. The message gives its exit status and the tail of its stderr."""


def one_line(error: object, limit: int = 400) -> str:
    """The text of an exception on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def child_environment(*, offline: bool, quiet: bool) -> dict[str, str]:
    environment = dict(os.environ)
    environment |= {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if offline:
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if quiet:
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    root = Path(__file__).resolve().parents[2]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout: the child must find the same package
        old = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{old}{os.pathsep}{root}" if old else str(root)
    return environment


def run_child(
    arguments: Sequence[str],
    request: dict[str, Any] | None = None,
    *,
    offline: bool,
    pass_stderr: bool = False,
    on_progress: Callable[[Any], None] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """Runs `python -m ARGUMENTS`, sends it `request` as JSON on stdin, and returns the JSON object that it answers.

    A line {"progress": ...} goes to `on_progress`. Raises UserError with the child's message if the child raised one,
    KeyboardInterrupt if it was interrupted, TimeoutError, and ChildFailure for every other failure.
    """
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if pass_stderr else errors,
            env=child_environment(offline=offline, quiet=not (pass_stderr and sys.stderr.isatty())),
        )
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(timeout_s or 0, expire)
        timer.daemon = True
        if timeout_s is not None:
            timer.start()
        try:
            reply = _exchange(process, request or {}, on_progress)
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
        finally:
            timer.cancel()
            process.stdout.close()
        if "error" in reply:
            raise UserError(reply["error"])
        if status == 0 and reply:
            return reply
        if expired.is_set():
            raise TimeoutError(f"python -m {arguments[0]} took more than {timeout_s:g} s")
        if status in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        raise _failure(arguments[0], status, errors)


def _exchange(
    process: subprocess.Popen[bytes], request: dict[str, Any], on_progress: Callable[[Any], None] | None
) -> dict[str, Any]:
    """Sends the request and reads until the child closes its stdout; returns {} if it sent no answer."""
    assert process.stdin is not None and process.stdout is not None
    reply: dict[str, Any] = {}
    try:
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it died before it read the request: its exit status gives the cause
    for line in process.stdout:
        if not line.startswith(b"{"):
            continue  # printed by a start-up hook before `answer` redirected stdout
        message = json.loads(line)
        if "progress" not in message:
            reply = message
        elif on_progress is not None:
            on_progress(message["progress"])
    return reply


def _failure(module: str, status: int, errors: BinaryIO) -> ChildFailure:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(errors.tell() - 2000, 0))
    tail = errors.read().decode(errors="replace").strip()
    cause = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    if -status == signal.SIGKILL:
        cause += ", probably by the system for lack of memory"
    return ChildFailure(f"python -m {module} failed ({cause})" + (f": {tail}" if tail else ""))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Asks a child to clean up and exit; kills it after two seconds."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent has died, since nobody would read the answer."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def answer(work: Callable[[dict[str, Any], Callable[[Any], None]], dict[str, Any]]) -> NoReturn:
    """The child's side of `run_child`: sends the result of `work(request, progress)`, or its UserError, and exits.

    The request is read from the first argument if there is one, otherwise from stdin. Libraries' output goes to stderr.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by the package (__init__.py)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    status = 0
    try:
        request = json.loads(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.read())
        with memory_errors_told():
            send(work(request, lambda state: send({"progress": state})))
    except UserError as error:
        send({"error": str(error)})
        status = 2
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:
        status = 1  # the parent is gone
    sys.exit(status)
