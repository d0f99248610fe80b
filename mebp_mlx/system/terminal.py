"""Keeps a command running if output fails: a closed pipe, a full device, a terminal without Unicode."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def say(text: str) -> None:
    """Prints one line to standard output and flushes it."""
    print(text, flush=True)


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Within the context, after a write to sys.stdout or sys.stderr fails, all further output to it is dropped."""
    before = sys.stdout, sys.stderr
    # A stream is None if its descriptor was closed at the start.
    sys.stdout, sys.stderr = (ForgivingStream(stream or open(os.devnull, "w")) for stream in before)  # noqa: SIM115
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # otherwise the interpreter would fail at exit
        sys.stdout, sys.stderr = before


class ForgivingStream:
    """A text stream whose writes never fail: after the first error it drops everything."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._dropping_what_fails():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping_what_fails():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping_what_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
