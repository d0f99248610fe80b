"""Signals: the first stops a run at a point where it can be resumed, the second stops it immediately."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_MESSAGE = b"\nstopping after this step; a second signal stops immediately, without saving\n"


class Stopped(KeyboardInterrupt):
    """A signal ends the command. exit_code: 128 + the signal's number, as in shells (130, 143, 129).

    message: the line for the user; None for the command's default, "" for none.
    """

    def __init__(self, number: int = signal.SIGINT, message: str | None = None) -> None:
        super().__init__(message or signal.Signals(number).name)
        self.exit_code, self.message = 128 + number, message


class Interrupt:
    """A context manager that raises Stopped for a signal or, while `deferred`, stores its number in `requested`.

    A signal that was ignored when the process started (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred or self.requested is not None:
            raise Stopped(number)
        self.requested = number
        with contextlib.suppress(OSError):
            os.write(2, _MESSAGE)  # print is not safe inside a signal handler
