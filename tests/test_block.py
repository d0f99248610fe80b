"""A block's equations: requested, kept and released values, for every policy."""

from __future__ import annotations

import gc
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine.backprop import BackpropEngine, block_backward, kept_names
from mebp_mlx.engine.base import Pass, Store
from mebp_mlx.families import BLOCKS, Gemma3Block, LlamaBlock
from mebp_mlx.families.base import value
from mebp_mlx.families.llama import PreNormBlock
from mebp_mlx.families.moe import MoeBlock
from mebp_mlx.model.base import DenseBlock
from mebp_mlx.model.config import PROJECTIONS
from mebp_mlx.ops.attention import Attention
from mebp_mlx.ops.gated_mlp import GatedMlp
from mebp_mlx.ops.lora_linear import LoraLinear
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PROJECTIONS, Barrier, Plan
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model

SHORTS = frozenset(PROJECTIONS)
NAMES = ["qwen2", "qwen3", "gemma3_text"]
ALL = [*NAMES, "olmoe-tied"]
B, T = 2, 150  # three tiles of 64 positions
TILES = 3


def _model(tmp_path: Path, name: str, **how: Any) -> tuple[Any, Any]:
    model = mebp_mlx.open_model(write_model(tmp_path / "model", CONFIGS[name] | {"num_hidden_layers": 2}))
    lora = mebp_mlx.init_lora(model, rank=2, **how)
    randomize_lora(lora, 0)
    return model, lora


def _plan(saved: frozenset[str], grain: str = "op") -> Plan:
    return Plan(grain, saved, token_block=64, query_block=50)


def _policies(seed: int, names: frozenset[str]) -> Iterator[frozenset[str]]:
    rng = np.random.default_rng(seed)
    yield SAVE_INPUTS
    yield SAVE_PROJECTIONS
    yield names
    for p in (0.2, 0.5, 0.8):
        for _ in range(5):
            yield frozenset(name for name in sorted(names) if rng.random() < p)


class Watched:
    """Records the computed values by name, and the products with frozen matrices and their operations."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.values: Counter[str] = Counter()
        self.products: Counter[str] = Counter()
        self.visited: list[str] = []  # projections whose backward ran
        for family in (PreNormBlock, MoeBlock, LlamaBlock, Gemma3Block):
            for name, cell in vars(family).items():
                if isinstance(cell, value):
                    patch.setattr(cell, "equation", self._counted(self.values, name, cell.equation))
        for method in ("matmul", "matmul_t"):
            patch.setattr(DenseBlock, method, self._counted(self.products, method, getattr(DenseBlock, method)))
        self._visits(patch)

    def clear(self) -> None:
        self.values.clear()
        self.products.clear()
        self.visited.clear()

    @staticmethod
    def _counted(counts: Counter[str], name: str, run: Any) -> Any:
        def counted(*args: Any) -> Any:
            counts[name] += 1
            return run(*args)

        return counted

    def _visits(self, patch: pytest.MonkeyPatch) -> None:
        linear, mlp, attention = LoraLinear.backward, GatedMlp.backward, Attention.backward

        def visit(name: Any, run: Any) -> Any:
            def visiting(owner: Any, *args: Any) -> Any:
                self.visited.append(name(owner))
                return run(owner, *args)

            return visiting

        patch.setattr(LoraLinear, "backward", visit(lambda owner: owner.low_name.removeprefix("low."), linear))
        patch.setattr(GatedMlp, "backward", visit(lambda _: "mlp", mlp))
        patch.setattr(Attention, "backward", visit(lambda _: "attention", attention))


class Kept(Store):
    """A store that records its requests."""

    def __init__(self) -> None:
        super().__init__(Barrier("op"), None)
        self.put_names: Counter[str] = Counter()
        self.found_names: Counter[str] = Counter()

    def put(self, layer: int, name: str, position: int, actual: mx.array) -> bool:
        self.put_names[name.partition(".")[0]] += 1
        return super().put(layer, name, position, actual)

    def get(self, layer: int, name: str, position: int) -> mx.array | None:
        actual = super().get(layer, name, position)
        if actual is not None:
            self.found_names[name.partition(".")[0]] += 1
        return actual


def _there_and_back(
    model: Any, lora: Any, plan: Plan, watched: Watched | None = None, need_dx: bool = True
) -> tuple[Kept, dict[str, mx.array], list[mx.array]]:
    """Runs block 1 forward and backward; returns its store, gradients and dx. Only the backward pass is recorded."""
    work, kept, layer = Pass(model, plan, lora), Kept(), model.spec.layers[1]
    names = kept_names(plan, model.spec.layers[0])
    x = [mx.random.normal((B, stop - start, model.spec.D), key=mx.random.key(1)) for start, stop in plan.tiles(T)]
    dy = [tile + 1 for tile in work.forward(layer, x, kept, names)]
    assert x == [] and set(kept.put_names) <= names
    if watched is not None:
        watched.clear()
    run = work.run(layer, kept, None)
    dx = block_backward(work, layer, run, dy, need_dx)
    assert dy == [] and run.blocks == []
    return kept, run.gradients, dx


@pytest.mark.parametrize("grain", ["op", "block"])
@pytest.mark.parametrize("name", ALL)
def test_after_a_forward_pass_only_kept_values_and_y_are_left(tmp_path: Path, name: str, grain: str, seed: int) -> None:
    """To the byte, by MLX's count, without garbage collection."""
    model, lora = _model(tmp_path, name)
    layer, n_bytes = model.spec.layers[1], B * T * model.spec.D * 4
    gc.collect()
    gc.disable()
    try:
        for saved in _policies(seed, BLOCKS[model.spec.layers[0].block].names):
            plan = _plan(saved, grain)
            work, kept = Pass(model, plan, lora), Kept()
            x = [mx.zeros((B, stop - start, model.spec.D)) for start, stop in plan.tiles(T)]
            mx.eval(x)
            mx.synchronize()
            before = mx.get_active_memory() - n_bytes  # x is released, unless it is kept
            y = work.forward(layer, x, kept, kept_names(plan, model.spec.layers[0]))
            mx.eval(y)
            work.barrier.finish()
            mx.synchronize()
            held = sum(array.nbytes for array in kept._arrays.values())
            left = mx.get_active_memory() - before - held - n_bytes
            assert left <= 4096, (sorted(saved), left, seed)
            del y, kept, work
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ALL)
def test_a_forward_pass_computes_every_value_once_and_releases_it_when_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = _model(tmp_path, name)
    watched = Watched(monkeypatch)
    work = Pass(model, _plan(SAVE_INPUTS), lora)
    run = work.run(model.spec.layers[0])
    block = run.block(run, 0, (B, 64), mx.zeros((B, 64, model.spec.D)))
    mx.eval(block.y)
    equations = run.block.names - {"g", "u", "low", "x"}
    assert watched.values == dict.fromkeys(equations, 1)
    assert {key for key in vars(block) if key in run.block.names} == {"y"}


@pytest.mark.parametrize("need_dx", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_backward_requests_kept_values_and_recomputes_the_rest(
    tmp_path: Path, name: str, need_dx: bool, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every policy: kept values are not recomputed, only values without a product with an MLP matrix are computed
    twice, every kept value is requested, and gradients are bit-equal."""
    model, lora = _model(tmp_path, name)
    watched, reference = Watched(monkeypatch), None
    for saved in _policies(seed, BLOCKS[model.spec.layers[0].block].names):
        plan = _plan(saved)
        kept, gradients, dx = _there_and_back(model, lora, plan, watched, need_dx)
        names = kept_names(plan, model.spec.layers[0])
        assert not names & set(watched.values), (sorted(saved), watched.values, seed)
        asked = set(kept.found_names)
        if need_dx and saved <= SAVE_PROJECTIONS:
            assert asked == set(kept.put_names), (sorted(saved), seed)
        assert asked <= names
        assert watched.values["y"] == 0
        assert len(dx) == (TILES if need_dx else 0)
        actual = {**{n: np.array(g) for n, g in gradients.items()}, **{f"dx{i}": np.array(t) for i, t in enumerate(dx)}}
        reference = reference or actual
        assert all(np.array_equal(actual[key], reference[key]) for key in reference), (sorted(saved), seed)


@pytest.mark.parametrize("name", NAMES)
def test_saving_projections_repeats_no_product_with_a_frozen_matrix(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lora = _model(tmp_path, name)
    watched = Watched(monkeypatch)
    kept, _, _ = _there_and_back(model, lora, _plan(SAVE_PROJECTIONS), watched)
    assert watched.products == {"matmul_t": 7 * TILES}
    # The last product, d, is not read unless its output is normed.
    assert ("d" in kept.put_names) is (name == "gemma3_text")
    _there_and_back(model, lora, _plan(SAVE_INPUTS), watched)
    # All but d; the MLP's backward releases everything, so the inputs of x1 (q and o) are recomputed. A norm of keys
    # needs them before rotation, so k is recomputed. gemma3 needs d for its norm: gate, up and down.
    n_forward = {"qwen2": 8, "qwen3": 9, "gemma3_text": 12}[name]
    assert watched.products == {"matmul": n_forward * TILES, "matmul_t": 7 * TILES}


def _needed(trained: frozenset[str], need_dx: bool) -> set[str]:
    """The projections whose backward must run, derived only from the flow of the loss's gradient."""
    visited = {"mlp"}
    if need_dx or trained & {"q", "k", "v", "o"}:
        visited.add("o")
    if need_dx or trained & {"q", "k", "v"}:
        visited |= {"attention", "q", "k", "v"}
    return visited


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text"])
@pytest.mark.parametrize("need_dx", [False, True])
def test_backward_visits_only_needed_projections_for_every_placement(
    tmp_path: Path, name: str, need_dx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = _model(tmp_path, name)
    watched, shorts = Watched(monkeypatch), {short: key for short, key in PROJECTIONS.items()}
    for n in (1, 2, 7):
        for trained in map(frozenset, itertools.combinations(sorted(SHORTS), n)):
            lora = mebp_mlx.init_lora(model, rank=1, keys=[shorts[short] for short in sorted(trained)])
            _, gradients, dx = _there_and_back(model, lora, _plan(SAVE_PROJECTIONS), watched, need_dx)
            assert Counter(watched.visited) == dict.fromkeys(_needed(trained, need_dx), TILES), sorted(trained)
            layer = model.spec.layers[1]
            wanted = {f"{layer.linears[short].name}.lora_{side}" for short in trained for side in "ab"}
            assert set(gradients) == wanted and len(dx) == TILES * need_dx
            products = watched.products["matmul_t"] // TILES
            if need_dx:
                assert products == 7
            else:  # dL/dm if anything from the gate down needs it, dL/dh2 of gate and up, dL/da
                inner, below = trained != {"down"}, bool(trained & {"q", "k", "v", "o"})
                assert products == inner + 2 * below + bool(trained & {"q", "k", "v"}), sorted(trained)


@pytest.mark.parametrize("grain", ["op", "block"])
@pytest.mark.parametrize("first", [0, 1])
def test_no_product_is_computed_below_the_lowest_trained_projection(
    tmp_path: Path, grain: str, first: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Blocks below it are not visited and keep nothing; in its own block no cotangent below it is computed."""
    model, lora = _model(tmp_path, "qwen2", num_layers=2 - first, keys=["mlp.down_proj"])
    watched, stores = Watched(monkeypatch), []
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda store, layer, *rest: (stores.append(layer), put(store, layer, *rest))[1])
    engine = BackpropEngine(model, lora, plan=_plan(SAVE_PROJECTIONS, grain))
    tokens, targets = random_batch(seed, B, T, model.spec.V, "none")
    batch = type("Batch", (), {"tokens": tokens, "targets": targets})
    asked: list[set[str]] = []
    engine.step(batch, step=0, micro=0, n_labels=B * T, sink=lambda g: asked.append(set(g)))  # type: ignore[arg-type]
    engine.close()
    # Block 1: all seven if it is not the lowest block, otherwise none. The head's matrix is in one piece.
    n_head = len(range(0, model.spec.V, engine.plan.vocabulary_chunk(B * T, 0, 4)))
    assert watched.products["matmul_t"] == n_head + 7 * TILES * (1 - first)
    assert set(stores) == set(range(first, 2))
    assert [{name.split(".")[2] for name in names} for names in asked] == [{"1"}, {"0"}][: 2 - first]
    assert watched.visited.count("mlp") == TILES * (2 - first)
    assert watched.visited.count("q") == TILES * (1 - first)


def test_policies_keep_only_values_that_are_read(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).mkdir()
        model, _ = _model(tmp_path / name, name)
        plan = Plan(saved=BLOCKS[model.spec.layers[0].block].names)
        names = kept_names(plan, model.spec.layers[0])
        assert "y" not in names and ("d" in names) is (name == "gemma3_text") and "x" in names
        assert kept_names(Plan(saved=frozenset()), model.spec.layers[0]) == {"x"}
        checkpoint = Plan(saved=plan.saved, checkpoint=True)
        assert kept_names(checkpoint, model.spec.layers[0]) == {"x"}


@pytest.mark.parametrize("how", [{}, {"checkpoint": True}, {"kept_bytes": 0}], ids=["", "checkpoint", "file"])
@pytest.mark.parametrize("grain", ["op", "tile", "block"])
def test_no_reference_cycle_keeps_an_array(tmp_path: Path, grain: str, how: dict[str, Any], seed: int) -> None:
    """Memory is freed at the end of a step, not when Python next collects cycles."""
    model, lora = _model(tmp_path, "gemma3_text", dropout=0.1)
    plan = Plan(grain, token_block=64, query_block=50, **how)
    engine = BackpropEngine(model, lora, plan=plan, arena_dir=tmp_path)
    tokens, targets = random_batch(seed, B, T, model.spec.V)
    batch: Any = type("Batch", (), {"tokens": tokens, "targets": targets})
    n_labels = int((targets != -100).sum())

    def run() -> int:
        engine.step(batch, step=0, micro=0, n_labels=n_labels, sink=lambda g: None)
        engine.evaluate(batch)
        mx.synchronize()
        return mx.get_active_memory()

    gc.collect()
    gc.disable()
    try:
        mx.synchronize()
        before = mx.get_active_memory()
        actual = [run() - before for _ in range(3)]
    finally:
        gc.enable()
        engine.close()
    assert max(actual) <= 4096, actual
