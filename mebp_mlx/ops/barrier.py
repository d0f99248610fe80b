"""Where a graph is submitted, and where it is waited for: the one place, with the grain as its knob."""

from __future__ import annotations

import mlx.core as mx

GRAINS = ("op", "stage", "tile", "block")


class Barrier:
    """How much of a step is one graph.

    grain "block": each (block, tile) is submitted, and only the block before is waited for; "tile": the same, but the
    tile before is waited for; "stage": every named value is evaluated at once; "op": so is every piece of it, which
    holds the least memory. Gradients are bit-equal for every grain. None: nothing is evaluated here, the caller
    traces the graph.
    """

    def __init__(self, grain: str | None):
        if grain is not None and grain not in GRAINS:
            raise ValueError(f"grain {grain!r} is none of {', '.join(GRAINS)}")
        self.grain = grain
        self.n_waits, self.n_submissions = 0, 0
        self._submitted: list[mx.array] = []  # since the last wait
        self._before: list[mx.array] = []  # submitted before that, and perhaps still under way

    @property
    def is_lazy(self) -> bool:
        """Whether values are left unevaluated until a tile is submitted."""
        return self.grain not in ("op", "stage")

    def piece(self, *arrays: mx.array) -> None:
        """A piece of an operation: the next one may need its memory."""
        if self.grain == "op":
            self.wait(*arrays)

    def value(self, *arrays: mx.array) -> None:
        """A named value of a block."""
        if self.grain in ("op", "stage"):
            self.wait(*arrays)

    def tile(self, *arrays: mx.array) -> None:
        """What a block gives on one tile."""
        self._submit(*arrays)
        if self.grain == "tile":
            self._wait_for_the_one_before()

    def chunk(self, *arrays: mx.array) -> None:
        """The state after a chunk of the vocabulary: at most it and the one before it are under way afterwards."""
        self._submit(*arrays)
        if self.grain is not None and self.is_lazy:
            self._wait_for_the_one_before()

    def block(self) -> None:
        """The end of a block: at most it and the one before it are under way afterwards."""
        if self.grain == "block":
            self._wait_for_the_one_before()

    def wait(self, *arrays: mx.array) -> None:
        """Evaluate now."""
        self.n_waits += 1
        mx.eval(*arrays)

    def _submit(self, *arrays: mx.array) -> None:
        if self.grain is None:
            return
        if not self.is_lazy:
            self.wait(*arrays)
            return
        mx.async_eval(*arrays)
        self.n_submissions += 1
        self._submitted += arrays

    def _wait_for_the_one_before(self) -> None:
        if self._before:
            self.wait(*self._before)
        self._before, self._submitted = self._submitted, []

    def finish(self) -> None:
        """Forget what was submitted; whoever needs it waits for it."""
        self._before, self._submitted = [], []
