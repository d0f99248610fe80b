"""How a step is divided, and where it is evaluated.

The plan sets which values are kept, the sizes of blocks, and how much work is one graph; the barrier submits the graphs
and waits for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..model.base import Model
from ..model.lora import DROPOUT_COLUMNS, DROPOUT_RUN, Adapter
from ..model.prefetch import Prefetch
from ..system.device import on_gpu

# Every projection's output: the backward pass repeats only norms, rope, attention and activations.
SAVE_PROJECTIONS = frozenset(
    {"x", "q", "k", "v", "o", "g", "u", "d", "qg", "bcx", "qkv", "z", "p", "pg", "pp", "logits"}
)
# Attention's output too, which saves one of its two recomputations.
SAVE_PRODUCTS = SAVE_PROJECTIONS | {"a"}
# Norms and the pairs' xA too: the backward repeats only the gate. For GPUs, where kernel launches matter.
SAVE_EVERYTHING = SAVE_PRODUCTS | {"h", "x1", "h2", "low"}
# Block inputs, and values whose cost is quadratic in the row length.
SAVE_ATTENTION = frozenset({"x", "a"})
# The paper's policy: block inputs only, everything inside a block is recomputed.
SAVE_INPUTS = frozenset({"x"})

GRAINS = ("op", "stage", "tile", "block")
_LEAST_ROWS, _ALL_ROWS = 32, 1 << 31


@dataclass(frozen=True)
class Plan:
    """How a step is divided.

    grain: the extent of one graph (Barrier), "block" on a GPU, "op" on the CPU; saved: names of values that the
    forward pass keeps for the backward pass; checkpoint: blocks are recomputed by mx.checkpoint and MLX's own
    backward instead, `saved` is their inputs; kept_bytes: limit of kept values in memory, the others go to a file
    (None: all in memory); weight_block_bytes: bytes of a frozen matrix in memory at a time if its pages cannot be used
    in place (None: whole matrices); head_block_bytes, logits_block_bytes: likewise for the head's matrix and the
    logits; token_block: positions of a tile, processed at a time; query_block: queries of attention at a time;
    offload_state: keep the optimizer's state in a file.
    """

    grain: str = field(default_factory=lambda: "block" if on_gpu() else "op")
    saved: frozenset[str] = SAVE_PRODUCTS
    checkpoint: bool = False
    kept_bytes: int | None = None
    weight_block_bytes: int | None = field(default_factory=lambda: None if on_gpu() else 4 << 20)
    head_block_bytes: int | None = field(default_factory=lambda: None if on_gpu() else 8 << 20)
    logits_block_bytes: int = 8 << 20
    token_block: int = 512
    query_block: int = 256
    offload_state: bool = False

    @property
    def is_lazy(self) -> bool:
        """Whether one tile of a block is one graph."""
        return self.grain not in ("op", "stage")

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "saved": sorted(self.saved)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Plan:
        """The plan from a to_dict() record; ignores other keys. Raises KeyError if a field is missing."""
        values = {field.name: record[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**values, "saved": frozenset(values["saved"])})

    def row_blocks(self, n_rows: int, row_bytes: float) -> list[tuple[int, int]]:
        """Ranges [start, stop) of a matrix's rows to read at a time, at least 32 rows each."""
        return _ranges(n_rows, self.weight_block_bytes, row_bytes, _LEAST_ROWS)

    def column_blocks(self, n_columns: int, column_bytes: float) -> list[tuple[int, int]]:
        """Ranges [start, stop) of a matrix's columns to read at a time, in multiples of DROPOUT_COLUMNS."""
        return _ranges(n_columns, self.weight_block_bytes, column_bytes, DROPOUT_COLUMNS)

    def vocabulary_chunk(self, n_rows: int, row_bytes: float, logit_bytes: int) -> int:
        """Rows of the head's matrix at a time for n_rows labelled positions, at least 32. logit_bytes: 0: no logits."""
        chunk = self.logits_block_bytes // (logit_bytes * n_rows) if logit_bytes else _ALL_ROWS
        if self.head_block_bytes is not None and row_bytes:
            chunk = min(chunk, int(self.head_block_bytes // row_bytes))
        return max(_LEAST_ROWS, chunk // _LEAST_ROWS * _LEAST_ROWS)

    def tiles(self, T: int) -> list[tuple[int, int]]:
        """The ranges of positions [start, stop) that are processed at a time."""
        step = max(DROPOUT_RUN, self.token_block // DROPOUT_RUN * DROPOUT_RUN)
        return [(start, min(start + step, T)) for start in range(0, T, step)]


def _ranges(n: int, limit_bytes: int | None, item_bytes: float, least: int) -> list[tuple[int, int]]:
    step = n
    if limit_bytes is not None and item_bytes:
        step = max(least, int(limit_bytes // item_bytes) // least * least)
    return [(start, min(start + step, n)) for start in range(0, n, step)]


class Barrier:
    """Submits graphs and waits for them; nothing else does.

    grain "block": submits each (block, tile) and waits only for the previous block; "tile": submits the same graphs,
    waits for the previous tile; "stage": evaluates every named value when computed; "op": evaluates every part of a
    value too, which needs the least memory. None: evaluates nothing, for a caller that traces the graph. Gradients are
    bit-equal for every grain. With any grain, a mixture of experts waits once per tile in a forward pass, for the
    experts that its tokens chose (ops/moe.py).
    """

    def __init__(self, grain: str | None):
        if grain is not None and grain not in GRAINS:
            raise ValueError(f"grain {grain!r} is none of {', '.join(GRAINS)}")
        self.grain = grain
        self.n_waits, self.n_submissions = 0, 0
        self._submitted: list[mx.array] = []  # since the last wait
        self._before: list[mx.array] = []  # submitted earlier, and perhaps still running

    @property
    def is_lazy(self) -> bool:
        """Whether values stay unevaluated until a tile is submitted."""
        return self.grain not in ("op", "stage")

    def piece(self, *arrays: mx.array) -> None:
        """A part of an operation is built: the next part may need its memory."""
        if self.grain == "op":
            self.wait(*arrays)

    def value(self, *arrays: mx.array) -> None:
        """A named value of a block is built."""
        if self.grain in ("op", "stage"):
            self.wait(*arrays)

    def tile(self, *arrays: mx.array) -> None:
        """A block's outputs on one tile are built."""
        self._submit(*arrays)
        if self.grain == "tile":
            self._wait_for_the_one_before()

    def chunk(self, *arrays: mx.array) -> None:
        """The state after a vocabulary chunk is built; at most this chunk and the previous one stay unfinished."""
        self._submit(*arrays)
        if self.grain is not None and self.is_lazy:
            self._wait_for_the_one_before()

    def block(self) -> None:
        """A block ends; at most this block and the previous one stay unfinished."""
        if self.grain == "block":
            self._wait_for_the_one_before()

    def wait(self, *arrays: mx.array) -> None:
        """Evaluates now."""
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
        """Drops references to submitted graphs; reading their results waits for them."""
        self._before, self._submitted = [], []


class Context:
    """The context of a pass's operations.

    adapter: the trainable pairs; dropout_parts: as `parts` of model.lora.Dropout, so that recomputation draws the same
    mask (None: no dropout); ahead: prefetches pages.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan,
        adapter: Adapter,
        barrier: Barrier | None = None,
        dropout_parts: tuple[int, ...] | None = None,
        ahead: Prefetch | None = None,
    ):
        self.ahead = ahead
        self.model, self.plan, self.adapter = model, plan, adapter
        self.barrier = barrier or Barrier(plan.grain)
        self.dropout_parts = dropout_parts
        self.tokens: np.ndarray | None = None  # [B, T], for layers that read the batch's tokens
        # DoRA's row lengths n, by matrix name and row range (lora_linear.py).
        self.row_lengths: dict[tuple[str, int, int], mx.array] = {}
