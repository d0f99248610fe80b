"""MLX's Metal kernels, from the headers in its wheel, run in the emulator and are as exact as MLX's CPU backend.

Every kernel's error against float64 is at most that of MLX's CPU backend plus a tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import mebp_mlx  # noqa: F401  (the BLAS must be loaded before mlx.core)

import mlx.core as mx  # isort: skip

from tests.metal_on_cpu import Kernel, mlx_include, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

ORDERS = (0, 1, 2)
TYPES = {"float": mx.float32, "half": mx.float16, "bfloat16_t": mx.bfloat16}
TOLERANCE = {
    "float": 1e-6,
    "half": 2**-11,
    "bfloat16_t": 2**-8,
}  # relative to the largest value: one rounding in 16 bits
QUANTIZED = ("steel/gemm/gemm", "quantized_utils", "quantized")
GROUP_SIZE = 64


def kernel_of_mlx(
    function: str, *headers: str, sanitize: str = "", constants: Mapping[int | str, object] | None = None
) -> Kernel:
    lines = [f'#include "mlx/backend/metal/kernels/{header}.h"' for header in ("utils", *headers)]
    return Kernel("\n".join(lines), function, [mlx_include()], constants, sanitize)


def bits(x: mx.array) -> np.ndarray:
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def empty(shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
    return bits(mx.full(shape, float("nan"), dtype))


def whole(value: int) -> np.ndarray:
    return np.array(value, np.int32)


def exactly(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def exact_softmax(x: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Softmax and logsumexp over the last axis, in float64."""
    z = exactly(x)
    top = z.max(-1, keepdims=True)
    total = np.exp(z - top).sum(-1, keepdims=True)
    return np.exp(z - top) / total, (np.log(total) + top)[..., 0]


def check(out: np.ndarray, by_mlx: mx.array, exact: np.ndarray, name: str) -> None:
    actual = exactly(mx.array(out).view(mx.bfloat16) if out.dtype == np.uint16 else mx.array(out))
    assert actual.shape == by_mlx.shape == exact.shape
    error, error_of_mlx = np.abs(actual - exact).max(), np.abs(exactly(by_mlx) - exact).max()
    assert error <= error_of_mlx + TOLERANCE[name] * np.abs(exact).max(), (error, error_of_mlx)  # false for NaN


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize(
    ("function", "n", "n_threads"),
    [
        ("softmax_single_row", 197, 64),
        ("softmax_looped", 8221, 1024),
        ("logsumexp", 77, 32),
        ("logsumexp_looped", 4999, 1024),
    ],
)
def test_softmax_and_logsumexp(function: str, n: int, n_threads: int, name: str, seed: int) -> None:
    mx.random.seed(seed)
    n_rows, dtype = 3, TYPES[name]
    x = (4 * mx.random.normal((n_rows, n))).astype(dtype)
    is_softmax = function.startswith("softmax")
    by_mlx = mx.softmax(x, -1, precise=True) if is_softmax else mx.logsumexp(x, -1)
    exact = exact_softmax(x)[0 if is_softmax else 1]
    kernel = kernel_of_mlx(f"{function}<{name}, float>", "softmax" if is_softmax else "logsumexp")
    for order in ORDERS:
        out = empty(by_mlx.shape, dtype)
        kernel([bits(x), out, whole(n)], (n_rows * n_threads, 1, 1), (n_threads, 1, 1), seed=order)
        check(out, by_mlx, exact, name)


@pytest.mark.parametrize("name", ["float", "bfloat16_t"])
def test_cross_entropy_and_its_gradient(name: str, seed: int) -> None:
    mx.random.seed(seed)
    n_rows, n, n_threads, dtype = 3, 1003, 96, TYPES[name]
    x = (3 * mx.random.normal((n_rows, n))).astype(dtype)
    targets = mx.random.randint(-n, n, (n_rows,))  # negative targets count from the end
    cotangent = mx.random.normal((n_rows,))
    columns = np.array(targets) % n

    def loss(x: mx.array) -> mx.array:
        return mx.logsumexp(x, -1) - mx.take_along_axis(x, mx.array(columns)[:, None], -1)[:, 0]

    by_mlx, gradient_by_mlx = mx.vjp(loss, [x.astype(mx.float32)], [cotangent])
    softmax, logsumexp = exact_softmax(x)
    exact = logsumexp - exactly(x)[range(n_rows), columns]
    exact_gradient = exactly(cotangent)[:, None] * (softmax - np.eye(n)[columns])
    forward = kernel_of_mlx(f"cross_entropy<{name}>", "cross_entropy")
    backward = kernel_of_mlx(f"cross_entropy_vjp<{name}>", "cross_entropy")
    grid, threadgroup = (n_rows * n_threads, 1, 1), (n_threads, 1, 1)
    for order in ORDERS:
        out, dx = empty((n_rows,), mx.float32), empty((n_rows, n), dtype)
        forward([bits(x), bits(targets), out, whole(n)], grid, threadgroup, seed=order)
        check(out, by_mlx[0], exact, "float")
        backward([bits(x), bits(targets), out, bits(cotangent), dx, whole(n)], grid, threadgroup, seed=order)
        check(dx, gradient_by_mlx[0], exact_gradient, name)


@pytest.mark.parametrize("name", TYPES)
def test_matrix_times_vector(name: str, seed: int) -> None:
    mx.random.seed(seed)
    n_rows, n, dtype = 37, 259, TYPES[name]
    matrix, vector = mx.random.normal((n_rows, n)).astype(dtype), mx.random.normal((n,)).astype(dtype)
    kernel = kernel_of_mlx(f"gemv<{name}, 4, 1, 1, 32, 4, 4, false, false>", "gemv")
    one, no_stride = np.array(1, np.float32), np.zeros(1, np.int64)
    sizes = [whole(n), whole(n_rows), whole(n), one, one]
    not_batched = [whole(1), whole(1), no_stride, no_stride, no_stride, whole(1)]
    for order in ORDERS:
        out = empty((n_rows,), dtype)
        buffers = [bits(matrix), bits(vector), None, out, *sizes, *not_batched]
        kernel(buffers, (32 * ((n_rows + 15) // 16), 1, 4), (32, 1, 4), seed=order)
        check(out, matrix @ vector, exactly(matrix) @ exactly(vector), name)


@pytest.mark.parametrize("n_bits", [4, 8])
def test_dequantize(n_bits: int, seed: int) -> None:
    mx.random.seed(seed)
    packed, scales, biases = mx.quantize(mx.random.normal((7, 192)), GROUP_SIZE, n_bits)
    kernel = kernel_of_mlx(f"affine_dequantize<float, {GROUP_SIZE}, {n_bits}>", *QUANTIZED)
    bytes_per_row = 192 * n_bits // 8
    by_mlx = mx.dequantize(packed, scales, biases, GROUP_SIZE, n_bits)
    for order in ORDERS:
        out = empty((7, 192), mx.float32)
        buffers = [bits(packed).view(np.uint8), bits(scales), bits(biases), out]
        kernel(buffers, (bytes_per_row, 7, 1), (32, 1, 1), seed=order)
        check(out, by_mlx, exactly(by_mlx), "float")


@pytest.mark.parametrize(
    ("function", "name", "n_bits", "sanitize"),
    [
        ("affine_qmv", "float", 4, ""),
        ("affine_qmv", "bfloat16_t", 8, ""),
        ("affine_qmm_t", "float", 8, ""),
        ("affine_qmm_t", "bfloat16_t", 4, ""),
        ("affine_qmm_t", "float", 4, "address,undefined"),
        ("affine_qmm_t", "float", 4, "thread"),
    ],
)
def test_quantized_matmul(function: str, name: str, n_bits: int, sanitize: str, seed: int) -> None:
    """x [m, k] times a packed matrix [n, k]; qmm uses simdgroup matrices, and neither m nor n is a multiple of 32."""
    if reason := why_not(sanitize):
        pytest.skip(reason)
    mx.random.seed(seed)
    m, n, k, dtype = 35, 44, 128, TYPES[name]
    x = mx.random.normal((m, k)).astype(dtype)
    packed, scales, biases = mx.quantize(mx.random.normal((n, k)).astype(dtype), GROUP_SIZE, n_bits)
    weight = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), GROUP_SIZE, n_bits)
    exact = exactly(x) @ exactly(weight).T
    by_mlx = mx.quantized_matmul(x, packed, scales, biases, True, GROUP_SIZE, n_bits)
    if function == "affine_qmv":
        kernel = kernel_of_mlx(f"affine_qmv<{name}, {GROUP_SIZE}, {n_bits}, false>", *QUANTIZED, sanitize=sanitize)
        sizes, grid, threadgroup = [whole(k), whole(n)], (m * 32, 2 * ((n + 7) // 8), 1), (32, 2, 1)
    else:
        template = f"{name}, {GROUP_SIZE}, {n_bits}, false, false"
        kernel = kernel_of_mlx(f"affine_qmm_t<{template}>", *QUANTIZED, sanitize=sanitize)
        sizes, threadgroup = [whole(k), whole(n), whole(m)], (32, 2, 2)
        grid = (32 * ((n + 31) // 32), 2 * ((m + 31) // 32), 2)
    not_batched = [whole(0), None, None, whole(0), None, None, None, None]
    for order in ORDERS[: 1 if sanitize == "thread" else 3]:
        out = empty((m, n), dtype)
        buffers = [bits(packed), bits(scales), bits(biases), bits(x), out, *sizes, *not_batched]
        kernel(buffers, grid, threadgroup, seed=order)
        check(out, by_mlx, exact, name)


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_of_two_queries(is_causal: bool, seed: int) -> None:
    """Uses function constants, and 1,024 threads per threadgroup."""
    mx.random.seed(seed)
    n_heads, n_kv_heads, n_keys, width, n_queries = 4, 2, 45, 64, 2
    q = mx.random.normal((1, n_heads, n_queries, width))
    k, v = mx.random.normal((2, 1, n_kv_heads, n_keys, width))
    scale, group = width**-0.5, n_heads // n_kv_heads
    scores = exactly(q) @ np.repeat(exactly(k), group, 1).swapaxes(-1, -2) * scale
    if is_causal:
        scores[..., 0, -1] = -np.inf  # the first query attends to all keys but the last
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights / weights.sum(-1, keepdims=True) @ np.repeat(exactly(v), group, 1)
    by_mlx = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal" if is_causal else None)
    kernel = kernel_of_mlx(f"sdpa_vector<float, {width}>", "sdpa_vector", constants={"do_causal": is_causal})
    strides = [np.array(stride, np.uint64) for stride in (n_keys * width, width) * 2]
    for order in ORDERS:
        out = empty(q.shape, mx.float32)
        numbers = [whole(group), whole(n_keys), *strides, np.array(scale, np.float32)]
        buffers = [bits(q), bits(k), bits(v), out, *numbers, *[None] * 7]  # no masks, no sinks
        kernel(buffers, (n_heads * 1024, n_queries, 1), (1024, 1, 1), seed=order)
        check(out, by_mlx, exact, "float")
