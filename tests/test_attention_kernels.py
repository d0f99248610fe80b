"""The attention kernels' real sources, emulated without Metal, compared with float64 and their references."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine.backprop import BackpropEngine, KeptSizes
from mebp_mlx.kernels import attention, metal, selfcheck
from mebp_mlx.ops import attention as ops
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, SAVE_PROJECTIONS, Plan
from mebp_mlx.planner import probe as probes
from mebp_mlx.planner.search import ladder
from mebp_mlx.planner.work import count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.testing.reference import largest_error
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model
from tests.emulated import running

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Margin of a kernel's error over its reference's: a few roundings of the dtype, relative to the largest number.
TOLERANCE = {mx.float32: 4e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


class Case(NamedTuple):
    """Heads, key heads, queries, keys, offset, window."""

    H: int
    K: int
    Tq: int
    Tk: int
    offset: int
    window: int | None


ROW = Case(2, 1, 31, 31, 0, None)
CASES = {
    64: [ROW, Case(14, 2, 33, 33, 0, 40), Case(2, 2, 63, 133, 70, None), Case(2, 1, 1, 1, 0, None)],
    80: [ROW, Case(2, 2, 70, 70, 0, 5)],
    96: [ROW, Case(3, 1, 40, 90, 41, 33)],
    128: [ROW, Case(2, 1, 65, 65, 0, 1), Case(4, 2, 17, 80, 50, 100)],
    256: [ROW, Case(2, 1, 40, 40, 0, 19), Case(2, 2, 18, 67, 49, None)],
}


@pytest.fixture
def check(record_property: Any) -> Any:
    """check(kind) counts this case for each kernel in the table at the end of the run."""
    return lambda kind: [record_property("kernel_check", (name, kind)) for name in attention.NAMES]


def _wide(x: mx.array) -> np.ndarray:
    return np.asarray(x.astype(mx.float32)).astype(np.float64)


def _draw(rng: np.random.Generator, case: Case, D: int, dtype: mx.Dtype, size: float = 1.0) -> list[mx.array]:
    """q, k, v, d_o."""
    shapes = [(1, case.H, case.Tq, D), *[(1, case.K, case.Tk, D)] * 2, (1, case.Tq, case.H, D)]
    q, *rest = (mx.array(rng.normal(size=shape), mx.float32) for shape in shapes)
    return [x.astype(dtype) for x in (q * size, *rest)]


def _by(impl: str, arrays: list[mx.array], case: Case, low: int = 0) -> list[mx.array]:
    """o, log-sum-exp, dq, delta, dk, dv by the kernels, or by their references."""
    q, k, v, d_o = arrays
    place = (q.shape[-1] ** -0.5, case.offset, case.window)
    o, lse = attention.attention_forward(q, k, v, *place, impl=impl)
    dq, delta = attention.attention_dq(q, k, v, (o, lse), d_o, place, impl=impl)
    dk, dv = attention.attention_dkv(q, k, v, d_o, (lse, delta), (*place, low, case.Tk), impl=impl)
    mx.eval(o, lse, dq, delta, dk, dv)
    return [o, lse, dq, delta, dk, dv]


def _seen(case: Case) -> np.ndarray:
    i, j = case.offset + np.arange(case.Tq)[:, None], np.arange(case.Tk)[None]
    return (j <= i) & (j > i - (case.window or 1 << 30))


def _truth(arrays: list[mx.array], case: Case) -> list[np.ndarray]:
    """o, log-sum-exp, dq, delta, dk, dv in float64."""
    q, k, v, d_o = (_wide(x)[0] for x in arrays)
    d_o, scale, G = d_o.swapaxes(0, 1), q.shape[-1] ** -0.5, case.H // case.K
    kk, vv = k.repeat(G, 0), v.repeat(G, 0)
    s = np.where(_seen(case), scale * q @ kk.swapaxes(1, 2), -np.inf)
    top = s.max(-1, keepdims=True)
    weights = np.exp(s - np.where(np.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    p = weights / np.where(total > 0, total, 1)
    o = p @ vv
    delta = (d_o * o).sum(-1)
    ds = scale * p * (d_o @ vv.swapaxes(1, 2) - delta[..., None])
    dk, dv = ((x.swapaxes(1, 2) @ y).reshape(case.K, G, *k.shape[1:]).sum(1) for x, y in ((ds, q), (p, d_o)))
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return [o.swapaxes(0, 1), lse, ds @ kk, delta, dk, dv]


def _assert_no_worse(actual: list[mx.array], reference: list[mx.array], truth: list[np.ndarray]) -> None:
    """error <= error of the reference in that dtype + a few roundings; NaN fails."""
    dtype = actual[0].dtype
    for name, f, r, t in zip(("o", "lse", "dq", "delta", "dk", "dv"), actual, reference, truth, strict=True):
        is_finite = np.isfinite(t)
        assert np.array_equal(_wide(f)[0][~is_finite], t[~is_finite])
        error, theirs = (float(np.abs(_wide(x)[0][is_finite] - t[is_finite]).max(initial=0)) for x in (f, r))
        size = max(float(np.abs(t[is_finite]).max(initial=0)), 1.0)
        assert error <= theirs + TOLERANCE[dtype] * size, f"{name}: {error} against {theirs}, of {size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_no_worse_than_the_reference_in_any_order_of_threads(D: int, dtype: mx.Dtype, seed: int, check: Any) -> None:
    check(f"{str(dtype).rpartition('.')[2]}, head dim {D}")
    rng = np.random.default_rng(seed)
    for case in CASES[D]:
        arrays = _draw(rng, case, D, dtype)
        found = []
        for order in (0, 1, 2) if case == ROW else (int(rng.integers(3, 9)),):
            with running(order):
                found.append(_by("metal", arrays, case))
        _assert_no_worse(found[0], _by("reference", arrays, case), _truth(arrays, case))
        assert [x.dtype for x in found[0]] == [dtype, mx.float32, dtype, *[mx.float32] * 3]
        for other in found[1:]:
            assert all(np.array_equal(_wide(x), _wide(y)) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("T", "window"), [(257, None), (257, 100), (1000, 150)])
def test_long_rows(T: int, window: int | None, seed: int, check: Any) -> None:
    check(f"{T} tokens")
    case = Case(1, 1, T, T, 0, window)
    arrays = _draw(np.random.default_rng(seed), case, 64, mx.bfloat16)
    with running():
        _assert_no_worse(_by("metal", arrays, case), _by("reference", arrays, case), _truth(arrays, case))


def test_large_scores(seed: int) -> None:
    """Scores of about +-60: the same softmax, and gradients that almost vanish."""
    case = Case(2, 1, 40, 40, 0, None)
    arrays = _draw(np.random.default_rng(seed), case, 64, mx.float32, 20.0)
    with running():
        _assert_no_worse(_by("metal", arrays, case), _by("reference", arrays, case), _truth(arrays, case))


def test_queries_before_the_first_key_have_no_output_and_no_gradient(seed: int) -> None:
    case = Case(2, 1, 40, 40, -35, 3)
    arrays = _draw(np.random.default_rng(seed), case, 64, mx.float32)
    with running():
        o, lse, dq, *_ = actual = _by("metal", arrays, case)
    _assert_no_worse(actual, _by("reference", arrays, case), _truth(arrays, case))
    assert not _wide(o)[:, :35].any() and not _wide(dq)[:, :, :35].any() and (_wide(lse)[:, :, :35] == -np.inf).all()


def test_only_the_requested_keys_are_written(seed: int) -> None:
    case = Case(2, 1, 20, 60, 40, None)
    arrays = _draw(np.random.default_rng(seed), case, 64, mx.float32)
    with running():
        whole, part = (_by("metal", arrays, case, low)[4:] for low in (0, 37))
    assert all(np.array_equal(_wide(x)[:, :, 37:], _wide(y)) for x, y in zip(whole, part, strict=True))


def test_several_rows_of_a_batch(seed: int) -> None:
    """Bit-equal to each row alone."""
    case = Case(4, 2, 35, 35, 0, 20)
    rng = np.random.default_rng(seed)
    rows = [_draw(rng, case, 64, mx.float16) for _ in range(2)]
    with running():
        alone = [_by("metal", row, case) for row in rows]
        both = _by("metal", [mx.concatenate(pair) for pair in zip(*rows, strict=True)], case)
    for one, two, x in zip(*alone, both, strict=True):
        assert np.array_equal(_wide(mx.concatenate([one, two])), _wide(x))


def sweep(seed: int, case_of: Callable[[int, np.random.Generator], Case]) -> None:
    """Every residue of the offset for tiles of 32, on which alone the kernels' loop bounds depend."""
    rng = np.random.default_rng(seed)
    for offset in range(33):
        case = case_of(offset, rng)
        arrays = _draw(rng, case, 64, mx.float32)
        _assert_no_worse(_by("metal", arrays, case), _by("reference", arrays, case), _truth(arrays, case))


def _short_window(offset: int, rng: np.random.Generator) -> Case:
    n = int(rng.integers(33, 41))
    return Case(1, 1, n, offset + n, offset, int(rng.integers(2, 8)))


def _any_window(offset: int, rng: np.random.Generator) -> Case:
    n = int(rng.integers(1, 41))
    return Case(1, 1, n, offset + n + int(rng.integers(0, 3)), offset, [None, int(rng.integers(1, 80))][offset % 2])


@pytest.mark.parametrize("case_of", [_short_window, _any_window])
def test_every_residue_of_start_length_and_window(case_of: Any, seed: int, check: Any) -> None:
    check("residues")
    with running():
        sweep(seed, case_of)


@pytest.mark.skipif(mx.metal.is_available(), reason="faults are planted into emulated kernels only")
@pytest.mark.parametrize("name", attention.NAMES)
def test_a_missing_barrier_between_simdgroups_that_share_rows_is_found(name: str) -> None:
    """The barrier that exists only for head dims of 128 (dkv) and 256."""
    barrier = "        threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    kernel, shared = selfcheck.KERNELS[name], "if (SPLIT > 1) {"

    def change(text: str) -> str:
        before, _, after = text.partition(shared)
        return before + shared + after.replace(barrier.strip(), "", 1) if after else text

    problems = []
    for order in (0, 1, 2):
        with running(order, change=change):
            problems.append(selfcheck.check(kernel, mx.float16, 256))
    assert any(problems)


# Loop bounds, each too tight by one: only few residues reveal it.
BOUNDS = {
    "forward: last key": (
        "offset + metal::min(row_start + ROWS, Tq));",
        "offset + metal::min(row_start + ROWS, Tq) - 1);",
    ),
    "forward and dq: first key": ("row_start - window + 1)", "row_start - window + 2)"),
    "dkv: last query": ("last_key + window - offset)", "last_key + window - offset - 1)"),
    "dkv: first query": ("metal::max(0, key_start - offset)", "metal::max(0, key_start - offset + 1)"),
    "causal": ("key <= query", "key < query"),
    "window": ("key > query - window", "key >= query - window"),
}


@pytest.mark.skipif(mx.metal.is_available(), reason="faults are planted into emulated kernels only")
@pytest.mark.parametrize("fault", BOUNDS)
def test_a_bound_one_too_tight_is_found(fault: str, seed: int) -> None:
    before, after = BOUNDS[fault]
    with running(change=lambda text: text.replace(before, after)), pytest.raises(AssertionError):
        sweep(seed, _short_window)


@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_tiles_fit_a_threadgroup(D: int, item_bytes: int) -> None:
    for name in attention.NAMES:
        tiles = attention.tiling(name, D, item_bytes)
        assert tiles.threadgroup_bytes(name, D, item_bytes) <= 22 << 10 and tiles.threads <= 256
        assert tiles.rows % 8 == tiles.columns % 8 == D % (8 * tiles.split) == 0


@pytest.fixture
def at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST_KEYS", dict.fromkeys(attention.HEAD_DIMS, 1))
    monkeypatch.setattr(attention, "_WIDE_ITEMS", 1)
    monkeypatch.delenv("MEBP_KERNELS", raising=False)


def _model(folder: Path, name: str, head_dim: int, seed: int) -> tuple[Any, Any]:
    heads: dict[str, Any] = {"head_dim": head_dim, "sliding_window": 50, "query_pre_attn_scalar": head_dim}
    heads["global_head_dim"] = head_dim
    config = CONFIGS[name] | heads
    config |= {"text_config": config["text_config"] | heads} if "text_config" in config else {}
    model = mebp_mlx.open_model(write_model(folder / "m", config, seed=seed))
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, seed)
    return model, lora


@pytest.mark.usefixtures("at_any_length")
@pytest.mark.parametrize(
    ("name", "head_dim", "saved", "kept_bytes"),
    [
        ("llama-sliding", 64, SAVE_PRODUCTS, None),
        ("llama-sliding", 64, SAVE_PRODUCTS, 0),
        ("llama-sliding", 64, SAVE_INPUTS, 0),
        ("gemma3_text", 80, SAVE_PROJECTIONS, None),
        ("qwen3_5", 64, SAVE_PRODUCTS, None),
        ("gemma4_text", 64, SAVE_PRODUCTS, None),  # layers that share keys and values
    ],
)
def test_gradients_by_the_kernels_are_as_exact(
    tmp_path: Path, name: str, head_dim: int, saved: Any, kept_bytes: int | None, seed: int, check: Any
) -> None:
    """In tiles, ragged, with windows; for any kept values, in memory or in the file."""
    check("gradients of a model")
    model, lora = _model(tmp_path, name, head_dim, seed)
    tokens, targets = random_batch(seed, 2, 75, model.spec.V)
    plan = Plan("op", saved, kept_bytes=kept_bytes, token_block=64, query_block=50)
    plain = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    lora.session = None
    with running(pretend=True), mock.patch.object(ops, "backward", side_effect=AssertionError("scores")):
        actual = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    assert largest_error(actual[0].item(), actual[1], plain[0].item(), plain[1]) <= 2e-5
    assert any(not np.array_equal(np.asarray(actual[1][n]), np.asarray(plain[1][n])) for n in plain[1])


@pytest.mark.usefixtures("at_any_length")
@pytest.mark.parametrize("head_dim", [64, 96])
def test_without_a_backward_the_kernel_runs_only_if_mlx_has_none(tmp_path: Path, head_dim: int, seed: int) -> None:
    """Forward-only passes use MLX's own fused forward if it exists; graphs that MLX differentiates always do."""
    model, lora = _model(tmp_path, "llama-sliding", head_dim, seed)
    tokens, targets = random_batch(seed, 1, 20, model.spec.V)
    plan = Plan("tile", checkpoint=True, saved=SAVE_INPUTS)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    calls: list[str] = []
    original = metal.Source.__call__

    def counted(source: metal.Source, *arguments: Any, **how: Any) -> Any:
        calls.append(source.name)
        return original(source, *arguments, **how)

    with running(pretend=True), mock.patch.object(metal.Source, "__call__", counted):
        forward = mebp_mlx.loss(model, lora, tokens, targets, plan=plan).item()
        assert ("attention_forward" in calls) == (head_dim == 96)
        differentiated = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    assert calls.count("attention_dq") <= 1  # the first-use check
    assert abs(forward - loss.item()) <= 1e-5 * loss.item()
    assert largest_error(differentiated[0].item(), differentiated[1], loss.item(), grads) <= 1e-5


def test_a_table_of_lengths_selects_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """By head dim and dtype; never without Metal, or if a kernel failed its check."""
    monkeypatch.delenv("MEBP_KERNELS", raising=False)
    assert not attention.serves(mx.bfloat16, 64, 1 << 20)
    with attention.assumed():
        for head_dim, least in attention.LEAST_KEYS.items():
            for dtype, factor in ((mx.float16, 1), (mx.bfloat16, 1), (mx.float32, 2)):
                assert attention.serves(dtype, head_dim, factor * least)
                assert not attention.serves(dtype, head_dim, factor * least - 1)
        assert not attention.serves(mx.bfloat16, 72, 1 << 20) and not attention.serves(mx.float64, 64, 1 << 20)
    wrong = lambda text: text.replace("key <= query", "key < query")  # noqa: E731
    for change in (None, wrong):
        with running(change=change, pretend=True), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert attention.serves(mx.float32, 64, 1 << 20) == (change is None)
        assert len(said) == (0 if change is None else 1)
        assert change is None or "attention_forward (float32, head dim 64) is not used" in str(said[0].message)


def test_plans_of_long_rows_have_no_scores(tmp_path: Path, seed: int) -> None:
    """Blocks of queries are those of the longest row with scores, which is probed too."""
    model, lora = _model(tmp_path, "qwen3", 64, seed)
    workload, least = Workload(model, lora, 1, 1 << 15), int(attention.least_keys(mx.float32, 64))
    without = [plan.query_block for plan in ladder(workload)]
    assert workload.T_scored == workload.T
    with attention.assumed():
        blocks = [plan.query_block for plan in ladder(workload)]
        shorter = dataclasses.replace(workload, T=least - 1)
        assert workload.T_scored == shorter.T_scored == least - 1
        assert blocks > without and blocks == [plan.query_block for plan in ladder(shorter)]


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_rows_with_capped_scores_or_sinks_keep_their_scores(tmp_path: Path, name: str, seed: int) -> None:
    """The kernels support neither, so the planner counts these scores for any length."""
    model, lora = _model(tmp_path, name, 64, seed)
    workload = Workload(model, lora, 1, 1 << 15)
    with attention.assumed():
        assert workload.T_scored == workload.T


def test_kept_bytes_depend_on_the_window(tmp_path: Path, seed: int) -> None:
    """A long row's log-sum-exp is kept only if the layer sees enough keys for the kernels."""
    model, lora = _model(tmp_path, "llama-sliding", 64, seed)
    sliding = [layer.window is not None for layer in model.spec.layers]
    T = int(attention.least_keys(mx.float32, 64))
    with attention.assumed():
        sizes = KeptSizes(model, Plan(), lora, 0, 1, T).of(Plan())
    assert {True, False} == set(sliding) and len(set(sizes)) == 2
    assert [size == min(sizes) for size in sizes] == sliding


@pytest.mark.usefixtures("at_any_length")
def test_every_length_whose_attention_differs_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model, lora = _model(tmp_path, "qwen3", 64, seed)
    workload, lengths = Workload(model, lora, 1, 40), []
    monkeypatch.setattr(probes, "_exact", lambda workload, *_: lengths.append(workload.T))
    monkeypatch.setattr(attention, "LEAST_KEYS", {64: 33})
    plan = ladder(workload)[0]
    probes.probe(workload, plan, tmp_path)
    assert lengths == [40]
    with running(pretend=True):
        probes.probe(workload, plan, tmp_path)
    assert lengths == [40, 40, 32]


@pytest.mark.usefixtures("at_any_length")
def test_waits_do_not_depend_on_blocks_of_queries(tmp_path: Path, seed: int) -> None:
    model, lora = _model(tmp_path, "llama-sliding", 64, seed)
    batch, waits = SimpleNamespace(tokens=np.zeros((1, 40), np.int32), targets=np.zeros((1, 40), np.int32)), []
    for query_block in (40, 3):
        engine = BackpropEngine(model, lora, plan=Plan("op", query_block=query_block))
        with running(pretend=True):
            engine.step(batch, step=0, micro=0, n_labels=40, sink=lambda _: None)
        waits.append(engine.barrier.n_waits)
        engine.close()
    assert waits[0] == waits[1]


def test_operations_are_those_of_the_visited_tiles(tmp_path: Path, seed: int) -> None:
    """At least 2 D per visible pair and product; at most one more tile at each end."""
    rng = np.random.default_rng(seed)
    for D in attention.HEAD_DIMS:
        n, offset = int(rng.integers(1, 200)), int(rng.integers(0, 100))
        case = Case(4, 2, n, offset + n, offset, [None, int(rng.integers(1, 150))][int(rng.integers(2))])
        shapes = ((1, 4, n, D), (1, 2, case.Tk, D))
        for name, products in zip(attention.NAMES, (2, 3, 4), strict=True):
            place = (offset, case.window or 0, *([0, case.Tk] if products == 4 else []))
            tiles = attention.tiling(name, D, 2)
            found = attention.operations(name, shapes, 2, place) / (2 * D * products * 4)
            seen, size = int(_seen(case).sum()), max(tiles.rows, tiles.columns)
            assert seen <= found <= seen + 3 * size * (max(n, case.Tk) + size)


@pytest.mark.usefixtures("at_any_length")
def test_a_steps_counted_work_includes_the_kernels(tmp_path: Path, seed: int) -> None:
    """No product of scores remains, and attention's operations are counted."""
    model, lora = _model(tmp_path, "qwen3", 64, seed)
    workload, plan = Workload(model, lora, 1, 70), Plan("block", token_block=64)
    plain = count(workload, plan)
    with attention.assumed():
        actual = count(workload, plan)
    assert {"forward", "head", "backward"} == set(actual)
    assert 0.8 <= actual["forward"].flops / plain["forward"].flops <= 1.3
    assert 1.0 <= actual["backward"].flops / plain["backward"].flops <= 1.5
