"""A Mac's defaults, selected with options: 16-bit activations, packed weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import BackpropEngine, kept_names
from mebp_mlx.engine.base import Pass, Store, TokenBatch, WholeBatch
from mebp_mlx.errors import UserError
from mebp_mlx.families import BLOCKS
from mebp_mlx.families.base import value
from mebp_mlx.model.base import Model
from mebp_mlx.ops.attention import Attention
from mebp_mlx.ops.gated_mlp import GatedMlp
from mebp_mlx.ops.lora_linear import LoraLinear
from mebp_mlx.ops.plan import SAVE_INPUTS, SAVE_PRODUCTS, Plan
from mebp_mlx.system import device
from mebp_mlx.testing.reference import largest_error, rms_error
from mebp_mlx.testing.tiny import packed_config, random_batch, randomize_lora, write_model

# Ratio of two 16-bit computations' distances from float64: at most 1.06 in 240 draws.
CHANCE = 1.25
FLOAT16 = 0.03  # limit for all gradients; at most 0.016 in twelve draws
FOUR_BIT = {"group_size": 32, "bits": 4}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
MXFP8 = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
SMALL_PIECES = Plan(weight_block_bytes=1, head_block_bytes=1, token_block=64, query_block=17)


def _folder(tmp_path: Path, name: str, seed: int, quantization: dict[str, Any] | None) -> Path:
    config = packed_config(name)
    config.get("text_config", config)["intermediate_size"] = 1088  # three blocks of the MLP's width
    return write_model(tmp_path / "model", config, seed=seed, quantization=quantization, dtype=mx.bfloat16)


def _lora(model: Model, seed: int, **how: Any) -> Any:
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, **how)
    randomize_lora(lora, seed)
    return lora


def _step(engine: Any, batch: TokenBatch) -> tuple[float, dict[str, mx.array]]:
    grads: dict[str, mx.array] = {}
    try:
        return engine.step(batch, step=3, micro=0, n_labels=batch.n_labels, sink=grads.update), grads
    finally:
        engine.close()


def _oracle(folder: Path, dtype: mx.Dtype, lora: Any, batch: TokenBatch) -> tuple[float, dict[str, mx.array]]:
    return _step(make_engine("whole-graph", Model(folder, dtype), lora), batch)


@pytest.mark.parametrize("plan", [None, SMALL_PIECES], ids=["default", "small pieces"])
@pytest.mark.parametrize("weights", ["packed", "decompressed"])
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("qwen2", "bfloat16"),
        ("qwen3", "float16"),
        ("llama", "bfloat16"),
        ("gemma3_text", "bfloat16"),
        ("gemma4_text", "bfloat16"),
    ],
)
def test_gradients_in_16_bits_are_as_exact_as_autograds(
    tmp_path: Path, name: str, dtype: str, weights: str, plan: Plan | None, seed: int
) -> None:
    T = 70 if plan is not None else 24  # two tiles, or one: packed products in 16 bits are slow on a CPU
    folder = _folder(tmp_path, name, seed, FOUR_BIT)
    model = mebp_mlx.open_model(folder, dtype, weights)
    lora, batch = _lora(model, seed), WholeBatch(*random_batch(seed, 2, T, model.spec.V))
    loss, grads = mebp_mlx.loss_and_grads(model, lora, batch.tokens, batch.targets, plan=plan)
    assert all(g.dtype == mx.float32 for g in grads.values())
    truth = _oracle(folder, mx.float64, lora, batch)
    # On the CPU MLX's quantized_matmul sums in 16 bits, with 20 times a matmul's error: autograd must use it as well.
    theirs = _step(make_engine("whole-graph", model, lora), batch)
    assert abs(loss.item() - theirs[0]) <= 1e-2 * theirs[0], f"seed {seed}"
    ours, allowed = rms_error(grads, truth[1]), CHANCE * rms_error(theirs[1], truth[1])
    assert ours <= allowed, f"seed {seed}: {ours} against {allowed}"


@pytest.mark.parametrize(
    "quantization",
    [FOUR_BIT, {"group_size": 64, "bits": 8}, MXFP4, MXFP8, NVFP4],
    ids=["4", "8", "mxfp4", "mxfp8", "nvfp4"],
)
def test_packed_products_give_the_same_gradients(tmp_path: Path, quantization: dict[str, Any], seed: int) -> None:
    """In float32 only the order of summation differs."""
    folder = _folder(tmp_path, "qwen2-untied", seed, quantization)
    packed, plain = (mebp_mlx.open_model(folder, "float32", weights) for weights in ("packed", "decompressed"))
    lora, (tokens, targets) = _lora(packed, seed), random_batch(seed, 2, 33, packed.spec.V)
    assert packed.stays_packed(packed.spec.head) and packed.stays_packed(packed.spec.layers[0].linears["down"])
    actual, expected = (mebp_mlx.loss_and_grads(m, lora, tokens, targets, plan=SMALL_PIECES) for m in (packed, plain))
    assert largest_error(actual[0].item(), actual[1], expected[0].item(), expected[1]) <= 1e-5, f"seed {seed}"
    losses = [mebp_mlx.loss(m, lora, tokens, targets).item() for m in (packed, plain)]
    assert abs(losses[0] - losses[1]) <= 1e-5 * losses[1]


def test_packings_without_a_packed_product_are_decompressed(tmp_path: Path, seed: int) -> None:
    """5-bit matrices have packed products, matrices with other group sizes do not; unpacked matrices never do."""
    folder = _folder(tmp_path, "qwen2", seed, {**FOUR_BIT, "model.layers.0.self_attn.q_proj": False})
    model = mebp_mlx.open_model(folder, weights="packed")
    assert not model.stays_packed(model.spec.layers[0].linears["q"])
    assert model.stays_packed(model.spec.layers[1].linears["q"])
    lora, (tokens, targets) = _lora(model, seed), random_batch(seed, 1, 9, model.spec.V)
    assert math.isfinite(mebp_mlx.loss_and_grads(model, lora, tokens, targets)[0].item())


def test_gradients_are_bit_equal_for_every_policy_in_16_bits(tmp_path: Path, seed: int) -> None:
    model = mebp_mlx.open_model(_folder(tmp_path, "gemma3_text", seed, FOUR_BIT), "bfloat16", "packed")
    lora, (tokens, targets) = _lora(model, seed), random_batch(seed, 2, 90, model.spec.V)
    reference = None
    for saved in (SAVE_PRODUCTS, SAVE_INPUTS, frozenset({"x", "k", "g", "o"})):
        plan = Plan(saved=saved, token_block=64, query_block=17)
        loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
        actual = {"loss": np.array(loss), **{name: np.array(g) for name, g in grads.items()}}
        reference = reference or actual
        assert all(np.array_equal(actual[name], value) for name, value in reference.items()), f"seed {seed}"


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("weights", ["packed", "decompressed"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3_text", "gemma4_text"])
def test_a_float32_lora_promotes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: str, dropout: float, seed: int
) -> None:
    """Values, kept values, block outputs and cotangents are bfloat16; gradients are float32."""
    model = mebp_mlx.open_model(_folder(tmp_path, name, seed, FOUR_BIT), "bfloat16", weights)
    lora, batch = _lora(model, seed, dropout=dropout), WholeBatch(*random_batch(seed, 2, 70, model.spec.V))
    family, seen = BLOCKS[model.spec.layers[0].block], []

    def watch(what: str, owner: Any, method: str, arrays: Any) -> None:
        original = getattr(owner, method)

        def watched(*args: Any, **how: Any) -> Any:
            result = original(*args, **how)
            seen.extend((what, label, array.dtype) for label, array in arrays(args, result) if array is not None)
            return result

        monkeypatch.setattr(owner, method, watched)

    def in_and_out(args: Any, dx: Any) -> list[tuple[str, Any]]:
        return [("in", args[2]), ("out", dx)]  # (self, x or q, the cotangent, ...)

    watch("value", value, "__get__", lambda args, actual: [(args[0].name, actual)] if args[1] is not None else [])
    watch("kept", Store, "put", lambda args, _: [(args[2], args[4])])
    watch("y", Pass, "forward", lambda _, tiles: [("", tile) for tile in tiles])
    watch("dy", family, "backward", lambda args, dx: [("in", args[1]), ("out", dx)])
    # The dx of projections of the same value are summed before rounding, so the dtype is checked after the sum.
    watch("projection", LoraLinear, "backward", lambda args, _: [("in", args[2])])
    watch("projection", family, "linear_backward", lambda _, dx: [("out", dx)])
    watch("mlp", GatedMlp, "backward", in_and_out)
    watch("attention", Attention, "backward", in_and_out)
    watch("keys", Attention, "cotangents", lambda _, actual: [("dk", actual[0]), ("dv", actual[1])])
    watch("dx", BackpropEngine, "backward", lambda _, tiles: [("", tile) for tile in tiles])
    _, grads = _step(BackpropEngine(model, lora, plan=SMALL_PIECES, seed=5), batch)
    kinds = {what for what, *_ in seen}
    assert kinds == {"value", "kept", "y", "dy", "projection", "mlp", "attention", "keys", "dx"}
    assert {label for what, label, _ in seen if what == "value"} == family.names - {"g", "u", "low"}
    assert {label.partition(".")[0] for what, label, _ in seen if what == "kept"} == kept_names(
        SMALL_PIECES, model.spec.layers[0]
    )
    assert {(what, label) for what, label, dtype in seen if dtype != mx.bfloat16} == set()
    assert all(g.dtype == mx.float32 for g in grads.values())


@pytest.mark.parametrize("grain, weights", [("op", "decompressed"), ("block", "packed")])
def test_float16_is_accurate_with_many_labels(tmp_path: Path, grain: str, weights: str, seed: int) -> None:
    """A token's share of a mean over many labels is below float16's range, so the sum is differentiated instead."""
    config = packed_config("qwen2") | {"num_hidden_layers": 2}
    folder = write_model(tmp_path / "model", config, seed=seed, quantization=FOUR_BIT, dtype=mx.bfloat16)
    model = mebp_mlx.open_model(folder, "float16", weights)
    lora, whole = _lora(model, seed), WholeBatch(*random_batch(seed, 1, 512, model.spec.V, "none"))
    batch = Batch(*whole, rows=(), n_labels=1024 * whole.n_labels)  # labels of a step of 1024 such micro-batches
    truth = _oracle(folder, mx.float64, lora, batch)
    loss, grads = _step(BackpropEngine(model, lora, plan=Plan(grain)), batch)
    assert abs(loss - truth[0]) <= 1e-2 * truth[0]
    ours = rms_error(grads, truth[1])
    assert ours <= FLOAT16, f"seed {seed}: {ours}"
    # Autograd differentiates the mean, and shows the loss of accuracy.
    theirs = rms_error(_step(make_engine("whole-graph", model, lora), batch)[1], truth[1])
    assert theirs >= 4 * FLOAT16, f"seed {seed}: {theirs}"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_defaults_follow_the_device_and_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, own: mx.Dtype
) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: gpu)
    assert device.compute_dtype("auto", "qwen2", own) == (own if gpu else mx.float32)
    gemma = mx.bfloat16 if own == mx.float16 else own
    assert device.compute_dtype("auto", "gemma3", own) == (gemma if gpu else mx.float32)
    assert device.compute_dtype("auto", "qwen2") == (mx.bfloat16 if gpu else mx.float32)
    assert device.compute_dtype("bfloat16", "qwen2", own) == mx.bfloat16
    assert device.keeps_packed("auto") == gpu
    assert device.keeps_packed("packed") and not device.keeps_packed("decompressed")
    with pytest.raises(UserError, match="--dtype: gemma3_text cannot be computed in float16"):
        device.compute_dtype("float16", "gemma3_text")


def test_a_gpu_that_is_not_metal_adopts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert device.on_gpu() and not device.on_metal()


@pytest.mark.parametrize("quantization", [None, FOUR_BIT, MXFP4, NVFP4], ids=["16 bits", "4 bits", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
@pytest.mark.parametrize("own", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_checkpoints_own_dtype_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, own: mx.Dtype, quantization: dict[str, Any] | None
) -> None:
    folder = write_model(tmp_path / "model", packed_config(name), quantization=quantization, dtype=own)
    assert mebp_mlx.open_model(folder).dtype == mx.float32
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    model = mebp_mlx.open_model(folder)
    assert model.dtype == (mx.bfloat16 if own == mx.float16 and name == "gemma3" else own) and model.packed


@pytest.mark.parametrize("how", [{"dtype": "half"}, {"weights": "zipped"}])
def test_unknown_settings_are_named(tmp_path: Path, how: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(how))}: '{next(iter(how.values()))}'"):
        mebp_mlx.open_model(tmp_path, **how)
