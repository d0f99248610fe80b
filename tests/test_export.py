"""Exported adapters: PEFT computes the same loss, and llama.cpp's format contains the same products."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx.export import __main__ as export
from mebp_mlx.export.adapters import adapters_of
from mebp_mlx.model.base import Model
from mebp_mlx.testing.tiny import CONFIGS, random_batch, write_model
from mebp_mlx.weights.safetensors import MappedWeights
from tests.adapters import make_adapters

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text"]


def run(adapters: Path, out: Path, *more: str) -> int:
    return export.main(["--adapter-path", str(adapters), "--save-path", str(out), *more])


def deltas(folder: Path, model: Path) -> dict[str, np.ndarray]:
    """s (A B)^T of every pair, float64 [out, in], by matrix name."""
    lora = adapters_of(folder, model)
    actual = {}
    for layer in Model(model).spec.layers:
        for linear in layer.linears.values():
            if (pair := lora.pairs.get(linear.name)) is not None:
                actual[linear.name] = lora.scale * (np.asarray(pair.a, np.float64) @ np.asarray(pair.b, np.float64)).T
    return actual


# PEFT


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same_loss(tmp_path: Path, family: str, seed: int) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    # mlx-lm rounds gemma's embedding factor to bfloat16, transformers does not; sqrt(36) is exact in both.
    width = {"hidden_size": 36} if family == "gemma3_text" else {}
    model = write_model(tmp_path / "model", CONFIGS[family] | width, seed=seed)
    adapters = make_adapters(tmp_path / "adapters", model, num_layers=2)
    assert run(adapters, tmp_path / "peft", "--peft") == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    ours = mebp_mlx.open_model(model)
    tokens, targets = random_batch(seed, 1, 13, ours.spec.V, masking="none")

    def their_loss() -> float:
        with torch.no_grad():
            logits = theirs(torch.tensor(tokens.astype(np.int64))).logits[0]
            return float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets[0].astype(np.int64))))

    base = their_loss()
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "peft")).eval()
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == 14
    expected = float(np.asarray(mebp_mlx.loss(ours, adapters_of(adapters, model), tokens, targets)))
    assert abs(their_loss() / expected - 1) <= 1e-5, f"seed {seed}"
    assert abs(base / expected - 1) > 1e-4, f"seed {seed}"


def test_a_multimodal_models_names_are_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = write_model(tmp_path / "model", CONFIGS["gemma3"])
    assert run(make_adapters(tmp_path / "adapters", model), tmp_path / "peft", "--peft") == 0
    text = {key: value for key, value in CONFIGS["gemma3"]["text_config"].items() if key != "rope_scaling"}
    config = transformers.Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 4})
    with torch.device("meta"):
        theirs = transformers.Gemma3ForConditionalGeneration(config)
    modules = {name for name, _ in theirs.named_modules()}
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    names = set(MappedWeights(tmp_path / "peft" / "adapter_model.safetensors").names)
    assert set(about["target_modules"]) <= modules and len(about["target_modules"]) == 4 * 7
    assert names == {f"base_model.model.{name}.lora_{p}.weight" for name in about["target_modules"] for p in "AB"}


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "gemma4"])
def test_the_layout_is_pefts_and_round_trips_bit_by_bit(tmp_path: Path, family: str) -> None:
    model, is_wrapped = write_model(tmp_path / "model", CONFIGS[family]), family in ("gemma3", "gemma4")
    q = "v" if family != "gemma4" else "q"
    adapters = make_adapters(tmp_path / "adapters", model, num_layers=2, keys=[f"self_attn.{q}_proj", "mlp.up_proj"])
    assert run(adapters, tmp_path / "peft", "--peft") == 0
    about = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 3, 6)
    tensors = MappedWeights(tmp_path / "peft" / "adapter_model.safetensors")
    spec = Model(model).spec
    for layer in spec.layers[-2:]:
        prefix = f"base_model.model.model.{'language_model.' if is_wrapped else ''}layers.{layer.index}"
        for short, key in ((q, f"self_attn.{q}_proj"), ("up", "mlp.up_proj")):
            linear = layer.linears[short]
            assert tensors.info(f"{prefix}.{key}.lora_A.weight").shape == (3, linear.in_dims)
            assert tensors.info(f"{prefix}.{key}.lora_B.weight").shape == (linear.out_dims, 3)
    assert len(tensors.names) == 8
    if not is_wrapped:
        n_layers = spec.L
        assert about["target_modules"] == ["up_proj", "v_proj"]
        assert about["layers_to_transform"] == [n_layers - 2, n_layers - 1]
    assert run(tmp_path / "peft", tmp_path / "back", "--from-peft") == 0
    files = [folder / "adapters.safetensors" for folder in (adapters, tmp_path / "back")]
    assert files[0].read_bytes() == files[1].read_bytes()
    known = [json.loads((file.parent / "adapter_config.json").read_text()) for file in files]
    assert known[0] == known[1]


def test_rslora_becomes_a_scale_and_16_bits_become_32(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    adapters = make_adapters(tmp_path / "adapters", model, rank=4)
    assert run(adapters, tmp_path / "peft", "--peft") == 0
    file = tmp_path / "peft" / "adapter_model.safetensors"
    mx.save_safetensors(str(file), {name: x.astype(mx.bfloat16) for name, x in mx.load(str(file)).items()})
    rewrite(tmp_path / "peft", use_rslora=True, lora_alpha=6)
    assert run(tmp_path / "peft", tmp_path / "back", "--from-peft") == 0
    assert adapters_of(tmp_path / "back", model).scale == 3.0
    before, after = deltas(adapters, model), deltas(tmp_path / "back", model)
    for name, delta in before.items():
        assert np.abs(after[name] / 3 - delta / 2).max() <= 0.02 * np.abs(delta).max()


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "use_dora: True is not supported"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: ['lm_head'] is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: {'q_proj': 4} is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not LORA"),
        ({"r": 0}, "r must be a positive whole number"),
        ({"r": 5}, "but the model and rank 5 require [5, "),
    ],
)
def test_adapters_other_than_plain_lora_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    assert run(make_adapters(tmp_path / "adapters", model), tmp_path / "peft", "--peft") == 0
    rewrite(tmp_path / "peft", **changes)
    assert run(tmp_path / "peft", tmp_path / "back", "--from-peft") == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'peft'}/adapter_") and message in said and said.count("\n") == 1
    assert not (tmp_path / "back").exists()


def test_modules_that_the_model_lacks_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    assert run(make_adapters(tmp_path / "adapters", model), tmp_path / "peft", "--peft") == 0
    file = tmp_path / "peft" / "adapter_model.safetensors"
    plain = dict(mx.load(str(file)))
    for name in ("base_model.model.lm_head.lora_A.weight", "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"):
        mx.save_safetensors(str(file), {**plain, name: mx.zeros((3, 60))})
        assert run(tmp_path / "peft", tmp_path / "back", "--from-peft") == 2
        assert f"error: {file}: {name}: the model has no such module" in capsys.readouterr().err
    name = sorted(plain)[0]
    mx.save_safetensors(str(file), {key: value for key, value in plain.items() if key != name})
    assert run(tmp_path / "peft", tmp_path / "back", "--from-peft") == 2
    assert "has no matching lora_a" in capsys.readouterr().err


# GGUF


def test_a_family_without_a_name_in_gguf_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model", CONFIGS["phi3"])
    adapters = make_adapters(tmp_path / "adapters", model)
    assert run(adapters, tmp_path / "a.gguf", "--gguf") == 2
    assert "--gguf: phi3 is not supported; supported: llama" in capsys.readouterr().err


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma3"])
def test_the_gguf_file_holds_the_same_products(tmp_path: Path, family: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = write_model(tmp_path / "model", CONFIGS[family])
    adapters = make_adapters(tmp_path / "adapters", model)
    assert run(adapters, tmp_path / "new" / "a.gguf", "--gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "new" / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(family, family)
    assert said[gguf.Keys.General.TYPE] == "adapter" and said[gguf.Keys.Adapter.TYPE] == "lora"
    assert said[gguf.Keys.General.ARCHITECTURE] == arch and said[gguf.Keys.Adapter.LORA_ALPHA] == 6.0
    spec = Model(model).spec
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), spec.L)
    tensors = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in reader.tensors}
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    for name, delta in deltas(adapters, model).items():
        theirs = names.get_name(f"{name.removeprefix('language_model.')}.weight", (".weight",))
        a, b = (tensors.pop(f"{theirs}.lora_{part}") for part in "ab")
        if arch == "llama" and name.endswith(("q_proj", "k_proj")):
            delta = neighbours(delta, spec.head_dim)
        assert np.allclose(said[gguf.Keys.Adapter.LORA_ALPHA] / 3 * (b @ a), delta, rtol=1e-6, atol=1e-9), name
    assert not tensors


def neighbours(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorders rows: i and i + head_dim / 2 of every head become neighbours."""
    order = [head + half + i for head in range(0, len(rows), head_dim) for i in range(head_dim // 2)
             for half in (0, head_dim // 2)]  # fmt: skip
    return rows[order]


def test_llama_cpps_rotation_of_reordered_rows_equals_ours(tmp_path: Path) -> None:
    """llama.cpp rotates neighbouring rows, like MLX's traditional rope; attention scores are equal."""
    from mebp_mlx.export.gguf import interleaved

    rng = np.random.default_rng(0)
    q, k = (mx.array(rng.standard_normal((2 * 12, 7)), mx.float32) for _ in "qk")

    def scores(rows: list[mx.array], traditional: bool) -> mx.array:
        q, k = (x.reshape(2, 12, 7).swapaxes(1, 2)[None] for x in rows)
        q, k = (mx.fast.rope(x, 12, traditional=traditional, base=1e4, scale=1.0, offset=0) for x in (q, k))
        return q @ k.swapaxes(2, 3)

    assert mx.allclose(scores([q, k], False), scores([interleaved(x, 2) for x in (q, k)], True), atol=1e-5).item()


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "--peft, --gguf, --from-peft: exactly one of these is required"),
        (["--peft", "--gguf"], "--peft, --gguf, --from-peft: exactly one of these is required"),
        (["--peft", "--save-path", "{tmp}/model"], "--save-path {tmp}/model: exists and is not empty"),
        (["--gguf"], "--save-path {tmp}/out: must end with .gguf"),
        (["--gguf", "--save-path", "{tmp}/there.gguf"], "--save-path {tmp}/there.gguf: exists"),
        (["--gguf", "--adapter-path", "{tmp}/none"], "--adapter-path {tmp}/none: no such folder"),
        (["--from-peft"], "{tmp}/adapters/adapter_config.json: peft_type is None, not LORA"),
        (["--peft", "--model", "{tmp}/none"], "--model {tmp}/none: no such folder"),
        (["--pfet"], "--pfet: no such option; did you mean --peft?"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    adapters = make_adapters(tmp_path / "adapters", model)
    (tmp_path / "there.gguf").write_text("kept")
    assert run(adapters, tmp_path / "out", *(part.format(tmp=tmp_path) for part in argv)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(tmp=tmp_path)}") and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists() and (tmp_path / "there.gguf").read_text() == "kept"
