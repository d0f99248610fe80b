"""Families besides their equations: tensor names, default LoRA keys, newer configs, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.errors import UserError
from mebp_mlx.model.families import FAMILIES
from mebp_mlx.testing.tiny import CONFIGS, random_batch, randomize_lora, write_model

pytestmark = pytest.mark.quick


def _change(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def _loss(folder: Path, T: int = 12) -> float:
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, 1)
    return float(np.asarray(mebp_mlx.loss(model, lora, *random_batch(1, 2, T, model.spec.V))))


def test_every_family_has_a_tiny_model() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_default_lora_keys_are_mlx_lms(tmp_path: Path, name: str) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    folder = write_model(tmp_path / "m", CONFIGS[name])
    theirs, _ = load_model(folder)
    theirs.freeze()
    linear_to_lora_layers(theirs, 2, {"rank": 3, "scale": 1.0, "dropout": 0.0})
    expected = {path: tuple(value.shape) for path, value in tree_flatten(theirs.trainable_parameters())}
    ours = mebp_mlx.init_lora(mebp_mlx.open_model(folder), rank=3, num_layers=2).parameters()
    assert {path: tuple(value.shape) for path, value in ours.items()} == expected


def test_keys_that_a_family_does_not_have_are_refused(tmp_path: Path) -> None:
    model = mebp_mlx.open_model(write_model(tmp_path / "m", CONFIGS["phi3"]))
    with pytest.raises(UserError, match=r"--keys: self_attn\.q_proj; modules that support LoRA: self_attn\.qkv_proj, "):
        mebp_mlx.init_lora(model, keys=["self_attn.q_proj"])


def test_an_unsupported_family_is_refused_with_the_list(tmp_path: Path) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS["qwen2"]), model_type="gpt_neox")
    with pytest.raises(UserError, match=r"'gpt_neox' is not supported; supported: qwen2, .*, phi3$"):
        mebp_mlx.open_model(folder)
    folder = write_model(tmp_path / "w", CONFIGS["mistral3"])
    _change(folder, text_config=json.loads((folder / "config.json").read_text())["text_config"] | {"model_type": "m4"})
    with pytest.raises(UserError, match=r"'m4' of text_config is not supported in mistral3; supported: ministral3, "):
        mebp_mlx.open_model(folder)


@pytest.mark.parametrize("name, tied", [("mistral3", False), ("mistral3", True), ("gemma3", True)])
def test_a_multimodal_checkpoint_with_transformers_names_is_the_same_model(
    tmp_path: Path, name: str, tied: bool
) -> None:
    config = json.loads(json.dumps(CONFIGS[name]))
    config["text_config"]["tie_word_embeddings"] = tied
    ours = write_model(tmp_path / "ours", config)
    theirs = write_model(tmp_path / "theirs", config)
    path = theirs / "model.safetensors"
    tensors: Any = mx.load(str(path))
    renamed = {
        key.replace("language_model.model.", "model.language_model.").replace(
            "language_model.lm_head", "lm_head"
        ): value
        for key, value in tensors.items()
    }
    more = ("model.vision_tower.patch.weight", "model.multi_modal_projector.norm.weight")
    mx.save_safetensors(str(path), {**renamed, **dict.fromkeys(more, mx.ones(5))})
    assert _loss(ours) == _loss(theirs)
    lora = mebp_mlx.init_lora(mebp_mlx.open_model(theirs), rank=1)
    assert all(key.startswith("language_model.model.layers.") for key in lora.parameters())


@pytest.mark.parametrize(
    "name", ["smollm3", "granite", "ernie4_5", "helium", "exaone4", "olmo3", "glm4", "phi3-partial"]
)
def test_nested_rope_parameters_are_the_same_model(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "m", CONFIGS[name])
    before, config = _loss(folder), CONFIGS[name]
    scaling = {"rope_type": "default", **(config.get("rope_scaling") or {}), "rope_theta": config["rope_theta"]}
    _change(folder, rope_theta=None, rope_scaling=None, rope_parameters=scaling)
    assert _loss(folder) == before


def test_a_dynamic_rope_ends_where_it_would_depend_on_a_row_s_length(tmp_path: Path) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS["internlm3"]), max_position_embeddings=12)
    _loss(folder, 12)
    with pytest.raises(UserError, match=r"--max-seq-length: 13 positions exceed max_position_embeddings=12"):
        _loss(folder, 13)


def test_minicpm_divides_only_before_an_untied_head(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", CONFIGS["minicpm"])
    assert mebp_mlx.open_model(folder).spec.head_divisor == 3.0
    tied = mebp_mlx.open_model(_change(folder, tie_word_embeddings=True)).spec
    assert tied.head_divisor == 1.0 and tied.tied


def test_tensors_of_other_tasks_and_heads_are_allowed(tmp_path: Path) -> None:
    extra = {"mimo": "model.mtp_layers.0.input_proj.weight", "internlm3": "model.layers.0.attention.rope.inv_freq"}
    for name, tensor in extra.items():
        folder = write_model(tmp_path / name, CONFIGS[name])
        path = folder / "model.safetensors"
        mx.save_safetensors(str(path), {**mx.load(str(path)), tensor: mx.ones(5)})  # type: ignore[dict-item]
        mebp_mlx.open_model(folder)


def test_layers_without_rope_must_be_listed_whole(tmp_path: Path) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS["smollm3"]), no_rope_layers=[1, 0])
    with pytest.raises(UserError, match="no_rope_layers must list 3 layers"):
        mebp_mlx.open_model(folder)
    spec = mebp_mlx.open_model(_change(folder, no_rope_layers=[1, 0, 0])).spec
    assert [layer.rope is None for layer in spec.layers] == [False, True, True]


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
def test_a_kernel_in_torchs_layout_is_the_same_model(tmp_path: Path, name: str) -> None:
    """In torch's layout Qwen 3.5's norms are stored as weight - 1, except for the gated delta net's norm."""
    ours, theirs = (write_model(tmp_path / folder, CONFIGS[name]) for folder in ("ours", "theirs"))
    path = theirs / "model.safetensors"
    tensors: Any = mx.load(str(path))
    for key, tensor in tensors.items():
        if tensor.ndim == 3:
            tensors[key] = tensor.transpose(0, 2, 1)
        elif name == "qwen3_5" and "norm" in key and ".linear_attn." not in key:
            tensors[key] = tensor - 1
    mx.save_safetensors(str(path), tensors)
    assert _loss(theirs) == pytest.approx(_loss(ours), rel=1e-5)
    mebp_mlx.open_model(theirs)


def test_unsupported_variants_of_lfm2_and_qwen3_5_are_refused(tmp_path: Path) -> None:
    folder = _change(write_model(tmp_path / "m", CONFIGS["lfm2"]), conv_bias=True)
    with pytest.raises(UserError, match="conv_bias is not supported"):
        mebp_mlx.open_model(folder)
    folder = write_model(tmp_path / "q", CONFIGS["qwen3_5"])
    text = json.loads((folder / "config.json").read_text())["text_config"]
    with pytest.raises(UserError, match="linear_num_value_heads=3 is not a multiple of linear_num_key_heads=2"):
        mebp_mlx.open_model(_change(folder, text_config=text | {"linear_num_value_heads": 3}))
    with pytest.raises(UserError, match="'qwen3_5_moe_text' of text_config is not supported in qwen3_5"):
        mebp_mlx.open_model(_change(folder, text_config=text | {"model_type": "qwen3_5_moe_text"}))
