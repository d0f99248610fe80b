"""Values kept between forward and backward: in memory while there is room, beyond it in a mapped file.

A value that goes to the file is written when it has been computed: at once where values are evaluated at once,
otherwise one block behind the GPU, whose next block computes meanwhile.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..ops.plan import Barrier
from ..system.pages import page_ceil
from .arena import Arena

Key = tuple[int, str, int]  # layer, name, tile


class Store:
    """Kept values of one step (families/base.py: Kept).

    memory_bytes: room in memory, None: all there is; folder: of the file.
    """

    def __init__(self, barrier: Barrier, memory_bytes: int | None, folder: str | Path | None = None):
        self.barrier, self.memory_bytes, self.folder = barrier, memory_bytes, folder
        self.arena: Arena | None = None
        self.written_bytes, self.read_bytes = 0, 0  # of the file, since clear()
        self.held_bytes = 0  # in memory
        self._arrays: dict[Key, mx.array] = {}
        self._behind: list[Key] = []  # to be written when the block that computes them is done
        self._new: list[Key] = []

    def reserve(self, n_blocks: int, block_bytes: int) -> None:
        """Make room for blocks that keep block_bytes each, in whole pages; UserError when the disk has none for those
        beyond memory.
        """
        n_bytes = n_blocks * block_bytes
        if self.memory_bytes is None or n_bytes <= self.memory_bytes:
            return
        # The value that does not fit into what is left of memory leaves less than a block of it unused.
        needed = min(n_bytes, n_bytes - self.memory_bytes + block_bytes)
        if self.arena is None or self.arena.capacity_bytes < needed:
            if self.arena is not None:
                self.arena.close()
            self.arena = Arena(needed, self.folder)

    def clear(self) -> None:
        """Forget everything."""
        self._arrays.clear()
        self._behind, self._new = [], []
        self.held_bytes = self.written_bytes = self.read_bytes = 0
        if self.arena is not None:
            self.arena.clear()

    def put(self, layer: int, name: str, tile: int, value: mx.array) -> bool:
        """Keep a value; whether its array stays in use."""
        key, n_bytes = (layer, name, tile), page_ceil(value.nbytes)
        if self.memory_bytes is None or self.held_bytes + n_bytes <= self.memory_bytes:
            self.held_bytes += n_bytes
            self._arrays[key] = value
            return True
        if self.barrier.is_lazy:
            self._arrays[key] = value
            self._new.append(key)
            return True
        self._write(key, value)
        return False

    def write_behind(self) -> None:
        """Write what the block before has computed; called when it has been waited for."""
        for key in self._behind:
            self._write(key, self._arrays.pop(key))
        self._behind, self._new = self._new, []

    def get(self, layer: int, name: str, tile: int) -> mx.array | None:
        """A kept value, or None."""
        key = (layer, name, tile)
        value = self._arrays.get(key)
        if value is None and self.arena is not None and key in self.arena:
            value = self.arena.get(*key)
            self.read_bytes += value.nbytes
        return value

    def take(self, layer: int, name: str, tile: int) -> mx.array | None:
        """The same, given away: nobody else has the array."""
        value = self.get(layer, name, tile)
        self._arrays.pop((layer, name, tile), None)
        return value

    def forget(self, layer: int) -> None:
        """Give up what a block kept in memory: its backward is done."""
        for key in [key for key in self._arrays if key[0] == layer]:
            del self._arrays[key]

    def close(self) -> None:
        """Give the file back."""
        self.clear()
        if self.arena is not None:
            self.arena.close()
            self.arena = None

    def _write(self, key: Key, value: mx.array) -> None:
        if self.arena is None:
            raise AssertionError("no file was reserved for kept values")
        self.barrier.wait(value)
        self.arena.put(*key, value)
        self.written_bytes += value.nbytes
