"""The frozen parameters of a model, brought into MLX a block of a matrix at a time.

What is returned is a fresh array made from the mapped file, or a view of its pages where MLX adopts them; nothing is
kept here, so a block lives exactly as long as its caller holds it.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..kernels import cpu
from ..weights.safetensors import MappedWeights
from .config import FLOAT_MODES, Layer, Linear, ModelSpec, Quantization
from .reading import read_config, read_spec

# What mx.quantized_matmul takes; other packings are dequantized.
PACKED_GROUP_SIZES = {"affine": (32, 64, 128), **{mode: (size,) for mode, (_, size) in FLOAT_MODES.items()}}
# Reads some rows or columns of a tensor from MappedWeights or the like: its name, and how many items it stores for how
# many columns of the matrix.
Read = Callable[[Any, str, int, int], Any]


def can_stay_packed(packing: Quantization | None) -> bool:
    """Whether MLX multiplies by such a matrix without dequantizing it."""
    return packing is not None and packing.group_size in PACKED_GROUP_SIZES[packing.mode]


@dataclass(frozen=True)
class DenseBlock:
    """Some rows or columns of a frozen matrix, W [n_out, n_in] in the compute dtype, ready for its two products."""

    matrix: mx.array

    def matmul(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return x @ self.matrix.T

    def matmul_t(self, g: mx.array) -> mx.array:
        """g W [N, n_in], not evaluated."""
        return g @ self.matrix


@dataclass(frozen=True)
class QuantizedBlock:
    """The same, with W's codes and group parameters; parts: weight, scales(, biases)."""

    parts: tuple[mx.array, ...]
    packing: Quantization

    def matmul(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return self._product(x, True)

    def matmul_t(self, g: mx.array) -> mx.array:
        """g W [N, n_in], not evaluated."""
        return self._product(g, False)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        how, (weight, scales, *biases) = self.packing, self.parts
        return mx.quantized_matmul(
            x,
            weight,
            scales,
            biases[0] if biases else None,
            transpose=transpose,
            group_size=how.group_size,
            bits=how.bits,
            mode=how.mode,
        )


WeightBlock = DenseBlock | QuantizedBlock


class Model:
    """An opened checkpoint: its architecture, its mapped files, and how to compute with it.

    dtype: of activations and dequantized weights; packed: multiply by packed weights where MLX can
    (mx.quantized_matmul) rather than dequantize them; adopt: use the mapped pages themselves where MLX can
    (MappedWeights).
    """

    def __init__(self, path: str | Path, dtype: mx.Dtype = mx.float32, *, packed: bool = False, adopt: bool = False):
        self.path = Path(path)
        config = read_config(self.path)
        self.weights = MappedWeights(self.path, adopt=adopt)
        self.spec: ModelSpec = read_spec(config, self.weights, where=str(self.path / "config.json"))
        self.dtype, self.packed = dtype, packed

    def row_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        """Rows [start, stop) of the matrix, ready for products."""
        start, stop = start + linear.first_row, stop + linear.first_row
        return self._block(linear, lambda weights, name, *_: weights.rows(name, start, stop))

    def column_block(self, linear: Linear, start: int, stop: int) -> WeightBlock:
        """Columns [start, stop) of the matrix, between groups of a packed one, ready for products."""

        if stop - start == linear.in_dims:
            return self.row_block(linear, 0, linear.out_dims)

        def read(weights: Any, name: str, n_items: int, n_columns: int) -> Any:
            return weights.columns(name, start * n_items // n_columns, stop * n_items // n_columns)

        return self._block(linear, read)

    def rows(self, linear: Linear, start: int, stop: int) -> mx.array:
        """Rows [start, stop) of the matrix, dequantized: [stop - start, in_dims] in the compute dtype."""
        start, stop = start + linear.first_row, stop + linear.first_row
        return self._dense(linear, lambda weights, name, *_: weights.rows(name, start, stop))

    def gather(self, linear: Linear, ids: np.ndarray) -> mx.array:
        """The rows `ids` (int, [n]) of the matrix, dequantized: [n, in_dims] in the compute dtype."""
        return self._dense(linear, lambda weights, name, *_: weights.gather(name, ids))

    def stays_packed(self, linear: Linear) -> bool:
        """Whether products with this matrix are made without dequantizing it."""
        return self.packed and can_stay_packed(linear.quantization)

    def copied_bytes(self, linear: Linear, n_items: int) -> float:
        """Memory that n_items of the matrix take where products are made with them; 0: the mapped pages themselves."""
        packing = linear.quantization
        if not self.stays_packed(linear):
            stored = None if packing is not None else self.weights.in_place(f"{linear.name}.weight")
            return 0 if stored is not None and stored.dtype == self.dtype else n_items * self.dtype.size
        assert packing is not None
        if all(self.weights.in_place(name) is not None for name in linear.tensors):
            return 0
        return n_items * (packing.bits / 8 + 2 * self.dtype.size / packing.group_size)

    def unread(self) -> Model:
        """The same model without weights: for graphs that are built and never evaluated."""
        model = copy.copy(self)
        model.weights = UnreadWeights(self.weights)  # type: ignore[assignment]
        return model

    def _block(self, linear: Linear, read: Read) -> WeightBlock:
        packing = linear.quantization
        if packing is None or not self.stays_packed(linear):
            return DenseBlock(self._dense(linear, read))
        weight, *of_groups = linear.tensors
        parts = [read(self.weights, name, 1, packing.group_size) for name in of_groups]
        if packing.mode == "affine":  # else a float32 scale would make the product float32
            parts = [part.astype(self.dtype) for part in parts]
        return QuantizedBlock((read(self.weights, weight, packing.bits, 32), *parts), packing)

    def _dense(self, linear: Linear, read: Read) -> mx.array:
        weight, *of_groups = linear.tensors
        packing, dtype = linear.quantization, self.dtype
        if packing is None:
            return read(self.weights, weight, 1, 1).astype(dtype)
        parts = [read(self.weights, name, 1, packing.group_size) for name in of_groups]
        if packing.mode == "affine":
            # Scales are widened first: dequantize computes in their dtype, and 16 bits would lose weight bits.
            parts = [part.astype(dtype) for part in parts]
            if packing.bits in cpu.BITS and cpu.serves(*parts):
                codes = read(Views(self.weights), weight, packing.bits, 32)
                return cpu.dequantize(codes, *parts, packing.bits, packing.group_size)
        biases = parts[1] if len(parts) > 1 else None
        how: dict[str, Any] = dict(group_size=packing.group_size, bits=packing.bits, mode=packing.mode, dtype=dtype)
        return mx.dequantize(read(self.weights, weight, packing.bits, 32), parts[0], biases, **how).astype(dtype)

    def bias(self, linear: Linear, start: int, stop: int) -> mx.array | None:
        """Entries [start, stop) of the bias in the compute dtype, or None."""
        if not linear.bias:
            return None
        start, stop = start + linear.first_row, stop + linear.first_row
        return self.weights.rows(f"{linear.name}.bias", start, stop).astype(self.dtype)

    def norm(self, name: str) -> mx.array:
        """A norm's weight vector as rms_norm takes it, in the compute dtype."""
        weight = self.weights.rows(name).astype(self.dtype)
        return self.spec.norm_offset + weight if self.spec.norm_offset else weight

    def norms(self, layer: Layer) -> dict[str, mx.array]:
        """All norm weights of a block, by the last part of their module's name ("input_layernorm")."""
        return {norm: self.norm(name) for norm, name in layer.norms.items()}

    def arrays(self, layer: Layer) -> dict[str, mx.array]:
        """A block's tensors that are no matrices and no norms, in float32 (float64 where that is computed in)."""
        dtype = self.dtype if self.dtype.size > 4 else mx.float32
        return {name: self.weights.rows(tensor).astype(dtype) for name, tensor in layer.arrays.items()}

    def embed(self, tokens: np.ndarray) -> mx.array:
        """tokens int32 [B, T] -> embeddings [B, T, D] in the compute dtype, scaled where the family does."""
        x = self.gather(self.spec.embedding, tokens.reshape(-1)).reshape(*tokens.shape, self.spec.D)
        scale = self.spec.embed_scale
        return x if scale is None else x * scale


_numbers = itertools.count()


def stand_in(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A distinct array that is never evaluated: exporting a graph merges equal parts."""
    return mx.full(shape, mx.array(next(_numbers), mx.int32)).astype(dtype)


class Views:
    """Tensors of a checkpoint as numpy's views of the mapped files: nothing is copied but gathered rows."""

    def __init__(self, weights: MappedWeights):
        self.weights = weights

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.weights.view(name)[start:stop]

    def columns(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.weights.view(name)[:, start:stop]

    def gather(self, name: str, ids: np.ndarray) -> np.ndarray:
        return self.weights.view(name)[ids]


class UnreadWeights:
    """Tensors of a checkpoint by shape and dtype alone, as arrays that are never evaluated."""

    def __init__(self, weights: MappedWeights):
        self.weights = weights

    def in_place(self, name: str) -> mx.array | None:
        return self.weights.in_place(name)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> mx.array:
        shape = self.weights.info(name).shape
        stop = shape[0] if stop is None else stop
        return stand_in((stop - start, *shape[1:]), self.weights.info(name).mlx_dtype)

    def columns(self, name: str, start: int, stop: int) -> mx.array:
        return stand_in((self.weights.info(name).shape[0], stop - start), self.weights.info(name).mlx_dtype)

    def gather(self, name: str, ids: np.ndarray) -> mx.array:
        return stand_in((*ids.shape, *self.weights.info(name).shape[1:]), self.weights.info(name).mlx_dtype)
