"""The mapped file that holds activations between forward and backward.

One preallocated, already unlinked file: its pages belong to the page cache and not to the
process's footprint, a full disk is reported before the first step, and nothing is left
behind, however the process ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..system.device import dtype_name
from ..system.files import DISK_FULL, reserve
from ..system.pages import page_ceil

_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


class Arena:
    """Arrays by key, put during the forward pass and taken back during the backward pass.

    folder: holds the file during the run (None: the first usual temporary folder that is on a disk); capacity_bytes:
    size of the file.
    """

    def __init__(self, capacity_bytes: int, folder: str | Path | None = None):
        self.folder = choose_folder(folder)
        self.capacity_bytes = page_ceil(max(capacity_bytes, 1))
        self._map = _create(self.folder, self.capacity_bytes)
        self._slots: dict[tuple[int, str, int], tuple[int, mx.Dtype, tuple[int, ...]]] = {}
        self._used = 0

    def clear(self) -> None:
        """Drops all entries; their space is reused."""
        self._slots.clear()
        self._used = 0

    def put(self, layer: int, name: str, tile: int, value: mx.array) -> None:
        """Copies in an evaluated array, replacing any entry with the same key, dtype and shape."""
        key, kind = (layer, name, tile), (value.dtype, tuple(value.shape))
        known = self._slots.get(key)
        if known is not None and known[1:] == kind:
            offset = known[0]
        else:
            offset, end = self._used, self._used + page_ceil(value.nbytes)
            if end > self.capacity_bytes:
                raise AssertionError(f"arena of {self.capacity_bytes} bytes is too small for layer {layer} {name}")
            self._slots[key] = (offset, *kind)
            self._used = end
        raw = np.asarray(value.reshape(-1).view(mx.uint8))
        np.frombuffer(self._map, np.uint8, value.nbytes, offset)[:] = raw

    def get(self, layer: int, name: str, tile: int) -> mx.array:
        """A copy of an entry as an MLX array."""
        offset, dtype, shape = self._slots[layer, name, tile]
        # Copied as 32-bit words where possible: one memcpy, no conversion.
        if dtype == mx.float32:
            return mx.array(self.view(layer, name, tile))
        raw = np.frombuffer(self._map, np.uint8, math.prod(shape) * dtype.size, offset)
        return mx.array(raw).view(dtype).reshape(shape)

    def view(self, layer: int, name: str, tile: int) -> np.ndarray:
        """A read-only numpy view of an entry, for dtypes that numpy supports; drop it before calling `close`."""
        offset, dtype, shape = self._slots[layer, name, tile]
        view = np.frombuffer(self._map, dtype_name(dtype), math.prod(shape), offset).reshape(shape)
        view.flags.writeable = False
        return view

    def __contains__(self, key: object) -> bool:
        return key in self._slots

    def close(self) -> None:
        """Frees the file; the arena cannot be used afterwards."""
        self._slots.clear()
        self._map.close()


def choose_folder(folder: str | Path | None) -> Path:
    """The arena's folder. Raises UserError for an explicit folder on tmpfs, whose pages would count as memory."""
    if folder is not None:
        path = Path(folder)
        if not path.is_dir():
            raise UserError(f"--arena-dir: {path} is not a folder")
        kind = filesystem_of(path)
        if kind in _MEMORY_FILESYSTEMS:
            raise UserError(f"--arena-dir: {path} is on a {kind}, which is memory; name a folder on a disk")
        return path
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd(), Path.home()]
    for path in candidates:
        if path.is_dir() and os.access(path, os.W_OK) and filesystem_of(path) not in _MEMORY_FILESYSTEMS:
            return path
    raise UserError(f"--arena-dir: no folder on a disk among {', '.join(map(str, candidates))}; name one")


def filesystem_of(path: Path) -> str:
    """The type of the file system that holds `path` ("ext4", "tmpfs"); "" if the system does not report it."""
    try:
        mounts = Path("/proc/self/mounts").read_text()
    except OSError:
        return ""
    best, kind = "", ""
    real = str(path.resolve()) + "/"
    for line in mounts.splitlines():
        fields = line.split()
        point = fields[1].replace("\\040", " ").rstrip("/") + "/"
        if real.startswith(point) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind


def _create(folder: Path, n_bytes: int) -> mmap.mmap:
    try:
        fd, name = tempfile.mkstemp(prefix="mebp-arena-", dir=folder)
    except OSError as error:
        raise UserError(f"--arena-dir: cannot create a file in {folder}: {error.strerror}") from None
    try:
        os.unlink(name)
        reserve(fd, n_bytes)
        return mmap.mmap(fd, n_bytes)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"--arena-dir: {folder} has no room for {n_bytes / 1e6:.0f} MB of saved activations ({error.strerror})"
        ) from None
    finally:
        os.close(fd)
