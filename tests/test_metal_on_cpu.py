"""The emulator of Metal kernels: correct kernels pass, planted faults are found, signatures equal MLX's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mebp_mlx  # noqa: F401  (the BLAS must be loaded before mlx.core)

import mlx.core as mx  # isort: skip

from tests.metal_on_cpu import (
    Kernel,
    MSLError,
    generated_by_mlx,
    lint,
    metal_kernel,
    mlx_include,
    signature,
    why_no_lint,
    why_not,
)
from tests.metal_on_cpu.faults import IN_MATMUL, IN_ROW_SUMS, MATMUL, ROW_SUMS, Fault
from tests.metal_on_cpu.words import HEADER, LOG_SUM_EXP, WORDS, WORDS_HEADER

SANITIZERS = ("address", "thread", "address,undefined")
ORDERS = (0, 1, 2)
TOLERANCE = 1e-5  # in addition to the error of the same sum in float32, relative to the largest value


def need(sanitize: str = "") -> None:
    reason = why_no_lint() if sanitize == "lint" else why_not(sanitize)
    if reason:
        pytest.skip(reason)


def row_sums(source: str, seed: int, sanitize: str = "", order: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(the kernel's result, the sums in float64, the sums in float32)."""
    n_rows, n = 3, 100
    x = np.random.default_rng(seed).uniform(0.5, 1.5, (n_rows, n)).astype(np.float32)
    out = np.full(n_rows, np.nan, np.float32)
    kernel = Kernel(source, "row_sums<float>", sanitize=sanitize)
    kernel([x, out, np.array(n, np.int32)], (n_rows * 128, 1, 1), (128, 1, 1), seed=order)
    return out, x.sum(1, dtype=np.float64), x.sum(1, dtype=np.float32)


def matmul(source: str, seed: int, sanitize: str = "", order: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For x [M, K] and w [N, K] in half: (the kernel's result, the product in float64, the product in float32)."""
    m, n, k = 13, 21, 19
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((m, k)).astype(np.float16), rng.standard_normal((n, k)).astype(np.float16)
    (out,) = metal_kernel("matmul", ["x", "w"], ["out"], source, sanitize=sanitize, seed=order)(
        inputs=[mx.array(x), mx.array(w)],
        template=[("T", mx.float16), ("M", m), ("N", n), ("K", k)],
        grid=(64 * ((n + 15) // 16), (m + 7) // 8, 1),
        threadgroup=(64, 1, 1),
        output_shapes=[(m, n)],
        output_dtypes=[mx.float32],
    )
    return np.array(out), x.astype(np.float64) @ w.astype(np.float64).T, x.astype(np.float32) @ w.astype(np.float32).T


def matmul_text(source: str) -> str:
    inputs = [((13, 19), mx.float16), ((21, 19), mx.float16)]
    template = [("T", mx.float16), ("M", 13), ("N", 21), ("K", 19)]
    return signature("matmul", ["x", "w"], inputs, ["out"], [mx.float32], source, "", template).text


def is_close(result: tuple[np.ndarray, np.ndarray, np.ndarray]) -> bool:
    """The rule for every kernel: its error is at most that of the float32 reference plus a tolerance."""
    out, exact, reference = result
    return bool(np.abs(out - exact).max() <= np.abs(reference - exact).max() + TOLERANCE * np.abs(exact).max())


def check_found(fault: Fault, run: Callable[..., Any], source: str, text_to_lint: str, seed: int) -> None:
    if fault.means == "lint":
        need("lint")
        errors = lint(text_to_lint, {"T": "half"} if run is matmul else None)
        assert errors and re.search(fault.message, "\n".join(errors)), errors
        return
    need()
    if fault.means == "values":
        assert not all(is_close(run(source, seed, order=order)) for order in ORDERS)
    elif fault.means == "orders":
        first, second = (run(source, seed, order=order)[0] for order in (0, 1))
        assert not np.array_equal(first, second, equal_nan=True)
    else:
        sanitize = "" if fault.means in ("run", "compile") else fault.means
        need(sanitize)
        with pytest.raises(MSLError, match=fault.message or None):
            run(source, seed, sanitize=sanitize)


@pytest.mark.parametrize("fault", IN_ROW_SUMS, ids=lambda fault: f"{fault.name}: {fault.means}")
def test_a_fault_in_sums_is_found(fault: Fault, seed: int) -> None:
    source = fault.planted_in(ROW_SUMS)
    check_found(fault, row_sums, source, source, seed)


@pytest.mark.parametrize("fault", IN_MATMUL, ids=lambda fault: f"{fault.name}: {fault.means}")
def test_a_fault_in_a_matmul_is_found(fault: Fault, seed: int) -> None:
    source = fault.planted_in(MATMUL)
    check_found(fault, matmul, source, matmul_text(source), seed)


@pytest.mark.parametrize("sanitize", ["", *SANITIZERS])
@pytest.mark.parametrize(("run", "source"), [(row_sums, ROW_SUMS), (matmul, MATMUL)], ids=["sums", "matmul"])
def test_a_correct_kernel_passes(run: Callable[..., Any], source: str, sanitize: str, seed: int) -> None:
    need(sanitize)
    for order in (*ORDERS, 3):
        result = run(source, seed, sanitize=sanitize, order=order)
        assert is_close(result), (order, result)


def test_a_correct_kernel_has_no_lint() -> None:
    need("lint")
    assert lint(ROW_SUMS) == []
    assert lint(matmul_text(MATMUL), {"T": "half"}) == []


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_kernel_with_its_own_functions(dtype: mx.Dtype, seed: int) -> None:
    need()
    mx.random.seed(seed)
    n_rows, n = 3, 77
    x = (3 * mx.random.normal((n_rows, n))).astype(dtype)
    z = np.array(x.astype(mx.float32)).astype(np.float64)
    exact = np.log(np.exp(z).sum(-1))
    template = [("T", dtype), ("n", n), ("is_wide", True)]
    tolerance = 1e-6 if dtype == mx.float32 else 2**-11 if dtype == mx.float16 else 2**-8
    for order in ORDERS:
        (out,) = metal_kernel("logsumexp", ["x"], ["out"], LOG_SUM_EXP, HEADER, seed=order)(
            inputs=[x],
            template=template,
            grid=(32, n_rows, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(n_rows,)],
            output_dtypes=[dtype],
        )
        difference = np.abs(np.array(out.astype(mx.float32)) - exact).max()
        assert difference <= tolerance * np.abs(exact).max()
    if why_no_lint() is None:
        made = signature("logsumexp", ["x"], [(x.shape, dtype)], ["out"], [dtype], LOG_SUM_EXP, HEADER, template)
        assert lint(made.text, {"T": "half", "is_wide": True}) == []
        assert lint(made.text.replace("row * n, i", "row * n, tops"), {"T": "half"}) != []


def test_the_words_of_the_language_compile_and_have_no_lint() -> None:
    need()
    template = [("T", mx.float16), ("K", 16), ("is_wide", True)]
    half = ((64,), mx.float16)
    made = signature("words", ["x", "y"], [half, half], ["out"], [mx.float32], WORDS, WORDS_HEADER, template)
    source = '#include "mlx/backend/metal/kernels/utils.h"\n' + made.text
    assert Kernel(source, made.function, [mlx_include()]).build().exists()
    need("lint")
    assert lint(made.text, {"T": "half", "K": 16, "is_wide": True}) == []


INPUTS = {
    "0-d": mx.array(1.5),
    "few elements": mx.zeros((7,), mx.float16),
    "eight elements": mx.zeros((8,), mx.bfloat16),
    "matrix": mx.zeros((4, 5), mx.int8),
    "no elements": mx.zeros((0, 3), mx.uint32),
}
BODIES = {
    "plain": "out[thread_position_in_grid.x] = 0;",
    "shapes": "uint i = thread_index_in_simdgroup + x_shape[0] * x_strides[0] + x_ndim; out[i] = threads_per_grid.y;",
    "a word within a word": "int my_x_shape = simdgroup_index_in_threadgroup; out[grid_size.x + my_x_shape] = 1;",
}
TEMPLATES: dict[str, list[tuple[str, Any]]] = {
    "no template": [],
    "int": [("N", 3)],
    "all kinds": [("T", mx.bfloat16), ("N", -2), ("is_causal", True), ("is_wide", False)],
}


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", INPUTS)
def test_the_signature_equals_mlxs(kind: str, body: str, template: str) -> None:
    x, atomic = INPUTS[kind], kind == "matrix"
    arguments: dict[str, Any] = dict(name="probe", input_names=["x", "y"], output_names=["out", "flags"])
    arguments |= dict(source=BODIES[body], header="inline float twice(float a) { return 2 * a; }\n")
    y = mx.zeros((3, 3), mx.uint8)

    def call(x: mx.array, y: mx.array) -> Any:
        kernel: Any = mx.fast.metal_kernel(**arguments, atomic_outputs=atomic)
        return kernel(
            inputs=[x, y],
            template=TEMPLATES[template],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
            output_shapes=[(4,), ()],
            output_dtypes=[mx.float32, mx.uint32],
            verbose=True,
        )

    ours = signature(
        **arguments,
        inputs=[(x.shape, x.dtype), (y.shape, y.dtype)],
        output_dtypes=[mx.float32, mx.uint32],
        template=TEMPLATES[template],
        atomic_outputs=atomic,
    )
    assert ours.text == generated_by_mlx(call, x, y)


def test_a_call_accepts_the_same_arguments_as_mlx() -> None:
    """Strides of a transposed input, an initial value, atomics, a 0-d output, and a number as input."""
    need()
    body = """
        uint i = thread_position_in_grid.x;
        float part = x[i % 3 * x_strides[0] + i / 3 * x_strides[1]] * scale;
        atomic_fetch_add_explicit(&sum[0], part, memory_order_relaxed);
        if (i == 0) atomic_store_explicit(&count[0], threads_per_grid.x, memory_order_relaxed);
    """
    kernel = metal_kernel("k", ["x", "scale"], ["sum", "count"], body, ensure_row_contiguous=False, atomic_outputs=True)
    total, count = kernel(
        inputs=[mx.arange(12, dtype=mx.float32).reshape(4, 3).T, 2.0],
        grid=(12, 1, 1),
        threadgroup=(256, 1, 1),  # larger than the grid, as MLX allows
        output_shapes=[(1,), ()],
        output_dtypes=[mx.float32, mx.uint32],
        init_value=0,
    )
    assert total.item() == 132 and count.item() == 12
    assert total.dtype == mx.float32 and count.shape == ()


def test_unwritten_outputs_are_nan() -> None:
    need()
    kernel = metal_kernel("k", ["x"], ["out"], "if (thread_position_in_grid.x == 1) out[1] = T(x[0]);")
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        (out,) = kernel(
            inputs=[mx.array([3.0])],
            template=[("T", dtype)],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
            output_shapes=[(4,)],
            output_dtypes=[dtype],
        )
        assert mx.isnan(out).tolist() == [True, False, True, True] and out[1].item() == 3
