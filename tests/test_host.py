"""Gates, softmax and attention in numpy against float64, and against the MLX functions they stand in for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.engine import host, scores
from mebp_mlx.model.attention import attend, key_range
from mebp_mlx.model.decoder import gelu_gate, silu_gate
from mebp_mlx.model.spec import Layer, ModelSpec

GATES = {"silu": silu_gate, "gelu": gelu_gate}


def _error(found: mx.array, truth: mx.array) -> float:
    """Largest difference over the largest true value."""
    expected = np.asarray(truth, np.float64)
    return float(np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("spread", [1.0, 40.0])  # 40: exp overflows, and the gate must not
@pytest.mark.parametrize("kind", GATES)
def test_gates(kind: str, spread: float, seed: int) -> None:
    gate = GATES[kind]
    rng = np.random.default_rng(seed)
    g, u, c = (rng.standard_normal((7, 6113)) for _ in range(3))
    g *= spread
    truth = [mx.array(v.astype(np.float32)).astype(mx.float64) for v in (g, u, c)]
    (m,), (dg, du) = mx.vjp(gate, truth[:2], truth[2:])
    single = [v.astype(mx.float32) for v in truth]
    (m32,), (dg32, du32) = mx.vjp(gate, single[:2], single[2:])
    mx.eval(m32, dg32, du32)
    found = host.gate_forward(gate, mx.array(single[0]), single[1])
    assert _error(found, m) <= _error(m32, m) + 1e-6, f"seed {seed}"
    for ours, theirs, exact in zip(host.gate_backward(gate, *single), (m32, dg32, du32), (m, dg, du), strict=True):
        assert _error(ours, exact) <= _error(theirs, exact) + 1e-6, f"seed {seed}"


class _Spec:
    attention_scale = 0.3


class _Layer:
    def __init__(self, window: int | None):
        self.window = window


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("start, n_queries", [(0, 1), (0, 13), (20, 17)])
def test_attention_of_a_block_of_queries(
    heads: int, key_heads: int, start: int, n_queries: int, window: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    spec: ModelSpec = _Spec()  # type: ignore[assignment]
    layer: Layer = _Layer(window)  # type: ignore[assignment]
    first, stop = key_range(layer, start, start + n_queries)
    n_keys, width = stop - first, 8
    shapes = [(2, heads, n_queries, width), *[(2, key_heads, n_keys, width)] * 2, (2, n_queries, heads * width)]
    q, k, v, da = (mx.array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes)

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attend(spec, layer, q, k, v, start, first)

    exact = [array.astype(mx.float64) for array in (q, k, v, da)]
    (a,), expected = mx.vjp(plain, exact[:3], exact[3:])
    mx.eval(a, expected)
    assert _error(scores.forward(spec, layer, q, k, v, start, first), a) <= 2e-6, f"seed {seed}"
    floor = max(float(mx.abs(part).max()) for part in expected)
    for found, part in zip(scores.backward(spec, layer, q, k, v, start, first, da), expected, strict=True):
        assert found.shape == part.shape
        assert float(mx.abs(found.astype(mx.float64) - part).max()) <= 4e-6 * floor, f"seed {seed}"


def test_a_logit_that_is_no_number_stays_visible() -> None:
    spec: ModelSpec = _Spec()  # type: ignore[assignment]
    layer: Layer = _Layer(None)  # type: ignore[assignment]
    q = mx.ones((1, 1, 3, 4))
    k = mx.array(np.where(np.arange(12).reshape(1, 1, 3, 4) == 5, np.nan, 1).astype(np.float32))
    a = np.asarray(scores.forward(spec, layer, q, k, mx.ones((1, 1, 3, 4)), 0, 0))
    assert not np.isnan(a[0, 0]).any() and np.isnan(a[0, 1:]).all()
