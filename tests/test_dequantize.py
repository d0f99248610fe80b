"""Decompression in numpy equals mx.dequantize, bit by bit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.kernels import cpu
from mebp_mlx.kernels.online_softmax import SoftmaxState

pytestmark = pytest.mark.skipif(not cpu.is_on(), reason="used on the CPU only")


@pytest.mark.parametrize("scale_dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", cpu.BITS)
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
    actual = cpu.dequantize(packed, *parts, bits, group_size)
    assert np.array_equal(np.asarray(actual), np.asarray(expected)), f"seed {seed}"


@pytest.mark.parametrize("T, C", [(1, 1), (3, 70_000), (257, 33)])
def test_in_place_online_softmax_equals_the_reference(T: int, C: int, seed: int) -> None:
    """To float32's rounding, compared with float64, over three chunks with targets in, before and after each chunk."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 10, (T, 3 * C)).astype(np.float32)
    y = rng.integers(-2, 3 * C, T).astype(np.int32)
    state = SoftmaxState.start(T, 1, need_dh=False).softmax
    for first in (0, C, 2 * C):
        part = np.ascontiguousarray(z[:, first : first + C])
        p, *state, _ = cpu.online_softmax(mx.array(part), *state, mx.array(y), first)
        truth = np.exp((part - z[:, : first + C].max(axis=1, keepdims=True)).astype(np.float64))
        np.testing.assert_allclose(np.asarray(p), truth, rtol=3e-7, atol=1e-37, err_msg=f"seed {seed}")
    wide = z.astype(np.float64)
    highest = wide.max(axis=1)
    assert np.array_equal(np.asarray(state[0]), highest), f"seed {seed}"
    total = np.exp(wide - highest[:, None]).sum(axis=1)
    # MLX's exp rescales the old total, with an error of up to 4e-6
    np.testing.assert_allclose(np.asarray(state[1]), total, rtol=1e-5, err_msg=f"seed {seed}")
    picked = np.where(y >= 0, wide[np.arange(T), np.maximum(y, 0)], 0)
    assert np.array_equal(np.asarray(state[2]), picked), f"seed {seed}"


def test_a_nan_logit_stays_nan() -> None:
    z = mx.array([[0.0, float("nan")], [float("inf"), 1.0]])
    step = cpu.online_softmax(z, *SoftmaxState.start(2, 1, need_dh=False).softmax, mx.array([0, 1]), 0)
    assert np.isnan(np.asarray(step.total)).all()
    assert step.p.shape == (2, 2)
