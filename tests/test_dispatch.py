"""A step on a GPU has few waits, copies no weight and writes nothing; the bench's counts are correct."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bench.dispatch import __main__ as table
from bench.dispatch import step
from bench.dispatch.watch import nodes_of, non_views
from mebp_mlx.testing.synth import SHAPES, write_model
from mebp_mlx.testing.tiny import PACKED, packed_config

FAMILIES = ("qwen2", "qwen3", "llama", "gemma3_text")
# Waits besides two per block; products of a block: seven projections, forward and backward.
FIXED_WAITS, PRODUCTS = 16, 14
NON_VIEWS = 330  # nodes of a qwen2 block with SGD, on the CPU; mlx-lm's has 288


def _case(folder: Path, family: str, n_blocks: int, optimizer: str, **how: Any) -> step.Case:
    config = packed_config(family)
    config.get("text_config", config).update({"num_hidden_layers": n_blocks, "sliding_window": 64})
    model = write_model(config, folder / f"{family}-{n_blocks}", group_size=32, sparse=True)
    return step.Case(model, 24, optimizer, **how)


@pytest.mark.parametrize("optimizer", step.OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_on_a_gpu(tmp_path: Path, family: str, optimizer: str) -> None:
    """A step with Metal's defaults: two waits per block, one product per projection and direction, no copy."""
    actual = step.count(_case(tmp_path, family, 3, optimizer))
    all_of, head = step.total(actual["stages"]), actual["stages"]["head"]["products"]
    assert not (all_of["waits"] > 2 * 3 + FIXED_WAITS), all_of
    assert all_of["products"] == 3 * PRODUCTS - 3 + head  # the first block needs no dL/dx: q, k, v
    assert all_of["copied_weights"] == all_of["copied_file"] == all_of["written"] == all_of["read"] == 0
    assert all_of["copied_gathered"] > 0 and actual["kept_bytes"] > 0
    assert actual["adopted_bytes"] > 0


def test_every_further_block_costs_the_same(tmp_path: Path) -> None:
    """--layers depends on this; exact to the node."""
    two, three, five = (step.count(_case(tmp_path, "qwen2", n, "sgd")) for n in (2, 3, 5))
    for name in table._GROWS:
        assert step.extrapolated(two[name], three[name], 2) == five[name]
    block = {k: n - step.total(two["stages"])[k] for k, n in step.total(three["stages"]).items()}
    assert block["waits"] <= 2 and block["submissions"] == 2 and block["products"] == PRODUCTS
    assert block["non_view"] <= NON_VIEWS


def test_waits_copies_and_writes_are_counted(tmp_path: Path) -> None:
    """Each counter increases when the engine does what it counts."""
    case = _case(tmp_path, "qwen2", 3, "adamw")
    lazy = step.total(step.count(case)["stages"])
    case.plan = dataclasses.replace(case.plan, grain="op", kept_bytes=0, offload_state=True)
    eager = step.total(step.count(case)["stages"])
    assert eager["waits"] > 10 * lazy["waits"] and eager["submissions"] == 0
    assert eager["written"] > 0 and eager["read"] > 0 and eager["copied_file"] == eager["read"]
    case.model.weights.close()
    copied = _case(tmp_path / "copied", "qwen2", 3, "adamw")
    copied.model.weights.adopt = False
    actual = step.count(copied)
    assert step.total(actual["stages"])["copied_weights"] > 0 and actual["adopted_bytes"] == 0


def test_nodes_are_those_of_an_unevaluated_graph() -> None:
    x = mx.ones((4, 4))
    mx.eval(x)
    y = mx.exp(x @ x).reshape(2, 8).T
    nodes = nodes_of({"y": [y, None]})
    assert nodes == {"Matmul": 1, "Exp": 1, "Reshape": 1, "Transpose": 1} and non_views(nodes) == 2
    mx.eval(y)
    assert not nodes_of([y])


def test_mlx_lms_graph_is_counted(tmp_path: Path) -> None:
    """It has the same products as ours except in the head, and its phases add up; checkpointing recomputes blocks."""
    config = packed_config("qwen2") | PACKED | {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 128}
    plain, again = (step.mlx_lm(config, 24, "sgd", how) for how in step.MLX_LM.values())
    assert plain["products"] == 3 * PRODUCTS - 3 + 2
    assert again["products"] == plain["products"] + 3 * 6  # down's output needs no recomputation
    assert again["nodes"] > plain["nodes"] > plain["non_view"] > 0
    assert not nodes_of([])


def test_table_limits_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    config = packed_config("qwen2") | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4}
    monkeypatch.setitem(SHAPES, "tiny", config)
    table.main(["tiny", "--quick", "--layers", "3", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 and 3 blocks counted, the rest extrapolated" in printed and "mlx-lm, checkpointed" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"dispatch.json", "dispatch.csv"}


def test_windows_shorter_than_the_rows_are_not_extrapolated() -> None:
    options = argparse.Namespace(
        shape="gemma3-1b", layers=2, depth=26, tokens=600, optimizer="sgd", kept_bytes=None, memory_budget=None
    )
    with pytest.raises(table.UserError, match="--layers 26"):
        table.counted(options)


def test_a_mixture_of_experts_on_a_gpu(tmp_path: Path) -> None:
    """Emulated: no expert's weights are copied, nothing is written, and a mixture adds one wait for its tile."""
    family, n_blocks = "qwen3_moe-tied", 4
    actual = step.count(_case(tmp_path, family, n_blocks, "sgd"))
    all_of = step.total(actual["stages"])
    assert not (all_of["waits"] > 3 * n_blocks + FIXED_WAITS), all_of
    assert all_of["copied_weights"] == all_of["copied_file"] == all_of["written"] == all_of["read"] == 0
