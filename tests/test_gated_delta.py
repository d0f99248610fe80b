"""The chunked gated delta rule, compared with the plain recurrence in float64, and its hard cases."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.families import gated_delta as block_file
from mebp_mlx.families.gated_delta import GatedDeltaBlock
from mebp_mlx.kernels import cpu
from mebp_mlx.ops import gated_delta, short_conv, silu
from mebp_mlx.ops.gated_delta import Tokens
from mebp_mlx.ops.plan import Barrier, Plan
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model

pytestmark = pytest.mark.quick
B, HK, HV, DK, DV = 2, 2, 4, 12, 9


def _recurrence(q: Any, k: Any, v: Any, g: Any, beta: Any, S: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token by token: S_t = a S + k u^T, u = b (v - a S^T k), o = S_t^T q."""
    q, k = (np.repeat(x, HV // HK, axis=2) for x in (q, k))
    out = []
    for t in range(v.shape[1]):
        S = np.exp(g[:, t])[..., None, None] * S
        u = beta[:, t][..., None] * (v[:, t] - np.einsum("bhkv,bhk->bhv", S, k[:, t]))
        S = S + np.einsum("bhk,bhv->bhkv", k[:, t], u)
        out.append(np.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return np.stack(out, axis=1), S


def _inputs(T: int, seed: int, g: float | None, beta: float | None, one_key: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    q, k = rng.normal(size=(B, T, HK, DK)), rng.normal(size=(B, 1 if one_key else T, HK, DK))
    k = np.broadcast_to(k, q.shape)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    decay = -rng.uniform(0, 8, HV) * np.log1p(np.exp(rng.normal(-3, 2, (B, T, HV))))
    write = 1 / (1 + np.exp(-rng.normal(size=(B, T, HV))))
    decay = decay if g is None else np.where(rng.random((B, T, HV)) < 0.5, g, decay * (g != 0))
    write = write if beta is None else np.full((B, T, HV), beta)
    return [q * DK**-0.5, k, rng.normal(size=(B, T, HV, DV)), decay, write, rng.normal(size=(B, HV, DK, DV))]


def _ours(inputs: list[np.ndarray]) -> tuple[Tokens, mx.array]:
    arrays = [mx.array(x, mx.float32) for x in inputs]
    return Tokens(*arrays[:5]), arrays[5].reshape(B, HK, HV // HK, DK, DV)


def _error(found: Any, expected: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(found, np.float64) - expected)) / max(np.max(np.abs(expected)), 1e-30))


CASES = [(None, None, False), (0.0, None, False), (-1e4, None, False), (None, 0.0, False), (0.0, 1.0, True)]


@pytest.mark.parametrize("g, beta, one_key", CASES)
@pytest.mark.parametrize("T", [1, 17, 64, 130])
def test_outputs_and_gradients_equal_the_recurrences(
    T: int, g: float | None, beta: float | None, one_key: bool, seed: int
) -> None:
    inputs, rng = _inputs(T, seed, g, beta, one_key), np.random.default_rng(seed + 1)
    tokens, S = _ours(inputs)
    o, states = gated_delta.forward(tokens, S, Barrier("op"))
    expected, last = _recurrence(*inputs)
    assert not (_error(o, expected) > 1e-5) and not (_error(states[-1].reshape(last.shape), last) > 1e-5)
    do, dS = rng.normal(size=expected.shape), rng.normal(size=last.shape)
    d_states = mx.array(dS, mx.float32).reshape(states[-1].shape)
    found = gated_delta.backward(tokens, states, mx.array(do, mx.float32), d_states, Barrier("op"))
    gradients = [*found[0], found[1].reshape(last.shape)]

    def loss(inputs: list[np.ndarray]) -> float:
        outputs, state = _recurrence(*inputs)
        return float((outputs * do).sum() + (state * dS).sum())

    # One direction per input: the float64 difference quotient is accurate to about 1e-9.
    for index, (x, gradient) in enumerate(zip(inputs, gradients, strict=True)):
        direction, eps = rng.normal(size=x.shape), 1e-6
        moved = [[*inputs[:index], x + sign * eps * direction, *inputs[index + 1 :]] for sign in (1, -1)]
        quotient = (loss(moved[0]) - loss(moved[1])) / (2 * eps)
        slope = np.asarray(gradient, np.float64) * direction
        assert not (abs(slope.sum() - quotient) > 1e-5 * max(np.abs(slope).sum(), 1e-6)), (index, seed)


def test_the_triangular_inverse_is_exact_where_powers_overflow() -> None:
    """With equal keys and b = 1 the entries stay in [-1, 1], but the matrix's powers do not."""
    C = 64
    a = mx.tril(mx.ones((C, C)), -1)
    assert _error(gated_delta.unit_lower_inverse(a), np.linalg.inv(np.eye(C) + np.tril(np.ones((C, C)), -1))) < 1e-6
    rng = np.random.default_rng(0)
    odd = np.tril(rng.normal(size=(3, 37, 37)), -1) * 0.2
    assert _error(gated_delta.unit_lower_inverse(mx.array(odd, mx.float32)), np.linalg.inv(np.eye(37) + odd)) < 1e-5


@pytest.mark.parametrize("cuts", [(1, 2), (2, 3, 7), (5,)])
def test_a_convolution_in_tiles_equals_that_of_the_whole_row(cuts: tuple[int, ...], seed: int) -> None:
    rng, T, K, D = np.random.default_rng(seed), 11, 4, 6
    w, x, dy = (mx.array(rng.normal(size=shape), mx.float32) for shape in ((K, D), (2, T, D), (2, T, D)))
    zeros = mx.zeros((2, K - 1, D))
    whole = short_conv.forward(w, x, zeros)
    d_whole = mx.vjp(lambda x: short_conv.forward(w, x, zeros), [x], [dy])[1][0]
    ranges = list(zip((0, *cuts), (*cuts, T), strict=True))
    before, outputs = zeros, []
    for start, stop in ranges:
        outputs.append(short_conv.forward(w, x[:, start:stop], before))
        before = short_conv.last(before, x[:, start:stop])
    after, parts = zeros, []
    for start, stop in reversed(ranges):
        parts.append(short_conv.backward(w, dy[:, start:stop], after))
        after = short_conv.first(dy[:, start:stop], after)
    assert mx.array_equal(mx.concatenate(outputs, axis=1), whole).item()
    assert not (_error(mx.concatenate(parts[::-1], axis=1), np.asarray(d_whole, np.float64)) > 1e-6)


def test_states_between_tiles_are_few_and_change_no_gradient(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 10 tiles has the gradients of one large tile, and holds only a fraction of its states at a time."""
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS["qwen3_5"], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2, keys=["linear_attn.in_proj_qkv"])
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 1, 64 * 10 - 7, model.spec.V)
    held, first_state = [], GatedDeltaBlock.first_state

    def watched(block: GatedDeltaBlock) -> mx.array | None:
        S = first_state(block)
        held.append(len(block.run.states))
        return S

    monkeypatch.setattr(GatedDeltaBlock, "first_state", watched)
    monkeypatch.setattr(block_file, "_APART", 3)
    plans = [Plan("op", token_block=length) for length in (64, 4096)]
    (_, actual), (_, expected) = (mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan) for plan in plans)
    assert max(held) <= 3 + 10 // 3
    for name, gradient in expected.items():
        assert not (_error(actual[name], np.asarray(gradient, np.float64)) > 1e-5), name


def test_silu_and_its_slope_are_those_of_float64(seed: int) -> None:
    x, g = np.random.default_rng(seed).normal(size=(2, 70_001)) * 8
    x[:3] = -100, 100, 0
    s = 1 / (1 + np.exp(-x))
    for context in (contextlib.nullcontext(), cpu.off()):
        with context:
            arrays = [mx.array(a, mx.float32) for a in (x, g)]
            assert not (_error(silu.silu(arrays[0]), x * s) > 1e-6)
            assert not (_error(silu.backward(*arrays), g * s * (1 + x * (1 - s))) > 1e-6)
            assert not (_error(silu.exp(-mx.abs(arrays[0])), np.exp(-np.abs(x))) > 1e-6)
            swapped = arrays[0][:70_000].reshape(200, 350).T  # not contiguous
            assert not (_error(silu.silu(swapped), (x * s)[:70_000].reshape(200, 350).T) > 1e-6)
