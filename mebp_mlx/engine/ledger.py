"""Bytes alive at a time, and what each primitive takes while it runs: the arithmetic under engine/predict.py.

The multiples are exact counts of the buffers that MLX's CPU backend holds at once in one eval, read off
mx.get_peak_memory(); tests/test_plan.py measures them again, so a changed kernel or stage is noticed there.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..model import unpack
from ..model.decoder import Stage
from ..model.piece import can_stay_packed
from ..model.spec import Linear, ModelSpec, Quantization
from .plan import Plan

# mx.dequantize unpacks into integers of the output's size beside the output; numpy (model/unpack.py) in small pieces.
DECOMPRESS_COPIES, DECOMPRESS_PIECES_BYTES = 2, 400_000
# One block of queries: arrays of [B, H, queries, keys] (in MLX's own attention one more where the window needs a mask
# array), and arrays of the size of the block's queries (more where they are normed).
SCORES_FORWARD, SCORES_BACKWARD, SCORES_MASK = 2, 5, 1
SCORES_FORWARD_IN_PLACE, SCORES_BACKWARD_IN_PLACE = 1, 2  # engine/scores.py
QUERIES_FORWARD, QUERIES_BACKWARD, QUERIES_NORM_FORWARD, QUERIES_NORM_BACKWARD = 2.0, 3.5, 1.6, 6.6
# Arrays of the size of k when attention begins (keys stays) and ends (dk, dv stay), and the same with a key norm.
KEYS_BEGIN, KEYS_END, KEYS_NORM_BEGIN, KEYS_NORM_END = 2.8, 6.8, 5.5, 9.6
DROPOUT_COPIES = 2.5  # of the mask, while it is drawn
# The head for N labelled rows: arrays of [N, chunk], and of [N, D] while a chunk is worked on and at the end.
# exp takes an array of its own only where it is not done in place (engine/host.py).
HEAD_LOGITS, HEAD_LOGITS_IN_PLACE, HEAD_ROWS_CHUNK, HEAD_ROWS_END, HEAD_VJP = 2, 1, 1, 2.2, 5
# Copies of a block's gradients, themselves included, while the optimizer works on them.
UPDATE_COPIES = {"sgd": 2.0, "muon": 5.0}
UPDATE_COPIES_OTHERS = 3.5


class Buffer:
    """Some bytes that several names may share."""

    __slots__ = ("n_bytes", "n_names")

    def __init__(self, n_bytes: float):
        self.n_bytes, self.n_names = n_bytes, 0


class Ledger:
    """What is alive now, and the most there ever was."""

    def __init__(self, base_bytes: float):
        self.now = self.peak = base_bytes

    def hold(self, buffer: Buffer) -> Buffer:
        """One more name for a buffer; its first one makes it count."""
        if buffer.n_names == 0:
            self.now += buffer.n_bytes
            self.peak = max(self.peak, self.now)
        buffer.n_names += 1
        return buffer

    def new(self, n_bytes: float) -> Buffer:
        """A buffer with one name."""
        return self.hold(Buffer(n_bytes))

    def drop(self, *buffers: Buffer | None) -> None:
        """One name less; without any, the bytes are free. None is nothing."""
        for buffer in buffers:
            if buffer is None:
                continue
            buffer.n_names -= 1
            assert buffer.n_names >= 0
            if buffer.n_names == 0:
                self.now -= buffer.n_bytes

    def drop_all(self, buffers: Iterable[Buffer | None]) -> None:
        self.drop(*buffers)

    def spike(self, n_bytes: float) -> None:
        """So much more for a moment."""
        self.peak = max(self.peak, self.now + n_bytes)


def unpacked_by_numpy(packing: Quantization, item_bytes: int) -> bool:
    """Whether model/frozen.py decompresses such a matrix itself, straight from the map."""
    return packing.mode == "affine" and packing.bits in unpack.BITS and item_bytes == 4 and unpack.on_cpu()


def in_place(item_bytes: int) -> bool:
    """Whether exp, gates and softmax go by engine/host.py."""
    return item_bytes == 4 and unpack.on_cpu()


def logits_copies(item_bytes: int) -> float:
    """Arrays [N, chunk] of the head."""
    return HEAD_LOGITS_IN_PLACE if in_place(item_bytes) else HEAD_LOGITS


def scores_copies(spec: ModelSpec, item_bytes: int, windowed: bool) -> tuple[float, float]:
    """Arrays [B, H, queries, keys] of attention's forward and backward on one block of queries."""
    if in_place(item_bytes):
        return SCORES_FORWARD_IN_PLACE, SCORES_BACKWARD_IN_PLACE
    return SCORES_FORWARD + SCORES_MASK * windowed, SCORES_BACKWARD + SCORES_MASK * windowed


def rows_bytes(linear: Linear, n_rows: int, item_bytes: int, packed: bool = False) -> float:
    """Of n_rows of a matrix while they are decompressed: result, scales; unpacked integers and packed rows in MLX.

    packed: of the same rows as products with packed weights take them.
    """
    return values_bytes(linear, n_rows * linear.in_dims, item_bytes, packed)


def values_bytes(linear: Linear, n_values: int, item_bytes: int, packed: bool = False) -> float:
    """The same for any part of the matrix with n_values entries."""
    packing = linear.quantization
    if packing is None:
        return n_values * (2 + item_bytes)
    per_group = (2 * (2 + item_bytes) if packing.mode == "affine" else 1) / packing.group_size
    if packed and can_stay_packed(packing):
        return n_values * (packing.bits / 8 + per_group)
    if unpacked_by_numpy(packing, item_bytes):
        return n_values * (item_bytes + per_group) + DECOMPRESS_PIECES_BYTES
    return n_values * (DECOMPRESS_COPIES * item_bytes + packing.bits / 8 + per_group)


def forward_bytes(plan: Plan, linear: Linear, N: int, item_bytes: int, trained: bool, packed: bool = False) -> float:
    """A projection's forward on N rows, its result included."""
    rows = min(plan.rows_per_block(linear.in_dims, item_bytes), linear.out_dims)
    copies = 2 if trained or linear.bias else 1
    decompressed = rows_bytes(linear, rows, item_bytes, packed)
    n_full = linear.out_dims // rows
    most = (n_full - 1) * rows * N * item_bytes + decompressed + copies * N * rows * item_bytes
    joined = 2 * N * linear.out_dims * item_bytes if linear.out_dims > rows else 0
    return max(most, joined)


def cotangent_bytes(plan: Plan, linear: Linear, N: int, item_bytes: int, trained: bool, packed: bool = False) -> float:
    """A projection's dx for N rows, its result included."""
    rows = min(plan.rows_per_block(linear.in_dims, item_bytes), linear.out_dims)
    several = linear.out_dims > rows
    dx = N * linear.in_dims * 4  # summed up in float32
    block = rows_bytes(linear, rows, item_bytes, packed) + (2 * dx + N * rows * item_bytes if several else dx)
    return max(block, (3 if trained or several else 1) * dx)


def glue_copies(spec: ModelSpec, stage: Stage) -> tuple[float, float]:
    """Copies of a glue stage's output that its forward and its vjp take, results included."""
    if stage.name.endswith("residual") and not spec.gemma:
        return 1, 0
    return 2, 5


def activation_copies(spec: ModelSpec, item_bytes: int) -> tuple[float, float]:
    """Arrays of g's size that the activation and its vjp take beside their inputs, results included."""
    if in_place(item_bytes):
        return 0, 0
    return (2, 12) if spec.gemma else (1, 8)
