"""Gemma 4's shared keys and values, whose gradient flows to a lower layer, and its per-layer inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.engine import make_engine
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import Pass, WholeBatch
from mebp_mlx.engine.shared_keys import SharedKeys
from mebp_mlx.engine.zeroth_order import make_estimator
from mebp_mlx.errors import UserError
from mebp_mlx.kernels import cpu
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.model.reading import describe
from mebp_mlx.ops.plan import GRAINS, SAVE_INPUTS, SAVE_PRODUCTS, Barrier, Plan
from mebp_mlx.planner.probe import probe
from mebp_mlx.planner.work import count
from mebp_mlx.planner.workload import Workload
from mebp_mlx.testing.reference import largest_error, mlx_lm_loss_and_grads
from mebp_mlx.testing.synth import SHAPES, _Listing
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, randomize_lora, relative_error, write_model

TOLERANCE = 1e-5
TINY_BLOCKS = Plan(weight_block_bytes=1, head_block_bytes=1, token_block=64, query_block=5)


def _setup(
    tmp_path: Path, seed: int, T: int = 17, name: str = "gemma4_text", **how: Any
) -> tuple[Any, Any, WholeBatch]:
    model = mebp_mlx.open_model(write_model(tmp_path / "m", CONFIGS[name], seed=seed))
    lora = mebp_mlx.init_lora(model, rank=3, scale=2.0, **how)
    randomize_lora(lora, seed)
    return model, lora, WholeBatch(*random_batch(seed, 2, T, model.spec.V))


def _step(engine: Any, batch: WholeBatch) -> tuple[float, dict[str, mx.array]]:
    grads: dict[str, mx.array] = {}
    loss = engine.step(batch, step=3, micro=0, n_labels=batch.n_labels, sink=grads.update)
    mx.eval(grads)
    engine.close()
    return loss, grads


def _assert_exact(model: Any, lora: Any, batch: WholeBatch, plan: Plan, seed: int) -> None:
    """Equal to mlx-lm's float32, or about as close to float64 as mlx-lm's float32."""
    loss, grads = mebp_mlx.loss_and_grads(model, lora, batch.tokens, batch.targets, plan=plan)
    theirs = mlx_lm_loss_and_grads(model.path, lora, batch.tokens, batch.targets)
    if largest_error(loss.item(), grads, *theirs) <= TOLERANCE:
        return
    truth = mlx_lm_loss_and_grads(model.path, lora, batch.tokens, batch.targets, mx.float64)
    allowed = 3 * largest_error(*theirs, *truth) + TOLERANCE
    assert largest_error(loss.item(), grads, *truth) <= allowed, f"seed {seed}"


# All; across both donors (2 and 3); across the upper one, with the lower one constant; above both.
@pytest.mark.parametrize("num_layers", [-1, 5, 4, 3, 1])
@pytest.mark.parametrize("saved", [SAVE_PRODUCTS, SAVE_INPUTS], ids=["products", "inputs"])
def test_gradients_equal_mlx_lms_for_any_first_trained_layer(
    tmp_path: Path, num_layers: int, saved: frozenset[str], seed: int
) -> None:
    model, lora, batch = _setup(tmp_path, seed, num_layers=num_layers)
    _assert_exact(model, lora, batch, dataclasses.replace(TINY_BLOCKS, saved=saved), seed)


@pytest.mark.parametrize("T", [1, 3, 4, 5, 67])
def test_rows_shorter_and_longer_than_the_window_and_a_tile(tmp_path: Path, T: int, seed: int) -> None:
    model, lora, _ = _setup(tmp_path, seed)
    tokens, targets = random_batch(seed, 3, max(T, 2), model.spec.V, "holes")
    _assert_exact(model, lora, WholeBatch(tokens[:, -T:], targets[:, -T:]), TINY_BLOCKS, seed)


def test_a_wrong_donor_is_detected(tmp_path: Path, seed: int) -> None:
    """Uses keys and values of layers 0 and 1, of the same kinds as 2 and 3."""
    model, lora, batch = _setup(tmp_path, seed)
    assert [layer.donor for layer in model.spec.layers] == [None] * 4 + [2, 3, 2]
    right = _step(make_engine("mebp", model, lora), batch)
    others = tuple(
        layer if layer.donor is None else dataclasses.replace(layer, donor=layer.donor - 2)
        for layer in model.spec.layers
    )
    model.spec = dataclasses.replace(model.spec, layers=others)
    wrong = _step(make_engine("mebp", model, lora), batch)
    assert largest_error(*wrong, *right) > 0.05, f"seed {seed}"


def test_missing_gradients_of_sharing_layers_are_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """They flow only through the donors and the layers below them."""
    model, lora, batch = _setup(tmp_path, seed)
    _, right = _step(make_engine("mebp", model, lora), batch)
    monkeypatch.setattr(SharedKeys, "take_back", lambda *_: None)
    _, wrong = _step(make_engine("mebp", model, lora), batch)
    off = {name for name in right if not relative_error(wrong[name], right[name]) <= 1e-3}
    assert {int(name.split(".")[2]) for name in off} == {0, 1, 2, 3}, f"seed {seed}"
    above = {f"model.layers.3.{key}" for key in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    assert not {name.rpartition(".")[0] for name in off} & above
    for donor in (2, 3):
        for key in ("k_proj", "v_proj"):
            assert f"model.layers.{donor}.self_attn.{key}.lora_b" in off


@pytest.mark.parametrize("num_layers, donors", [(-1, {2, 3}), (4, {3}), (3, set())])
def test_gradients_of_constant_keys_are_not_summed_and_nothing_is_left(
    tmp_path: Path, num_layers: int, donors: set[int], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model, lora, batch = _setup(tmp_path, seed, num_layers=num_layers)
    summed, passes = set(), []
    take_back, made = SharedKeys.take_back, SharedKeys.__init__

    def watching(shared: Any, layer: Any, attention: Any) -> None:
        take_back(shared, layer, attention)
        summed.update(shared.gradients)

    monkeypatch.setattr(SharedKeys, "take_back", watching)
    monkeypatch.setattr(SharedKeys, "__init__", lambda self, *a: (passes.append(self), made(self, *a))[1])
    _step(BackpropEngine(model, lora, plan=Plan(token_block=64)), batch)
    assert summed == donors and len(passes) == 1
    assert not passes[0].gradients and set(passes[0].pairs) == {2, 3} - donors


@pytest.mark.parametrize("numpy_too", [True, False], ids=["numpy", "plain"])
def test_gradients_are_bit_equal_for_every_grain_and_store(tmp_path: Path, numpy_too: bool, seed: int) -> None:
    model, lora, batch = _setup(tmp_path, seed, T=70, dropout=0.2)
    reference: dict[str, np.ndarray] = {}
    stores = zip((*GRAINS, "op", "block"), (None, 0, 150_000) * 2, (SAVE_PRODUCTS, SAVE_INPUTS) * 3, strict=True)
    for grain, kept_bytes, saved in stores:
        plan = Plan(grain, saved, kept_bytes=kept_bytes, weight_block_bytes=1, token_block=64, query_block=30)
        with contextlib.nullcontext() if numpy_too else cpu.off():
            loss, grads = _step(BackpropEngine(model, lora, plan=plan, seed=5, arena_dir=tmp_path), batch)
        actual = {"loss": np.array(loss), **{name: np.array(g) for name, g in grads.items()}}
        reference = reference or actual
        for name, expected in reference.items():
            assert np.array_equal(actual[name], expected), f"{name}, {grain}, {kept_bytes}, seed {seed}"


def test_a_forward_only_pass_has_the_same_loss(tmp_path: Path, seed: int) -> None:
    """Evaluation, and zeroth-order passes with nothing perturbed."""
    model, lora, batch = _setup(tmp_path, seed)
    loss, _ = _step(make_engine("whole-graph", model, lora), batch)
    evaluated = make_engine("mebp", model, lora).evaluate(batch)
    assert abs(evaluated.loss_sum / evaluated.n_labels - loss) <= TOLERANCE * loss, f"seed {seed}"
    estimator = make_estimator("mezo", lora, seed=seed, eps=1e-6)
    zeroth = make_engine("mezo", model, lora, estimator=estimator)
    at_theta, grads = _step(zeroth, batch)
    assert abs(at_theta - loss) <= 1e-4 * loss and set(grads) == set(lora.parameters()), f"seed {seed}"


@pytest.mark.parametrize("bits, group_size", [(4, 32), (8, 32), (3, 32), (2, 64)])
def test_columns_of_gathered_rows_are_those_of_the_matrix(
    tmp_path: Path, bits: int, group_size: int, seed: int
) -> None:
    """Including columns that begin and end inside a group."""
    config = packed_config("gemma4_text") | {"intermediate_size": 128}
    folder = write_model(tmp_path / "m", config, quantization={"group_size": group_size, "bits": bits})
    ids = np.random.default_rng(seed).integers(0, 131, 9).astype(np.int32)
    for packed in (False, True):
        model = Model(folder, packed=packed)
        inputs = model.spec.layer_inputs
        assert inputs is not None
        whole = np.asarray(model.gather(inputs.embedding, ids))
        for start, stop in ((0, 448), (64, 128), (100, 101), (37, 333)):
            part = model.gather(inputs.embedding, ids, (start, stop))
            assert np.array_equal(np.asarray(part), whole[:, start:stop]), f"seed {seed}"


def test_a_layer_reads_only_its_columns_of_the_second_embedding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    model, lora, batch = _setup(tmp_path, seed)
    read, get = [], Tensor.__getitem__

    def watching(tensor: Tensor, index: Any) -> mx.array:
        items = get(tensor, index)
        if "embed_tokens_per_layer" in tensor.name:
            read.append(items.shape)
        return items

    monkeypatch.setattr(Tensor, "__getitem__", watching)
    _step(BackpropEngine(model, lora, plan=Plan(saved=SAVE_PRODUCTS)), batch)
    assert read == [(2 * 17, 12)] * 7  # once per layer, because p is kept


def test_plans_are_measured_and_counted(tmp_path: Path, seed: int) -> None:
    model, lora, _ = _setup(tmp_path, seed)
    workload = Workload(model, lora, 2, 70)
    measured = probe(workload, Plan(token_block=64), tmp_path)
    assert measured.kept_bytes > 0 and set(measured.phases) == {"forward", "head", "backward"}
    work = count(workload, Plan(token_block=64))
    fewer = count(dataclasses.replace(workload, lora=mebp_mlx.init_lora(model, num_layers=3)), Plan(token_block=64))
    assert work["backward"].flops > 2 * fewer["backward"].flops > 0


def test_a_single_block_needs_stand_ins_for_the_others(tmp_path: Path, seed: int) -> None:
    """Without stand-ins it fails at once, instead of computing something else."""
    model, lora, _ = _setup(tmp_path, seed)
    x = [mx.zeros((2, 5, model.spec.D))]
    with pytest.raises(KeyError):
        Pass(model, Plan(), lora, Barrier("op")).forward(model.spec.layers[5], x)


@pytest.mark.parametrize(
    "shape, n_own, sliding, full, wide", [("gemma4-e2b", 15, 13, 14, 12_288), ("gemma4-e4b", 24, 22, 23, 10_240)]
)
def test_donors_and_widths_of_the_real_shapes(shape: str, n_own: int, sliding: int, full: int, wide: int) -> None:
    layers = describe(SHAPES[shape], _Listing(SHAPES[shape])).layers
    for layer in layers:
        is_full = layer.window is None
        assert layer.donor == (None if layer.index < n_own else full if is_full else sliding)
        assert layer.head_dim == (512 if is_full else 256)
        assert layer.linears["q"].out_dims == 8 * layer.head_dim and ("k" in layer.linears) is (layer.index < n_own)
        assert layer.linears["gate"].out_dims == (
            wide if layer.index >= n_own else SHAPES[shape]["text_config"]["intermediate_size"]
        )
        assert layer.rope is not None and layer.rope.dims == layer.head_dim
        if is_full:
            assert layer.rope.freqs is not None
            assert int(mx.isfinite(layer.rope.freqs).sum()) == 64
    assert [layer.index for layer in layers if layer.window is None][:3] == ([4, 9, 14] if n_own == 15 else [5, 11, 17])


def _changed(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"enable_moe_block": True}, "enable_moe_block True is not supported"),
        ({"attention_k_eq_v": True}, "attention_k_eq_v True is not supported"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all' is not supported"),
        ({"hidden_size_per_layer_input": 0}, "nothing reads the tensor model.*per_layer"),
        ({"hidden_size_per_layer_input": -2}, "hidden_size_per_layer_input must be a positive number, found '-2'"),
        ({"num_kv_shared_layers": None}, "num_kv_shared_layers must be 0 to 6, found 'None'"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers must be 0 to 6, found '7'"),
        ({"num_kv_shared_layers": 6}, "layer 1 shares keys and values, but no layer below 1 is of its kind"),
        ({"num_kv_shared_layers": 2}, "requires the tensor model.layers.4.self_attn.k_proj.weight"),
        ({"use_double_wide_mlp": False}, "model.layers.4.mlp.gate_proj.weight has shape"),
        ({"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input=100 is less than vocab_size"),
        ({"global_head_dim": None}, "model.layers.1.self_attn.q_proj.weight has shape"),
    ],
)
def test_unsupported_settings_of_gemma_4_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = _changed(write_model(tmp_path / "m", CONFIGS["gemma4_text"]), **changes)
    with pytest.raises(UserError, match=message.replace("(", "\\(")):
        mebp_mlx.open_model(folder)


@pytest.mark.parametrize("key", ["num_kv_shared_layers", "use_double_wide_mlp", "final_logit_softcapping"])
def test_keys_that_two_libraries_read_differently_are_required(tmp_path: Path, key: str) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["gemma4_text"])
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIGS["gemma4_text"].items() if k != key}))
    with pytest.raises(UserError, match=f"{key} is missing; mlx-lm assumes .*, transformers "):
        mebp_mlx.open_model(folder)


def _loss(folder: Path) -> float:
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, 1)
    return float(np.asarray(mebp_mlx.loss(model, lora, *random_batch(1, 2, 12, model.spec.V))))


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
def test_a_checkpoint_with_transformers_names_is_the_same_model(tmp_path: Path, name: str) -> None:
    """With vision and audio towers, clipping buffers, and keys of layers that share a donor's."""
    ours, theirs = (write_model(tmp_path / folder, CONFIGS[name]) for folder in ("ours", "theirs"))
    path = theirs / "model.safetensors"
    tensors: Any = mx.load(str(path))
    renamed = {
        key.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): tensor
        for key, tensor in tensors.items()
    }
    more = [f"model.{module}.a.weight" for module in ("vision_tower", "audio_tower", "embed_vision", "embed_audio")]
    more += ["model.language_model.layers.1.mlp.gate_proj.input_max", "model.language_model.rotary_emb.inv_freq"]
    if name == "gemma4":
        attention = "model.language_model.layers.4.self_attn."
        more += [f"{attention}{part}.weight" for part in ("k_proj", "v_proj", "k_norm")]
    mx.save_safetensors(str(path), {**renamed, **dict.fromkeys(more, mx.ones(5))})
    assert _loss(ours) == _loss(theirs)
    for extra in ("model.language_model.layers.1.self_attn.k_proj.bias", "model.language_model.layers.0.router.scale"):
        mx.save_safetensors(str(path), {**renamed, extra: mx.ones(5)})
        with pytest.raises(UserError, match=r"nothing reads the tensor language_model\.model\.layers"):
            mebp_mlx.open_model(theirs)
