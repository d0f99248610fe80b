"""Mixtures of experts: reads, routing, gradients, adapters and storage."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import convert, fuse
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import WholeBatch
from mebp_mlx.engine.zeroth_order import ZerothOrderEngine, make_estimator
from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.ops.gated_mlp import CLIPPED
from mebp_mlx.ops.moe import Moe
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.planner.sizes import ExpertSizes, expert_sizes
from mebp_mlx.planner.work import count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, relative_error, write_model
from mebp_mlx.weights.safetensors import MappedWeights
from tests.adapters import make_adapters

NAMES = ["qwen3_moe", "qwen3_moe-tied", "olmoe", "olmoe-tied", "lfm2_moe", "lfm2_moe-plain", "gpt_oss"]
TOLERANCE = 1e-5
APART = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # LFM2-MoE's names on the hub


def _open(tmp_path: Path, name: str, seed: int, **changes: Any) -> tuple[Any, Any]:
    if name == "gpt_oss" and "num_experts" in changes:
        changes["num_local_experts"] = changes.pop("num_experts")
    folder = write_model(tmp_path / "model", CONFIGS[name] | changes, seed=seed)
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
    randomize_lora(lora, seed)
    return model, lora


def _assert_exact(model: Any, lora: Any, batch: tuple[np.ndarray, np.ndarray], found: Any, seed: int) -> None:
    """The (loss, gradients) equal mlx-lm's, or are about as close to float64 as mlx-lm's."""
    theirs = mlx_lm_loss_and_grads(model.path, lora, *batch)
    loss, grads = found[0].item(), found[1]
    if largest_error(loss, grads, *theirs) <= TOLERANCE:
        return
    truth = mlx_lm_loss_and_grads(model.path, lora, *batch, mx.float64)
    allowed = TOLERANCE + 3 * largest_error(*theirs, *truth)
    assert not (largest_error(loss, grads, *truth) > allowed), f"seed {seed}"


def _stacks(lora: Any) -> list[str]:
    return [name for name, value in lora.parameters().items() if value.ndim == 3]


def _store_apart(folder: Path, hub_names: bool = False) -> Path:
    """The same model with one tensor per expert, as on the hub."""
    path = folder / "model.safetensors"
    tensors: Any = mx.load(str(path))
    apart: dict[str, mx.array] = {}
    for name, tensor in tensors.items():
        rows = {name: tensor}
        if ".switch_mlp." in name:
            rows = {name.replace(".switch_mlp.", f".experts.{i}."): tensor[i] for i in range(tensor.shape[0])}
        for own, value in rows.items():
            parts = own.split(".")
            renames = hub_names and "feed_forward" in parts
            apart[".".join(APART.get(part, part) if renames else part for part in parts)] = mx.contiguous(value)
    mx.save_safetensors(str(path), apart)
    return folder


class Reads:
    """Records the experts whose rows are read, by stack."""

    def __init__(self, patch: pytest.MonkeyPatch, n_rows: dict[str, int]):
        self.experts: dict[str, set[int]] = {}
        self.n_bytes = 0
        plain = Tensor.__getitem__

        def read(tensor: Tensor, index: Any) -> mx.array:
            items = plain(tensor, index)
            if "switch_mlp" in tensor.name:
                first = index[0] if isinstance(index, tuple) else index
                own = self.experts.setdefault(tensor.name, set())
                own.update(row // n_rows[tensor.name] for row in (first.start, first.stop - 1))
                self.n_bytes += items.nbytes
            return items

        patch.setattr(Tensor, "__getitem__", read)


PLANS = {"default": Plan(), "32 rows": Plan(weight_block_bytes=1), "block": Plan("block", SAVE_INPUTS)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("packed", [False, True])
def test_only_experts_that_a_token_chose_are_read(
    tmp_path: Path, plan: Plan, packed: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    config = packed_config("qwen3_moe") | {"num_experts": 16}
    how = {"group_size": 32, "bits": 4} if packed else None
    model = mebp_mlx.open_model(write_model(tmp_path / "m", config, seed=seed, quantization=how))
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 1, 4, model.spec.V, "none")
    chosen: dict[str, set[int]] = {}
    choose = Moe.choose

    def watched(moe: Moe, r: mx.array) -> mx.array:
        choice = choose(moe, r)
        if not moe.model.is_unread:
            for stack in moe.stacks.values():
                chosen.setdefault(stack.name, set()).update(np.asarray(choice).reshape(-1).tolist())
        return choice

    monkeypatch.setattr(Moe, "choose", watched)
    stacks = [stack for layer in model.spec.layers for stack in layer.experts.values()]
    reads = Reads(monkeypatch, {name: stack.out_dims for stack in stacks for name in stack.tensors})
    mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    assert len(chosen) == 6 and all(len(experts) <= 8 < 16 for experts in chosen.values())
    names = {name: stack.name for stack in stacks for name in stack.tensors[1 if packed else 0 :]}  # numpy reads codes
    assert reads.experts == {name: chosen[stack] for name, stack in names.items()}
    stored = sum(model.weights.info(name).n_bytes for name in names)
    assert 0 < reads.n_bytes <= 3 * stored * 8 / 16  # forward; backward: down's columns, gate and up again


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_without_rows_has_a_gradient_of_zeros(tmp_path: Path, name: str, seed: int) -> None:
    model, lora = _open(tmp_path, name, seed, num_experts=9)
    tokens, targets = random_batch(seed, 1, 2, model.spec.V, "none")
    expected = mlx_lm_loss_and_grads(model.path, lora, tokens, targets)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    _assert_exact(model, lora, (tokens, targets), (loss, grads), seed)
    for stack in _stacks(lora):
        empty = [e for e in range(9) if not np.asarray(expected[1][stack])[e].any()]
        assert len(empty) >= 9 - 2 * 3, f"seed {seed}"
        assert [e for e in range(9) if not np.asarray(grads[stack])[e].any()] == empty, f"{stack}, seed {seed}"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_float64s(tmp_path: Path, name: str, seed: int) -> None:
    model, lora = _open(tmp_path, name, seed)
    tokens, targets = random_batch(seed, 3, 13, model.spec.V)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=Plan(weight_block_bytes=1))
    truth = mlx_lm_loss_and_grads(model.path, lora, tokens, targets, mx.float64)
    theirs = mlx_lm_loss_and_grads(model.path, lora, tokens, targets)
    allowed = TOLERANCE + 3 * largest_error(*theirs, *truth)
    assert not (largest_error(loss.item(), grads, *truth) > allowed), f"seed {seed}"


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "lfm2_moe", "gpt_oss"])
def test_gradients_of_packed_stacks(tmp_path: Path, name: str, mode: str, seed: int) -> None:
    sizes = {"affine": (32, 8), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    how = {"group_size": sizes[0], "bits": sizes[1], "mode": mode}
    folder = write_model(tmp_path / "model", packed_config(name), seed=seed, quantization=how)
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    _assert_exact(model, lora, (tokens, targets), (loss, grads), seed)
    if mode != "nvfp4":  # packed products round differently
        packed = Model(folder, packed=True)
        again = mebp_mlx.loss_and_grads(packed, lora, tokens, targets, plan=Plan("block"))
        assert not (largest_error(again[0].item(), again[1], loss.item(), grads) > 1e-4), f"seed {seed}"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "gpt_oss"])
def test_experts_stored_separately_are_the_same_model(tmp_path: Path, name: str, seed: int) -> None:
    model, lora = _open(tmp_path, name, seed)
    apart = _store_apart(write_model(tmp_path / "apart", CONFIGS[name], seed=seed), hub_names=name.startswith("lfm2"))
    batch = random_batch(seed, 2, 9, model.spec.V)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, *batch)
    other = mebp_mlx.open_model(apart)
    randomize_lora(again := mebp_mlx.init_lora(other, rank=3, scale=2.0), seed)
    same_loss, same = mebp_mlx.loss_and_grads(other, again, *batch)
    assert loss.item() == same_loss.item() and grads.keys() == same.keys()
    assert all(np.array_equal(np.asarray(grads[key]), np.asarray(same[key])) for key in grads)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe-tied", "lfm2_moe"])
def test_experts_stored_separately_convert_and_fuse_to_stacks(tmp_path: Path, name: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    config = packed_config(name)
    whole = write_model(tmp_path / "whole", config, seed=seed)
    apart = _store_apart(write_model(tmp_path / "apart", config, seed=seed), hub_names=name.startswith("lfm2"))
    how = ("--bits", "4", "--group-size", "32")
    for source in (whole, apart):
        assert convert.main(["--model", str(source), "--out", str(tmp_path / f"{source.name}-4"), *how]) == 0
    ours, same = (MappedWeights(tmp_path / f"{kind}-4") for kind in ("apart", "whole"))
    assert set(ours.names) == set(same.names) and any(".switch_mlp." in tensor for tensor in ours.names)
    assert all(np.array_equal(ours.view(tensor), same.view(tensor)) for tensor in same.names)
    load_model(tmp_path / "apart-4", strict=True)
    assert convert.main(["--model", str(apart), "--out", str(tmp_path / "kept"), "--mode", "keep"]) == 0
    assert not any(".switch_mlp." in tensor for tensor in MappedWeights(tmp_path / "kept").names)
    load_model(tmp_path / "kept", strict=True)
    key = next(key for key in Model(apart).spec.lora_keys if key.endswith("switch_mlp.up_proj"))
    adapters = make_adapters(tmp_path / "adapters", apart, keys=[key])
    flags = ["--adapter-path", str(adapters), "--tolerance", "none"]
    assert fuse.main(["--model", str(apart), "--save-path", str(tmp_path / "fused"), *flags]) == 0
    load_model(tmp_path / "fused", strict=True)
    batch = random_batch(seed, 2, 9, 131)
    model, fused = mebp_mlx.open_model(apart), mebp_mlx.open_model(tmp_path / "fused")
    with_adapters = mebp_mlx.loss(model, mebp_mlx.load_adapters(adapters, model), *batch).item()
    plain = mebp_mlx.loss(fused, mebp_mlx.init_lora(fused, rank=1), *batch).item()
    assert not (abs(plain / with_adapters - 1) > TOLERANCE), f"seed {seed}"


def test_experts_packed_differently_are_refused(tmp_path: Path) -> None:
    config = packed_config("olmoe-tied")
    plain = _store_apart(write_model(tmp_path / "plain", config))
    four = _store_apart(write_model(tmp_path / "four", config, quantization={"group_size": 32, "bits": 4}))
    tensors: Any = mx.load(str(four / "model.safetensors"))
    dense: Any = mx.load(str(plain / "model.safetensors"))
    name = "model.layers.1.mlp.experts.3.up_proj"
    for part in ("weight", "scales", "biases"):
        del tensors[f"{name}.{part}"]
    mx.save_safetensors(str(four / "model.safetensors"), tensors | {f"{name}.weight": dense[f"{name}.weight"]})
    with pytest.raises(UserError, match=r"experts\.3\.up_proj and .*experts\.0\.up_proj are packed differently"):
        mebp_mlx.open_model(four)


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "lfm2_moe", "gpt_oss"])
def test_adapters_are_exchanged_with_mlx_lm(tmp_path: Path, name: str, seed: int) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
    from mlx_lm.utils import load_model

    model, lora = _open(tmp_path, name, seed)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V, "none")
    folder = mebp_mlx.save_adapters(tmp_path / "ours", lora, model)
    theirs = load_adapters(load_model(model.path)[0], str(folder))
    logits = theirs(mx.array(tokens)).astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    expected = -mx.take_along_axis(logits, mx.array(targets)[..., None], axis=-1).mean().item()
    assert not (abs(mebp_mlx.loss(model, lora, tokens, targets).item() / expected - 1) > TOLERANCE), f"seed {seed}"
    fresh = load_model(model.path)[0]
    fresh.freeze()
    linear_to_lora_layers(fresh, 2, {"rank": 3, "scale": 2.0, "dropout": 0.0})
    (tmp_path / "theirs").mkdir()
    values = dict(tree_flatten(fresh.trainable_parameters()))
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), values)
    about = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": 2.0, "dropout": 0.0}}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(about))
    read = mebp_mlx.load_adapters(tmp_path / "theirs", model).parameters()
    assert read.keys() == values.keys() and _stacks(mebp_mlx.load_adapters(tmp_path / "theirs", model))
    assert all(np.array_equal(np.asarray(read[key]), np.asarray(values[key])) for key in values)


def test_unsupported_settings_of_experts_are_refused(tmp_path: Path) -> None:
    model, lora = _open(tmp_path, "olmoe", 1)
    with pytest.raises(UserError, match=r"dora: mlp\.switch_mlp\.gate_proj holds experts"):
        mebp_mlx.init_lora(model, fine_tune_type="dora")
    mebp_mlx.init_lora(model, fine_tune_type="dora", keys=["mlp.gate", "self_attn.q_proj"])
    from mebp_mlx.export import __main__ as export

    folder = mebp_mlx.save_adapters(tmp_path / "a", lora, model)
    flags = ["--model", str(model.path), "--adapter-path", str(folder), "--save-path", str(tmp_path / "p"), "--peft"]
    assert export.main(flags) == 2
    for changes, problem in (
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
        ({"num_experts": None}, "num_experts is missing"),
    ):
        config = json.loads((model.path / "config.json").read_text()) | changes
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=problem):
            mebp_mlx.open_model(model.path)


def test_a_zero_router_sends_every_token_to_the_same_experts_as_in_mlx_lm(tmp_path: Path, seed: int) -> None:
    """All scores are equal, so argpartition chooses."""
    folder = write_model(tmp_path / "model", CONFIGS["qwen3_moe"], seed=seed)
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    zeros = {name: mx.zeros(value.shape) for name, value in tensors.items() if name.endswith("mlp.gate.weight")}
    mx.save_safetensors(str(folder / "model.safetensors"), {**tensors, **zeros})
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)  # B = 0
    batch = random_batch(seed, 2, 9, model.spec.V)
    _assert_exact(model, lora, batch, mebp_mlx.loss_and_grads(model, lora, *batch), seed)


@pytest.mark.parametrize("name", ["qwen3_moe-tied", "lfm2_moe"])
@pytest.mark.parametrize("grain", ["op", "block"])
def test_the_backward_pass_visits_the_experts_of_the_forward_pass_without_choosing_again(
    tmp_path: Path, name: str, grain: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Even if the router's output is recomputed."""
    model, lora = _open(tmp_path, name, seed)
    n_mixtures = sum(bool(layer.experts) for layer in model.spec.layers)
    batch = WholeBatch(*random_batch(seed, 2, 150, model.spec.V))
    chosen: list[bytes] = []
    visited: list[bytes] = []
    choose, visits = Moe.choose, Moe.backward

    def watched(moe: Moe, r: mx.array) -> mx.array:
        choice = choose(moe, r)
        if not moe.model.is_unread:
            chosen.append(np.asarray(choice).tobytes())
        return choice

    def seen(moe: Moe, *args: Any) -> Any:
        visited.append(np.asarray(args[2]).tobytes())
        return visits(moe, *args)

    monkeypatch.setattr(Moe, "choose", watched)
    monkeypatch.setattr(Moe, "backward", seen)
    for saved in (SAVE_INPUTS, SAVE_PRODUCTS):
        chosen.clear()
        visited.clear()
        engine = BackpropEngine(model, lora, plan=Plan(grain, saved, token_block=64, kept_bytes=0), dropout=False)
        engine.step(batch, step=0, micro=0, n_labels=10, sink=lambda g: None)
        engine.close()
        assert len(chosen) == 3 * n_mixtures  # once per tile, and not in the backward pass
        assert sorted(visited) == sorted(chosen), f"seed {seed}"


def test_a_mixture_costs_one_wait_per_tile(tmp_path: Path, seed: int) -> None:
    """More than a model without one, for any kept values; counted with a GPU's grain."""
    model, lora = _open(tmp_path, "qwen3_moe-tied", seed)
    mixtures = sum(bool(layer.experts) for layer in model.spec.layers)
    waits = Counter[int]()
    for n_tokens in (60, 120):
        plan = Plan("block", token_block=64, weight_block_bytes=None, head_block_bytes=None)
        engine = BackpropEngine(model, lora, plan=plan, dropout=False)
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Model, "copied_bytes", lambda *_: 0.0)  # as if pages were used in place
        batch = WholeBatch(*random_batch(seed, 1, n_tokens, model.spec.V))
        engine.step(batch, step=0, micro=0, n_labels=10, sink=lambda g: None)
        monkey.undo()
        waits[n_tokens] = engine.barrier.n_waits
        engine.close()
    assert waits[120] - waits[60] == mixtures


def test_dropout_is_the_same_in_each_engine_and_tile(tmp_path: Path, seed: int) -> None:
    model, _ = _open(tmp_path, "qwen3_moe-tied", seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, dropout=0.4)
    randomize_lora(lora, seed)
    batch = WholeBatch(*random_batch(seed, 2, 130, model.spec.V))
    results = []
    for engine in (
        make_engine("whole-graph", model, lora, seed=5),
        BackpropEngine(model, lora, plan=Plan(token_block=64), seed=5),
        BackpropEngine(model, lora, plan=Plan(token_block=128, saved=SAVE_INPUTS, weight_block_bytes=1), seed=5),
    ):
        grads: dict[str, mx.array] = {}
        loss = engine.step(batch, step=3, micro=0, n_labels=50, sink=grads.update)
        engine.close()
        results.append((loss, grads))
    for loss, grads in results[1:]:
        assert not (abs(loss / results[0][0] - 1) > TOLERANCE), f"seed {seed}"
        assert not (max(relative_error(grads[n], results[0][1][n], 1e-6) for n in grads) > 1e-4), f"seed {seed}"


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_16_bits_stay_close_to_float32(tmp_path: Path, dtype: mx.Dtype, seed: int) -> None:
    """Except for experts with equal rounded scores: a few tokens may choose differently."""
    folder = write_model(tmp_path / "model", packed_config("lfm2_moe"), seed=seed, dtype=dtype)
    lora = mebp_mlx.init_lora(mebp_mlx.open_model(folder), rank=3, scale=2.0)
    batch = random_batch(seed, 2, 12, 131)
    exact = mebp_mlx.loss_and_grads(Model(folder), lora, *batch)
    narrow = mebp_mlx.loss_and_grads(Model(folder, dtype), lora, *batch)
    assert not (abs(narrow[0].item() / exact[0].item() - 1) > 0.05), f"seed {seed}"
    assert all(g.dtype == mx.float32 for g in narrow[1].values())


@pytest.mark.parametrize("name", ["qwen3_moe", "lfm2_moe"])
@pytest.mark.parametrize("engine", ["mezo", "kzoo", "hizoo", "fzoo"])
def test_zeroth_order_estimates_use_the_mixtures_loss(tmp_path: Path, name: str, engine: str, seed: int) -> None:
    """Losses at the probes equal those of perturbed parameters; every stack gets an estimate in its own layout."""
    model, lora = _open(tmp_path, name, seed)
    batch = WholeBatch(*random_batch(seed, 2, 9, model.spec.V))
    n_labels = int((batch.targets != -100).sum())
    estimator = make_estimator(engine, lora, seed=seed, eps=1e-2, n_samples=2)
    found: dict[str, mx.array] = {}
    worker = ZerothOrderEngine(model, lora, estimator, seed=seed)
    worker.step(batch, step=1, micro=0, n_labels=n_labels, sink=found.update)
    start = lora.parameters()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in start.items()}
    losses = []
    for probe in estimator.probes:
        moved = {
            key: value + probe.amount * estimator.direction(probe.number, key, value.shape) if probe.amount else value
            for key, value in start.items()
        }
        lora.update(moved)
        losses.append(mebp_mlx.loss(model, lora, batch.tokens, batch.targets).item())
    lora.update(start)
    assert not (abs(estimator.loss(np.array(losses)) / worker.estimator.loss(worker._losses) - 1) > 1e-4), f"{seed}"


def test_the_plan_counts_the_experts_that_a_pass_reads(tmp_path: Path, seed: int) -> None:
    """Few tokens reach few experts; only bytes of reached experts are counted."""
    model, lora = _open(tmp_path, "qwen3_moe", seed, num_experts=16)
    stacks = [stack for layer in model.spec.layers for stack in layer.experts.values()]
    one = expert_sizes(model, 1)
    assert one == ExpertSizes(sum(16 * 4 * s.out_dims * s.in_dims for s in stacks), one.reached, 2, 2)  # type: ignore[union-attr]
    assert one is not None and one.reached == one.stored * 2 // 16
    many = expert_sizes(model, 8)
    assert many is not None and many.reached == many.stored and many.n_reached == 16
    dense = mebp_mlx.open_model(write_model(tmp_path / "dense", CONFIGS["qwen3"]))
    assert expert_sizes(dense, 8) is None
    counted = [count(Workload(model, lora, 1, T), Plan(weight_block_bytes=None)) for T in (1, 2, 4)]
    flops = [[work[phase].flops for phase in ("forward", "backward")] for work in counted]
    assert all(b > a > 0 for a, b in zip(flops[0], flops[1], strict=True))
    assert counted[0]["backward"].memory_bytes < counted[2]["backward"].memory_bytes


def test_a_clipped_gate_is_mlx_lms_and_has_its_gradient(seed: int) -> None:
    """gpt-oss's, with many values beyond its limits; a clipped value has no gradient."""
    from mlx_lm.models.activations import swiglu_oai

    g, u, dm = (10 * mx.random.normal((40, 30), key=mx.random.key(seed + i)) for i in range(3))
    (m,), (dg, du) = mx.vjp(lambda g, u: swiglu_oai(g, u, alpha=1.702, limit=7.0), [g, u], [dm])
    for ours, theirs in zip(CLIPPED.backward(g, u, dm), (m, dg, du), strict=True):
        assert not (relative_error(ours, theirs) > 1e-6), f"seed {seed}"
    assert not np.asarray(CLIPPED.backward(g, u, dm)[1])[np.asarray(g) > 7].any()


def test_gpt_oss_published_experts_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", CONFIGS["gpt_oss"])
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    tensors["model.layers.0.mlp.experts.gate_up_proj_blocks"] = mx.zeros((6, 90, 2, 16), mx.uint8)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(UserError, match=r"gate_up_proj_blocks: experts whose gate and up rows alternate"):
        mebp_mlx.open_model(folder)


@pytest.mark.parametrize("apart", [False, True])
def test_only_pages_of_chosen_experts_are_prefetched(
    tmp_path: Path, apart: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    folder = write_model(tmp_path / "model", CONFIGS["olmoe"] | {"num_experts": 16}, seed=seed)
    model = mebp_mlx.open_model(_store_apart(folder) if apart else folder)
    lora = mebp_mlx.init_lora(model, rank=2)
    asked: set[tuple[str, int, int | None]] = set()
    chosen: set[tuple[str, int, int | None]] = set()
    choose = Moe.choose

    def watched(moe: Moe, r: mx.array) -> mx.array:
        choice = choose(moe, r)
        for stack in () if moe.model.is_unread else moe.stacks.values():
            for expert in np.unique(np.asarray(choice)).tolist():
                own = stack.expert(expert).tensors
                chosen.update((name, 0, None) if apart else (name, expert, expert + 1) for name in own)
        return choice

    def advise(weights: MappedWeights, name: str, start: int = 0, stop: int | None = None) -> None:
        if "switch_mlp" in name or ".experts." in name:
            asked.add((name, start, stop))

    monkeypatch.setattr(Moe, "choose", watched)
    monkeypatch.setattr(MappedWeights, "advise", advise)
    engine = BackpropEngine(model, lora, plan=Plan(), dropout=False)
    engine.step(WholeBatch(*random_batch(seed, 1, 3, 131)), step=0, micro=0, n_labels=3, sink=lambda g: None)
    engine.ahead.wait()
    engine.close()
    assert asked == chosen and len(chosen) <= 3 * 3 * 2 * 3


def test_a_selection_bias_keeps_its_dtype(tmp_path: Path, seed: int) -> None:
    """Rounding would send tokens to other experts; mlx-lm's conversions keep it too."""
    source = write_model(tmp_path / "source", packed_config("lfm2_moe"), seed=seed)
    flags = ["--bits", "4", "--group-size", "32", "--dtype", "bfloat16"]
    assert convert.main(["--model", str(source), "--out", str(tmp_path / "out"), *flags]) == 0
    before, after = MappedWeights(source), MappedWeights(tmp_path / "out")
    names = [name for name in before.names if name.endswith("expert_bias")]
    assert names and all(np.array_equal(before.view(name), after.view(name)) for name in names)
    assert after.info("model.embedding_norm.weight").dtype == "BF16"
