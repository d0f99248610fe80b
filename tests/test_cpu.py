"""Gates, softmax and attention in numpy, compared with float64 and the MLX functions that they replace."""

from __future__ import annotations

import contextlib

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.kernels import cpu
from mebp_mlx.model.rope import Rope
from mebp_mlx.ops.attention import Heads, backward, forward
from mebp_mlx.ops.gated_mlp import GELU_TANH, SILU

GATES = {"silu": SILU, "gelu": GELU_TANH}

pytestmark = pytest.mark.skipif(not cpu.is_on(), reason="used on the CPU only")


def _error(actual: mx.array, truth: mx.array) -> float:
    """The largest difference divided by the largest true value."""
    expected = np.asarray(truth, np.float64)
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("spread", [1.0, 40.0])  # at 40 exp overflows, but the gate must not
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind: str, spread: float, seed: int) -> None:
    gate = GATES[kind]
    rng = np.random.default_rng(seed)
    g, u, c = (rng.standard_normal((7, 6113)) for _ in range(3))
    g *= spread
    truth = [mx.array(v.astype(np.float32)).astype(mx.float64) for v in (g, u, c)]
    m, dg, du = gate.backward(*truth)  # MLX's function, because numpy's takes only float32
    single = [v.astype(mx.float32) for v in truth]
    with cpu.off():
        plain = gate(*single[:2]), *gate.backward(*single)
        mx.eval(plain)
    assert np.array_equal(plain[0], plain[1])
    for in_place in (False, True):
        own = mx.array(single[0])
        actual = gate(own, single[1], in_place)
        assert _error(actual, m) <= _error(plain[0], m) + 1e-6, f"seed {seed}"
        assert np.array_equal(own, actual if in_place else single[0])
    for ours, theirs, exact in zip(gate.backward(*single), plain[1:], (m, dg, du), strict=True):
        assert _error(ours, exact) <= _error(theirs, exact) + 1e-6, f"seed {seed}"


def _heads(window: int | None, scale: float = 0.3) -> Heads:
    return Heads(8, scale, window, Rope(8, 1e4), 1e-5, {})


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("start, n_queries", [(0, 1), (0, 13), (20, 17)])
def test_attention_of_a_block_of_queries(
    heads: int, key_heads: int, start: int, n_queries: int, window: int | None, seed: int
) -> None:
    rng, settings, width = np.random.default_rng(seed), _heads(window), 8
    low, high = settings.key_range(start, start + n_queries)
    n_keys = high - low
    shapes = [(2, heads, n_queries, width), *[(2, key_heads, n_keys, width)] * 2, (2, n_queries, heads * width)]
    given = [mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]
    exact = [array.astype(mx.float64) for array in given]  # MLX's attention, because numpy's takes only float32
    truth = [forward(settings, *exact[:3], start, low), *backward(settings, *exact[:3], start, low, exact[3])]
    mx.eval(truth)
    floor = max(float(mx.abs(part).max()) for part in truth[1:])
    for off in (False, True):
        with cpu.off() if off else contextlib.nullcontext():
            a = forward(settings, *given[:3], start, low)
            actual = backward(settings, *given[:3], start, low, given[3])
            mx.eval(a, actual)
        assert _error(a, truth[0]) <= 2e-6, f"seed {seed}"
        for part, expected in zip(actual, truth[1:], strict=True):
            assert part.shape == expected.shape
            assert float(mx.abs(part.astype(mx.float64) - expected).max()) <= 4e-6 * floor, f"seed {seed}"


def test_a_nan_score_reaches_the_output() -> None:
    q = mx.ones((1, 1, 3, 8))
    k = mx.array(np.where(np.arange(24).reshape(1, 1, 3, 8) == 9, np.nan, 1).astype(np.float32))
    a = np.asarray(forward(_heads(None), q, k, mx.ones((1, 1, 3, 8)), 0, 0))
    assert not np.isnan(a[0, 0]).any() and np.isnan(a[0, 1:]).all()


def test_numpy_supports_only_float32_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, half = mx.zeros(3), mx.zeros(3, mx.bfloat16)
    assert cpu.serves(x) and cpu.serves(x, x) and not cpu.serves(half) and not cpu.serves(x, half)
    with cpu.off():
        assert not cpu.serves(x)
        with cpu.off():
            pass
        assert not cpu.serves(x)  # the outer context applies
    assert cpu.serves(x)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert not cpu.serves(x)
