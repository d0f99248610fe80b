"""A conversion that is killed, interrupted, or given wrong input leaves nothing behind; its memory stays small."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mebp_mlx import convert
from mebp_mlx.model.base import Model
from mebp_mlx.testing.tiny import packed_config, write_model


@pytest.fixture
def source(tmp_path: Path, seed: int) -> Path:
    return write_model(tmp_path / "source", packed_config("qwen2-untied"), seed=seed, dtype=mx.bfloat16)


def start_and_hold(command: list[str], folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Starts a conversion to `out` that blocks on its output after its first file, until the output is read."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(512))  # a full pipe
    os.set_blocking(writing, True)
    process = subprocess.Popen(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    while not list(folder.glob(".out.*/*-00001-of-00027.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    return process, reading


def test_a_killed_conversion_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    config = packed_config("llama")
    config.update(num_hidden_layers=25, hidden_size=512, intermediate_size=1536, head_dim=128)
    folder = write_model(tmp_path / "source", config, dtype=mx.bfloat16)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mebp_mlx.convert", "--model", str(folder), "--out", str(out), "--mode", "mxfp4"]
    process, reading = start_and_hold(command, tmp_path)
    process.send_signal(signal.SIGKILL)
    os.close(reading)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (left,) = tmp_path.glob(".out.*.partial")
    assert list(left.glob("*.safetensors")) and not (left / "config.json").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "which a killed process left behind" in again.stdout
    assert not list(tmp_path.glob(".out.*")) and len(list(out.glob("*.safetensors"))) == 27
    Model(out).weights.close()


def test_an_interrupted_conversion_removes_its_files(tmp_path: Path) -> None:
    config = packed_config("llama")
    config.update(num_hidden_layers=25, hidden_size=512, intermediate_size=1536, head_dim=128)
    folder = write_model(tmp_path / "source", config, dtype=mx.bfloat16)
    command = [sys.executable, "-m", "mebp_mlx.convert", "--model", str(folder), "--out", str(tmp_path / "out")]
    process, reading = start_and_hold(command, tmp_path)
    process.send_signal(signal.SIGINT)
    while os.read(reading, 1 << 16):
        pass
    os.close(reading)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said == "interrupted; no partial output is left behind\n"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The matrix has 64 MB in float32; only some rows are in memory."""
    config = packed_config("llama")
    config.update(num_hidden_layers=1, hidden_size=1024, vocab_size=16384, head_dim=64, intermediate_size=4096)
    folder = write_model(tmp_path / "source", config, dtype=mx.bfloat16)
    command = [sys.executable, "-m", "mebp_mlx.convert", "--model", str(folder), "--out", str(tmp_path / "out")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak_mb = int(said.partition("peak footprint ")[2].partition(" MB")[0])
    assert 0 < peak_mb < 100, said


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out", "{new}"], "--model: is required"),
        (["--model", "{new}", "--out", "{new}"], "{new}"),
        (["--model", "{source}", "--out", "{full}"], "--out {full}: exists and is not empty"),
        (["--model", "{source}", "--out", "{source}/inside"], "--out {source}/inside: is inside the source"),
        (["--model", "{source}", "--out", "{new}", "--bits", "7"], "--bits 7: affine supports 2 or 3 or 4 or 5 or"),
        (["--model", "{source}", "--out", "{new}", "--mode", "symmetric", "--bits", "5"], "symmetric supports 4 or 8"),
        (["--model", "{source}", "--out", "{new}", "--group-size", "48"], "--group-size 48: affine supports 32 or"),
        (
            ["--hf-path", "{source}", "--mlx-path", "{new}", "-q", "-d"],
            "--quantize: cannot be combined with --dequantize",
        ),
        (["--hf-path", "{source}", "--mlx-path", "{new}", "-d", "--q-bits", "4"], "--bits 4: cannot be combined"),
        (["--hf-path", "{source}", "--mlx-path", "{new}", "--upload-repo", "me/it"], "--upload-repo: not available"),
        (["--model", "{source}", "--out", "{new}", "--quant-predicate", "mixed_3_6", "--q-mode", "nvfp4"], "affine"),
        (["--model", "{source}", "--out", "{new}", "--quant-predicate", "mixed_3_6", "--q-bits", "4"], "sets the bits"),
        (["--model", "{source}", "--out", "{new}", "--quant-predicate", "mixed_1"], "--quant-predicate: "),
        (
            ["--model", "{source}", "--out", "{new}", "--group-size", "128"],
            "--group-size 128: divides no matrix's row length",
        ),
        (["--model", "{source}", "--out", "{new}", "--mode", "mxfp4", "--bits", "8"], "--bits 8: mxfp4 supports 4"),
        (["--model", "{source}", "--out", "{new}", "--mode", "mxfp4", "--group-size", "64"], "64: mxfp4 supports 32"),
        (["--model", "{source}", "--out", "{new}", "--mode", "int4"], "--mode: "),
        (
            ["--model", "{source}", "--out", "{new}", "--mode", "keep", "--bits", "4"],
            "--bits 4: cannot be combined with",
        ),
        (
            ["--model", "{source}", "--out", "{new}", "--mode", "keep", "--group-size", "64"],
            "--group-size 64: cannot be combined",
        ),
        (
            ["--model", "{source}", "--out", "{new}", "--mode", "keep", "--dtype", "float32"],
            "--dtype float32: cannot be combined",
        ),
        (["--model", "{source}", "--out", "{new}", "--group", "32"], "--group: no such option"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, source: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    places = {"new": str(tmp_path / "new"), "source": str(source), "full": str(full)}
    began = time.perf_counter()
    assert convert.main([part.format(**places) for part in argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message.format(**places) in said, said
    assert not (tmp_path / "new").exists() and time.perf_counter() - began < 10


def test_a_weight_that_is_nan_is_named(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = dict(mx.load(str(source / "model.safetensors")))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = mx.where(mx.arange(tensors[name].shape[1]) == 3, mx.nan, tensors[name]).astype(mx.bfloat16)
    mx.save_safetensors(str(source / "model.safetensors"), tensors)
    assert convert.main(["--model", str(source), "--out", str(tmp_path / "out")]) == 2
    assert f"tensor {name} contains values that are not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))
