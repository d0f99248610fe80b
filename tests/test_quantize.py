"""Quantizing rows: the same bits as MLX if it has the format; otherwise the nearest code of the symmetric grid."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.export.quantize import BITS, GROUP_SIZES, MODES, Packing, pack, unpacked
from mebp_mlx.kernels import cpu
from mebp_mlx.model.config import FLOAT_MODES

pytestmark = pytest.mark.quick

FLOATS = [mx.bfloat16, mx.float16, mx.float32]


def random_rows(seed: int, dtype: mx.Dtype, n_rows: int = 67, n_in: int = 384) -> mx.array:
    """Normal rows whose groups of 32 have very different scales; one group is zero."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(-2, 1.5, (n_rows, n_in // 32))).repeat(32, axis=1)
    values = rng.standard_normal((n_rows, n_in)) * spread
    values[3, :128] = 0
    return mx.array(values, mx.float32).astype(dtype)


def numbers(array: Any) -> np.ndarray:
    return np.asarray(array.astype(mx.float32))


def same(actual: mx.array, expected: mx.array) -> bool:
    return actual.dtype == expected.dtype and mx.array_equal(actual, expected).item() is True


@pytest.mark.skipif(not cpu.is_on(), reason="Metal rounds halfway cases otherwise")
@pytest.mark.parametrize("dtype", FLOATS)
def test_mxfp4_is_bit_equal_to_mx_quantize(dtype: mx.Dtype, seed: int) -> None:
    rows = random_rows(seed, dtype)
    halves = mx.array(np.random.default_rng(seed).integers(-24, 25, (67, 384)) * 0.25, dtype)  # halfway between codes
    for values in (rows, halves, -halves * 4096):
        parts = pack(values, Packing(4, 32, "mxfp4"))
        weight, scales = mx.quantize(values, group_size=32, bits=4, mode="mxfp4")
        assert same(parts["scales"], scales) and same(parts["weight"], weight), f"seed {seed}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("mode", "bits"), [*(("affine", bits) for bits in BITS["affine"]), ("symmetric", 4), ("symmetric", 8)]
)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_readers_of_affine_weights_get_the_dequantized_values(
    mode: str, bits: int, group_size: int, dtype: mx.Dtype, seed: int
) -> None:
    parts = pack(random_rows(seed, dtype), packing := Packing(bits, group_size, mode))
    assert {part.dtype for name, part in parts.items() if name != "weight"} == {dtype}
    wide = [parts["weight"], *(parts[name].astype(mx.float32) for name in ("scales", "biases"))]
    seen = mx.dequantize(*wide, group_size=group_size, bits=bits)
    assert np.array_equal(np.asarray(seen), unpacked(parts, packing)), f"seed {seed}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_symmetric_code_is_the_nearest_for_the_stored_scale(
    bits: int, group_size: int, dtype: mx.Dtype, seed: int
) -> None:
    rows, half = random_rows(seed, dtype), 2 ** (bits - 1)
    parts = pack(rows, packing := Packing(bits, group_size, "symmetric"))
    scales, truth = numbers(parts["scales"]), numbers(rows)
    assert np.array_equal(numbers(parts["biases"]), -half * scales), f"seed {seed}: the offset is not exact"
    actual = unpacked(parts, packing)
    wide = scales.repeat(group_size, axis=1)
    nearest = np.min([np.abs(q * wide - truth) for q in range(-half, half)], axis=0)
    rounding = 2 * half * np.abs(wide) * 2.0**-23  # of the reader in float32
    assert not (np.abs(actual - truth) > nearest + rounding).any(), f"seed {seed}"
    assert (actual[3, :128] == 0).all()
    groups = truth.reshape(len(truth), -1, group_size)
    highest, lowest = groups.max(axis=-1), groups.min(axis=-1)
    kept = np.where(
        highest > -lowest, actual.reshape(groups.shape).max(axis=-1), actual.reshape(groups.shape).min(axis=-1)
    )
    normal = np.abs(scales) >= float(mx.finfo(dtype).smallest_normal)  # so that a division by 8 is exact
    assert np.array_equal(kept[normal], np.where(highest > -lowest, highest, lowest)[normal]), f"seed {seed}"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_symmetric_weights_again_changes_nothing(bits: int, seed: int) -> None:
    packing = Packing(bits, 64, "symmetric")
    parts = pack(random_rows(seed, mx.float32), packing)
    again = pack(mx.array(unpacked(parts, packing)), packing)
    for name, part in parts.items():
        assert same(again[name], part), f"{name}, seed {seed}"


@pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_symmetric_grid_is_better_than_one_with_equal_sides(distribution: str, group_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = getattr(rng, distribution)(-1 if distribution == "uniform" else 0, 1, (256, 512)).astype(np.float32)
    packing = Packing(4, group_size, "symmetric")
    ours = np.square(unpacked(pack(mx.array(rows), packing), packing) - rows).mean()
    groups = rows.reshape(256, -1, group_size)
    scales = np.abs(groups).max(axis=-1, keepdims=True) / 7
    theirs = np.square(np.rint(groups / scales) * scales - groups).mean()
    assert not (ours >= theirs), f"seed {seed}: {ours} {theirs}"


@pytest.mark.parametrize("mode", FLOAT_MODES)
def test_a_matrix_is_packed_as_its_rows_are(mode: str, seed: int) -> None:
    rows = mx.array(np.random.default_rng(seed).standard_normal((301, 1024)), mx.bfloat16)
    bits, group_size = FLOAT_MODES[mode]
    parts, layout = (
        pack(rows, packing := Packing(bits, group_size, mode)),
        dict(group_size=group_size, bits=bits, mode=mode),
    )
    for actual, expected in zip(parts.values(), mx.quantize(rows, **layout), strict=True):  # type: ignore[arg-type]
        assert same(actual, expected), f"seed {seed}"
    seen = mx.dequantize(*parts.values(), **layout, dtype=mx.float32)  # type: ignore[arg-type]
    assert np.array_equal(np.asarray(seen), unpacked(parts, packing))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
def test_the_largest_and_the_smallest_numbers_of_a_dtype_stay_finite(mode: str, dtype: mx.Dtype) -> None:
    rows = np.zeros((4, 128), np.float32)
    rows[0, :] = float(mx.finfo(dtype).max) / 4
    rows[0, ::2] *= -1
    rows[1, 5] = float(mx.finfo(dtype).smallest_normal)
    rows[2, :] = 1e-7
    packing = Packing(BITS[mode][-1], GROUP_SIZES[mode][0], mode)
    actual = unpacked(pack(mx.array(rows).astype(dtype), packing), packing)
    assert np.isfinite(actual).all()
    assert (actual[3] == 0).all()
