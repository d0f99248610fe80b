"""Properties of the list of operations that a policy gives, by carrying it out on names alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mebp_mlx.engine.plan import SAVE_INPUTS, SAVE_PROJECTIONS, Plan
from mebp_mlx.engine.schedule import Op, backward_ops, forward_ops, needs_gradient
from mebp_mlx.model.decoder import Stage, block_stages, segments
from mebp_mlx.model.spec import PROJECTIONS, ModelSpec

SHORT = frozenset(PROJECTIONS)


def _stages(gemma: bool) -> tuple[Stage, ...]:
    return block_stages(_spec(gemma))


def _spec(gemma: bool) -> ModelSpec:
    sizes = dict.fromkeys(("D", "F", "H", "K", "head_dim", "V", "L"), 2)
    empty = dict.fromkeys(("layers", "embedding", "head", "final_norm", "embed_scale"))
    return ModelSpec(
        family="", norm_eps=1e-5, attention_scale=1.0, qk_norm=False, gemma=gemma, **sizes, **empty
    )  # type: ignore[arg-type]


def _carry_out(ops: list[Op], values: set[str], available: frozenset[str]) -> tuple[set[str], int]:
    """What is left in memory, and how many projections ran; fails when something is read that is not there."""
    n_products = 0
    for op in ops:
        if op.kind == "run":
            assert op.stage is not None and set(op.stage.inputs) <= values
            values.add(op.stage.output)
            n_products += len(op.stage.linears)
        elif op.kind == "save":
            assert op.value in values
        elif op.kind == "load":
            assert op.value in available
            values.add(op.value)
        elif op.kind == "drop":
            values.discard(op.value)
        else:
            assert op.stage is not None and set(op.stage.needs) <= values
    return values, n_products


def _backward(gemma: bool, saved: frozenset[str], trained: frozenset[str] = SHORT, want_dx: bool = True) -> list[Op]:
    stages = _stages(gemma)
    useful = needs_gradient(stages, trained, want_dx)
    ops = []
    for part, entering in zip(segments(stages), ("x", "a"), strict=True):
        ops += backward_ops(part, saved | {"x", entering}, trained, useful)
    return ops


def _policies(seed: int, stages: tuple[Stage, ...]) -> list[frozenset[str]]:
    rng = np.random.default_rng(seed)
    names = [name for stage in stages for name in (stage.output, *stage.inner)]
    random = [frozenset({"x", *(n for n in names if rng.random() < p)}) for p in (0.2, 0.5, 0.8) for _ in range(10)]
    return [SAVE_INPUTS, SAVE_PROJECTIONS, *random]


@pytest.mark.parametrize("gemma", [False, True])
def test_forward_leaves_only_what_is_kept(gemma: bool, seed: int) -> None:
    before, after = segments(_stages(gemma))
    for saved in _policies(seed, _stages(gemma)):
        left, _ = _carry_out(forward_ops(before, saved, keep=("q", "k", "v")), {"x"}, saved)
        assert left == {"q", "k", "v"}, (sorted(saved), seed)
        left, _ = _carry_out(forward_ops(after, saved), {"x", "a"}, saved)
        assert left == {"y"}, (sorted(saved), seed)


@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("want_dx", [False, True])
def test_backward_reads_only_what_is_there_and_leaves_nothing(gemma: bool, want_dx: bool, seed: int) -> None:
    for saved in _policies(seed, _stages(gemma)):
        left, _ = _carry_out(_backward(gemma, saved, want_dx=want_dx), set(), saved | {"x", "a"})
        assert left == set(), (sorted(saved), seed)


@pytest.mark.parametrize("gemma", [False, True])
def test_saving_projections_repeats_no_matrix_product(gemma: bool) -> None:
    saved = Plan(saved=SAVE_PROJECTIONS).saved_for(_spec(gemma))
    assert _carry_out(_backward(gemma, saved), set(), saved | {"x", "a"})[1] == 0
    # The last product, d, is read by nobody unless its output is normed.
    assert ("d" in saved) is gemma
    again = _carry_out(_backward(gemma, SAVE_INPUTS), set(), SAVE_INPUTS | {"a"})[1]
    # And q, k, v for attention, gate and up inside the mlp, outside these lists.
    assert again == (4 if gemma else 1)


def test_every_trained_projection_is_visited_and_no_other_work_is_done() -> None:
    for n in (1, 2, 7):
        for trained in itertools.combinations(sorted(SHORT), n):
            ops = _backward(False, SAVE_PROJECTIONS, frozenset(trained), want_dx=False)
            stages = [op.stage for op in ops if op.kind == "backward" and op.stage is not None]
            visited = [stage.name for stage in stages]
            assert set(trained) <= {linear for stage in stages for linear in stage.linears}
            assert len(visited) == len(set(visited))
            if set(trained) <= {"gate", "up", "down"}:
                assert visited == ["mlp_residual", "mlp"]


def test_unsaved_policies_are_narrowed_to_what_is_read() -> None:
    everything = frozenset({"x", "h", "q", "k", "v", "a", "o", "x1", "h2", "g", "u", "d", "y"})
    kept = Plan(saved=everything).saved_for(_spec(False))
    assert not kept & {"y", "d"} and "x" in kept
