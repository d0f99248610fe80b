"""Gradients equal autograd's, for every family, placement, mask, packing and policy."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import WholeBatch
from mebp_mlx.families import BLOCKS
from mebp_mlx.kernels import cpu
from mebp_mlx.model.config import PROJECTIONS
from mebp_mlx.ops.plan import GRAINS, SAVE_INPUTS, SAVE_PRODUCTS, SAVE_PROJECTIONS, Plan
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, relative_error, write_model

TOLERANCE = 1e-5
# The distances of two float32 results from float64 differ randomly: over 40 ill-conditioned models their ratio had a
# median of 1.00 and a range of 0.77 to 1.68.
CHANCE = 3
# Blocks of 32 rows of a matrix, odd query blocks, tiles of 64 positions.
TINY_BLOCKS = Plan(weight_block_bytes=1, head_block_bytes=1, token_block=64, query_block=5)


def _model(tmp_path: Path, config: dict, **how: object) -> mebp_mlx.api.Model:
    return mebp_mlx.open_model(write_model(tmp_path / "model", config, **how))  # type: ignore[arg-type]


def _whole_graph(model: object, lora: object, batch: WholeBatch, **how: object) -> tuple[float, dict[str, mx.array]]:
    engine = make_engine("whole-graph", model, lora, **how)  # type: ignore[arg-type]
    grads: dict[str, mx.array] = {}
    n_labels = int((batch.targets != -100).sum())
    return engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update), grads


def _float64(model: Any, lora: Any, batch: WholeBatch, **how: object) -> tuple[float, dict[str, mx.array]]:
    """The whole graph's loss and gradients, with everything but the last rounding in float64."""
    model.dtype = mx.float64
    try:
        return _whole_graph(model, lora, batch, **how)
    finally:
        model.dtype = mx.float32


def _assert_as_exact(
    model: Any, lora: Any, batch: WholeBatch, loss: float, grads: dict[str, mx.array], seed: int, dropout_seed: int
) -> None:
    """With dropout: equal to the whole graph in float32, or as close to float64 up to chance."""
    theirs = _whole_graph(model, lora, batch, seed=dropout_seed)
    if largest_error(loss, grads, *theirs) <= TOLERANCE:
        return
    truth = _float64(model, lora, batch, seed=dropout_seed)
    assert largest_error(loss, grads, *truth) <= CHANCE * largest_error(*theirs, *truth) + TOLERANCE, f"seed {seed}"


def _assert_exact(model: Any, lora: Any, tokens: np.ndarray, targets: np.ndarray, plan: Plan | None, seed: int) -> None:
    """Equal to mlx-lm in float32, or as close to float64 up to chance."""
    theirs = mlx_lm_loss_and_grads(model.path, lora, tokens, targets)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    if largest_error(loss.item(), grads, *theirs) <= TOLERANCE:
        return
    truth = mlx_lm_loss_and_grads(model.path, lora, tokens, targets, mx.float64)
    allowed = CHANCE * largest_error(*theirs, *truth) + TOLERANCE
    assert largest_error(loss.item(), grads, *truth) <= allowed, f"seed {seed}"


@pytest.mark.quick
@pytest.mark.parametrize("plan", [None, TINY_BLOCKS], ids=["default", "tiny-blocks"])
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_mlx_lms_model(tmp_path: Path, name: str, plan: Plan | None, seed: int) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 3, 17, model.spec.V)
    _assert_exact(model, lora, tokens, targets, plan, seed)
    loss, _ = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    forward = mebp_mlx.loss(model, lora, tokens, targets, plan=plan).item()
    assert abs(forward - loss.item()) <= TOLERANCE * forward


TILED = [
    "qwen2",
    "llama-sliding",
    "gemma3_text",
    "olmo3",
    "glm4",
    "phi3-partial",
    "gemma2",
    "ministral3",
    "minicpm",
    "lfm2",
]
TILED += ["qwen3_5", "qwen3_5-tied", "gemma4_text", "qwen3_moe", "olmoe", "lfm2_moe", "gpt_oss"]


@pytest.mark.parametrize("saved", [SAVE_PROJECTIONS, SAVE_INPUTS], ids=["save-projections", "save-inputs"])
@pytest.mark.parametrize(
    "name, masking",
    [(name, masking) for name in TILED for masking in ("ragged", "holes") if name in TILED[:3] or masking == "ragged"],
)
def test_gradients_of_sequences_in_tiles(
    tmp_path: Path, name: str, masking: str, saved: frozenset[str], seed: int
) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, dropout=0.3)
    randomize_lora(lora, seed)
    batch = WholeBatch(*random_batch(seed, 2, 150, model.spec.V, masking))
    n_labels = int((batch.targets != -100).sum())
    for token_block, query_block in ((64, 50), (128, 200)):
        plan = Plan(saved=saved, token_block=token_block, query_block=query_block)
        engine = BackpropEngine(model, lora, plan=plan, seed=5)
        grads: dict[str, mx.array] = {}
        loss = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update)
        engine.close()
        _assert_as_exact(model, lora, batch, loss, grads, seed, dropout_seed=5)


@pytest.mark.parametrize("saved", [SAVE_PROJECTIONS, SAVE_INPUTS, frozenset({"x", "g"})], ids=["all", "x", "x and g"])
@pytest.mark.parametrize("name, packed", [("llama", False), ("qwen2", True), ("gemma3_text", True)])
@pytest.mark.parametrize("keys", [None, ["mlp.down_proj"], ["mlp.gate_proj", "self_attn.v_proj"]])
def test_mlp_in_blocks_of_columns(
    tmp_path: Path, name: str, packed: bool, keys: list[str] | None, saved: frozenset[str], seed: int
) -> None:
    config = packed_config(name) if packed else dict(CONFIGS[name])
    config["intermediate_size"] = 1088 if packed else 1031
    quantization = {"group_size": 32, "bits": 4} if packed else None
    model = _model(tmp_path, config, seed=seed, quantization=quantization)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, keys=keys, dropout=0.2)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 70, model.spec.V)
    plan = Plan(saved=saved, weight_block_bytes=1, token_block=64)  # 512 columns at a time
    _assert_exact(model, lora, tokens, targets, plan, seed)  # without dropout
    engine, grads = BackpropEngine(model, lora, plan=plan, seed=5), {}
    batch = WholeBatch(tokens, targets)
    loss = engine.step(batch, step=3, micro=0, n_labels=int((targets != -100).sum()), sink=grads.update)
    engine.close()
    _assert_as_exact(model, lora, batch, loss, grads, seed, dropout_seed=5)


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text", "gemma4_text"])
def test_error_against_float64_is_that_of_float32(tmp_path: Path, name: str, seed: int) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 3, 17, model.spec.V)
    truth = mlx_lm_loss_and_grads(model.path, lora, tokens, targets, mx.float64)
    theirs = largest_error(*mlx_lm_loss_and_grads(model.path, lora, tokens, targets), *truth)
    for plan in (None, TINY_BLOCKS):
        loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
        assert largest_error(loss.item(), grads, *truth) <= CHANCE * theirs + TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize(
    "quantization",
    [
        {"group_size": 32, "bits": 4},
        {"group_size": 64, "bits": 8, "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4}},
        {"group_size": 32, "bits": 4, "model.embed_tokens": False, "model.layers.0.self_attn.q_proj": False},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 32, "bits": 5},
    ],
    ids=["4-bit", "8-bit, one 4-bit", "4-bit, two in 16 bits", "mxfp4", "mxfp8", "nvfp4", "5-bit"],
)
@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3_text", "gemma3"])
def test_gradients_of_packed_checkpoints(tmp_path: Path, name: str, quantization: dict, seed: int) -> None:
    if name == "gemma3":
        quantization = {f"language_model.{k}" if k.startswith("model.") else k: v for k, v in quantization.items()}
    config = packed_config(name)
    if quantization["group_size"] == 64 or any(isinstance(v, dict) for v in quantization.values()):
        (config.get("text_config") or config)["intermediate_size"] = 128
    model = _model(tmp_path, config, seed=seed, quantization=quantization)
    lora = mebp_mlx.init_lora(model, rank=4, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    _assert_exact(model, lora, tokens, targets, TINY_BLOCKS, seed)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", [None, {"group_size": 32, "bits": 4}], ids=["plain", "4-bit"])
def test_gradients_of_16_bit_checkpoints(tmp_path: Path, dtype: mx.Dtype, quantization: dict | None, seed: int) -> None:
    model = _model(tmp_path, packed_config("qwen3"), seed=seed, dtype=dtype, quantization=quantization)
    lora = mebp_mlx.init_lora(model, rank=4, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    _assert_exact(model, lora, tokens, targets, None, seed)


@pytest.mark.parametrize("masking", ["none", "ragged", "prompt", "holes"])
@pytest.mark.parametrize("B, T", [(1, 1), (1, 11), (4, 2), (5, 7)])
def test_gradients_for_masks_and_odd_batches(tmp_path: Path, masking: str, B: int, T: int, seed: int) -> None:
    model = _model(tmp_path, CONFIGS["gemma3_text"], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=2, scale=3.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, B, max(T, 2), model.spec.V, masking)
    tokens, targets = tokens[:, -T:], targets[:, -T:]
    # A single token can be ill-conditioned, so the tolerance is autograd's distance from float64.
    truth = mlx_lm_loss_and_grads(model.path, lora, tokens, targets, mx.float64)
    theirs = largest_error(*_whole_graph(model, lora, WholeBatch(tokens, targets)), *truth)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=TINY_BLOCKS)
    assert largest_error(loss.item(), grads, *truth) <= CHANCE * theirs + TOLERANCE, f"seed {seed}"


@pytest.mark.parametrize(
    "keys, num_layers",
    [
        (["self_attn.q_proj"], -1),
        (["mlp.down_proj"], 2),
        (["self_attn.v_proj", "mlp.gate_proj"], 1),
        (["self_attn.o_proj", "mlp.up_proj"], -1),
        (None, 1),
    ],
)
@pytest.mark.parametrize("saved", [SAVE_PROJECTIONS, SAVE_INPUTS], ids=["save-projections", "save-inputs"])
def test_gradients_for_every_placement(
    tmp_path: Path, keys: list[str] | None, num_layers: int, saved: frozenset[str], seed: int
) -> None:
    model = _model(tmp_path, CONFIGS["llama"], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, keys=keys, num_layers=num_layers)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 8, model.spec.V)
    _assert_exact(model, lora, tokens, targets, Plan(saved=saved), seed)


@pytest.mark.parametrize(
    "name, keys, num_layers",
    [
        ("phi3", ["self_attn.qkv_proj"], -1),
        ("phi3", ["mlp.gate_up_proj"], 1),
        ("glm4", ["self_attn.k_proj", "mlp.gate_up_proj"], 2),
        ("olmo2", ["mlp.up_proj"], 2),
        ("olmo2", ["self_attn.v_proj"], -1),
        ("granite", ["self_attn.o_proj"], 2),
        ("hunyuan_v1_dense", ["self_attn.k_proj"], -1),
        ("gemma2", ["self_attn.q_proj", "mlp.down_proj"], 3),
        ("lfm2", ["conv.in_proj"], -1),
        ("lfm2", ["conv.out_proj", "self_attn.v_proj"], 3),
        ("lfm2", ["feed_forward.w1"], 2),
        ("qwen3_5", ["linear_attn.in_proj_a"], -1),
        ("qwen3_5", ["linear_attn.in_proj_qkv", "linear_attn.out_proj"], 3),
        ("qwen3_5", ["self_attn.q_proj", "linear_attn.in_proj_z"], -1),
        ("qwen3_5-tied", ["mlp.down_proj", "linear_attn.in_proj_b"], 2),
        ("qwen3_moe", ["mlp.gate"], -1),
        ("qwen3_moe", ["mlp.gate"], 1),
        ("qwen3_moe-tied", ["mlp.gate", "self_attn.v_proj"], 1),
        ("qwen3_moe-tied", ["mlp.switch_mlp.down_proj"], -1),
        ("qwen3_moe-tied", ["mlp.switch_mlp.down_proj"], 1),
        ("olmoe", ["mlp.switch_mlp.gate_proj"], 2),
        ("olmoe", ["mlp.switch_mlp.up_proj", "mlp.gate"], 1),
        ("olmoe", ["self_attn.q_proj"], -1),
        ("olmoe-tied", ["mlp.gate", "mlp.switch_mlp.down_proj"], 1),
        ("gpt_oss", ["mlp.router"], 1),
        ("gpt_oss", ["mlp.experts.down_proj"], -1),
        ("gpt_oss", ["mlp.experts.gate_proj", "self_attn.k_proj"], 3),
        ("lfm2_moe", ["feed_forward.gate"], 2),
        ("lfm2_moe", ["conv.in_proj", "feed_forward.switch_mlp.up_proj"], 3),
        ("lfm2_moe-plain", ["feed_forward.switch_mlp.gate_proj", "conv.out_proj"], -1),
        ("lfm2_moe-plain", ["feed_forward.gate_proj"], -1),
        ("gemma4_text", ["self_attn.k_proj"], -1),
        ("gemma4_text", ["self_attn.v_proj", "per_layer_input_gate"], 5),
        ("gemma4_text", ["self_attn.k_proj", "mlp.down_proj"], 4),
        ("gemma4_text", ["per_layer_projection"], 3),
        ("gemma4_text", ["per_layer_input_gate"], 1),
        ("gemma4_text", ["mlp.gate_proj", "self_attn.q_proj"], -1),
    ],
)
def test_gradients_for_placements_in_other_blocks(
    tmp_path: Path, name: str, keys: list[str], num_layers: int, seed: int
) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, keys=keys, num_layers=num_layers)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 8, model.spec.V)
    _assert_exact(model, lora, tokens, targets, TINY_BLOCKS, seed)


@pytest.mark.parametrize(
    "name",
    [
        "mistral3",
        "granite",
        "minicpm",
        "olmo3",
        "exaone4",
        "hunyuan_v1_dense",
        "glm4",
        "phi3",
        "gemma2",
        "lfm2",
        "qwen3_5",
        "qwen3_moe",
        "olmoe",
        "lfm2_moe",
        "gemma4_text",
        "gemma4",
        "gpt_oss",
    ],
)
def test_gradients_of_packed_checkpoints_of_other_blocks(tmp_path: Path, name: str, seed: int) -> None:
    model = _model(tmp_path, packed_config(name), seed=seed, quantization={"group_size": 32, "bits": 4})
    lora = mebp_mlx.init_lora(model, rank=4, scale=2.0)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    _assert_exact(model, lora, tokens, targets, TINY_BLOCKS, seed)


@pytest.mark.parametrize(
    "name",
    ["qwen3", "gemma3_text", "olmo2", "phi3", "lfm2", "qwen3_5", "gemma4_text", "qwen3_moe", "lfm2_moe", "gpt_oss"],
)
def test_gradients_are_bit_equal_for_every_policy(tmp_path: Path, name: str, seed: int) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 2, 90, model.spec.V)
    names = sorted(set().union(*(BLOCKS[layer.block].names for layer in model.spec.layers)))
    rng = np.random.default_rng(seed)
    policies = [SAVE_INPUTS, SAVE_PROJECTIONS, frozenset(names)]
    policies += [frozenset(n for n in names if rng.random() < 0.5) for _ in range(8)]
    reference = None
    for saved in policies:
        plan = Plan(saved=saved, token_block=64, query_block=17)
        loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
        actual = {"loss": np.array(loss), **{k: np.array(v) for k, v in grads.items()}}
        reference = reference or actual
        for key, value in reference.items():
            assert np.array_equal(actual[key], value), f"{key} differs with {sorted(saved)}, seed {seed}"


@pytest.mark.parametrize("numpy_too", [True, False], ids=["numpy", "plain"])
@pytest.mark.parametrize(
    "name, how",
    [
        ("qwen3", {}),
        ("gemma3_text", {"quantization": {"group_size": 32, "bits": 4}}),
        ("lfm2_moe", {"quantization": {"group_size": 32, "bits": 4}}),
    ],
)
def test_gradients_are_bit_equal_for_every_grain_and_store(
    tmp_path: Path, name: str, how: dict, numpy_too: bool, seed: int
) -> None:
    """Every grain with every store, and every policy with either; all triples would double the number of steps."""
    config = packed_config(name) | {"intermediate_size": 1088, "num_hidden_layers": 3}
    model = _model(tmp_path, config, seed=seed, **how)
    lora = mebp_mlx.init_lora(model, rank=3, dropout=0.2)
    randomize_lora(lora, seed)
    batch = WholeBatch(*random_batch(seed, 2, 150, model.spec.V))
    n_labels = int((batch.targets != -100).sum())
    some_bytes, reference = 150_000, None
    for grain_index, grain in enumerate(GRAINS):
        for store_index, kept_bytes in enumerate((None, 0, some_bytes)):
            saved = (SAVE_PRODUCTS, SAVE_INPUTS)[(grain_index + store_index) % 2]
            plan = Plan(grain, saved, kept_bytes=kept_bytes, weight_block_bytes=1, token_block=64, query_block=17)
            engine, grads = BackpropEngine(model, lora, plan=plan, seed=5), {}
            with contextlib.nullcontext() if numpy_too else cpu.off():
                loss = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update)
                mx.eval(grads)
            assert kept_bytes != 0 or engine.store.written_bytes > 0
            engine.close()
            actual = {"loss": np.array(loss), **{k: np.array(v) for k, v in grads.items()}}
            reference = reference or actual
            for key, value in reference.items():
                assert np.array_equal(actual[key], value), f"{key} differs with {grain}, {kept_bytes}, seed {seed}"


@pytest.mark.parametrize(
    "name, keys",
    [
        *(
            (n, k)
            for n in ("qwen2", "llama-sliding", "gemma3_text")
            for k in (None, ["mlp.up_proj"], ["self_attn.q_proj", "self_attn.o_proj"])
        ),
        ("phi3", None),
        ("phi3", ["self_attn.qkv_proj"]),
        ("lfm2", None),
        ("qwen3_5", None),
        ("olmoe", None),
        ("lfm2_moe", ["feed_forward.gate", "feed_forward.switch_mlp.up_proj"]),
        ("gemma2", None),
        ("gemma4_text", None),
        ("gemma4_text", ["self_attn.k_proj", "per_layer_input_gate"]),
    ],
)
def test_checkpointed_blocks_give_the_same_gradients(tmp_path: Path, name: str, keys: list | None, seed: int) -> None:
    model = _model(tmp_path, CONFIGS[name], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, dropout=0.3, keys=keys)
    randomize_lora(lora, seed)
    batch = WholeBatch(*random_batch(seed, 2, 90, model.spec.V))
    for grain in ("op", "block"):
        plan = Plan(grain, checkpoint=True, token_block=64, query_block=17)
        engine, grads = BackpropEngine(model, lora, plan=plan, seed=5), {}
        n_labels = int((batch.targets != -100).sum())
        loss = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update)
        engine.close()
        _assert_as_exact(model, lora, batch, loss, grads, seed, dropout_seed=5)


@pytest.mark.parametrize("saved", [SAVE_PROJECTIONS, SAVE_INPUTS], ids=["save-projections", "save-inputs"])
def test_dropout_is_the_same_in_forward_and_recomputation(tmp_path: Path, saved: frozenset[str], seed: int) -> None:
    model = _model(tmp_path, CONFIGS["qwen2"], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, dropout=0.4)
    randomize_lora(lora, seed, spread=0.3)
    batch = WholeBatch(*random_batch(seed, 2, 10, model.spec.V))
    engine = BackpropEngine(model, lora, plan=Plan(saved=saved), seed=7)
    n_labels = int((batch.targets != -100).sum())
    grads: dict[str, mx.array] = {}
    loss = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=grads.update)
    _assert_as_exact(model, lora, batch, loss, grads, seed, dropout_seed=7)
    other = engine.step(batch, step=4, micro=0, n_labels=n_labels, sink=lambda g: None)
    again = engine.step(batch, step=3, micro=0, n_labels=n_labels, sink=lambda g: None)
    assert other != loss and again == loss
    engine.close()


def test_micro_batches_add_up_to_the_token_weighted_mean(tmp_path: Path, seed: int) -> None:
    model = _model(tmp_path, CONFIGS["qwen2"], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=3)
    randomize_lora(lora, seed)
    tokens, targets = random_batch(seed, 5, 11, model.spec.V, "prompt")
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    engine = make_engine("mebp", model, lora)
    n_labels, total, added = int((targets != -100).sum()), 0.0, dict.fromkeys(grads, 0)
    for micro, rows in enumerate((slice(0, 2), slice(2, 5))):
        part: dict[str, mx.array] = {}
        batch = WholeBatch(tokens[rows], targets[rows])
        total += engine.step(batch, step=0, micro=micro, n_labels=n_labels, sink=part.update)
        added = {name: added[name] + part[name] for name in part}
    assert abs(total - loss.item()) <= TOLERANCE * abs(total)
    assert max(relative_error(added[n], grads[n]) for n in grads) <= TOLERANCE, f"seed {seed}"


def test_gradients_agree_with_a_float64_difference_quotient(tmp_path: Path, seed: int) -> None:
    model = _model(tmp_path, CONFIGS["qwen3"], seed=seed)
    lora = mebp_mlx.init_lora(model, rank=2, scale=1.0)
    randomize_lora(lora, seed, spread=0.2)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    _, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets)
    start = lora.parameters()
    rng = np.random.default_rng(seed)
    direction = {n: rng.standard_normal(p.shape) for n, p in start.items()}
    slope = sum(float((np.asarray(grads[n], np.float64) * d).sum()) for n, d in direction.items())
    losses = []
    for sign in (1, -1):
        lora.update({n: mx.array(np.asarray(p) + sign * 1e-3 * direction[n], mx.float32) for n, p in start.items()})
        losses.append(mebp_mlx.loss(model, lora, tokens, targets).item())
    quotient = (losses[0] - losses[1]) / 2e-3
    assert abs(quotient - slope) <= 2e-2 * max(abs(slope), 0.1), f"seed {seed}"


def test_every_projection_is_covered_by_the_default_keys(tmp_path: Path) -> None:
    model = _model(tmp_path, CONFIGS["qwen2"])
    names = mebp_mlx.init_lora(model, rank=1).parameters()
    expected = {
        f"model.layers.{i}.{key}.lora_{side}" for i in range(3) for key in PROJECTIONS.values() for side in "ab"
    }
    assert set(names) == expected
