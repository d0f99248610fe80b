"""Fused models are W + s (A B)^T to the last bit of their format, loadable by mlx-lm; a loss of gain is reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import fuse, train
from mebp_mlx.export import upload as uploading
from mebp_mlx.export.adapters import adapters_of
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, write_model
from mebp_mlx.weights.safetensors import MappedWeights
from tests.adapters import make_adapters
from tests.runs import arguments
from tests.texts import write_tokenizer

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gemma3"]
FAMILIES += ["mistral3", "minicpm", "olmo2", "glm4", "phi3", "gemma2", "lfm2", "qwen3_5"]
FAMILIES += ["gemma4", "qwen3_moe", "olmoe", "lfm2_moe", "gpt_oss"]


def run(model: Path, adapters: Path, out: Path, *more: str) -> int:
    return fuse.main(["--model", str(model), "--adapter-path", str(adapters), "--save-path", str(out), *more])


def _loss(folder: Path, adapters: Path | None, seed: int) -> float:
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=1) if adapters is None else adapters_of(adapters, folder)
    return float(np.asarray(mebp_mlx.loss(model, lora, *random_batch(seed, 2, 15, model.spec.V))))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fused_model_is_the_model_with_adapters(tmp_path: Path, name: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    model = write_model(tmp_path / "model", CONFIGS[name], seed=seed)
    adapters = make_adapters(tmp_path / "adapters", model)
    assert run(model, adapters, tmp_path / "out", "--tolerance", "none") == 0
    base, with_adapters = _loss(model, None, seed), _loss(model, adapters, seed)
    fused = _loss(tmp_path / "out", None, seed)
    assert abs(fused / with_adapters - 1) <= 1e-5, f"seed {seed}"
    assert abs(base / with_adapters - 1) > 1e-4, f"seed {seed}"  # so the bound above detects the adapters
    load_model(tmp_path / "out", strict=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [None, 4])
def test_results_in_16_bits_are_correctly_rounded(tmp_path: Path, dtype: str, bits: int | None, seed: int) -> None:
    from mlx_lm.utils import load_model

    how = None if bits is None else {"group_size": 32, "bits": bits}
    model = write_model(tmp_path / "model", packed_config("qwen3"), seed=seed, quantization=how, dtype=mx.bfloat16)
    adapters = make_adapters(tmp_path / "adapters", model, keys=["self_attn.q_proj", "mlp.down_proj"], num_layers=2)
    assert run(model, adapters, tmp_path / "out", "--dequantize", "--dtype", dtype, "--tolerance", "none") == 0
    source, new = Model(model), MappedWeights(tmp_path / "out")
    lora = adapters_of(adapters, model)
    for layer in source.spec.layers:
        for linear in layer.linears.values():
            exact = np.asarray(source.rows(linear, 0, linear.out_dims), np.float64)
            if (pair := lora.pairs.get(linear.name)) is not None:
                exact += lora.scale * (np.asarray(pair.a, np.float64) @ np.asarray(pair.b, np.float64)).T
            assert (pair is None) == (layer.index == 0 or linear.name.rpartition(".")[2] not in ("q_proj", "down_proj"))
            actual = Tensor(new, f"{linear.name}.weight")[...]
            assert actual.dtype == getattr(mx, dtype)
            step = (
                np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
                if dtype == "float16"
                else (2.0 ** (np.floor(np.log2(np.abs(exact) + 1e-30)) - 7))
            )
            error = np.abs(np.asarray(actual.astype(mx.float32), np.float64) - exact)
            assert (error <= 0.501 * step + 1e-6).all(), f"{linear.name}, seed {seed}"
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_model(tmp_path / "out", strict=True)
    with_adapters, fused = _loss(model, adapters, seed), _loss(tmp_path / "out", None, seed)
    assert abs(fused / with_adapters - 1) <= 2e-2, f"seed {seed}"


@pytest.mark.parametrize("mode, bits", [("affine", 4), ("affine", 5), ("mxfp4", 4)])
def test_only_trained_matrices_are_quantized_again(tmp_path: Path, mode: str, bits: int, seed: int) -> None:
    from mlx_lm.utils import load_model

    how = {"group_size": 32, "bits": bits, "mode": mode}
    model = write_model(tmp_path / "model", packed_config("llama"), seed=seed, quantization=how, dtype=mx.bfloat16)
    adapters = make_adapters(tmp_path / "adapters", model, keys=["mlp.up_proj"], num_layers=1)
    assert run(model, adapters, tmp_path / "out", "--tolerance", "none") == 0
    old, new, lora = MappedWeights(model), MappedWeights(tmp_path / "out"), adapters_of(adapters, model)
    assert set(new.names) == set(old.names)
    (linear,) = [x for x in Model(model).spec.layers[-1].linears.values() if x.name.endswith("up_proj")]
    for name in old.names:
        if not name.startswith(linear.name) or name.endswith(".bias"):
            assert new.view(name).tobytes() == old.view(name).tobytes(), name
    pair = lora.pairs.get(linear.name)
    assert pair is not None
    rows = (Model(model).rows(linear, 0, linear.out_dims) + lora.scale * (pair.a @ pair.b).T).astype(mx.bfloat16)
    for part, expected in zip(
        ("weight", "scales", "biases"), mx.quantize(rows, group_size=32, bits=bits, mode=mode), strict=False
    ):
        same = Tensor(new, f"{linear.name}.{part}")[...] == expected
        assert np.asarray(same).mean() > 0.98, part  # the sum's last bit may change the rounding of a code
    load_model(tmp_path / "out", strict=True)


@pytest.fixture(scope="module")
def packed_home(home: Path) -> Path:
    """`home`'s data, and a model packed in 4 bits."""
    write_tokenizer(home / "packed", chat=True)
    config = packed_config("qwen3") | {"vocab_size": 320, "num_hidden_layers": 2}
    write_model(home / "packed", config, seed=3, quantization={"group_size": 32, "bits": 4}, dtype=mx.bfloat16)
    return home


def trained(home: Path, out: Path, rate: float) -> Path:
    given = arguments(home, out, "--iters", "12", "--learning-rate", str(rate), "--weights", "decompressed")
    given[given.index("--model") + 1] = str(home / "packed")
    assert train.main(given) == 0
    return out


def test_quantization_to_4_bits_that_loses_the_gain_is_refused(
    packed_home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = trained(packed_home, tmp_path / "adapters", 1e-4)
    capsys.readouterr()
    out = tmp_path / "out"
    given = ["--adapter-path", str(adapters), "--save-path", str(out)]
    assert fuse.main([*given, "--tolerance", "0.02"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --tolerance 0.02: in the source's format, loss ") and said.count("\n") == 1
    assert "of the gain is kept; --dequantize keeps more; nothing was written" in said
    assert not out.exists() and not list(tmp_path.glob(".out.*"))
    assert fuse.main([*given, "--dequantize", "--dtype", "float32", "--tolerance", "0.02"]) == 0
    text = capsys.readouterr().out
    assert "  measured  valid.jsonl: loss " in text and ": 100.0% of the gain is kept" in text
    card = (out / "README.md").read_text()
    assert f"| trained on | {packed_home / 'data'} |" in card and "| labelled tokens trained on | " in card
    assert "| peak footprint of training | " in card and "100.0% of the gain kept" in card and " cores, " in card
    assert "base_model" not in card  # a folder is not a model of the hub


def test_a_longer_run_survives_packing(
    packed_home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = trained(packed_home, tmp_path / "adapters", 1e-2)
    given = ["--adapter-path", str(adapters), "--data", str(packed_home / "data" / "test.jsonl")]
    assert fuse.main([*given, "--save-path", str(tmp_path / "four"), "--tolerance", "0.3"]) == 0
    assert fuse.main([*given, "--save-path", str(tmp_path / "eight"), "--bits", "8", "--group-size", "32"]) == 0
    config = json.loads((tmp_path / "eight" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert "test.jsonl" in capsys.readouterr().out


def test_adapters_that_gain_nothing_are_not_measured(
    home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = make_adapters(tmp_path / "adapters", home / "model", spread=0.0, data=str(home / "data"))
    assert run(home / "model", adapters, tmp_path / "out") == 2
    assert "error: --adapter-path: no gain on valid.jsonl: loss " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Matrices have 64 MB in float32; only some rows are in memory."""
    config = packed_config("llama")
    config.update(num_hidden_layers=1, hidden_size=1024, vocab_size=16384, head_dim=64, intermediate_size=16384)
    model = write_model(tmp_path / "model", config, dtype=mx.bfloat16)
    adapters = make_adapters(tmp_path / "adapters", model)
    command = [sys.executable, "-m", "mebp_mlx.fuse", "--model", str(model), "--adapter-path", str(adapters)]
    more = ["--save-path", str(tmp_path / "out"), "--tolerance", "none"]
    done = subprocess.run(command + more, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    peak_mb = int(said.partition("peak footprint ")[2].partition(" MB")[0])
    assert 0 < peak_mb < 100, said


def test_an_upload_gets_the_complete_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    adapters = make_adapters(tmp_path / "adapters", model)
    asked = []

    def child(arguments: list[str], request: dict[str, str], **_: object) -> dict[str, str]:
        asked.append((arguments, request, (Path(request["folder"]) / "README.md").exists()))
        return {"address": "https://hub/me/it"}

    monkeypatch.setattr(uploading, "run_child", child)
    assert run(model, adapters, tmp_path / "out", "--tolerance", "none", "--upload-repo", "me/it") == 0
    assert asked == [(["mebp_mlx.export.upload"], {"folder": str(tmp_path / "out"), "repo": "me/it"}, True)]
    assert "uploaded  https://hub/me/it" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run(model, adapters, tmp_path / "two", "--tolerance", "none", "--upload-repo", "me/it") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --upload-repo me/it: ") and f"the model is complete in {tmp_path / 'two'}" in said


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--adapter-path", "{tmp}/none"], "--adapter-path {tmp}/none: no such folder"),
        (["--adapter-path", "{tmp}/model"], "--adapter-path {tmp}/model: the folder contains no adapter_config.json"),
        (["--model", "{tmp}/other"], "{tmp}/adapters/adapters.safetensors: model.layers.0."),
        (["--save-path", "{tmp}/model"], "--save-path {tmp}/model: exists and is not empty"),
        (["--save-path", "{tmp}/model/new"], "--save-path {tmp}/model/new: is inside the source"),
        (["--bits", "7"], "--bits 7: affine supports 2 or 3 or 4 or 5 or 6 or 8"),
        (["--bits", "4", "--dequantize"], "--bits: cannot be combined with --dequantize"),
        (["--dtype", "float16"], "--dtype float16: needs --dequantize or --bits"),
        (["--tolerance", "-1"], "--tolerance: must be at least 0"),
        (["--upload-repo", "a b"], "--upload-repo a b: not the name of a repository"),
        (["--export-gguf"], "--export-gguf: not available: python -m mebp_mlx.export --gguf"),
        (["--tolerance", "0.1", "--data", "{tmp}/none"], "--data {tmp}/none: no such folder"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model", CONFIGS["qwen2"])
    write_model(tmp_path / "other", CONFIGS["llama"] | {"hidden_size": 48})
    adapters = make_adapters(tmp_path / "adapters", model)
    given = ["--model", str(model), "--adapter-path", str(adapters), "--save-path", str(tmp_path / "out")]
    assert fuse.main([*given, "--tolerance", "none", *(part.format(tmp=tmp_path) for part in argv)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(tmp=tmp_path)}") and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
