"""A run's reports: one JSON object per event in log.jsonl, and lines or a progress bar for the user.

Events: start, train, valid, test, save, notice, interrupted, end. All have `event` and `time` (Unix seconds);
NaN and infinite values are written as null. A resumed run appends a `start` with its iteration, then its own events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..system.terminal import ForgivingStream
from ..system.units import megabytes
from .folder import LOG

Send = Callable[[dict[str, float], int], Any]  # numbers by name, iteration


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """Training since the last report. step_s: seconds per optimizer step; thermal: the machine's thermal state, None if
    unknown; learning_rate: None if the optimizer sets its own; loss_at: the point where the loss is taken, None for the
    current weights; footprint_bytes, peak_bytes: the largest of all machines; peak_bytes_by_rank: None for one machine.
    """

    loss: float
    learning_rate: float | None
    n_tokens: int
    tokens_per_s: float
    step_s: float
    footprint_bytes: int
    peak_bytes: int
    peak_bytes_by_rank: tuple[int, ...] | None = None
    thermal: str | None = None
    loss_at: str | None = None


class RunLog:
    """The log of one run in `folder`, which must exist; use as a context manager.

    n_iters: the run's last iteration; iteration: the first one, for the progress bar; continues: keep existing events;
    stream: output for the user (default: standard output); senders: called with the numeric fields and the iteration of
    every train, valid and test event. Raises UserError if another process is writing the same log or an event cannot be
    written.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_iters: int,
        iteration: int = 0,
        continues: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self.senders: Sequence[Send] = ()
        self.n_iters = n_iters
        self._stream: Any = ForgivingStream(sys.stdout if stream is None else stream)
        self._path = folder / LOG
        self._file = _open_for_append(self._path)
        if not continues:
            self._file.truncate(0)  # left by a run that saved nothing
        self._bar = _ProgressBar(self._stream, n_iters, iteration) if _is_terminal(self._stream) else None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress display and closes the file; may be called twice."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
        self._file.close()

    def event(self, event: str, **fields: Any) -> None:
        """Appends one object to log.jsonl and flushes it."""
        entry = {"event": event, "time": round(time.time(), 3), **fields}
        self._append(json.dumps(_jsonable(entry), allow_nan=False).encode() + b"\n")
        if event in ("train", "valid", "test"):
            numbers = {f"{event}/{name}": n for name, n in fields.items() if isinstance(n, (int, float))}
            for send in self.senders:
                send(numbers, fields["iter"])

    def _append(self, line: bytes) -> None:
        whole_bytes = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(whole_bytes)  # leave no partial line
            raise UserError(
                f"--adapter-path {self._path}: cannot be written: {error.strerror or error}; the last save, if there "
                "was one, is intact"
            ) from None

    def say(self, text: str) -> None:
        """Prints one line for the user; it is not written to the file."""
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=self._stream, flush=True)

    def notice(self, text: str, **fields: Any) -> None:
        """Writes a notice to the log and prints it."""
        self.event("notice", text=text, **fields)
        self.say(f"note: {text}")

    def advance(self, iteration: int) -> None:
        """Moves the progress bar, if there is one."""
        if self._bar is not None:
            self._bar.advance(iteration)

    def train(self, iteration: int, report: TrainReport) -> None:
        """Reports the mean loss and the speed since the last report."""
        fields = dataclasses.asdict(report)
        for name in ("thermal", "loss_at", "peak_bytes_by_rank"):
            if fields[name] is None:
                del fields[name]
        self.event("train", iter=iteration, **fields)
        rate = "" if report.learning_rate is None else f"  lr {report.learning_rate:.2e}"
        where = "" if report.loss_at is None else f" ({report.loss_at})"
        peaks, whose = report.peak_bytes_by_rank, ""
        if peaks is not None:
            whose = f" (rank {peaks.index(report.peak_bytes)} of {len(peaks)})"
        self.say(
            f"iter {iteration:>{len(str(self.n_iters))}}/{self.n_iters}  loss {report.loss:.3f}{where}{rate}  "
            f"{report.tokens_per_s:,.0f} tokens/s  {report.step_s:.3g} s/step  "
            f"footprint {megabytes(report.footprint_bytes)} now, {megabytes(report.peak_bytes)} peak{whose}"
        )

    def evaluation(
        self, kind: str, iteration: int, *, loss: float, accuracy: float, n_tokens: int, seconds: float
    ) -> None:
        """Reports a validation or test. kind: "valid" or "test"; loss, accuracy: means over n_tokens labels."""
        self.event(kind, iter=iteration, loss=loss, accuracy=accuracy, n_tokens=n_tokens, seconds=seconds)
        self.say(
            f"iter {iteration:>{len(str(self.n_iters))}}/{self.n_iters}  {kind} loss {loss:.3f}  "
            f"perplexity {math.exp(min(loss, 700)):,.4g}  accuracy {accuracy:.1%}  "
            f"({n_tokens:,} tokens, {seconds:.1f} s)"
        )


def events(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The events of one kind in a run's log, in order. Lines that are not JSON are skipped; no log means no events."""
    with contextlib.suppress(FileNotFoundError), open(folder / LOG, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == kind:
                    yield entry


def last_event(folder: Path, kind: str) -> dict[str, Any] | None:
    """The latest event of one kind; None if there is none."""
    return next(iter(deque(events(folder, kind), maxlen=1)), None)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _open_for_append(path: Path) -> FileIO:
    """Opens the log and locks it for this process; removes a partial last line that a killed process left."""
    try:
        file = FileIO(path, "a+")  # unbuffered: write errors show up at once
    except OSError as error:
        raise UserError(f"--adapter-path {path}: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise UserError(f"--adapter-path {path.parent}: another process is training there") from None
        # The file system has no locks: continue without one.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 65536))
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
    return file


def _is_terminal(stream: Any) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _ProgressBar:
    """rich's progress bar below the run's lines. Only terminals use it, because rich takes 3 MB."""

    def __init__(self, stream: Any, n_iters: int, iteration: int) -> None:
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(file=stream),
            refresh_per_second=2,
            transient=True,
        )
        self._task = self._progress.add_task("", total=n_iters, completed=iteration)
        self._progress.start()

    def print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, iteration: int) -> None:
        self._progress.update(self._task, completed=iteration)

    def stop(self) -> None:
        self._progress.stop()
