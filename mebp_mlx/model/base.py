"""The frozen parameters of a model, read into MLX one weight block at a time.

Each block is a new array copied from the mapped file, or a view of its pages if MLX uses them in place. Nothing is
cached, so a block lives exactly as long as its caller holds it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..kernels import cpu
from ..weights.safetensors import MappedWeights
from .config import FLOAT_MODES, Layer, Linear, ModelSpec, Quantization
from .reading import read_config, read_spec

# Packings that mx.quantized_matmul supports; others are dequantized.
PACKED_GROUP_SIZES = {"affine": (32, 64, 128), **{mode: (size,) for mode, (_, size) in FLOAT_MODES.items()}}
_NORM_BYTES = 2 << 20  # of rows whose norms are computed at a time
Index = Callable[["Tensor"], Any]  # an index of a tensor, as in numpy


def can_stay_packed(packing: Quantization | None) -> bool:
    """Whether mx.quantized_matmul supports this packing."""
    return packing is not None and packing.group_size in PACKED_GROUP_SIZES[packing.mode]


@dataclass(frozen=True)
class DenseBlock:
    """A row or column block W [n_out, n_in] of a frozen matrix in the compute dtype, and its two products."""

    matrix: mx.array

    def matmul(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return x @ self.matrix.T

    def matmul_t(self, g: mx.array) -> mx.array:
        """g W [N, n_in], not evaluated."""
        return g @ self.matrix


@dataclass(frozen=True)
class QuantizedBlock:
    """A row or column block that stays packed. parts: weight, scales(, biases).

    in_half: compute products of bfloat16 in float16 (_as_half).
    """

    parts: tuple[mx.array, ...]
    packing: Quantization
    in_half: bool = False

    def matmul(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return self._product(x, True)

    def matmul_t(self, g: mx.array) -> mx.array:
        """g W [N, n_in], not evaluated."""
        return self._product(g, False)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        how, (weight, *of_groups) = self.packing, self.parts
        size = None
        if self.in_half and x.dtype == mx.bfloat16:
            x, size = _as_half(x)
            of_groups = [part.astype(mx.float16) for part in of_groups]
        y = mx.quantized_matmul(
            x,
            weight,
            of_groups[0],
            of_groups[1] if len(of_groups) > 1 else None,
            transpose=transpose,
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
        )
        return y if size is None else (y.astype(mx.float32) * size).astype(mx.bfloat16)


def _as_half(x: mx.array) -> tuple[mx.array, mx.array]:
    """bfloat16 rows of x over the power of two below their largest entry, float16; that power, float32 [..., 1].

    An entry keeps its 8 bits unless it is below 2^-15 of the row's largest. Entries are below 2, so a product overflows
    only if its weights' magnitudes sum to 32,752 or more.
    """
    largest = mx.abs(x).max(axis=-1, keepdims=True)
    size = (largest.view(mx.uint16) & 0x7F80).view(mx.bfloat16).astype(mx.float32)  # cleared fraction: a power of two
    size = mx.maximum(size, 2.0**-100)
    return (x.astype(mx.float32) / size).astype(mx.float16), size


class WeightBlock(Protocol):
    """A row or column block W [n_out, n_in] of a frozen matrix."""

    def matmul(self, x: mx.array) -> mx.array: ...

    def matmul_t(self, g: mx.array) -> mx.array: ...


class Tensor:
    """A tensor of the checkpoint, indexed as in numpy: `tensor[2:5]`, `tensor[:, :8]`, `tensor[ids]`,
    `tensor[ids, :8]`, `tensor[...]`. n_axes: leading axes are merged until this many are left; a stack of matrices
    becomes one matrix of all their rows.

    An index returns an MLX array of the tensor's own dtype: a slice of the mapped pages if MLX uses them in place,
    otherwise a copy of only these items.
    """

    def __init__(self, weights: MappedWeights, name: str, n_axes: int | None = None):
        info = weights.info(name)
        self.weights, self.name, self.shape = weights, name, info.shape
        self.dtype, self.in_place = info.mlx_dtype, weights.in_place(name)
        if n_axes is not None and n_axes < len(self.shape):
            first = len(self.shape) - n_axes + 1
            self.shape = (math.prod(self.shape[:first]), *self.shape[first:])
            self.in_place = None if self.in_place is None else self.in_place.reshape(self.shape)

    @cached_property
    def items(self) -> np.ndarray:
        """The whole tensor as a view of the map; bfloat16 as uint16."""
        return self.weights.view(self.name).reshape(self.shape)

    def __getitem__(self, index: Any) -> mx.array:
        first = index[0] if isinstance(index, tuple) else index
        if self.in_place is not None and not isinstance(first, np.ndarray):
            return self.in_place[index]
        items = self.items[index]
        if not items.flags.c_contiguous:  # MLX would copy everything between its first byte and its last
            items = items.copy()
        if not items.flags.aligned:  # bytes need no alignment, and MLX's own buffer is aligned
            return mx.array(items.reshape(-1).view(np.uint8)).view(self.dtype).reshape(items.shape)
        array = mx.array(items)
        return array if array.dtype == self.dtype else array.view(self.dtype)


class UnreadTensor(Tensor):
    """A tensor with shape and dtype but no data: its items must never be evaluated."""

    def __getitem__(self, index: Any) -> mx.array:
        return stand_in(np.broadcast_to(np.uint8(0), self.shape)[index].shape, self.dtype)


class Model:
    """An opened checkpoint: its architecture, mapped files and compute settings.

    dtype: of activations and dequantized weights; packed: multiply by packed weights (mx.quantized_matmul) if MLX
    supports it, rather than dequantize them; adopt: use the mapped pages in place if MLX can (MappedWeights).
    half_products: compute packed products of bfloat16 in float16.
    """

    def __init__(self, path: str | Path, dtype: mx.Dtype = mx.float32, *, packed: bool = False, adopt: bool = False):
        self.path = Path(path)
        config = read_config(self.path)
        self.weights = MappedWeights(self.path, adopt=adopt)
        self.spec: ModelSpec = read_spec(config, self.weights, where=str(self.path / "config.json"))
        self.dtype, self.packed, self.half_products = dtype, packed, False
        self._tensors: dict[tuple[str, int | None], Tensor] = {}
        self._kind: type[Tensor] = Tensor
        self._squared_norms: dict[Linear, mx.array] = {}

    def tensor(self, name: str, n_axes: int | None = None) -> Tensor:
        """A tensor of the checkpoint by name; the same object until close()."""
        key = name, n_axes
        if key not in self._tensors:
            self._tensors[key] = self._kind(self.weights, name, n_axes)
        return self._tensors[key]

    def _parts(self, linear: Linear) -> list[Tensor]:
        """The tensors of a matrix; a stack is read as one matrix of all its rows."""
        return [self.tensor(name, 2) for name in linear.tensors]

    def row_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        """Rows [start, stop) of the matrix, ready for products. Raises IndexError beyond its rows."""
        rows = rows_of(linear, start, stop)
        return self._block(linear, lambda _: rows)

    def column_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        """Columns [start, stop) of the matrix, ready for products; whole groups if it is packed."""
        if stop - start == linear.in_dims:
            return self.row_block(linear, 0, linear.out_dims)
        if not 0 <= start <= stop <= linear.in_dims:
            raise IndexError(f"{linear.name}: columns {start}..{stop} of {linear.in_dims}")
        rows = rows_of(linear, 0, linear.out_dims)
        return self._block(linear, lambda tensor: (rows, _columns(linear, tensor, start, stop)))

    def rows(self, linear: Linear, start: int, stop: int) -> mx.array:
        """Rows [start, stop) of the matrix, dequantized: [stop - start, in_dims] in the compute dtype."""
        rows = rows_of(linear, start, stop)
        return self._dense(linear, lambda _: rows)

    def squared_norms(self, linear: Linear) -> mx.array:
        """The squared length of each row of the matrix, float32 [out_dims]; computed once, a few rows at a time."""
        if linear not in self._squared_norms:
            if self.is_unread:
                return stand_in((linear.out_dims,), mx.float32)
            step = max(1, _NORM_BYTES // (4 * linear.in_dims))
            parts = []
            for start in range(0, linear.out_dims, step):
                rows = self.rows(linear, start, min(start + step, linear.out_dims)).astype(mx.float32)
                parts.append(mx.square(rows).sum(axis=1))
                mx.eval(parts[-1])
            self._squared_norms[linear] = mx.concatenate(parts)
            mx.eval(self._squared_norms[linear])
        return self._squared_norms[linear]

    def row_lengths(self, linear: Linear) -> mx.array:
        """The length of each row of the matrix, float32 [out_dims]: the initial value of DoRA's m."""
        return mx.sqrt(self.squared_norms(linear))

    def gather(self, linear: Linear, ids: np.ndarray, columns: tuple[int, int] | None = None) -> mx.array:
        """The rows `ids` (int, [n]) of the matrix, or columns [start, stop) of them, dequantized: [n, in_dims] in the
        compute dtype. No other row is read.

        Raises IndexError if an id is negative or beyond the rows.
        """
        if ids.size and not (ids.min() >= 0 and ids.max() < linear.out_dims):
            raise IndexError(f"{linear.name}: row ids {ids.min()}..{ids.max()} of {linear.out_dims}")
        if columns is None:
            return self._dense(linear, lambda _: ids)
        packing = linear.quantization
        group_size = 1 if packing is None else packing.group_size
        first, last = columns[0] // group_size * group_size, -(-columns[1] // group_size) * group_size  # whole groups
        rows = self._dense(linear, lambda tensor: (ids, _columns(linear, tensor, first, last)))
        return rows[:, columns[0] - first : columns[1] - first]

    def stays_packed(self, linear: Linear) -> bool:
        """Whether products with this matrix use its packed form."""
        return self.packed and can_stay_packed(linear.quantization)

    def copied_bytes(self, linear: Linear, n_items: int) -> float:
        """Bytes of memory that n_items of the matrix take during a product; 0 if the mapped pages are used in place."""
        packing = linear.quantization
        if not self.stays_packed(linear):
            stored = None if packing is not None else self.tensor(linear.tensors[0]).in_place
            return 0 if stored is not None and stored.dtype == self.dtype else n_items * self.dtype.size
        assert packing is not None
        if all(self.tensor(name).in_place is not None for name in linear.tensors):
            return 0
        return n_items * (packing.bits / 8 + 2 * self.dtype.size / packing.group_size)

    @property
    def is_unread(self) -> bool:
        """Whether the model has shapes but no data (unread())."""
        return self._kind is UnreadTensor

    def unread(self) -> Model:
        """This model without weights, for graphs that are never evaluated."""
        model = copy.copy(self)
        model._tensors, model._kind = {}, UnreadTensor
        return model

    def close(self) -> None:
        """Closes the maps once no array uses their pages."""
        self._tensors.clear()
        self.weights.close()

    def _block(self, linear: Linear, index: Index) -> WeightBlock:
        packing = linear.quantization
        if packing is None or not self.stays_packed(linear):
            return DenseBlock(self._dense(linear, index))
        weight, *parts = (tensor[index(tensor)] for tensor in self._parts(linear))
        if packing.mode == "affine":  # a float32 scale would make the product float32
            parts = [part.astype(self.dtype) for part in parts]
        return QuantizedBlock((weight, *parts), packing, self.half_products and packing.mode == "affine")

    def _dense(self, linear: Linear, index: Index) -> mx.array:
        weight, *of_groups = self._parts(linear)
        packing, dtype = linear.quantization, self.dtype
        if packing is None:
            return weight[index(weight)].astype(dtype)
        parts = [tensor[index(tensor)] for tensor in of_groups]
        if packing.mode == "affine":
            # Widen scales first: dequantize computes in their dtype, and 16 bits would lose weight bits.
            parts = [part.astype(dtype) for part in parts]
            if packing.bits in cpu.BITS and cpu.serves(*parts):
                return cpu.dequantize(weight.items[index(weight)], *parts, packing.bits, packing.group_size)
        biases = parts[1] if len(parts) > 1 else None
        how: dict[str, Any] = dict(group_size=packing.group_size, bits=packing.bits, mode=packing.mode, dtype=dtype)
        return mx.dequantize(weight[index(weight)], parts[0], biases, **how).astype(dtype)

    def bias(self, linear: Linear, start: int, stop: int) -> mx.array | None:
        """Entries [start, stop) of the bias in the compute dtype, or None."""
        if not linear.bias:
            return None
        return self.tensor(f"{linear.name}.bias", 1)[rows_of(linear, start, stop)].astype(self.dtype)

    def norm(self, name: str) -> mx.array:
        """A norm's weight vector for rms_norm, in the compute dtype."""
        weight = self.tensor(name)[...].astype(self.dtype)
        return self.spec.norm_offset + weight if self.spec.norm_offset else weight

    def norms(self, layer: Layer) -> dict[str, mx.array]:
        """All norm weights of a block, by the last part of their module's name ("input_layernorm")."""
        return {norm: self.norm(name) for norm, name in layer.norms.items()}

    def arrays(self, layer: Layer) -> dict[str, mx.array]:
        """A block's tensors other than matrices and norms, in float32 (float64 if that is the compute dtype)."""
        dtype = self.dtype if self.dtype.size > 4 else mx.float32
        return {name: self.tensor(tensor)[...].astype(dtype) for name, tensor in layer.arrays.items()}

    def embed(self, tokens: np.ndarray) -> mx.array:
        """tokens int32 [B, T] -> embeddings [B, T, D] in the compute dtype, scaled if the family does so."""
        x = self.gather(self.spec.embedding, tokens.reshape(-1)).reshape(*tokens.shape, self.spec.D)
        scale = self.spec.embed_scale
        return x if scale is None else x * scale


def _columns(linear: Linear, tensor: Tensor, start: int, stop: int) -> slice:
    """The index of columns [start, stop) in one tensor of a matrix; packed and per-group tensors have fewer."""
    first, last = (at * tensor.shape[1] // linear.in_dims for at in (start, stop))
    return slice(first, last)


def rows_of(linear: Linear, start: int, stop: int) -> slice:
    """The index of rows [start, stop) in a matrix's tensors."""
    if not 0 <= start <= stop <= linear.out_dims:
        raise IndexError(f"{linear.name}: rows {start}..{stop} of {linear.out_dims}")
    return slice(linear.first_row + start, linear.first_row + stop)


_numbers = itertools.count()


def stand_in(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A distinct array that is never evaluated; distinct, because exporting a graph merges equal parts."""
    return mx.full(shape, mx.array(next(_numbers), mx.int32)).astype(dtype)
