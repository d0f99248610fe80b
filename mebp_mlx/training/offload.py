"""The optimizer's state in a mapped file: up to two copies of the trainable parameters that need not stay in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..engine.arena import Arena
from ..system.pages import page_ceil


class ParkedState:
    """An optimizer's state by parameter name; each entry is in memory only between take() and put().

    state: of an initialised mlx optimizer, flat under the parameters' names; entries that move to the file are emptied.
    folder: as in Arena; raises UserError if its disk is full.
    """

    def __init__(self, state: dict[str, Any], folder: str | Path | None = None):
        self._names = {name: sorted(_arrays(entry)) for name, entry in state.items() if isinstance(entry, dict)}
        self.n_bytes = parked_bytes(state)
        self._file = Arena(self.n_bytes, folder)
        for name in self._names:
            self.put(name, state)

    def put(self, name: str, state: dict[str, Any]) -> None:
        """Moves a parameter's entry of `state` into the file."""
        parts = _arrays(state[name])
        mx.eval(parts)
        for part in self._names[name]:
            self._file.put(0, f"{name}/{part}", 0, parts[part])
        state[name] = {}

    def take(self, name: str) -> Any:
        """Returns a copy of a parameter's entry, in memory."""
        return self._entry(name, self._file.get)

    def views(self, state: dict[str, Any]) -> dict[str, Any]:
        """`state` with numpy views of the file as parked entries; they take no memory and are valid until put()."""
        return {
            name: self._entry(name, self._file.view) if name in self._names else entry for name, entry in state.items()
        }

    def _entry(self, name: str, read: Callable[[int, str, int], Any]) -> Any:
        arrays = [(part, read(0, f"{name}/{part}", 0)) for part in self._names[name]]
        return tree_unflatten(arrays) if arrays else {}


def parked_bytes(state: dict[str, Any]) -> int:
    """The file's size for an optimizer's state, with every array in whole pages; 0 if there is nothing to store."""
    entries = [entry for entry in state.values() if isinstance(entry, dict)]
    return sum(page_ceil(array.nbytes) for entry in entries for array in _arrays(entry).values())


def _arrays(entry: dict[str, Any]) -> dict[str, mx.array]:
    return dict(tree_flatten(entry))
