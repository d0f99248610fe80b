"""The sizes a run works with: which values are saved, and how large each piece of work may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..model.decoder import block_stages, value_width
from ..model.lora import DROPOUT_COLUMNS, DROPOUT_RUN
from ..model.spec import ModelSpec

# Every projection's output: the backward repeats no product with a weight, only norms, rope, attention and activation.
SAVE_PROJECTIONS = frozenset({"x", "q", "k", "v", "o", "g", "u", "d"})
# Attention's too, which saves one of its two recomputations.
SAVE_PRODUCTS = SAVE_PROJECTIONS | {"a"}
# The paper's policy: block inputs only, everything inside a block is recomputed.
SAVE_INPUTS = frozenset({"x"})


@dataclass(frozen=True)
class Plan:
    """How a step is cut into pieces.

    saved: value names kept in the arena for the backward; weight_block_bytes: decompressed
    bytes of a projection in memory at a time; head_block_bytes, logits_block_bytes: the same
    for the vocabulary and its logits; token_block: positions of the sequence that token-wise
    stages work on at a time; query_block: queries of attention at a time.
    """

    saved: frozenset[str] = field(default=SAVE_PRODUCTS)
    weight_block_bytes: int = 4 << 20
    head_block_bytes: int = 8 << 20
    logits_block_bytes: int = 8 << 20
    token_block: int = 512
    query_block: int = 256

    def rows_per_block(self, in_dims: int, item_bytes: int) -> int:
        """Rows of a [*, in_dims] matrix that fit in weight_block_bytes, at least 32."""
        return max(32, self.weight_block_bytes // (in_dims * item_bytes))

    def mlp_columns(self, D: int, item_bytes: int) -> int:
        """Columns of the MLP's inner width at a time."""
        columns = self.weight_block_bytes // (D * item_bytes) // DROPOUT_COLUMNS * DROPOUT_COLUMNS
        return max(DROPOUT_COLUMNS, columns)

    def vocabulary_chunk(self, n_rows: int, D: int, item_bytes: int) -> int:
        """Rows of the head's matrix at a time for n_rows labelled positions, at least 32."""
        return max(32, min(self.head_block_bytes // (D * item_bytes), self.logits_block_bytes // (4 * n_rows)))

    def tiles(self, T: int) -> list[tuple[int, int]]:
        """The ranges of positions [start, stop) that are worked on at a time."""
        step = max(DROPOUT_RUN, self.token_block // DROPOUT_RUN * DROPOUT_RUN)
        return [(start, min(start + step, T)) for start in range(0, T, step)]

    def saved_for(self, spec: ModelSpec) -> frozenset[str]:
        """The saved names that a backward of this architecture ever reads, block inputs always among them."""
        read = {name for stage in block_stages(spec) for name in stage.needs}
        inner = {name for stage in block_stages(spec) for name in stage.inner}
        return (self.saved & (read | inner)) | _sources(spec, read, self.saved) | {"x"}

    def arena_bytes(self, spec: ModelSpec, B: int, T: int, n_layers: int, item_bytes: int) -> int:
        """Bytes the arena needs for `n_layers` trained blocks on tokens [B, T]."""
        inner = {name for stage in block_stages(spec) for name in stage.inner}
        step = self.mlp_columns(spec.D, item_bytes)
        widths = []
        for name in self.saved_for(spec):
            width = value_width(spec, name)
            widths += [min(step, width - at) for at in range(0, width, step)] if name in inner else [width]
        sizes = [B * (stop - start) * width * item_bytes for start, stop in self.tiles(T) for width in widths]
        return n_layers * sum(page_ceil(size) for size in sizes)


def _sources(spec: ModelSpec, read: set[str], saved: frozenset[str]) -> frozenset[str]:
    """Saved names from which a value that the backward reads is recomputed."""
    producer = {stage.output: stage for stage in block_stages(spec)}
    found: set[str] = set()

    def visit(name: str) -> None:
        if name in saved or name not in producer:
            found.add(name)
            return
        for source in producer[name].inputs:
            visit(source)

    for name in read:
        visit(name)
    return frozenset(found)


def page_ceil(n_bytes: int) -> int:
    """n_bytes rounded up to whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES


PAGE_BYTES = 16 << 10  # Apple silicon's page; a multiple of Linux's
