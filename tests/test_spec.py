"""config.json and the checkpoint: refused contradictions and their messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import mebp_mlx
from mebp_mlx.errors import UserError
from mebp_mlx.testing.tiny import CONFIGS, packed_config, write_model

pytestmark = pytest.mark.quick


def _change(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_type": "gpt2"}, r"config\.json: model_type 'gpt2' is not supported; supported: qwen2, qwen3, llama"),
        ({"hidden_size": 64}, r"model\.safetensors: model\.embed_tokens\.weight has shape \[131, 60\].*\[131, 64\]"),
        ({"intermediate_size": 76}, r"mlp\.gate_proj\.weight has shape \[75, 60\].*requires \[76, 60\]"),
        ({"num_hidden_layers": 4}, r"requires the tensor model\.layers\.3\."),
        ({"vocab_size": None}, r"config\.json: vocab_size is missing"),
        ({"rms_norm_eps": "tiny"}, r"rms_norm_eps must be a positive number, found 'tiny'"),
        ({"num_key_value_heads": 4}, r"num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"rope_scaling": {"type": "ntk", "factor": 2}}, r"rope scaling 'ntk' is not supported"),
        ({"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, r"needs a list of 5 numbers 'long_factor'"),
        ({"rope_scaling": {"type": "linear"}}, r"needs a positive 'factor'"),
        ({"tie_word_embeddings": False}, r"requires the tensor lm_head\.weight"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, changes: dict, said: str) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS["qwen2"]), **changes)
    with pytest.raises(UserError, match=said) as caught:
        mebp_mlx.open_model(folder)
    assert "\n" not in str(caught.value)


def test_packing_must_agree_with_the_config(tmp_path: Path) -> None:
    quantization = {"group_size": 32, "bits": 4}
    folder = write_model(tmp_path / "m", packed_config("qwen3"), quantization=quantization)
    name = "model.layers.1.mlp.up_proj"
    _change(folder, quantization={**quantization, name: {"group_size": 64, "bits": 4}})
    with pytest.raises(UserError, match=f"{name} should have 4 bits in groups of 64.*groups of 32"):
        mebp_mlx.open_model(folder)
    _change(folder, quantization={**quantization, "mode": "nvfp4"})
    with pytest.raises(UserError, match=r"should be nvfp4, but has 4 bits in groups of 32, affine"):
        mebp_mlx.open_model(folder)
    _change(folder, quantization={**quantization, "mode": "nf4"})
    with pytest.raises(UserError, match=r"'nf4'.*not supported: affine, mxfp4, mxfp8, nvfp4"):
        mebp_mlx.open_model(folder)


FLOAT_PACKINGS = [
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


@pytest.mark.parametrize("packing", FLOAT_PACKINGS, ids=lambda packing: packing["mode"])
@pytest.mark.parametrize("said", ["mode", "quant_method", "nothing", "another mode"])
def test_the_quantization_mode_is_derived_from_the_tensors(tmp_path: Path, packing: dict, said: str) -> None:
    folder = write_model(tmp_path / "m", packed_config("qwen3"), quantization=packing)
    mode = packing["mode"]
    if said == "quant_method":
        _change(folder, quantization=None, quantization_config={"quant_method": mode})
    elif said == "nothing":
        _change(folder, quantization=None)
    elif said == "another mode":
        other = next(each["mode"] for each in FLOAT_PACKINGS if each["mode"] != mode)
        _change(folder, quantization={**packing, "mode": other})
        with pytest.raises(UserError, match=rf"config\.json: model\.embed_tokens should be {other}.*, {mode}$"):
            mebp_mlx.open_model(folder)
        return
    spec = mebp_mlx.open_model(folder).spec
    actual = spec.layers[0].linears["q"].quantization
    assert actual is not None and vars(actual) == packing


@pytest.mark.parametrize(
    "name, extra, file_says",
    [
        ("qwen2", "model.layers.0.self_attn.o_proj.bias", "o_proj.bias"),
        ("qwen2", "model.layers.2.mlp.down_proj.bias", "down_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_proj.bias", "q_proj.bias"),
        ("llama-sliding", "model.layers.1.self_attn.k_proj.bias", "k_proj.bias"),
        ("llama", "model.layers.3.input_layernorm.weight", "layers.3"),
        ("llama", "lm_head.bias", "lm_head.bias"),
        ("mistral", "model.layers.0.self_attn.q_norm.weight", "q_norm"),
        ("gemma3_text", "model.layers.0.self_attn.q_proj.global_scale", "global_scale"),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj.bias", "up_proj.bias"),
        ("gemma3", "model.layers.0.mlp.up_proj.bias", "up_proj.bias"),
    ],
)
def test_unused_decoder_tensors_are_refused(tmp_path: Path, name: str, extra: str, file_says: str) -> None:
    folder = write_model(tmp_path / "m", CONFIGS[name])
    path = folder / "model.safetensors"
    mx.save_safetensors(str(path), {**mx.load(str(path)), extra: mx.ones(5)})  # type: ignore[dict-item]
    with pytest.raises(UserError, match=rf"model\.safetensors: nothing reads the tensor \S*{file_says}") as caught:
        mebp_mlx.open_model(folder)
    assert "\n" not in str(caught.value)


def test_recomputed_and_non_decoder_tensors_are_allowed(tmp_path: Path) -> None:
    extra = {
        "qwen2": ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"],
        "gemma3": ["vision_tower.patch.weight", "multi_modal_projector.norm.weight"],
    }
    for name, names in extra.items():
        folder = write_model(tmp_path / name, CONFIGS[name])
        path = folder / "model.safetensors"
        mx.save_safetensors(str(path), {**mx.load(str(path)), **dict.fromkeys(names, mx.ones(5))})  # type: ignore
        assert mebp_mlx.open_model(folder).spec.tied


def test_missing_and_broken_config(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["qwen2"])
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON"):
        mebp_mlx.open_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: not found"):
        mebp_mlx.open_model(folder)


def test_families_read_as_data(tmp_path: Path) -> None:
    gemma = mebp_mlx.open_model(write_model(tmp_path / "g", CONFIGS["gemma3"])).spec
    assert [layer.window for layer in gemma.layers] == [4, 4, None, 4]
    assert gemma.layers[0].rope.base == 300.0 and gemma.layers[2].rope.base == 5000.0
    assert gemma.layers[2].rope.scale == 0.25 and gemma.layers[0].rope.scale == 1.0
    assert gemma.V == 139 and gemma.tied and gemma.layers[0].prefix.startswith("language_model.model.")
    llama = mebp_mlx.open_model(write_model(tmp_path / "l", CONFIGS["llama-sliding"])).spec
    assert [layer.window for layer in llama.layers] == [5, None, 5]


def test_newer_configs_nest_rope_parameters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["qwen2"])
    _change(folder, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    assert mebp_mlx.open_model(folder).spec.layers[0].rope.base == 777.0
    folder = write_model(tmp_path / "g", CONFIGS["gemma3_text"])
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 9e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
    _change(folder, rope_theta=None, rope_local_base_freq=None, rope_scaling=None, rope_parameters=nested)
    layers = mebp_mlx.open_model(folder).spec.layers
    assert (layers[0].rope.base, layers[0].rope.scale) == (1e3, 1.0)
    assert (layers[2].rope.base, layers[2].rope.scale) == (9e5, 1 / 8)


@pytest.mark.parametrize(
    "name, changes, remark",
    [
        ("smollm3", {"rope_parameters": {"rope_theta": 5000.0}}, "rope_theta 10000 instead of 5000"),
        ("smollm3", {"rope_parameters": {"rope_theta": 10_000.0}}, None),  # its default
        ("glm4", {"rope_parameters": {"rope_theta": 5000.0}}, "cannot open this model"),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}},
            "a different rope scaling",
        ),
        ("qwen3", {"rope_parameters": {"rope_theta": 5000.0}}, None),  # which mlx-lm reads
        ("smollm3", {"rope_parameters": {"rope_theta": 5000.0}, "rope_theta": 5000.0}, None),
    ],
)
def test_a_rope_that_mlx_lm_reads_differently_is_reported(
    tmp_path: Path, name: str, changes: dict, remark: str | None
) -> None:
    folder = write_model(tmp_path / "m", CONFIGS[name])
    remarks = mebp_mlx.open_model(_change(folder, **({"rope_theta": None} | changes))).spec.remarks
    assert len(remarks) == (remark is not None) and (remark is None or remark in remarks[0])


def test_old_and_new_rope_keys_may_coexist_if_they_agree(tmp_path: Path) -> None:
    gemma = write_model(tmp_path / "g", CONFIGS["gemma3_text"])  # with the old keys
    ropes = [layer.rope for layer in mebp_mlx.open_model(gemma).spec.layers]
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    _change(gemma, rope_parameters=nested)
    assert [layer.rope for layer in mebp_mlx.open_model(gemma).spec.layers] == ropes
    _change(gemma, rope_local_base_freq=None)
    assert [layer.rope for layer in mebp_mlx.open_model(gemma).spec.layers] == ropes
    qwen = _change(write_model(tmp_path / "q", CONFIGS["qwen2"]), rope_parameters={"rope_theta": 5000.0})
    assert mebp_mlx.open_model(qwen).spec.layers[0].rope.base == 5000.0


@pytest.mark.parametrize(
    "name, changes, key",
    [
        ("qwen2", {"rope_parameters": {"rope_theta": 10.0}}, "rope_theta"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}}, "rope_local_base_freq"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_theta"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
            "rope_scaling",
        ),
        ("llama", {"rope_parameters": {"rope_type": "default"}}, "rope_scaling"),
    ],
)
def test_old_and_new_rope_keys_that_differ_are_refused(tmp_path: Path, name: str, changes: dict, key: str) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS[name]), **changes)
    with pytest.raises(UserError, match=rf"config\.json: {key} and rope_parameters contradict"):
        mebp_mlx.open_model(folder)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"keys": ["self_attn.q"]}, "--keys: self_attn.q; modules that support LoRA: self_attn.q_proj"),
        ({"rank": 0}, "--rank"),
        ({"num_layers": 9}, "--num-layers: must be -1"),
        ({"dropout": 1.0}, "--dropout"),
    ],
)
def test_lora_options_are_checked(tmp_path: Path, arguments: dict, said: str) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "m", CONFIGS["qwen2"]))
    with pytest.raises(UserError, match=said):
        mebp_mlx.init_lora(model, **arguments)


def test_lora_starts_as_the_identity_and_by_its_seed(tmp_path: Path) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "m", CONFIGS["qwen2"]))
    first, again, other = (mebp_mlx.init_lora(model, seed=s).parameters() for s in (1, 1, 2))
    for name, value in first.items():
        assert value.dtype == mx.float32
        assert mx.array_equal(value, again[name]).item()
        if name.endswith("lora_b"):
            assert not value.any().item()
        else:
            assert mx.abs(value).max().item() <= value.shape[0] ** -0.5
            assert not mx.array_equal(value, other[name]).item()


@pytest.mark.parametrize(
    "tokens, targets, said",
    [
        ([[1, 2]], [[1]], "must both be"),
        ([1, 2], [1, 2], "must both be"),
        ([[1, 2]], [[-100, -100]], "loss is undefined"),
        ([[1, 131]], [[1, 2]], "tokens: ids must be in"),
        ([[1, 2]], [[1, -3]], "targets: ids must be in"),
    ],
)
def test_batches_are_checked(tmp_path: Path, tokens: list, targets: list, said: str) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "m", CONFIGS["qwen2"]))
    with pytest.raises(UserError, match=said):
        mebp_mlx.loss_and_grads(model, mebp_mlx.init_lora(model), tokens, targets)


def test_a_config_nested_too_deep_is_one_line(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["qwen2"])
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON") as caught:
        mebp_mlx.open_model(folder)
    assert "\n" not in str(caught.value)
