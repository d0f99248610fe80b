"""Some rows or columns of a frozen matrix, ready for its two products: decompressed, or packed as they are."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from .config import Quantization

# What mx.quantized_matmul takes; other packings are decompressed.
PACKED_GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,)}


def can_stay_packed(packing: Quantization | None) -> bool:
    """Whether MLX multiplies by such a matrix without decompressing it."""
    return packing is not None and packing.group_size in PACKED_GROUP_SIZES[packing.mode]


@dataclass(frozen=True)
class Decompressed:
    """W [n_out, n_in] in the compute dtype."""

    matrix: mx.array

    def forward(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return x @ self.matrix.T

    def backward(self, g: mx.array) -> mx.array:
        """g W [N, n_in], not evaluated."""
        return g @ self.matrix


@dataclass(frozen=True)
class Packed:
    """The same, with W's codes and group parameters; parts: weight, scales(, biases)."""

    parts: tuple[mx.array, ...]
    packing: Quantization

    def forward(self, x: mx.array) -> mx.array:
        """x W^T [N, n_out], not evaluated."""
        return self._product(x, True)

    def backward(self, g: mx.array) -> mx.array:
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


Piece = Decompressed | Packed
