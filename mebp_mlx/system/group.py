"""The processes of one run on several machines, and their messages, over mx.distributed's transports.

`mlx.launch` starts a process on each machine and names its rank in the environment. Every message is a collective: all
ranks make the same calls in the same order. Sums and messages follow the order of ranks, so that every rank has the
same bits. With one process, every message returns its input.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import PeerFailed, PeerLost, UserError
from .allocator import zeros_given_back

TIMEOUT_S = 60.0
_SETUP_S = 600.0  # before the first step, a machine may tokenize, measure row lengths or test plans for minutes
_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # of mlx.launch, and of two mpirun implementations
_PIECE_BYTES = 4 << 20  # of a file per message
_MESSAGE_BYTES = 256  # of a message that carries a short text
_BROKEN = re.compile(r"\[(ring|mpi|jaccl|nccl)", re.IGNORECASE)  # prefixes of errors from MLX's transports
_WORKS = 0  # status in a message's header; any other value is an exit code

# Arguments: the line to print, a folder to remove or "". faulthandler writes to the pipe on a timeout; otherwise the
# pipe closes with the process.
_SCRIPT = r"""
IFS= read -r fault && { cat > /dev/null; echo "$1" >&2; }
rm -rf -- "$2"
"""


class _Sum(NamedTuple):
    """A block's gradients in transit: names and shapes of the parts of `total`."""

    shapes: dict[str, tuple[int, ...]]
    total: mx.array


class Group:
    """The ranks of a run, created by connect(); without arguments, a single process.

    rank, size: of this process; waited_s: seconds spent waiting for others; sent_bytes: by this process, counted as in
    a ring; timeout_s: limit of a wait, after which the process ends with one line and exit code 1; reduce_dtype: of
    gradients in transit. Every message raises PeerLost if a machine is gone, and PeerFailed if a rank reported an
    error.
    """

    def __init__(self, group: mx.distributed.Group | None = None, deadline: Deadline | None = None) -> None:
        self._group, self._deadline = group, deadline
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self._stream = None if group is None else mx.new_stream(mx.cpu)
        self._pending: _Sum | None = None
        self.reduce_dtype, self.timeout_s = mx.float32, _SETUP_S
        self.waited_s, self.sent_bytes = 0.0, 0

    @property
    def is_alone(self) -> bool:
        """Whether there is one process."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    def close(self) -> None:
        """Cancels the connection's deadline, and removes this rank's folder."""
        if self._deadline is not None:
            self._deadline.close()

    @property
    def folder(self) -> Path:
        """A temporary folder, for ranks other than the first; removed when the process ends, however it ends."""
        assert self._deadline is not None
        return Path(self._deadline.folder)

    # Messages

    def gather(self, value: Any) -> list[Any]:
        """One value from each rank, in the order of ranks. value: any JSON value."""
        if self.is_alone:
            return [value]
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def first(self, value: Any) -> Any:
        """The first rank's value. value: any JSON value; ignored on other ranks."""
        return self.gather(value if self.is_first else None)[0]

    def total(self, values: np.ndarray) -> np.ndarray:
        """The sum over all ranks of a float64 array, the same bits on each; eight bytes a number are sent."""
        if self.is_alone:
            return values
        parts = self._gather_bytes(np.ascontiguousarray(values, np.float64).tobytes())
        return sum((np.frombuffer(part, np.float64) for part in parts), np.zeros(values.size)).reshape(values.shape)

    def fail(self, exit_code: int, text: str) -> None:
        """Reports to the others, at their next message, that this rank ends with an error, if that is possible."""
        if not self.is_alone:
            self._pending = None
            with contextlib.suppress(Exception):  # if the others are in a sum, the answer is not a message
                self._gather_bytes(text.encode(), exit_code)

    def copy_file(self, source: Path, target: Path) -> None:
        """Writes the first rank's file `source`, if it exists, as `target` on every other rank."""
        n_bytes = self.first(source.stat().st_size if self.is_first and source.is_file() else None)
        if n_bytes is None or self.is_alone:
            return
        with open(source, "rb") if self.is_first else open(target, "wb") as file:
            for start in range(0, n_bytes, _PIECE_BYTES):
                piece = np.zeros(min(_PIECE_BYTES, n_bytes - start), np.uint8)
                if self.is_first:
                    piece[:] = np.frombuffer(file.read(len(piece)), np.uint8)
                total = mx.distributed.all_sum(mx.array(piece), group=self._group, stream=self._stream)
                self._wait(total)
                self.sent_bytes += self._ring_bytes(total)
                if not self.is_first:
                    file.write(np.asarray(total).tobytes())

    def _gather_bytes(self, own: bytes, status: int = _WORKS) -> list[bytes]:
        """Bytes from every rank; short ones travel with the header, in one message."""
        begin = np.zeros((_MESSAGE_BYTES,), np.uint8)
        begin[:16] = np.array([status, len(own)], np.int64).view(np.uint8)
        short = own[: _MESSAGE_BYTES - 16]
        begin[16 : 16 + len(short)] = np.frombuffer(short, np.uint8)
        begins = self._all_gather(begin).reshape(self.size, _MESSAGE_BYTES)
        headers = np.ascontiguousarray(begins[:, :16]).view(np.int64)
        rest = np.zeros(max(0, int(headers[:, 1].max()) - len(begin) + 16), np.uint8)
        rest[: len(own) - len(short)] = np.frombuffer(own[len(short) :], np.uint8)
        rests = self._all_gather(rest).reshape(self.size, -1) if rest.size else begins[:, :0]
        rows = np.concatenate([begins[:, 16:], rests], axis=1)
        texts = [row[:n].tobytes() for row, n in zip(rows, headers[:, 1], strict=True)]
        for rank, exit_code in enumerate(headers[:, 0].tolist()):
            if exit_code != _WORKS and rank != self.rank:
                raise PeerFailed(rank, exit_code, texts[rank].decode(errors="replace"))
        return texts

    def _all_gather(self, own: np.ndarray) -> np.ndarray:
        with mx.stream(mx.cpu):
            every = mx.distributed.all_gather(mx.array(own), group=self._group, stream=self._stream)
        self._wait(every)
        self.sent_bytes += own.nbytes * (self.size - 1)
        return np.array(every)

    # Gradients

    def exchange(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """Starts sending a block's gradients; returns the sums over all ranks of those sent before, {} if none.

        Thus a block's sum travels while the next block computes. With one process: returns the gradients.
        """
        if self.is_alone or not gradients:
            return gradients
        names = sorted(gradients)
        flat = mx.concatenate([gradients[name].reshape(-1) for name in names]).astype(self.reduce_dtype)
        total = mx.distributed.all_sum(flat, group=self._group, stream=self._stream)
        mx.async_eval(total)
        self.sent_bytes += self._ring_bytes(total)
        before, self._pending = self._pending, _Sum({name: gradients[name].shape for name in names}, total)
        return self._arrived(before)

    def rest(self) -> dict[str, mx.array]:
        """The sums of the gradients sent last; {} if none are in transit."""
        before, self._pending = self._pending, None
        return self._arrived(before)

    def _arrived(self, sent: _Sum | None) -> dict[str, mx.array]:
        if sent is None:
            return {}
        self._wait(sent.total)
        ends = np.cumsum([math.prod(shape) for shape in sent.shapes.values()])
        parts = mx.split(sent.total.astype(mx.float32), ends[:-1].tolist())
        return {name: part.reshape(shape) for (name, shape), part in zip(sent.shapes.items(), parts, strict=True)}

    def _ring_bytes(self, array: mx.array) -> int:
        """Bytes that a rank sends when a ring sums an array."""
        return 2 * (self.size - 1) * array.nbytes // self.size

    def _wait(self, array: mx.array) -> None:
        began_s = time.perf_counter()
        assert self._deadline is not None
        with self._deadline.within(self.timeout_s), self.broken_connections_told():
            mx.eval(array)
        self.waited_s += time.perf_counter() - began_s

    @contextlib.contextmanager
    def broken_connections_told(self) -> Iterator[None]:
        """Turns MLX's error for a broken connection, which any later evaluation may raise, into PeerLost."""
        try:
            yield
        except RuntimeError as error:
            if self.is_alone or isinstance(error, (PeerLost, PeerFailed)) or not _BROKEN.match(str(error)):
                raise
            who = " or ".join(str(n) for n in sorted({(self.rank - 1) % self.size, (self.rank + 1) % self.size}))
            raise PeerLost(
                f"lost rank {who} ({error}); the last save is complete; --resume continues on the remaining machines"
            ) from None


class Deadline:
    """Ends the process with one line if a wait takes too long. Runs outside Python, since MLX may hold the GIL."""

    def __init__(self, rank: int) -> None:
        line = f"error: rank {rank}: no answer from another machine within --peer-timeout; the last save is complete"
        self.folder = tempfile.mkdtemp(prefix=f"mebp_mlx-rank-{rank}-") if rank else ""
        read, self._pipe = os.pipe()
        command = ["/bin/sh", "-c", _SCRIPT, "sh", line, self.folder]
        # In its own session, so that Ctrl-C does not reach the shell.
        self._shell = subprocess.Popen(command, stdin=read, stdout=subprocess.DEVNULL, start_new_session=True)
        os.close(read)

    @contextlib.contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Ends the process with exit code 1 unless the context exits in time."""
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._pipe)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Ends the shell, which removes the folder."""
        os.close(self._pipe)
        self._shell.wait()


def connect(environment: Mapping[str, str] = os.environ) -> Group:
    """The group named by the environment, once all its processes have connected; Group() if it names none."""
    rank = next((environment[name] for name in _RANKS if name in environment), None)
    hosts = environment.get("MLX_HOSTFILE")
    with contextlib.suppress(OSError, ValueError):
        if hosts is not None and len(json.loads(Path(hosts).read_text().strip() or "[]")) < 2:
            rank = None  # MLX's ring refuses a single machine; mlx.launch -n 1 leaves an empty file
    if rank is None:
        return Group()
    deadline = Deadline(int(rank))
    try:
        with deadline.within(TIMEOUT_S), zeros_given_back():
            group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        deadline.close()
        raise UserError(f"mx.distributed: {error}") from None
    if group.size() == 1:
        deadline.close()
        return Group()
    return Group(group, deadline)
