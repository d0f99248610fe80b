"""Writes safetensors files whose data begins on a page boundary.

A file is written in pieces, a few rows of a model or one array of a checkpoint at a time, so memory use is small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..errors import NonFiniteLoss
from ..system.files import flush, write_atomically
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
        """The entry for an array, without evaluating it."""
        return cls(name, _dtype_name(value), tuple(value.shape))

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * DTYPES[self.dtype].size


class Shard:
    """A context manager that writes a new safetensors file.

    file: an open, empty binary file, which stays open. metadata: header metadata, added to {"format": "mlx"}.

    The header is padded with spaces so that the data begins on a page. Tensors of whole pages come first, so each of
    them begins on a page, too; the others follow, larger items first, so each is aligned to its item size. There are
    no holes, which the format forbids.
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
        self._ends = dict(self._begins)  # the end of the written part of each tensor
        self._file = file
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(8 + len(text) + offset)

    def append(self, name: str, rows: Array) -> None:
        """Writes the next rows of a tensor; contiguous rows are not copied."""
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
        """On success, checks that every tensor is complete and flushes the file to disk."""
        if kind is None:
            for name, entry in self._entries.items():
                assert self._ends[name] == self._begins[name] + entry.n_bytes, name
            flush(self._file)


def _member(name: str, value: dict[str, Any]) -> str:
    """Encodes one member of a JSON object: encoding a whole header at once would take ten times its size."""
    return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}"


def _dtype_name(value: Array) -> str:
    return NAMES[value.dtype if isinstance(value, mx.array) else getattr(mx, value.dtype.name)]


def _place(entry: Entry) -> int:
    """The sort key of a tensor: 0 for whole pages, then by item size, largest first; the sort is stable."""
    return 0 if entry.n_bytes % PAGE_BYTES == 0 else 9 - DTYPES[entry.dtype].size


def write_arrays(
    path: Path, arrays: Mapping[str, Array], when: str, flag: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Replaces a safetensors file by these arrays, written one after another without a copy.

    Raises NonFiniteLoss naming `when`, and leaves the file unchanged, if a value is NaN or infinite; UserError naming
    `flag` if writing fails.
    """

    def write(file: BinaryIO) -> None:
        names = sorted(arrays)
        with Shard(file, [Entry.of(name, arrays[name]) for name in names], metadata) as shard:
            for name in names:
                if not _is_finite(arrays[name]):
                    raise NonFiniteLoss(f"{name} is no longer finite after {when}; the last good state is unchanged")
                shard.append(name, arrays[name])

    write_atomically(path, write, flag)


def _is_finite(value: Array) -> bool:
    library: Any = mx if isinstance(value, mx.array) else np
    return not library.issubdtype(value.dtype, library.floating) or bool(library.isfinite(value).all())
