"""Safetensors files whose data begins on a page, and a folder that appears whole or not at all.

A file is written in pieces, a model's of a few rows and a checkpoint's of an array, so nothing here holds more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..system.pages import PAGE_BYTES
from . import safetensors

DTYPES = {name: dtype for name, (_, dtype) in safetensors.DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Array = mx.array | np.ndarray


@dataclass(frozen=True)
class Entry:
    """A tensor to be written. dtype: a key of DTYPES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, value: Array) -> Entry:
        """The entry of an array, which is not evaluated."""
        return cls(name, _dtype_name(value), tuple(value.shape))

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].size


class Shard:
    """Writes a new safetensors file, as a context manager. Its tensors are named in the order given.

    file: open, empty and binary; it stays open. metadata: of the header, over {"format": "mlx"}.

    The header is padded with spaces so that the data begins on a page. Tensors of whole pages come first, so each
    of them begins on a page, too; the others follow, larger items first, so each lies on a multiple of its item
    size. There are no holes, which the format forbids.
    """

    def __init__(self, file: BinaryIO, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> None:
        ordered = sorted(entries, key=_place)
        self._entries = {entry.name: entry for entry in ordered}
        header = [_member("__metadata__", {"format": "mlx", **(metadata or {})})]
        begins, offset = {}, 0
        for entry in ordered:
            begins[entry.name] = offset
            offset += entry.n_bytes
            offsets = [begins[entry.name], offset]
            about = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
            header.append(_member(entry.name, about))
        text = f"{{{','.join(header)}}}".encode()
        text += b" " * (-(8 + len(text)) % PAGE_BYTES)
        self._begins = {name: 8 + len(text) + begin for name, begin in begins.items()}
        self._ends = dict(self._begins)  # up to where each tensor is written
        self._file = file
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + offset)

    def append(self, name: str, rows: Array) -> None:
        """Writes the next rows of a tensor; contiguous ones are not copied."""
        entry = self._entries[name]
        assert _dtype_name(rows) == entry.dtype, (name, rows.dtype)
        flat = rows.reshape(-1)
        data = np.asarray(flat.view(mx.uint8)) if isinstance(flat, mx.array) else flat.view(np.uint8)
        self._file.seek(self._ends[name])
        self._file.write(data.data)
        self._ends[name] += data.size
        assert self._ends[name] <= self._begins[name] + entry.n_bytes, name

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Flushes the file to the disk, when nothing went wrong: every tensor must be complete then."""
        if kind is None:
            for name, entry in self._entries.items():
                assert self._ends[name] == self._begins[name] + entry.n_bytes, name
            flush(self._file)


def _member(name: str, value: dict[str, Any]) -> str:
    """Of a JSON object; a whole header's worth at once would take ten times its size."""
    return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}"


def _dtype_name(value: Array) -> str:
    return NAMES[value.dtype if isinstance(value, mx.array) else getattr(mx, value.dtype.name)]


def _place(entry: Entry) -> int:
    """0 for whole pages, then by size of item; the sort keeps the order given among equals."""
    return 0 if entry.n_bytes % PAGE_BYTES == 0 else 9 - DTYPES[entry.dtype].size


def flush(file: Any) -> None:
    """Writes an open file's content to the disk."""
    file.flush()
    os.fsync(file.fileno())


class NewFolder:
    """A folder that does not exist, or is empty, and gets its name only when it is complete.

    As a context manager it makes `partial`, a hidden folder beside it, which `publish` renames; without that it is
    removed at the end. What a killed process left behind is removed by the next one that writes the same folder:
    `removed` says what. A live process holds a lock on its own. Raises UserError naming `flag`.
    """

    def __init__(self, path: str | Path, flag: str) -> None:
        self.shown = f"{flag} {path}"
        self.path = Path(path).expanduser().resolve()
        self.removed: list[Path] = []
        self._lock: int | None = None
        self.partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")

    def check(self) -> None:
        """Raises UserError if the name is taken."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.shown}: is a file")
        if os.path.ismount(self.path):
            raise UserError(f"{self.shown}: is where a disk is mounted; name a folder inside it")
        if self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.shown}: exists and is not empty")

    def check_space(self, n_bytes: int) -> None:
        """Raises UserError if the disk has too little room."""
        parent = next(folder for folder in self.path.parents if folder.exists())
        free_bytes = shutil.disk_usage(parent).free
        if free_bytes < n_bytes * 1.01:
            needed, free = f"{n_bytes / 1e9:,.2f} GB", f"{free_bytes / 1e9:,.2f} GB"
            raise UserError(f"{self.shown}: needs {needed} of disk space, {free} is free")

    def remove_leftovers(self) -> None:
        """Removes partial folders whose process is gone."""
        pattern = re.compile(rf"\.{re.escape(self.path.name)}\.\d+\.partial")
        if not self.path.parent.is_dir():
            return
        for folder in self.path.parent.iterdir():
            if not pattern.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            try:
                descriptor = _locked(folder)
            except OSError:  # a file system without locks
                raise UserError(f"{self.shown}: remove {folder} if no process is writing it") from None
            if descriptor is None:
                raise UserError(f"{self.shown}: another process is writing it, in {folder.name}")
            os.close(descriptor)
            shutil.rmtree(folder)
            self.removed.append(folder)

    def __enter__(self) -> NewFolder:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial.mkdir()
        with contextlib.suppress(OSError):
            self._lock = _locked(self.partial)
        return self

    def publish(self) -> None:
        """Gives the folder its name. All files in it must have been flushed."""
        _flush_folder(self.partial)
        os.rename(self.partial, self.path)
        _flush_folder(self.path.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock until it is closed, at the latest by the process's end.

    None when another process holds it. OSError on a file system without locks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise
    return descriptor


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
