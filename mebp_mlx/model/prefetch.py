"""Prefetches the pages of the next block while this one computes, to avoid waiting for the disk.

A plain thread that only calls madvise: it never touches MLX, whose arrays belong to the thread that created them.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from .base import Model
from .config import Linear


class Prefetch:
    """One thread per model, started at first use; close() ends it."""

    def __init__(self, model: Model):
        self._weights = model.weights
        self._blocks = [
            [name for linear in layer.matrices.values() if not linear.n_experts for name in linear.tensors]
            for layer in model.spec.layers
        ]
        self._head: list[str] = model.spec.head.tensors
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def block(self, index: int) -> None:
        """Prefetches a block's matrices, except experts, which are not chosen yet; index L is the head.

        A block that does not exist is ignored.
        """
        if 0 <= index < len(self._blocks):
            self._ask([(name, 0, None) for name in self._blocks[index]])
        elif index == len(self._blocks):
            self._ask([(name, 0, None) for name in self._head])

    def experts(self, stack: Linear, chosen: Iterable[int]) -> None:
        """Prefetches these matrices of a stack."""
        if stack.apart is None:
            self._ask([(name, index, index + 1) for index in chosen for name in stack.tensors])
        else:
            self._ask([(name, 0, None) for index in chosen for name in stack.expert(index).tensors])

    def wait(self) -> None:
        """Waits until all requests so far have been passed to the system."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _ask(self, parts: list[tuple[str, int, int | None]]) -> None:
        """parts: tensors and ranges of their rows."""

        def run() -> None:
            for name, start, stop in parts:
                self._weights.advise(name, start, stop)

        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._last = self._thread.submit(run)
