"""A training run that is killed, or whose disk is full, at the n-th flush, rename or write.

`python -m bench.torture.faults PLAN OPTIONS` trains with OPTIONS. PLAN is a JSON object: {"kill": n} kills the process
before the n-th fsync or rename; {"full": n} makes the n-th write, flush or reservation and all later ones fail with
ENOSPC; {"count": file} writes the totals of a whole run to a file. The package itself contains no such code.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from mebp_mlx import train
from mebp_mlx.system import files
from mebp_mlx.training import log


class Faults:
    """Counts a run's flushes and renames (`n_points`) and its writes (`n_writes`).

    kill: the point before which the process is killed; full: the first write that fails; 0 disables either.
    """

    def __init__(self, kill: int = 0, full: int = 0) -> None:
        self.kill, self.full = kill, full
        self.n_points = self.n_writes = 0

    def point(self) -> None:
        """Called before every flush and rename."""
        self.n_points += 1
        if self.n_points == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self) -> None:
        """Called before every operation that fails on a full disk."""
        self.n_writes += 1
        if self.full and self.n_writes >= self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def installed(self) -> Iterator[Faults]:
        """Replaces the system's calls by counting ones."""
        faults = self

        class CountedIO(io.FileIO):
            def write(self, data: Any) -> int:
                faults.write()
                return super().write(data) or 0

        def opened(path: Any, mode: str = "r", *rest: Any, **how: Any) -> Any:
            if "w" not in mode and "x" not in mode:
                return open(path, mode, *rest, **how)
            raw = io.BufferedWriter(CountedIO(path, mode.replace("b", "")))
            return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

        with (
            mock.patch.object(os, "fsync", _before(os.fsync, self.point, self.write)),
            mock.patch.object(os, "replace", _before(os.replace, self.point)),
            mock.patch.object(os, "rename", _before(os.rename, self.point)),
            mock.patch.object(files, "reserve", _before(files.reserve, self.write)),
            mock.patch.object(files, "open", opened, create=True),
            mock.patch.object(log, "FileIO", CountedIO),
        ):
            yield self


def _before(call: Callable[..., Any], *checks: Callable[[], None]) -> Callable[..., Any]:
    def checked(*given: Any, **options: Any) -> Any:
        for check in checks:
            check()
        return call(*given, **options)

    return checked


def main(plan: str, *options: str) -> int:
    wanted = json.loads(plan)
    with Faults(wanted.get("kill", 0), wanted.get("full", 0)).installed() as faults:
        code = train.main(list(options))
    if "count" in wanted:
        Path(wanted["count"]).write_text(json.dumps([faults.n_points, faults.n_writes]))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
