"""Converted checkpoints have mlx-lm's bits in a standard format, and are complete or absent, for every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mebp_mlx
from mebp_mlx import convert
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.system.pages import PAGE_BYTES
from mebp_mlx.testing.tiny import CONFIGS, packed_config, random_batch, write_model
from mebp_mlx.weights.safetensors import MappedWeights

FORMATS = {
    "affine 4": ("--group-size", "32"),
    "affine 8": ("--bits", "8", "--group-size", "32"),
    "symmetric": ("--mode", "symmetric", "--group-size", "32"),
    "mxfp4": ("--mode", "mxfp4"),
    "mxfp8": ("--mode", "mxfp8"),
    "nvfp4": ("--mode", "nvfp4"),
    "affine 2": ("--bits", "2", "--group-size", "32"),
    "affine 3": ("--bits", "3", "--group-size", "32"),
    "affine 5": ("--bits", "5", "--group-size", "32"),
    "affine 6": ("--bits", "6", "--group-size", "32"),
}
# Relative RMS error of normal weights, about the limit that the format's step size implies.
ERRORS = {"affine 4": 0.10, "affine 8": 0.008, "symmetric": 0.11, "mxfp4": 0.13, "mxfp8": 0.035, "nvfp4": 0.11}
ERRORS |= {"affine 2": 0.5, "affine 3": 0.22, "affine 5": 0.05, "affine 6": 0.025}


def run(source: Path | str, out: Path | str, *more: str) -> int:
    return convert.main(["--model", str(source), "--out", str(out), *more])


@pytest.fixture
def source(tmp_path: Path, seed: int) -> Path:
    return write_model(tmp_path / "source", packed_config("qwen2-untied"), seed=seed, dtype=mx.bfloat16)


def _loss(folder: Path, seed: int) -> float:
    model = mebp_mlx.open_model(folder)
    lora = mebp_mlx.init_lora(model, rank=1)
    return float(np.asarray(mebp_mlx.loss(model, lora, *random_batch(seed, 2, 15, model.spec.V))))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_converts_and_loads_in_mlx_lm(tmp_path: Path, name: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    folder = write_model(tmp_path / "source", packed_config(name), seed=seed, dtype=mx.bfloat16)
    assert run(folder, tmp_path / "out", "--bits", "8", "--group-size", "32") == 0
    assert abs(_loss(tmp_path / "out", seed) / _loss(folder, seed) - 1) <= 0.02, f"seed {seed}"
    load_model(tmp_path / "out", strict=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    routers = {key: how for key, how in config["quantization"].items() if key.endswith((".gate", ".router"))}
    assert routers.keys() <= {key for key, how in routers.items() if how["group_size"] == 64}  # mlx-lm's own
    expected = {"group_size": 32, "bits": 8, "mode": "affine"} | routers
    assert config["quantization"] == expected == config["quantization_config"]


def test_tensors_that_mlx_lm_keeps_in_float32_keep_it(tmp_path: Path, seed: int) -> None:
    """The logarithm of a gated delta net's decay, for any dtype of the other tensors."""
    folder = write_model(tmp_path / "source", packed_config("qwen3_5"), seed=seed)
    assert run(folder, tmp_path / "out", "--bits", "8", "--group-size", "32", "--dtype", "bfloat16") == 0
    before, after = MappedWeights(folder), MappedWeights(tmp_path / "out")
    logs = [name for name in after.names if name.endswith("A_log")]
    assert logs and all(after.view(name).tobytes() == before.view(name).tobytes() for name in logs)
    assert {after.info(name).dtype for name in after.names if name.endswith("dt_bias")} == {"BF16"}


@pytest.mark.parametrize("flags", [("--mode", "keep"), ("--bits", "8", "--group-size", "32")], ids=["keep", "8 bits"])
def test_a_head_that_mlx_lm_requires_with_a_tied_embedding_is_kept(
    tmp_path: Path, flags: tuple[str, ...], seed: int
) -> None:
    from mlx_lm.utils import load_model

    config = packed_config("helium") | {"tie_word_embeddings": True}
    folder = write_model(tmp_path / "source", config, seed=seed)
    load_model(folder, strict=True)
    assert run(folder, tmp_path / "out", *flags) == 0
    assert "lm_head.weight" in MappedWeights(tmp_path / "out").names
    load_model(tmp_path / "out", strict=True)
    assert abs(_loss(tmp_path / "out", seed) / _loss(folder, seed) - 1) <= 0.02, f"seed {seed}"


@pytest.mark.parametrize("format_name", FORMATS)
def test_reported_errors_are_those_of_the_format(
    tmp_path: Path, source: Path, format_name: str, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    assert run(source, tmp_path / "out", *FORMATS[format_name]) == 0
    text = capsys.readouterr().out
    reported = float(text.partition("  error     ")[2].partition("%")[0]) / 100
    before, after = Model(source), Model(tmp_path / "out")
    sums = np.zeros(2)
    for linear in _linears(before):
        new = next(x for x in _linears(after) if x.name == linear.name)
        w, packed = (np.asarray(m.rows(x, 0, x.out_dims), np.float64) for m, x in ((before, linear), (after, new)))
        sums += [((w - packed) ** 2).sum(), (w**2).sum()]
    measured = (sums[0] / sums[1]) ** 0.5
    assert abs(reported - measured) <= 1e-4, f"seed {seed}"
    assert 0 < measured <= ERRORS[format_name], f"seed {seed}"


def _linears(model: Model) -> list[Any]:
    return [model.spec.embedding, model.spec.head, *(x for layer in model.spec.layers for x in layer.linears.values())]


@pytest.mark.parametrize(
    "bits, mode, group",
    [(bits, "affine", group) for bits, group in ((4, 64), (8, 32), (2, 32), (3, 64), (5, 64), (6, 32))]
    + [(4, "mxfp4", 32), (8, "mxfp8", 32), (4, "nvfp4", 16)],
)
def test_the_bits_equal_mlxs(tmp_path: Path, source: Path, bits: int, mode: str, group: int) -> None:
    config = json.loads((source / "config.json").read_text())
    how = ("--bits", str(bits), "--mode", mode, "--group-size", str(group))
    assert run(source, tmp_path / "out", *how) == 0
    ours, plain = MappedWeights(tmp_path / "out"), MappedWeights(source)
    n_packed = 0
    for name in plain.names:
        value = Tensor(plain, name)[...]
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" not in ours:
            assert (
                mx.array_equal(Tensor(ours, name)[...], value).item()
                and ours.info(name).dtype == plain.info(name).dtype
            )
            continue
        n_packed += 1
        for part, expected in zip(
            ("weight", "scales", "biases"), mx.quantize(value, group_size=group, bits=bits, mode=mode), strict=False
        ):
            actual = Tensor(ours, f"{stem}.{part}")[...]
            assert actual.dtype == expected.dtype and mx.array_equal(actual, expected).item(), (stem, part)
    widths = (config["hidden_size"], config["intermediate_size"])  # rows of 96 are not whole groups of 64
    assert n_packed == 3 * (6 * (widths[0] % group == 0) + (widths[1] % group == 0)) + 2 * (widths[0] % group == 0)


@pytest.mark.parametrize("format_name", ["affine 4", "affine 3", "mxfp4", "nvfp4"])
def test_tensors_already_in_the_format_are_copied(
    tmp_path: Path, source: Path, format_name: str, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    """Quantizing it again would add the format's error twice."""
    assert run(source, tmp_path / "one", *FORMATS[format_name]) == 0
    assert "copied" not in capsys.readouterr().out
    assert run(tmp_path / "one", tmp_path / "two", *FORMATS[format_name]) == 0
    assert "already packed in this format" in capsys.readouterr().out
    one, two = (MappedWeights(tmp_path / name) for name in ("one", "two"))
    assert set(one.names) == set(two.names)
    assert all(mx.array_equal(Tensor(one, name)[...], Tensor(two, name)[...]).item() for name in one.names)
    assert run(tmp_path / "one", tmp_path / "eight", "--bits", "8", "--group-size", "32") == 0
    losses = [_loss(tmp_path / name, seed) for name in ("one", "eight")]
    assert abs(losses[1] / losses[0] - 1) <= 2e-2, f"seed {seed}"


SOURCES: dict[str, tuple[mx.Dtype, dict[str, Any] | None]] = {
    "4 bits": (mx.float16, {"group_size": 32, "bits": 4}),
    "8 bits": (mx.bfloat16, {"group_size": 32, "bits": 8}),
    "5 bits": (mx.bfloat16, {"group_size": 32, "bits": 5}),
    "mixed": (mx.float32, {"group_size": 32, "bits": 4, "model.layers.1.mlp.up_proj": {"group_size": 32, "bits": 8}}),
    "mxfp4": (mx.bfloat16, {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
    "float16": (mx.float16, None),
    "bfloat16": (mx.bfloat16, None),
}


@pytest.mark.parametrize("name", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("kind", SOURCES)
def test_keep_changes_only_positions(tmp_path: Path, name: str, kind: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    dtype, quantization = SOURCES[kind]
    config = packed_config(name)
    if kind == "mixed" and name == "gemma3":
        quantization = {f"language_model.{key}" if "." in key else key: v for key, v in (quantization or {}).items()}
    folder = write_model(tmp_path / "source", config, seed=seed, quantization=quantization, dtype=dtype)
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), {**mx.load(str(file)), "vision_tower.patch.weight": mx.zeros((3, 3))})
    assert run(folder, tmp_path / "out", "--mode", "keep") == 0
    before, after = MappedWeights(folder), MappedWeights(tmp_path / "out")
    assert set(after.names) == set(before.names) - {"vision_tower.patch.weight"}
    for tensor in after.names:
        old, new = before.info(tensor), after.info(tensor)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert after.view(tensor).tobytes() == before.view(tensor).tobytes(), (tensor, seed)
        assert new.not_adoptable is None, tensor
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) == len(Model(folder).spec.layers) + 2
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    load_model(tmp_path / "out", strict=True)


@pytest.mark.parametrize("kind", SOURCES)
def test_dequantized_weights_equal_the_packed_ones(tmp_path: Path, kind: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    dtype, quantization = SOURCES[kind]
    folder = write_model(tmp_path / "source", packed_config("llama"), seed=seed, quantization=quantization, dtype=dtype)
    assert run(folder, tmp_path / "out", "-d") == 0
    before, after = Model(folder), Model(tmp_path / "out")
    for linear in _linears(before):
        packed = linear.quantization
        new = Tensor(after.weights, f"{linear.name}.weight")[...]
        assert new.dtype == dtype, linear.name
        if packed is None or packed.mode == "affine":
            exact = before.rows(linear, 0, linear.out_dims).astype(dtype)
            assert mx.array_equal(new, exact).item(), (linear.name, seed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert abs(_loss(tmp_path / "out", seed) / _loss(folder, seed) - 1) <= 2e-3, f"seed {seed}"
    load_model(tmp_path / "out", strict=True)


@pytest.mark.parametrize("recipe", ["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"])
def test_mixed_recipes_are_mlx_lms(tmp_path: Path, recipe: str, seed: int) -> None:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import load_model

    config = packed_config("llama") | {"num_hidden_layers": 11}
    folder = write_model(tmp_path / "source", config, seed=seed, dtype=mx.bfloat16)
    theirs = mixed_quant_predicate_builder(recipe, load_model(folder)[0], 32)
    assert run(folder, tmp_path / "out", "--quant-predicate", recipe, "--q-group-size", "32") == 0
    for linear in _linears(Model(tmp_path / "out")):
        actual, expected = linear.quantization, theirs(linear.name, None)  # type: ignore[call-arg, arg-type]
        assert actual is not None and vars(actual) == expected, linear.name
    _, loaded = load_model(tmp_path / "out", strict=True)
    assert loaded["quantization"]["bits"] == int(recipe.split("_")[1])


def test_mlx_lms_names_mean_the_same(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"
    assert convert.main(["--hf-path", str(source), "--mlx-path", str(new), "-q", "--q-bits", "8"]) == 0
    assert json.loads((new / "config.json").read_text())["quantization"] == {
        "group_size": 64,
        "bits": 8,
        "mode": "affine",
    }
    assert convert.main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "same")]) == 0
    assert "unchanged, every tensor aligned" in capsys.readouterr().out
    for mode, size, bits in (("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)):
        out = tmp_path / mode
        assert convert.main(["--hf-path", str(source), "--mlx-path", str(out), "-q", "--q-mode", mode]) == 0
        actual = json.loads((out / "config.json").read_text())["quantization"]
        assert actual == {"group_size": size, "bits": bits, "mode": mode}
        import mlx_lm.utils

        mlx_lm.utils.load_model(out, strict=True)


def test_without_a_name_the_result_is_mlx_model(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert convert.main(["--model", str(source)]) == 0
    assert (tmp_path / "mlx_model" / "config.json").exists()
    assert convert.main(["--model", str(source)]) == 2  # nothing is overwritten


def test_keep_reports_its_result(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(source, tmp_path / "out", "--mode", "keep") == 0
    text = capsys.readouterr().out
    assert "format    unchanged, every tensor aligned" in text and "error" not in text and "packed" not in text
    before, after = text.partition("  bytes     ")[2].split(",  ")[0].split(" -> ")
    assert before == after.partition(", ")[0]


def test_files_are_page_aligned_blocks_for_every_reader(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    config = packed_config("gemma3")
    config["text_config"].update(hidden_size=256, intermediate_size=512)
    folder = write_model(tmp_path / "source", config, dtype=mx.bfloat16)
    assert run(folder, tmp_path / "out", "--group-size", "32") == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) == 4 + 2  # blocks, embedding, norm
    n_aligned = 0
    for number, file in enumerate(files):
        with safetensors.safe_open(str(file), "np") as reader:
            names = list(reader.keys())
        blocks = {name.split(".layers.")[1].split(".")[0] for name in names if ".layers." in name}
        assert blocks == ({str(number - 1)} if 0 < number < 5 else set())
        assert {index[name] for name in names} == {file.name}
        weights = MappedWeights(file)
        assert weights.info(weights.names[0]).offset % PAGE_BYTES == 0
        for name in weights.names:
            info = weights.info(name)
            assert info.offset % mx.array([], {"U32": mx.uint32, "BF16": mx.bfloat16}[info.dtype]).itemsize == 0
            if info.n_bytes % PAGE_BYTES == 0:
                assert info.offset % PAGE_BYTES == 0, name
                n_aligned += 1
        end = max(weights.info(name).offset + weights.info(name).n_bytes for name in weights.names)
        assert end == file.stat().st_size
    assert n_aligned > 8


def test_tokenizer_files_are_copied_and_unknown_tensors_are_not(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = dict(mx.load(str(source / "model.safetensors")))
    tensors["vision_tower.patch.weight"] = mx.zeros((3, 3))
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    (source / "tokenizer.json").write_text("{}")
    (source / "modeling.py").write_text("raise SystemExit")
    assert run(source, tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "modeling.py").exists()
    assert "left out  vision_tower.patch.weight: the model does not use it" in capsys.readouterr().out
    assert "vision_tower.patch.weight" not in MappedWeights(tmp_path / "out")
