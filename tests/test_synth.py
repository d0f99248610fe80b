"""Synthetic models: mlx-lm loads them strictly, sizes are the real ones, and no partial output remains."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx.testing.synth as synth
from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Tensor
from mebp_mlx.testing.synth import SHAPES, layers_of, model_config, write_model
from mebp_mlx.weights.safetensors import MappedWeights

ROOT = Path(__file__).resolve().parents[1]
SEVEN = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"

_TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 257,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
}
_TINY_GEMMA = _TINY | {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}
TINY: dict[str, dict[str, Any]] = {
    "qwen2": _TINY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 untied": _TINY | {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3": _TINY | {"model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": True},
    "llama": _TINY | {"model_type": "llama", "tie_word_embeddings": False},
    "llama with biases": _TINY
    | {"model_type": "llama", "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": _TINY | {"model_type": "mistral", "head_dim": 16, "tie_word_embeddings": False},
    "gemma3_text": _TINY_GEMMA,
    "gemma3": {"model_type": "gemma3", "vocab_size": 261, "text_config": _TINY_GEMMA},
    "not groupable": _TINY | {"model_type": "qwen2", "tie_word_embeddings": True, "intermediate_size": 200},
}


def load(folder: Path, lazy: bool = False) -> Any:
    from mlx_lm.utils import load_model

    return load_model(folder, lazy=lazy, strict=True)[0]


@pytest.mark.parametrize("bits", [4, 8, 3, 16])
@pytest.mark.parametrize("name", TINY)
def test_mlx_lm_loads_every_family_strictly(tmp_path: Path, name: str, bits: int) -> None:
    folder = write_model(TINY[name], tmp_path / "model", bits=bits)
    logits = load(folder)(mx.array([[1, 2, 3, 256]])).astype(mx.float32)
    assert bool(mx.isfinite(logits).all())
    assert float(logits.std()) > 0
    assert any(path.endswith(".scales") for path in MappedWeights(folder).names) == (bits < 16)


@pytest.mark.parametrize("name", SHAPES)
def test_mlx_lm_finds_every_parameter_of_the_real_shapes(tmp_path: Path, name: str) -> None:
    """Only names and shapes: the files are sparse, and nothing is evaluated."""
    folder = write_model(name, tmp_path / "model", sparse=True)
    model = load(folder, lazy=True)
    assert len(model.layers) == model_config(name).get("text_config", model_config(name))["num_hidden_layers"]
    largest = max(math.prod(layer.shape) for layer in layers_of(model_config(name))) // 2  # bytes of 4 bits
    assert all(file.stat().st_size <= max(1_001_000_000, 1.001 * largest) for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-0.5b", 4_399_104),
        ("qwen2.5-1.5b", 9_232_384),
        ("qwen2.5-3b", 14_966_784),
        ("gemma3-1b", 6_522_880),
        ("gemma3-4b", 14_901_248),
    ],
)
def test_rank_8_on_seven_projections_has_the_papers_number_of_parameters(name: str, expected: int) -> None:
    projections = [layer for layer in layers_of(model_config(name)) if re.search(f"({SEVEN})$", layer.name)]
    assert sum(8 * sum(layer.shape) for layer in projections if layer.kind == "matrix") == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("gemma3-1b", 999_885_952),
        ("gemma2-2b", 2_614_341_888),
        ("gemma4-e2b", 4_628_569_379),
        ("gemma4-e4b", 7_463_013_418),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("olmoe-1b-7b", 6_919_161_856),
        ("gpt-oss-20b", 20_914_757_184),
        ("lfm2-8b-a1b", 8_339_929_856 + 22 * 32),  # and the selection biases, which are buffers there
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.2-3b", 3_212_749_824),
        ("smollm2-135m", 134_515_008),
        ("smollm3-3b", 3_075_098_624),
        ("phi4-mini", 3_836_021_760),
        ("olmo2-1b", 1_484_916_736),
        ("lfm2.5-1.2b", 1_170_340_608),
    ],
)
def test_the_number_of_parameters_is_the_published_one(name: str, expected: int) -> None:
    assert sum(math.prod(layer.shape) for layer in layers_of(model_config(name))) == expected


@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (2, "bfloat16"),
        (3, "float16"),
        (4, "float32"),
        (4, "bfloat16"),
        (4, "float16"),
        (5, "bfloat16"),
        (6, "float16"),
        (8, "float32"),
        (16, "bfloat16"),
        (16, "float16"),
    ],
)
def test_weights_have_the_spread_of_a_real_model(tmp_path: Path, bits: int, dtype: str) -> None:
    weights = MappedWeights(write_model(TINY["qwen2"], tmp_path / "model", bits=bits, group_size=32, dtype=dtype))
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
        w = Tensor(weights, f"{name}.weight")[...]
        if bits < 16:
            scales, biases = Tensor(weights, f"{name}.scales")[...], Tensor(weights, f"{name}.biases")[...]
            assert scales.dtype == getattr(mx, dtype)
            w = mx.dequantize(w, scales, biases, group_size=32, bits=bits)
        values = np.array(w.astype(mx.float32))
        assert abs(values.mean()) <= 0.002
        assert 0.018 <= values.std() <= 0.022
    norm = np.array(Tensor(weights, "model.layers.0.input_layernorm.weight")[...].astype(mx.float32))
    assert abs(norm.mean() - 1) <= 0.05


def test_gemmas_norm_weights_are_near_zero(tmp_path: Path) -> None:
    weights = MappedWeights(write_model(TINY["gemma3"], tmp_path / "model"))
    norm = Tensor(weights, "language_model.model.layers.0.pre_feedforward_layernorm.weight")[...]
    assert float(norm.astype(mx.float32).abs().max()) <= 0.5


def test_the_values_depend_on_the_seed_and_not_on_the_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MappedWeights(write_model(TINY["llama"], tmp_path / "whole", seed=3))
    other = MappedWeights(write_model(TINY["llama"], tmp_path / "other", seed=4))
    monkeypatch.setattr(synth, "SHARD_BYTES", 20_000)
    folder = write_model(TINY["llama"], tmp_path / "sharded", seed=3)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3
    sharded = MappedWeights(folder)
    load(folder)
    assert sharded.names == whole.names
    for name in whole.names:
        assert np.array_equal(sharded.view(name), whole.view(name)), name
        assert not np.array_equal(other.view(name), whole.view(name)), name
    first, second = (whole.view(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1))
    assert not np.array_equal(first, second)


def test_fewer_layers(tmp_path: Path) -> None:
    folder = write_model(model_config(TINY["gemma3"], 1), tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"] == 1
    assert len(load(folder).layers) == 1
    assert TINY["gemma3"]["text_config"]["num_hidden_layers"] == 2  # the given dict is not changed


def test_a_folder_that_is_not_empty_is_not_changed(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(TINY["qwen2"], tmp_path / "model")  # empty: fine
    before = {file: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError, match=r"DIR .*model: exists and is not empty"):
        write_model(TINY["llama"], tmp_path / "model")
    assert {file: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"DIR .*file: is a file"):
        write_model(TINY["llama"], tmp_path / "file")
    with pytest.raises(UserError, match="DIR"):
        write_model(TINY["llama"], tmp_path / "file" / "inside")


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**4, 10**4))
    with pytest.raises(UserError, match="GB"):
        write_model(TINY["llama"], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    write, calls = synth._write_values, []

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 9:
            raise problem
        write(*arguments)

    monkeypatch.setattr(synth, "_write_values", failing)
    raised = UserError if isinstance(problem, OSError) else KeyboardInterrupt
    with pytest.raises(raised, match=r"^$|DIR .*No space left"):
        write_model(TINY["llama"], tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 7}, "--bits 7"),
        ({"group_size": 48}, "--group-size 48"),
        ({"dtype": "float64"}, "--dtype float64"),
        ({"bits": 16, "dtype": "float32"}, "--dtype float32"),
        ({"layers": 0}, "--layers 0"),
        ({"shape": "qwen9"}, "qwen9"),
        ({"shape": {"model_type": "gpt2"}}, "gpt2"),
    ],
)
def test_invalid_options_are_refused_by_name(tmp_path: Path, options: dict[str, Any], named: str) -> None:
    options = dict(options)
    with pytest.raises(UserError, match=named):
        config = model_config(options.pop("shape", TINY["qwen2"]), options.pop("layers", None))
        write_model(config, tmp_path / "model", **options)
    assert list(tmp_path.iterdir()) == []


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.synth", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_command_writes_a_model_and_reports_it_in_json(tmp_path: Path) -> None:
    done = command("gemma3-1b", str(tmp_path / "model"), "--layers", "1", "--bits", "2", "--group-size", "128")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["n_bytes"] == sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    assert os.listdir(tmp_path) == ["model"]
    again = command("gemma3-1b", str(tmp_path / "model"))
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1 and again.stderr.startswith("error: DIR")


def test_memory_stays_small_whatever_the_tensor(tmp_path: Path) -> None:
    code = """
import sys
from mebp_mlx.testing.synth import model_config, write_model
from mebp_mlx.system.footprint import PeakMeter
with PeakMeter() as meter:
    before = meter.now_bytes
    write_model(model_config("qwen2.5-0.5b", 1), sys.argv[1], bits=8)  # the embedding alone has 145 MB
    print(meter.peak_bytes - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) <= 80_000_000
