"""The Metal kernels' real sources, emulated without Metal: exact for every order of threads, and without faults."""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx import kernels
from mebp_mlx.kernels import linear_cross_entropy, online_softmax, selfcheck
from mebp_mlx.kernels.online_softmax import SoftmaxState
from tests import metal_on_cpu
from tests.emulated import SOURCES, running

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
ORDERS = [0, 1, 2]
NAMES = list(SOURCES)
# A kernel's error may exceed its reference's by a few roundings of the dtype, relative to the largest number.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@pytest.fixture
def check(record_property: Any) -> Any:
    """check(kernel, kind): counts this case in the table of kernels and checks at the end of the run."""
    return lambda kernel, kind: record_property("kernel_check", (kernel, kind))


def _wide(x: mx.array) -> np.ndarray:
    return np.asarray(x.astype(mx.float32)).astype(np.float64)


def _assert_no_worse(
    actual: mx.array, reference: mx.array, truth: np.ndarray, dtype: mx.Dtype, seed: int, tolerance: int = 1
) -> None:
    """error <= error of the reference in that dtype + tolerance; NaN fails."""
    size = max(float(np.abs(truth).max(initial=0)), 1.0)
    error, theirs = (float(np.abs(_wide(x) - truth).max(initial=0)) for x in (actual, reference))
    assert error <= theirs + tolerance * TOLERANCE[dtype] * size, f"seed {seed}: {error} against {theirs}"


def _softmax_chunks(z: mx.array, targets: mx.array, chunks: list[tuple[int, int]], impl: str) -> list[mx.array]:
    """[p of the last chunk, maximum, total, target_logit, shrink] after all chunks."""
    state = SoftmaxState.start(z.shape[0], 1, need_dh=False).softmax
    for start, stop in chunks:
        step = online_softmax(z[:, start:stop], *state, targets, start, impl=impl)
        state = step[1:4]
    return list(step)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, C", [(1, 1), (3, 31), (5, 257), (2, 1500)])
def test_online_softmax(T: int, C: int, dtype: mx.Dtype, order: int, seed: int, check: Any) -> None:
    check("online_softmax", f"{str(dtype).rpartition('.')[2]}, thread order {order}")
    rng = np.random.default_rng(seed)
    z = mx.array(rng.normal(0, 6, (T, 3 * C)), mx.float32).astype(dtype)
    targets = mx.array(rng.integers(-2, 3 * C, T), mx.int32)
    chunks = [(0, C), (C, 2 * C), (2 * C, 3 * C)]
    with running(order):
        actual = _softmax_chunks(z, targets, chunks, "metal")
        mx.eval(actual)
    reference = _softmax_chunks(z, targets, chunks, "reference")
    wide, y = _wide(z), np.asarray(targets)
    before, highest = wide[:, : 2 * C].max(axis=1), wide.max(axis=1)
    truth = [
        np.exp(wide[:, 2 * C :] - highest[:, None]),
        highest,
        np.exp(wide - highest[:, None]).sum(axis=1),
        np.where(y >= 0, wide[np.arange(T), np.maximum(y, 0)], 0),
        np.exp(before - highest),
    ]
    assert actual[0].dtype == dtype and all(x.dtype == mx.float32 for x in actual[1:])
    for f, r, t in zip(actual, reference, truth, strict=True):
        _assert_no_worse(f, r, t, dtype, seed)


def _head(rng: np.random.Generator, T: int, V: int, D: int, group: int, dtype: mx.Dtype, symmetric: bool) -> tuple:
    flat = rng.choice([1.0, D**-0.5])  # peaked or flat logits
    h = mx.array(rng.normal(0, flat, (T, D)), mx.float32).astype(dtype)
    packed, scales, biases = mx.quantize(mx.array(rng.normal(0, 1, (V, D)), mx.float32), group_size=group, bits=4)
    scales = scales.astype(dtype)
    biases = -8 * scales if symmetric else biases.astype(dtype)
    targets = rng.integers(0, V, T).astype(np.int32)
    targets[rng.random(T) < 0.3] = -100
    return h, packed, scales, biases, mx.array(targets)


def _head_truth(
    h: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, targets: mx.array, group: int
) -> Any:
    """(losses, dh of their sum) in float64."""
    wide = [scales.astype(mx.float32), biases.astype(mx.float32)]
    w = np.asarray(mx.dequantize(packed, *wide, group_size=group, bits=4)).astype(np.float64)
    z, y = _wide(h) @ w.T, np.asarray(targets)
    highest = z.max(axis=1, keepdims=True)
    p = np.exp(z - highest)
    labelled, rows = y >= 0, np.arange(len(y))
    losses = np.log(p.sum(axis=1)) + highest[:, 0] - z[rows, np.maximum(y, 0)]
    dh = (p / p.sum(axis=1, keepdims=True)) @ w - w[np.maximum(y, 0)]
    return np.where(labelled, losses, 0), np.where(labelled[:, None], dh, 0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "T, V, D, group, symmetric",
    [
        (1, 3, 32, 32, False),
        (33, 205, 96, 32, True),
        (7, 129, 128, 64, False),
        (70, 64, 256, 128, True),
        (5, 1037, 64, 64, False),
    ],
)
def test_linear_cross_entropy(
    T: int, V: int, D: int, group: int, symmetric: bool, dtype: mx.Dtype, order: int, seed: int, check: Any
) -> None:
    check("linear_cross_entropy", f"{str(dtype).rpartition('.')[2]}, thread order {order}")
    arguments = _head(np.random.default_rng(seed), T, V, D, group, dtype, symmetric)
    h, *weight, targets = arguments
    how = {"group_size": group, "symmetric": symmetric}
    with running(order):
        actual = linear_cross_entropy(h, weight, targets, **how, impl="metal")
        mx.eval(actual)
    assert actual.dtype == mx.float32
    reference = linear_cross_entropy(h, weight, targets, **how, impl="reference")
    _assert_no_worse(actual, reference, _head_truth(*arguments, group)[0], dtype, seed)


def test_linear_cross_entropy_of_the_largest_vocabulary(seed: int, check: Any) -> None:
    check("linear_cross_entropy", "V = 262,144")
    arguments = _head(np.random.default_rng(seed), 3, 262_144, 32, 32, mx.bfloat16, False)
    h, *weight, targets = arguments
    with running():
        actual = linear_cross_entropy(h, weight, targets, group_size=32, impl="metal")
        mx.eval(actual)
    reference = linear_cross_entropy(h, weight, targets, group_size=32, impl="reference")
    _assert_no_worse(actual, reference, _head_truth(*arguments, 32)[0], mx.bfloat16, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["metal", "reference"])
def test_gradient_of_linear_cross_entropy(impl: str, dtype: mx.Dtype, seed: int, check: Any) -> None:
    """Weighted by the cotangent, zero without a label; no worse than autograd in 16 bits."""
    if impl == "metal":
        check("linear_cross_entropy", "gradient")
        check("online_softmax", "gradient of the head")
    rng = np.random.default_rng(seed)
    h, *rest = _head(rng, 9, 141, 64, 32, dtype, False)
    weights = rng.normal(0, 1, 9)

    def total(h: mx.array) -> mx.array:
        losses = linear_cross_entropy(h, rest[:-1], rest[-1], group_size=32, impl=impl)
        return (losses * mx.array(weights, mx.float32)).sum()

    def plain(h: mx.array) -> mx.array:
        packed, scales, biases, targets = rest
        z = h @ mx.dequantize(packed, scales, biases, group_size=32, bits=4).T
        picked = mx.take_along_axis(z, mx.maximum(targets, 0)[:, None], axis=1)[:, 0]
        losses = mx.where(targets >= 0, mx.logsumexp(z, axis=1) - picked, 0).astype(mx.float32)
        return (losses * mx.array(weights, mx.float32)).sum()

    with running():
        actual = mx.grad(total)(h)
        mx.eval(actual)
    assert actual.dtype == dtype
    truth = _head_truth(h, *rest, 32)[1] * weights[:, None]
    # On the CPU the quantized product of 16-bit rows is summed in 16 bits.
    _assert_no_worse(actual, mx.grad(plain)(h), truth, dtype, seed, tolerance=1 if dtype == mx.float32 else 10)
    assert not np.asarray(actual.astype(mx.float32))[np.asarray(rest[-1]) < 0].any()


@pytest.mark.parametrize("sanitize", ["address", "thread"])
@pytest.mark.parametrize("name", NAMES)
def test_sanitizers_find_nothing(name: str, sanitize: str, check: Any) -> None:
    check(name, f"{sanitize} sanitizer")
    kernel = selfcheck.KERNELS[name]
    with running(sanitize=sanitize):
        for group_size in {kernel.group_sizes[0], kernel.group_sizes[-1]}:
            assert selfcheck.check(kernel, mx.bfloat16, group_size) == ""


def _call(name: str, dtype: mx.Dtype, group_size: int) -> tuple[Any, tuple]:
    """(function of a kernel's array arguments that calls it with verbose=True, the arguments)."""
    kernel, source = selfcheck.KERNELS[name], SOURCES[name]
    arguments = kernel.sample(dtype, group_size)
    arrays = [a for a in arguments if isinstance(a, mx.array)]

    def call(*given: mx.array) -> Any:
        left = list(given)
        return kernel.metal(*(left.pop(0) if isinstance(a, mx.array) else a for a in arguments))

    def verbose(**how: Any) -> Any:
        built = mx.fast.metal_kernel(**how)
        return lambda **more: built(**more, verbose=True)

    assert source.inputs
    return (call, verbose), tuple(arrays)


@pytest.mark.skipif(mx.metal.is_available(), reason="the signature is MLX's own on Metal")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_emulated_signature_equals_mlxs(name: str, dtype: mx.Dtype, check: Any, monkeypatch: Any) -> None:
    check(name, "signature")
    group_size = selfcheck.KERNELS[name].group_sizes[0]
    (call, verbose), arrays = _call(name, dtype, group_size)
    texts: list[str] = []

    def recording(**how: Any) -> Any:
        def run(*, inputs: Any, template: Any, output_dtypes: Any, **_: Any) -> Any:
            given = [(x.shape, x.dtype) for x in inputs]
            names = (how["input_names"], given, how["output_names"], output_dtypes)
            body = (how["source"], how["header"])
            texts.append(metal_on_cpu.signature(how["name"], *names, *body, template=template).text)
            return verbose(**how)(inputs=inputs, template=template, output_dtypes=output_dtypes, **_)

        return run

    monkeypatch.setattr(kernels.metal, "factory", recording)
    SOURCES[name].__dict__.pop("_kernel", None)
    try:
        generated = metal_on_cpu.generated_by_mlx(call, *arrays)
    finally:
        SOURCES[name].__dict__.pop("_kernel", None)
    assert texts[0].split() == generated.split()


@pytest.mark.skipif(bool(metal_on_cpu.why_no_lint()), reason=str(metal_on_cpu.why_no_lint()))
@pytest.mark.parametrize("name", NAMES)
def test_address_spaces(name: str, check: Any) -> None:
    check(name, "address-space lint")
    tiles = {"scalar": "half", "D": 128, "ROWS": 32, "COLUMNS": 16, "SPLIT": 2, "HELD": True}
    templates = dict.fromkeys(kernels.attention.NAMES, tiles) | {
        "online_softmax": {"scalar": "half", "THREADS": 256},
        "linear_cross_entropy": {"scalar": "half", "GROUP": 32, "SYMMETRIC": False},
    }
    assert metal_on_cpu.lint(_generated(name), templates[name]) == []
    spaces = r"threadgroup (float (?:partial\[32\]|tile\[[^;]*\])|uint4 \w+\[[^;]*\]);"
    broken = re.sub(spaces, r"device \1;", _generated(name))
    assert broken != _generated(name) and metal_on_cpu.lint(broken, templates[name]) != []


def _generated(name: str) -> str:
    """A kernel's complete source, as MLX would compile it for float16 inputs."""
    texts: list[str] = []

    def recording(**how: Any) -> Any:
        def run(*, inputs: Any, template: Any, output_shapes: Any, output_dtypes: Any, **_: Any) -> Any:
            given = [(x.shape, x.dtype) for x in inputs]
            names = (how["input_names"], given, how["output_names"], output_dtypes)
            body = (how["source"], how["header"])
            texts.append(metal_on_cpu.signature(how["name"], *names, *body, template=template).text)
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes, strict=True)]

        return run

    kernel = selfcheck.KERNELS[name]
    before, kernels.metal.factory = kernels.metal.factory, recording
    SOURCES[name].__dict__.pop("_kernel", None)
    try:
        kernel.metal(*kernel.sample(mx.float16, kernel.group_sizes[0]))
    finally:
        kernels.metal.factory = before
        SOURCES[name].__dict__.pop("_kernel", None)
    return texts[0]


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# Faults planted in the kernels: the checks above must detect each.
FAULTS = {
    "online_softmax: no barrier": (BARRIER, "", ""),
    "online_softmax: the old total is not shrunk": ("total[row] * factor", "total[row]", ""),
    "online_softmax: a half sum": ("float sum = 0.0f;", "half sum = 0.0h;", ""),
    "online_softmax: one column too many": ("c < C; c += THREADS", "c <= C; c += THREADS", "address"),
    "online_softmax: the target of another chunk": ("column >= 0 && column < C", "column < C", "address"),
    "linear_cross_entropy: no barrier": (BARRIER, "", "thread"),
    "attention_forward: no barrier": (BARRIER, "", ""),
    "attention_forward: the old sums are not shrunk": ("sums[d].thread_elements()[0] *= shrink;", "", ""),
    "attention_forward: the old total is not shrunk": ("total *= shrink;", "", ""),
    "attention_forward: hidden keys count as 0": ("* scale2 : -INFINITY", "* scale2 : 0.0f", ""),
    "attention_forward: rows beyond Tq are written": ("if (is_row) {", "if (true) {", "address"),
    "attention_forward: the wrong head's keys": ("head % n_heads / (n_heads / n_key_heads)", "head % n_key_heads", ""),
    "attention_dq: no barrier": (BARRIER, "", ""),
    "attention_dq: no delta": ("dp[j].thread_elements()[e] - own_delta", "dp[j].thread_elements()[e]", ""),
    "attention_dq: a half sum": ("float own_delta = 0.0f;", "half own_delta = 0.0h;", ""),
    "attention_dkv: no barrier": (BARRIER, "", ""),
    "attention_dkv: one head of the group": (
        "head < (key_head + 1) * per_key_head",
        "head < key_head * per_key_head + 1",
        "",
    ),
    "attention_dkv: hidden pairs count": ("seen ? weight : 0.0f", "weight", ""),
    "attention_dkv: rows beyond Tq are read": ("is_row ? delta[", "true ? delta[", "address"),
    "attention_dkv: keys beyond the last are written": ("if (is_key) {", "if (true) {", "address"),
    "linear_cross_entropy: no rescaling": ("sum *= metal::precise::exp(maximum - highest);", "", ""),
    "linear_cross_entropy: rows beyond T are written": (" && row_start + own_row < T) {", ") {", "address"),
    "linear_cross_entropy: columns beyond V take part": (
        "metal::clamp(last - column_start - own_columns, 0, ",
        "(",
        "",
    ),
    "linear_cross_entropy: codes in the wrong order": ("(4 * i)", "(28 - 4 * i)", ""),
    "linear_cross_entropy: the scale of another group": ("word * 8) / GROUP", "word * 8 + GROUP - 1) / GROUP", ""),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="faults are planted into emulated kernels only")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str) -> None:
    name = fault.partition(":")[0]
    before, after, sanitize = FAULTS[fault]

    def change(text: str) -> str:
        return text.replace(before, after)

    assert before in SOURCES[name].text
    kernel = selfcheck.KERNELS[name]
    problems = []
    for order in ORDERS if not sanitize else ORDERS[:1]:
        with running(order, sanitize, change):
            problems += [selfcheck.check(kernel, dtype, kernel.group_sizes[0]) for dtype in DTYPES[:2]]
    assert any(problems), "nobody noticed"
