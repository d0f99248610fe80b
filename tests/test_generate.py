"""Streamed greedy text equals that of a loop without a cache; decompressing once; errors."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mebp_mlx import generate
from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import BudgetError, UserError
from mebp_mlx.generation import dense
from mebp_mlx.generation import sample as sampling
from mebp_mlx.generation.sample import sample
from mebp_mlx.generation.text import Prompt, Writer
from mebp_mlx.testing.tiny import CONFIGS, packed_config, write_model
from mebp_mlx.training.report import show_sample
from tests.texts import write_tokenizer

PROMPT = "what is the capital"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sample")
    made = {name: write_tokenizer(root / name, chat=name == "chat") for name in ("chat", "plain")}
    pieces = json.loads((made["plain"] / "tokenizer.json").read_text())["model"]["vocab"]
    config = CONFIGS["qwen2"] | {"vocab_size": len(pieces)}
    for folder in made.values():
        write_model(folder, config, seed=3)
    return made | {"adapters": write_adapters(root / "adapters", config)}


def write_adapters(folder: Path, config: dict[str, Any], rank: int = 3) -> Path:
    folder.mkdir()
    random = np.random.default_rng(1)
    D, F = config["hidden_size"], config["intermediate_size"]
    arrays = {}
    for layer in (1, 2):
        for name, (inputs, outputs) in {"self_attn.q_proj": (D, D), "mlp.up_proj": (D, F)}.items():
            for part, shape in (("lora_a", (inputs, rank)), ("lora_b", (rank, outputs))):
                arrays[f"model.layers.{layer}.{name}.{part}"] = mx.array(random.normal(size=shape), mx.float32)
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    lora = {"rank": rank, "scale": 1.0, "dropout": 0.5, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    described = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def greedy(model_path: Path, adapter_path: Path | None, n_tokens: int) -> str:
    """The text of the most likely tokens, each from a forward pass over all previous tokens."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(model_path), adapter_path=str(adapter_path) if adapter_path else None)[:2]
    tokens = tokenizer.encode(PROMPT)
    if model_path.name == "chat":
        tokens = tokenizer.encode(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    start = len(tokens)
    while len(tokens) < start + n_tokens and tokens[-1] != tokenizer.eos_token_id:
        tokens.append(int(mx.argmax(model(mx.array([tokens]))[0, -1])))
    return tokenizer.decode([token for token in tokens[start:] if token != tokenizer.eos_token_id])


@pytest.mark.parametrize("name", ["chat", "plain"])
def test_the_text_consists_of_the_most_likely_tokens(folders: dict[str, Path], name: str) -> None:
    texts = []
    for adapters in (None, folders["adapters"]):
        pieces = list(Writer(folders[name], adapters).stream(Prompt(PROMPT, 12)))
        assert len(pieces) > 1 and "".join(pieces) == greedy(folders[name], adapters, 12)
        texts.append("".join(pieces))
    assert texts[0] != texts[1]


def test_the_command_streams_only_text_to_stdout(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["--model", str(folders["plain"]), "--adapter-path", str(folders["adapters"]), "-m", "12"]
    expected = greedy(folders["plain"], folders["adapters"], 12) + "\n"
    assert generate.main([*argv, "-p", PROMPT]) == 0
    said = capsys.readouterr()
    assert said.out == expected and said.err.startswith("peak footprint ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert generate.main([*argv, "--prompt", "-"]) == 0
    assert capsys.readouterr().out == expected
    drawn = []
    for seed in (1, 1, 2):
        assert generate.main([*argv, "-p", PROMPT, "--temp", "2", "--top-p", "0.9", "--seed", str(seed)]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_chat_template_can_be_ignored(folders: dict[str, Path]) -> None:
    writer = Writer(folders["chat"])
    tokenizer = writer._tokenizer
    assert writer._tokens(Prompt(PROMPT, plain=True)) == tokenizer.encode(PROMPT)
    expected = f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert writer._tokens(Prompt(PROMPT, system="be brief")) == tokenizer.encode(expected)


# Decompression


PACKINGS: dict[str, tuple[dict[str, Any] | None, mx.Dtype]] = {
    "4 bits": ({"group_size": 32, "bits": 4}, mx.bfloat16),
    "5 bits": ({"group_size": 32, "bits": 5}, mx.float16),
    "mxfp4": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, mx.bfloat16),
    "bfloat16": (None, mx.bfloat16),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gemma4", "qwen3_moe"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_decompressed_model_computes_the_same(tmp_path: Path, family: str, packing: str, seed: int) -> None:
    from mlx_lm.utils import load_model

    quantization, dtype = PACKINGS[packing]
    folder = write_model(tmp_path / "m", packed_config(family), seed=seed, quantization=quantization, dtype=dtype)
    tokens = mx.array(np.random.default_rng(seed).integers(0, 131, (1, 9)))
    stored = load_model(folder)[0]
    stored.set_dtype(mx.float32)
    expected = np.asarray(stored(tokens).astype(mx.float32))
    lines: list[str] = []
    for share in (math.inf, 0.5, 0.0):
        model = load_model(folder, lazy=True)[0]
        slow = list(dense._slow_matrices(model))
        growth = sum(4 * dense._n_weights(m) - sum(v.nbytes for _, v in dense._parameters(m)) for _, m in slow)
        dense.make_dense(model, share * growth if math.isfinite(share) else share, lines.append)
        n_left, free = len(list(dense._slow_matrices(model))), sum(not dense._must_grow(m) for _, m in slow)
        assert (n_left == 0) if share == math.inf else (0 < n_left < len(slow) if share else n_left == free)
        actual = np.asarray(model(tokens).astype(mx.float32))
        # Gemma 4 takes a product with the embedding itself, in its dtype, before any norm.
        is_wide = family != "gemma4" or (share == math.inf and packing != "mxfp4")
        tolerance = 2e-4 if is_wide else 2e-2
        assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max(), f"share {share}, seed {seed}"
    assert lines[0].startswith("decompressing the weights once, ") and "products with them are slower" in lines[2]


def test_float32_weights_are_not_changed(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    model = load_model(write_model(tmp_path / "m", packed_config("qwen2")))[0]
    lines: list[str] = []
    before = model.model.layers[0].mlp.up_proj.weight
    dense.make_dense(model, math.inf, lines.append)
    assert model.model.layers[0].mlp.up_proj.weight is before and not lines
    assert all(isinstance(m, nn.Module) for _, m in model.named_modules())


def test_a_budget_without_room_is_refused_by_size(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    pattern = r"^--memory-budget: 1\.0 MB is too little .* workable budget is \d+MB$"
    with pytest.raises(BudgetError, match=pattern) as said:
        Writer(folders["plain"], None, 1_000_000)
    least = str(said.value).rpartition(" ")[2]
    argv = ["--model", str(folders["plain"]), "-p", PROMPT, "-m", "3", "--memory-budget"]
    assert generate.main([*argv, "1MB"]) == 3
    assert capsys.readouterr().err.startswith("error: --memory-budget: 1.0 MB")
    assert generate.main([*argv, f"{int(least[:-2]) + 100}MB"]) == 0


# Errors


def test_bad_input_is_one_line(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapters = folders["plain"], folders["adapters"]
    other = write_adapters(tmp_path / "other", CONFIGS["qwen2"] | {"hidden_size": 12})
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model / "config.json").read_text())
    (broken / "model.safetensors").write_text("no weights")
    cases = [
        ([], "--prompt: is required"),
        (["-p", ""], "--prompt: expected text"),
        (["-p", PROMPT, "-m", "0"], "--max-tokens: must be at least 1"),
        (
            ["-p", PROMPT, "--adapter-path", tmp_path],
            f"--adapter-path {tmp_path}: the folder contains no adapter_config",
        ),
        (["-p", PROMPT, "--adapter-path", other], f"--adapter-path {other}: ValueError: "),
        (["-p", PROMPT, "--model", broken], f"--model {broken}: "),
        (["-p", PROMPT, "--model", tmp_path], f"--model {tmp_path}: the folder {tmp_path} contains no config.json"),
        (["-p", PROMPT, "--adapters", adapters], "--adapters: no such option; did you mean --adapter-path?"),
        (["-p", PROMPT, "--trust-remote-code"], "--trust-remote-code: not available: no code from"),
    ]
    for argv, expected in cases:
        assert generate.main(["--model", str(model), *map(str, argv)]) == 2
        said = capsys.readouterr()
        assert said.err.startswith(f"error: {expected}") and said.err.count("\n") == 1, said.err
        assert said.out == ""


# The child process that samples during training


def test_the_child_streams_both_texts(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    model, adapters = folders["plain"], folders["adapters"]
    shown: dict[str, str] = {}

    def show(kind: str, text: str) -> None:
        shown[kind] = shown.get(kind, "") + text

    texts = sample(model, adapters, PROMPT, 12, show=show)
    assert texts == {"before": greedy(model, None, 12), "after": greedy(model, adapters, 12)} == shown
    assert capfd.readouterr() == ("", "")


def test_errors_in_the_child_are_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain, adapters = folders["plain"], folders["adapters"]
    with pytest.raises(UserError, match=r"^--adapter-path /none: no such folder$"):
        sample(plain, "/none", PROMPT, 2)
    with pytest.raises(UserError, match=r"^sampling from .*plain failed: .*generation\.sample took more than 0"):
        sample(plain, adapters, PROMPT, timeout_s=0.05)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match=r"^sampling from .*plain failed: .*exit status 1\)$"):
        sample(plain, adapters, PROMPT)


def test_a_run_announces_its_sample_and_that_an_interrupt_loses_nothing(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(model=str(folders["plain"]), sample_prompt=PROMPT, memory_budget=500_000_000)
    asked = []

    def child(arguments: list[str], request: dict[str, Any], on_progress: Any, **_: Any) -> dict[str, str]:
        asked.append(request["budget_bytes"])
        for piece in (["note", "decompressing"], ["before", "a "], ["before", "b"], ["after", "c"]):
            on_progress(piece)
        if len(asked) == 2:
            raise KeyboardInterrupt
        if len(asked) == 3:
            raise UserError("too large")
        return {"before": "a b", "after": "c"}

    monkeypatch.setattr(sampling, "run_child", child)
    texts = f"--- prompt\n{PROMPT}\n--- before\na b\n--- after\nc\n"
    first = f"sample     another process loads {folders['plain']}; interrupting it loses nothing, the run is complete\n"
    endings = ("", "sample interrupted; the run itself is complete, adapters in x\n", "note: no sample: too large\n")
    for ending in endings:
        show_sample(config, folders["plain"], Path("x"))
        assert capsys.readouterr().out == f"{first}sample     decompressing\n{texts}{ending}"
    assert asked == [500_000_000] * 3


def test_the_training_process_imports_no_mlx_lm() -> None:
    code = "import sys, mebp_mlx.train; print([m for m in ('mlx_lm', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
