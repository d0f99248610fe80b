"""The one-pass head, compared with a float64 cross-entropy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.engine.whole_graph import log_sum_exp
from mebp_mlx.kernels import online_softmax
from mebp_mlx.kernels.online_softmax import SoftmaxState
from mebp_mlx.testing.tiny import relative_error


def _truth(h: np.ndarray, w: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    z = h.astype(np.float64) @ w.astype(np.float64).T
    z -= z.max(axis=1, keepdims=True)
    total = np.exp(z).sum(axis=1, keepdims=True)
    p = np.exp(z) / total
    rows = np.arange(len(y))
    p_minus_y = p.copy()
    p_minus_y[rows, y] -= 1
    return np.log(total[:, 0]) - z[rows, y], p_minus_y @ w


def _run(h: np.ndarray, w: np.ndarray, y: np.ndarray, chunk: int, dtype: mx.Dtype = mx.float32) -> tuple:
    H, W = mx.array(h).astype(dtype), mx.array(w).astype(dtype)
    state = SoftmaxState.start(len(y), h.shape[1], need_dh=True)
    for first in range(0, len(w), chunk):
        rows = W[first : first + chunk]
        step = online_softmax(H @ rows.T, *state.softmax, mx.array(y), first)
        state = state.update(step, step.p @ rows)
    return state.losses(), state.gradient(W[mx.array(y)])


@pytest.mark.parametrize("N, D, V, chunk", [(1, 3, 2, 1), (7, 13, 101, 32), (5, 8, 101, 101), (33, 20, 257, 50)])
@pytest.mark.parametrize("size", [0.1, 3.0, 60.0], ids=["flat", "usual", "peaked"])
def test_loss_and_dh(N: int, D: int, V: int, chunk: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h = (size * rng.standard_normal((N, D))).astype(np.float32)
    w = rng.standard_normal((V, D)).astype(np.float32)
    y = rng.integers(0, V, N)
    losses, dh = _run(h, w, y, chunk)
    true_losses, true_dh = _truth(h, w, y)
    # Float32's rounding of a logit is proportional to its size; it affects the loss and the exponent.
    noise = 4e-7 * (1 + np.abs(h.astype(np.float64) @ w.T).max())
    assert np.abs(np.asarray(losses) - true_losses).max() <= 10 * noise, f"seed {seed}"
    assert np.abs(np.asarray(dh) - true_dh).max() <= 20 * noise * np.abs(w).max(), f"seed {seed}"


@pytest.mark.parametrize("dtype, epsilon", [(mx.float16, 1e-3), (mx.bfloat16, 8e-3)], ids=str)
def test_16_bit_inputs_accumulate_in_float32(dtype: mx.Dtype, epsilon: float, seed: int) -> None:
    """The error is at most that of the plain 16-bit computation plus one rounding."""
    rng = np.random.default_rng(seed)
    N, D, V = 9, 32, 301
    h = np.asarray(mx.array(rng.standard_normal((N, D)), mx.float32).astype(dtype).astype(mx.float32))
    w = np.asarray(mx.array(rng.standard_normal((V, D)), mx.float32).astype(dtype).astype(mx.float32))
    y = rng.integers(0, V, N)
    losses, dh = _run(h, w, y, 64, dtype)
    assert losses.dtype == mx.float32 and dh.dtype == mx.float32
    true_losses, true_dh = _truth(h, w, y)
    H, W = mx.array(h).astype(dtype), mx.array(w).astype(dtype)
    z = H @ W.T
    plain = (mx.logsumexp(z, axis=1) - z[mx.arange(N), mx.array(y)]).astype(mx.float32)
    p = mx.softmax(z, axis=1) - mx.eye(V, dtype=dtype)[mx.array(y)]
    plain_dh = (p @ W).astype(mx.float32)
    assert relative_error(losses, true_losses) <= relative_error(plain, true_losses) + epsilon, f"seed {seed}"
    assert relative_error(dh, true_dh) <= relative_error(plain_dh, true_dh) + epsilon, f"seed {seed}"


def test_loss_only_keeps_no_weighted_sum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, w = mx.array(rng.standard_normal((4, 6)), mx.float32), mx.array(rng.standard_normal((20, 6)), mx.float32)
    state = SoftmaxState.start(4, 6, need_dh=False)
    state = state.update(online_softmax(h @ w.T, *state.softmax, mx.arange(4), 0), None)
    assert state.weighted is None and state.losses().shape == (4,)


@pytest.mark.parametrize("V", [5, 1000, 49157])
def test_the_oracles_log_sum_exp_is_accurate_for_any_vocabulary(V: int, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((4, V)) * 3).astype(np.float32)
    truth = np.log(np.exp(x.astype(np.float64)).sum(axis=-1))
    error = np.abs(np.asarray(log_sum_exp(mx.array(x)), np.float64) - truth).max()
    assert error <= 2e-6, f"seed {seed}"
    share = np.exp(x - truth[:, None])
    gradient = np.asarray(mx.grad(lambda x: log_sum_exp(x).sum())(mx.array(x)), np.float64)
    assert np.abs(gradient / share - 1).max() <= 1e-5, f"seed {seed}"
