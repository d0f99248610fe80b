"""The cross-entropy of a packed output matrix, without storing any logits (linear_cross_entropy.metal)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from . import online_softmax as step
from . import selfcheck
from .metal import Source
from .online_softmax import SoftmaxState

SOURCE = Source(
    "linear_cross_entropy",
    ("h", "packed", "scales", "biases", "targets"),
    ("maxima", "sums", "target_logits"),
)
GROUP_SIZES = (32, 64, 128)
ROWS, COLUMNS, THREADS = 32, 64, 128  # a threadgroup's tile of logits, and its threads; as in the .metal file
_THREADGROUPS = 256  # several for every core of an M-series GPU
_TILES_PER_SPLIT = 4  # minimum: a split's rows of h stay in the cache, and its loop outweighs its start-up cost
_CHUNK = 4096  # vocabulary rows at a time in the reference and in the gradient


def linear_cross_entropy(
    h: mx.array,
    weight: tuple[mx.array, mx.array, mx.array],
    targets: mx.array,
    *,
    group_size: int,
    symmetric: bool = False,
    impl: str | None = None,
) -> mx.array:
    """losses [T] float32: log sum_v exp(h . W_v) - h . W_y;  0 for rows without a label (a negative target).

    h [T, D] float32, float16 or bfloat16; weight: W in 4 bits, affine, as mx.quantize packs it: uint32 [V, D / 8],
    scales and biases [V, D / group_size]; targets int32 [T]; symmetric: biases are -8 scales (the kernel does not read
    them). Differentiable in h: d loss / dh = softmax W - W_y, by `online_softmax` between two quantized products
    (kernels/README.md explains why this has no kernel). Raises ValueError for another packing.
    """
    packed, scales, biases = weight
    if group_size not in GROUP_SIZES or packed.shape[1] * 8 != scales.shape[1] * group_size:
        raise ValueError(f"4-bit rows in groups of {group_size}: wrong shapes, or a group size not in {GROUP_SIZES}")
    scales, biases = scales.astype(h.dtype), biases.astype(h.dtype)
    arguments = (packed, scales, biases, targets, group_size, symmetric)

    @mx.custom_function
    def losses(h: mx.array) -> mx.array:
        result: mx.array = selfcheck.run("linear_cross_entropy", (h, *arguments), impl, h.dtype, group_size)
        return result

    @losses.vjp
    def backward(h: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        return _gradient(h, *arguments[:-1], impl=impl) * cotangent[:, None].astype(h.dtype)

    result: Any = losses(h)
    return result


def reference(
    h: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    targets: mx.array,
    group_size: int,
    symmetric: bool = False,
) -> mx.array:
    """The losses in MLX's own operations, one chunk of the vocabulary at a time."""
    state = SoftmaxState.start(h.shape[0], h.shape[1], need_dh=False)
    for first, rows in _chunks(packed, scales, biases):
        held_back = mx.depends([h], [state.total])[0]  # else MLX could compute the logits of all chunks at once
        z = _product(held_back, rows, group_size, transpose=True)
        state = state.update(step.reference(z, *state.softmax, targets, first), None)
    return mx.where(targets >= 0, state.losses(), 0)


def metal(
    h: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    targets: mx.array,
    group_size: int,
    symmetric: bool = False,
) -> mx.array:
    """The losses by the Metal kernel."""
    state = SoftmaxState.start(h.shape[0], h.shape[1], need_dh=False)
    state = linear_softmax(state, h, (packed, scales, biases), targets, 0, group_size, symmetric)
    return mx.where(targets >= 0, state.losses(), 0)


def linear_softmax(
    state: SoftmaxState,
    h: mx.array,
    weight: tuple[mx.array, ...],
    targets: mx.array,
    first: int,
    group_size: int,
    symmetric: bool = False,
) -> SoftmaxState:
    """Updates a running softmax (loss only) with the rows `weight`, which begin at vocabulary index `first`: runs the
    kernel and combines its splits of these rows with the old state. Arguments as in linear_cross_entropy.
    """
    packed, scales, biases = weight
    T, V = h.shape[0], packed.shape[0]
    n_tiles = -(-T // ROWS)
    n_splits = max(1, min(_THREADGROUPS // n_tiles, -(-V // COLUMNS) // _TILES_PER_SPLIT))
    columns = mx.where(targets >= first, targets - first, -1).astype(mx.int32)
    splits = SOURCE(
        [h, packed, scales, biases, columns],
        [("scalar", h.dtype), ("GROUP", group_size), ("SYMMETRIC", symmetric)],
        grid=(THREADS, n_tiles, n_splits),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(n_splits, T)] * 3,
        output_dtypes=[mx.float32] * 3,
    )
    maxima, sums, logits = (mx.concatenate([old[None], new]) for old, new in zip(state.softmax, splits, strict=True))
    highest = maxima.max(axis=0)
    return SoftmaxState(highest, (sums * mx.exp(maxima - highest)).sum(axis=0), logits.sum(axis=0), None)


def _chunks(*parts: mx.array) -> Iterator[tuple[int, list[mx.array]]]:
    """Yields (index of the first row, [codes, scales, biases]) for each chunk of the output matrix."""
    for first in range(0, parts[0].shape[0], _CHUNK):
        yield first, [part[first : first + _CHUNK] for part in parts]


def _product(x: mx.array, rows: list[mx.array], group_size: int, transpose: bool) -> mx.array:
    """x W^T if transpose, else x W, for some rows of W."""
    codes, scales, biases = rows
    return mx.quantized_matmul(x, codes, scales, biases, transpose=transpose, group_size=group_size, bits=4)


def _gradient(
    h: mx.array,
    packed: mx.array,
    scales: mx.array,
    biases: mx.array,
    targets: mx.array,
    group_size: int,
    impl: str | None,
) -> mx.array:
    """softmax W - W_y [T, D]; 0 for rows without a label."""
    state = SoftmaxState.start(h.shape[0], h.shape[1], need_dh=True)
    for first, rows in _chunks(packed, scales, biases):
        z = _product(mx.depends([h], [state.total])[0], rows, group_size, transpose=True)
        after = step.online_softmax(z, *state.softmax, targets, first, impl=impl)
        state = state.update(after, _product(after.p, rows, group_size, transpose=False))
    labels = mx.maximum(targets, 0)
    target_rows = mx.dequantize(packed[labels], scales[labels], biases[labels], group_size=group_size, bits=4)
    dh = mx.where(targets[:, None] >= 0, state.gradient(target_rows), 0)
    return dh.astype(h.dtype)


def sample(dtype: mx.Dtype, group_size: int, T: int = 37, V: int = 1003, D: int = 0, **_: int) -> tuple:
    """Arguments for the first-use check and for timing: several splits of several tiles, flat logits (so that every
    column matters), one row without a label.
    """
    keys = mx.random.split(mx.random.key(11), 2)
    D = D or 2 * group_size
    h = (mx.random.normal((T, D), key=keys[0]) / D**0.5).astype(dtype)
    packed, scales, biases = mx.quantize(mx.random.normal((V, D), key=keys[1]), group_size=group_size, bits=4)
    targets = (mx.arange(T) * 11 + V) % (V + 1) - 1
    return h, packed, scales.astype(dtype), biases.astype(dtype), targets.astype(mx.int32), group_size, False


selfcheck.register("linear_cross_entropy", metal, reference, sample, group_sizes=GROUP_SIZES)
