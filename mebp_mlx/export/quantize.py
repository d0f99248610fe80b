"""Quantizes weights to 2 to 8 bits, in the layouts that mx.dequantize (and so every MLX model) reads.

kernels/cpu.py dequantizes. All functions take whole rows, so a matrix can be packed one row block at a time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..kernels import cpu
from ..model.config import FLOAT_MODES, Quantization

BITS = {"affine": (2, 3, 4, 5, 6, 8), "symmetric": (4, 8), **{mode: (bits,) for mode, (bits, _) in FLOAT_MODES.items()}}
GROUP_SIZES = {
    "affine": (32, 64, 128),
    "symmetric": (32, 64, 128),
    **{mode: (size,) for mode, (_, size) in FLOAT_MODES.items()},
}
MODES = tuple(BITS)
MIXED = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}  # mlx-lm's recipes
_MXFP8_SMALLEST = 2.0**-118
_NVFP4_ITEMS = 128 << 10  # at a time: MLX compares each weight with all sixteen values at once
_PIECE_ITEMS = 64 << 10  # float32 numbers that fit in a core's cache
_FP4_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6


@dataclass(frozen=True)
class Packing:
    """A storage format for weights. mode: one of MODES; bits, group_size: allowed by BITS[mode], GROUP_SIZES[mode]."""

    bits: int
    group_size: int
    mode: str

    @property
    def stored(self) -> Quantization:
        """The format as config.json records it: symmetric weights are affine with biases of -2^(bits-1) scales."""
        return Quantization(self.bits, self.group_size, "affine" if self.mode == "symmetric" else self.mode)

    def fits(self, in_dims: int) -> bool:
        """Whether rows of this length can be packed (mlx-lm's own rule)."""
        return in_dims % self.group_size == 0


def checked_packing(bits: int | None, group_size: int | None, mode: str) -> Packing:
    """The format that --bits, --group-size and --mode specify. Raises UserError if the mode does not support it."""
    default_bits, default_group_size = FLOAT_MODES.get(mode, (4, 64))
    bits = default_bits if bits is None else bits
    group_size = default_group_size if group_size is None else group_size
    for flag, value, known in (("--bits", bits, BITS[mode]), ("--group-size", group_size, GROUP_SIZES[mode])):
        if value not in known:
            raise UserError(f"{flag} {value}: {mode} supports {' or '.join(map(str, known))}")
    return Packing(bits, group_size, mode)


@dataclass(frozen=True)
class Recipe:
    """How each matrix of a model is stored. packing: the default format; None packs nothing. high_bits: the bits of
    the more sensitive matrices in a mixed recipe.
    """

    packing: Packing | None
    high_bits: int | None = None

    def of(self, name: str, n_layers: int) -> Packing | None:
        """The packing of the matrix `name`. As in mlx-lm's mixed recipes, the head gets more bits, and so do v_proj and
        down_proj in the first and last eighth of the layers and in every third layer between.
        """
        if self.packing is None or self.high_bits is None:
            return self.packing
        match = re.search(r"\blayers\.(\d+)\.", name)
        index, eighth = int(match[1]) if match else 0, n_layers // 8
        is_outer = index < eighth or index >= 7 * n_layers // 8
        is_chosen = name.endswith(("v_proj", "down_proj")) and (is_outer or (index - eighth) % 3 == 2)
        if is_chosen or name.endswith("lm_head"):
            return replace(self.packing, bits=self.high_bits)
        return self.packing


def pack(rows: mx.array, packing: Packing) -> dict[str, mx.array]:
    """{"weight": uint32 [n, in * bits / 32], "scales": [n, in / group], "biases": like scales, none in FLOAT_MODES}.

    rows: finite, [n, in]; affine scales and biases get their dtype, scales in FLOAT_MODES are uint8.
    """
    if packing.mode == "symmetric":
        return _symmetric(rows, packing.bits, packing.group_size)
    if packing.mode == "mxfp4" and cpu.is_on():
        return _mxfp4(rows)
    if packing.mode == "nvfp4" and rows.size > _NVFP4_ITEMS and rows.shape[0] > 1:
        step = max(1, _NVFP4_ITEMS // rows.shape[1])
        pieces = [_quantized(rows[start : start + step], packing) for start in range(0, rows.shape[0], step)]
        return {name: mx.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return _quantized(rows, packing)


def _quantized(rows: mx.array, packing: Packing) -> dict[str, mx.array]:
    if packing.mode == "mxfp8":  # below this magnitude MLX's exponent wraps around to infinity
        rows = mx.where(mx.abs(rows) < _MXFP8_SMALLEST, 0, rows).astype(rows.dtype)
    parts = mx.quantize(rows, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    mx.eval(parts)
    return dict(zip(("weight", "scales", "biases"), parts, strict=False))


def unpacked(parts: dict[str, mx.array], packing: Packing) -> np.ndarray:
    """Packed rows dequantized, as a reader would do it: float32 [n, in]."""
    how = packing.stored
    if how.mode in FLOAT_MODES:
        layout: dict[str, Any] = dict(group_size=how.group_size, bits=how.bits, mode=how.mode, dtype=mx.float32)
        return np.asarray(mx.dequantize(parts["weight"], parts["scales"], **layout))
    scales, biases = (parts[name].astype(mx.float32) for name in ("scales", "biases"))
    if cpu.is_on() and how.bits in cpu.BITS:
        return np.asarray(cpu.dequantize(parts["weight"], scales, biases, how.bits, how.group_size))
    return np.asarray(mx.dequantize(parts["weight"], scales, biases, group_size=how.group_size, bits=how.bits))


def _symmetric(rows: mx.array, bits: int, group_size: int) -> dict[str, mx.array]:
    """scale * q, q in [-half, half - 1], half = 2^(bits - 1); scale = the group's largest value by magnitude / -half.

    That value becomes q = -half exactly: dividing by a power of two is exact in the stored dtype, except for subnormal
    numbers. With 4 bits the step is max|w| / 8, against max|w| / 7 for a grid with equal ranges on both sides. This
    gains more than clipping at the missing +half loses: on normal weights in groups of 64 the RMS error is 9.5 % of
    the weights against 10.8 %, and it is also smaller for Laplace and uniform weights and other group sizes.
    half * scale cannot overflow: it is at most the largest weight. Codes are computed with the stored, rounded scale.
    """
    half = 1 << (bits - 1)
    numbers = np.asarray(rows.astype(mx.float32))
    n_rows, n_in = numbers.shape
    groups = numbers.reshape(n_rows, -1, group_size)
    highest, lowest = groups.max(axis=-1), groups.min(axis=-1)
    extreme = np.where(highest > -lowest, highest, lowest)
    scales = mx.array(extreme / np.float32(-half)).astype(rows.dtype)
    exact = np.asarray(scales.astype(mx.float32))
    steps = np.where(exact == 0, np.float32(1), exact)[..., None]  # 0: a group of zeros or tiny numbers
    codes = np.empty((n_rows, n_in), np.uint8)

    def run(piece: slice) -> None:
        levels = groups[piece] / steps[piece]
        np.rint(levels, out=levels)
        np.clip(levels, -half, half - 1, out=levels)
        np.add(levels, half, out=levels)
        codes[piece] = levels.reshape(-1, n_in)  # exact: the levels are whole numbers

    cpu.in_pieces(n_rows, n_in, _PIECE_ITEMS, run)
    biases = mx.array(exact * np.float32(-half)).astype(rows.dtype)
    return {"weight": _words(codes, bits), "scales": scales, "biases": biases}


def _mxfp4(rows: mx.array) -> dict[str, mx.array]:
    """The bits of mx.quantize(mode="mxfp4") on MLX's CPU backend, about ten times as fast. MLX compares each weight
    with all sixteen values, in arrays sixteen times the size of the weights.

    A group's scale is the smallest power of two with max|w| <= 6 scale; ties go to the smaller magnitude. Groups that
    would need a scale below 2^-127 get 2^-127, where MLX's exponent wraps around to NaN.
    """
    n_rows, n_in = rows.shape
    numbers = np.asarray(rows.astype(mx.float32)).reshape(n_rows, -1, 32)
    largest = np.maximum(numbers.max(axis=-1), -numbers.min(axis=-1))
    exponents = mx.ceil(mx.log2(mx.array(largest) / 6))  # MLX's own log2: numpy's may round differently
    exponents = mx.where(mx.array(largest == 0), 0, mx.maximum(exponents, -127)).astype(mx.int32)
    steps = np.ldexp(np.float32(1), np.asarray(exponents))[..., None]
    codes = np.empty((n_rows, n_in), np.uint8)

    def run(piece: slice) -> None:
        levels = numbers[piece] / steps[piece]
        negative = levels < 0
        np.abs(levels, out=levels)
        code = (levels > _FP4_MIDPOINTS[0]).view(np.uint8)
        for midpoint in _FP4_MIDPOINTS[1:]:
            code += levels > midpoint
        code |= (negative & (code > 0)).view(np.uint8) << 3
        codes[piece] = code.reshape(-1, n_in)

    cpu.in_pieces(n_rows, n_in, _PIECE_ITEMS, run)
    return {"weight": _words(codes, 4), "scales": (exponents + 127).astype(mx.uint8)}


def _words(codes: np.ndarray, bits: int) -> mx.array:
    """Packs codes, one per byte, into uint32 words, lowest bits first."""
    packed: Any = codes
    if bits == 4:
        pairs = codes.view("<u2")
        packed = (pairs | (pairs >> 4)).astype(np.uint8)  # the high byte's nibble goes above the low byte's
    return mx.array(packed.view("<u4"))
