"""Decompression by numpy: mx.dequantize's numbers, bit by bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.engine import host
from mebp_mlx.model import unpack

pytestmark = pytest.mark.skipif(not unpack.on_cpu(), reason="used on the CPU only")


@pytest.mark.parametrize("scale_dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", unpack.BITS)
def test_unpacked_rows_are_bit_equal_to_dequantize(
    bits: int, group_size: int, scale_dtype: mx.Dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    n_rows, n_in = int(rng.integers(1, 700)), group_size * int(rng.integers(1, 9))
    packed = rng.integers(0, 2**32, (n_rows, n_in * bits // 32), np.uint32)
    parts = [
        mx.array(rng.standard_normal((n_rows, n_in // group_size), np.float32)).astype(scale_dtype).astype(mx.float32)
        for _ in range(2)
    ]
    expected = mx.dequantize(mx.array(packed), *parts, group_size=group_size, bits=bits)
    found = unpack.affine(packed, *(np.asarray(part) for part in parts), bits, group_size)
    assert np.array_equal(np.asarray(found), np.asarray(expected)), f"seed {seed}"


@pytest.mark.parametrize("shape", [(1, 1), (3, 70_000), (257, 33)])
def test_exp_minus_is_exact_to_float32s_rounding(shape: tuple[int, int], seed: int) -> None:
    z = np.random.default_rng(seed).normal(0, 10, shape).astype(np.float32)
    maximum = z.max(axis=-1, keepdims=True)
    truth = np.exp((z - maximum).astype(np.float64))
    p, total = host.exp_minus(mx.array(z), mx.array(maximum))
    np.testing.assert_allclose(np.asarray(p), truth, rtol=3e-7, atol=1e-37, err_msg=f"seed {seed}")
    np.testing.assert_allclose(np.asarray(total), truth.sum(-1, keepdims=True), rtol=1e-6, err_msg=f"seed {seed}")


def test_a_logit_that_is_no_number_stays_one() -> None:
    z = mx.array([[0.0, float("nan")], [float("inf"), 1.0]])
    p, total = host.exp_minus(z, z.max(axis=-1, keepdims=True))
    assert np.isnan(np.asarray(total)).all()
    assert p.shape == (2, 2)
