"""What a run tells: one JSON object for each event in log.jsonl, and lines or a progress bar for a person.

Events: start, train, valid, test, save, notice, interrupted, end. All have `event` and `time` (Unix seconds);
a value that is NaN or infinite is written as null. A resumed run appends, after a `start` with its iteration.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..errors import UserError
from ..system.units import megabytes
from .checkpoint import LOG

Send = Callable[[dict[str, float], int], Any]  # numbers by name, iteration


class RunLog:
    """The log of one run in `folder`, which must exist; use as a context manager.

    n_iters: the run's last iteration; iteration: where it starts, for the progress bar; stream: where a person
    reads (standard output); send: called with the number fields and the iteration of every train, valid and
    test event. Raises UserError when another process is writing the same log.
    """

    def __init__(
        self,
        folder: Path,
        *,
        n_iters: int,
        iteration: int = 0,
        stream: TextIO | None = None,
        send: Send | None = None,
    ) -> None:
        self._send = send
        self.n_iters = n_iters
        self._stream: TextIO | None = sys.stdout if stream is None else stream
        self._file = _open_for_append(folder / LOG)
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
        self._file.write(json.dumps(_jsonable(entry), allow_nan=False) + "\n")
        self._file.flush()
        if self._send is not None and event in ("train", "valid", "test"):
            numbers = {name: value for name, value in fields.items() if isinstance(value, (int, float))}
            self._send({f"{event}/{name}": value for name, value in numbers.items()}, fields["iter"])

    def say(self, text: str) -> None:
        """One line for a person; not in the file. A closed pipe or terminal does not stop the run."""
        try:
            if self._bar is not None:
                self._bar.print(text)
            elif self._stream is not None:
                print(text, file=self._stream, flush=True)
        except OSError:
            self._bar = self._stream = None

    def notice(self, text: str, **fields: Any) -> None:
        """Something that a person should know, on both ways."""
        self.event("notice", text=text, **fields)
        self.say(f"note: {text}")

    def advance(self, iteration: int) -> None:
        """Moves the progress bar, where there is one."""
        if self._bar is not None:
            self._bar.advance(iteration)

    def train(
        self,
        iteration: int,
        *,
        loss: float,
        learning_rate: float | None,
        n_tokens: int,
        tokens_per_s: float,
        step_s: float,
        footprint_bytes: int,
        peak_bytes: int,
        thermal: str | None = None,
    ) -> None:
        """A report: mean loss and speed since the last one. step_s: seconds for each optimizer step; thermal: the
        machine's state, where it is known.
        """
        self.event(
            "train",
            iter=iteration,
            loss=loss,
            learning_rate=learning_rate,
            n_tokens=n_tokens,
            tokens_per_s=tokens_per_s,
            step_s=step_s,
            footprint_bytes=footprint_bytes,
            peak_bytes=peak_bytes,
            **({} if thermal is None else {"thermal": thermal}),
        )
        rate = "" if learning_rate is None else f"  lr {learning_rate:.2e}"
        self.say(
            f"iter {iteration:>{len(str(self.n_iters))}}/{self.n_iters}  loss {loss:.3f}{rate}  "
            f"{tokens_per_s:,.0f} tokens/s  {step_s:.3g} s/step  "
            f"footprint {megabytes(footprint_bytes)} now, {megabytes(peak_bytes)} peak"
        )

    def evaluation(
        self, kind: str, iteration: int, *, loss: float, accuracy: float, n_tokens: int, seconds: float
    ) -> None:
        """A validation or test: `kind` is "valid" or "test", loss and accuracy means over n_tokens labelled tokens."""
        self.event(kind, iter=iteration, loss=loss, accuracy=accuracy, n_tokens=n_tokens, seconds=seconds)
        self.say(
            f"iter {iteration:>{len(str(self.n_iters))}}/{self.n_iters}  {kind} loss {loss:.3f}  "
            f"perplexity {math.exp(min(loss, 700)):,.4g}  accuracy {accuracy:.1%}  "
            f"({n_tokens:,} tokens, {seconds:.1f} s)"
        )


def reporter(service: str | None, project: str, options: dict[str, Any]) -> Send | None:
    """What sends reports to `service` ("wandb"), or None for None. Raises UserError when its library is missing."""
    if service is None:
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(f'--report-to {service}: is not installed; pip install "mebp_mlx[logging]"') from None
    run = wandb.init(project=project, config=options)
    return lambda numbers, iteration: run.log(numbers, step=iteration)


def first_event(folder: Path, event: str, latest: bool = False) -> dict[str, Any] | None:
    """The first (or latest) event of that kind in a run's log, or None; what is not JSON is passed over."""
    found = None
    with open(folder / LOG, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("event") == event:
                    found = entry
            if found and not latest:
                break
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _jsonable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def _open_for_append(path: Path) -> TextIO:
    """The log, locked for this process; half a line that a killed process left at its end is cut off."""
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115  (the log's life)
    except OSError as error:
        raise UserError(f"--adapter-path {path}: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.close()
            raise UserError(f"--adapter-path {path.parent}: another process is training there") from None
        # A file system without locks: go on without.
    with open(path, "rb") as content:
        size = content.seek(0, os.SEEK_END)
        content.seek(max(0, size - 65536))
        tail = content.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
    return file


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


class _ProgressBar:
    """rich's progress bar under the lines of the run. Imports rich, which costs 3 MB, so only terminals do."""

    def __init__(self, stream: TextIO | None, n_iters: int, iteration: int) -> None:
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
