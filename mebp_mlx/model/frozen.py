"""The frozen parameters of a model, brought into MLX a piece at a time.

What is returned is a fresh array made from the mapped file, or a view of its pages where MLX adopts them; nothing is
kept here, so a piece lives exactly as long as its caller holds it.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..weights.safetensors import MappedWeights
from . import unpack
from .config import Layer, Linear, ModelSpec, Quantization, read_config, read_spec
from .piece import Decompressed, Packed, Piece, can_stay_packed


class Model:
    """An opened checkpoint: its architecture, its mapped files, and how to compute with it.

    dtype: of activations and decompressed weights; packed: multiply by packed weights where MLX can
    (mx.quantized_matmul) rather than decompress them; adopt: use the mapped pages themselves where MLX can
    (MappedWeights).
    """

    def __init__(self, path: str | Path, dtype: mx.Dtype = mx.float32, *, packed: bool = False, adopt: bool = False):
        self.path = Path(path)
        config = read_config(self.path)
        self.weights = MappedWeights(self.path, adopt=adopt)
        self.spec: ModelSpec = read_spec(config, self.weights, where=str(self.path / "config.json"))
        self.dtype, self.packed = dtype, packed

    def piece_of_rows(self, linear: Linear, start: int, stop: int) -> Piece:
        """Rows [start, stop) of the matrix, ready for products."""
        if not self.stays_packed(linear):
            return Decompressed(self.rows(linear, start, stop))
        return self._packed(linear, [self.weights.rows(name, start, stop) for name in _tensors_of(linear)])

    def piece_of_columns(self, linear: Linear, start: int, stop: int) -> Piece:
        """Columns [start, stop) of the matrix, between groups of a packed one, ready for products."""
        if not self.stays_packed(linear):
            return Decompressed(self.columns(linear, start, stop))
        packing = linear.quantization
        assert packing is not None
        words = (start * packing.bits // 32, stop * packing.bits // 32)
        groups = (start // packing.group_size, stop // packing.group_size)
        weight, *of_groups = _tensors_of(linear)
        parts = [self.weights.columns(weight, *words)]
        return self._packed(linear, [*parts, *(self.weights.columns(name, *groups) for name in of_groups)])

    def stays_packed(self, linear: Linear) -> bool:
        """Whether products with this matrix are made without decompressing it."""
        return self.packed and can_stay_packed(linear.quantization)

    def copied_bytes(self, linear: Linear, n_items: int) -> float:
        """Memory that n_items of the matrix take where products are made with them; 0: the mapped pages themselves."""
        packing = linear.quantization
        if not self.stays_packed(linear):
            stored = None if packing is not None else self.weights.in_place(f"{linear.name}.weight")
            return 0 if stored is not None and stored.dtype == self.dtype else n_items * self.dtype.size
        assert packing is not None
        if all(self.weights.in_place(name) is not None for name in _tensors_of(linear)):
            return 0
        return n_items * (packing.bits / 8 + 2 * self.dtype.size / packing.group_size)

    def unread(self) -> Model:
        """The same model with nothing behind it: for graphs that are built and never evaluated."""
        model = copy.copy(self)
        model.weights = UnreadWeights(self.weights)  # type: ignore[assignment]
        return model

    def _packed(self, linear: Linear, parts: list[mx.array]) -> Packed:
        packing = linear.quantization
        assert packing is not None
        if packing.mode == "affine":  # else a float32 scale would make the product float32
            parts = [parts[0], *(part.astype(self.dtype) for part in parts[1:])]
        return Packed(tuple(parts), packing)

    def rows(self, linear: Linear, start: int, stop: int) -> mx.array:
        """Rows [start, stop) of the matrix, decompressed: [stop - start, in_dims] in the compute dtype."""
        weight, *of_groups = _tensors_of(linear)
        parts = [self.weights.rows(name, start, stop) for name in of_groups]
        if self._unpacks_here(linear):
            return self._unpack(linear, self.weights.view(weight)[start:stop], parts)
        return _decompress([self.weights.rows(weight, start, stop), *parts], linear.quantization, self.dtype)

    def columns(self, linear: Linear, start: int, stop: int) -> mx.array:
        """Columns [start, stop) of the matrix, decompressed: [out_dims, stop - start] in the compute dtype.

        For a packed matrix the range must begin and end between groups.
        """
        packing = linear.quantization
        words = groups = (start, stop)
        if packing is not None:
            words = (start * packing.bits // 32, stop * packing.bits // 32)
            groups = (start // packing.group_size, stop // packing.group_size)
        weight, *of_groups = _tensors_of(linear)
        parts = [self.weights.columns(name, *groups) for name in of_groups]
        if self._unpacks_here(linear):
            return self._unpack(linear, self.weights.view(weight)[:, slice(*words)], parts)
        return _decompress([self.weights.columns(weight, *words), *parts], packing, self.dtype)

    def gather(self, linear: Linear, ids: np.ndarray) -> mx.array:
        """The rows `ids` (int, [n]) of the matrix, decompressed: [n, in_dims] in the compute dtype."""
        weight, *of_groups = _tensors_of(linear)
        parts = [self.weights.gather(name, ids) for name in of_groups]
        if self._unpacks_here(linear):
            return self._unpack(linear, self.weights.view(weight)[ids], parts)
        return _decompress([self.weights.gather(weight, ids), *parts], linear.quantization, self.dtype)

    def _unpacks_here(self, linear: Linear) -> bool:
        packing = linear.quantization
        if packing is None or packing.mode != "affine" or packing.bits not in unpack.BITS:
            return False
        return self.dtype == mx.float32 and unpack.on_cpu()

    def _unpack(self, linear: Linear, packed: np.ndarray, scales_and_biases: list[mx.array]) -> mx.array:
        """Decompresses straight from the mapped file."""
        packing = linear.quantization
        assert packing is not None
        scales, biases = (np.asarray(part.astype(mx.float32)) for part in scales_and_biases)
        return unpack.affine(packed, scales, biases, packing.bits, packing.group_size)

    def bias(self, linear: Linear, start: int, stop: int) -> mx.array | None:
        """Entries [start, stop) of the bias in the compute dtype, or None."""
        if not linear.bias:
            return None
        return self.weights.rows(f"{linear.name}.bias", start, stop).astype(self.dtype)

    def norm(self, name: str) -> mx.array:
        """A norm's weight vector as rms_norm takes it, in the compute dtype."""
        weight = self.weights.rows(name).astype(self.dtype)
        return 1.0 + weight if self.spec.gemma else weight

    def norms(self, layer: Layer) -> dict[str, mx.array]:
        """All norm weights of a block, by the part of their name after the layer's prefix ("input_layernorm")."""
        found = {}
        for name in _norm_names(self.spec):
            found[name.rsplit(".", 1)[-1]] = self.norm(f"{layer.prefix}.{name}.weight")
        return found

    def embed(self, tokens: np.ndarray) -> mx.array:
        """tokens int32 [B, T] -> embeddings [B, T, D] in the compute dtype, scaled where the family does."""
        x = self.gather(self.spec.embedding, tokens.reshape(-1)).reshape(*tokens.shape, self.spec.D)
        if self.spec.embed_scale is not None:
            # Gemma was trained with the factor rounded to bfloat16.
            x = x * mx.array(self.spec.embed_scale, mx.bfloat16).astype(x.dtype)
        return x


_numbers = itertools.count()


def stand_in(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array that nobody evaluates, unlike any other: a graph that is exported has equal parts once only."""
    return mx.full(shape, mx.array(next(_numbers), mx.int32)).astype(dtype)


class UnreadWeights:
    """Tensors of a checkpoint by shape and dtype alone, as arrays that nobody evaluates."""

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


def _norm_names(spec: ModelSpec) -> list[str]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if spec.gemma:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if spec.qk_norm:
        names += ["self_attn.q_norm", "self_attn.k_norm"]
    return names


def _tensors_of(linear: Linear) -> list[str]:
    names = [f"{linear.name}.weight"]
    if linear.quantization:
        names.append(f"{linear.name}.scales")
        if linear.quantization.mode == "affine":
            names.append(f"{linear.name}.biases")
    return names


def _decompress(parts: list[mx.array], packing: Quantization | None, dtype: mx.Dtype) -> mx.array:
    if packing is None:
        return parts[0].astype(dtype)
    # Scales are widened first: dequantize computes in their dtype, and 16 bits would lose weight bits.
    if packing.mode == "affine":
        scales, biases = (part.astype(dtype) for part in parts[1:])
        return mx.dequantize(parts[0], scales, biases, group_size=packing.group_size, bits=packing.bits)
    unpacked = mx.dequantize(
        parts[0], parts[1], group_size=packing.group_size, bits=packing.bits, mode=packing.mode, dtype=dtype
    )
    return unpacked.astype(dtype)
