"""Greedy text before and after adapters, against a loop that keeps no cache, and what goes wrong in the child."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.errors import UserError
from mebp_mlx.generate import generate, main, sample
from mebp_mlx.testing.tiny import CONFIGS, write_model
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
    """The text of the most likely tokens, each from a forward pass over all tokens so far."""
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
def test_both_texts_are_the_most_likely_tokens(folders: dict[str, Path], name: str) -> None:
    texts = generate(folders[name], folders["adapters"], PROMPT, 12)
    assert texts == {
        "before": greedy(folders[name], None, 12), "after": greedy(folders[name], folders["adapters"], 12)
    }  # fmt: skip
    assert texts["before"] != texts["after"]


def test_the_child_gives_the_same_texts_as_the_command_line(
    folders: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    model, adapters = folders["plain"], folders["adapters"]
    texts = sample(model, adapters, PROMPT, 12)
    assert texts == generate(model, adapters, PROMPT, 12) and capfd.readouterr() == ("", "")
    options = ["--model", str(model), "--prompt", PROMPT, "--max-tokens", "12"]
    command = [sys.executable, "-m", "mebp_mlx.generate", *options, "--adapter-path", str(adapters), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout) == texts
    assert main(options) == 0
    assert capfd.readouterr().out == f"--- before\n{texts['before']}\n"


def test_bad_input(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, adapters = folders["plain"], folders["adapters"]
    other = write_adapters(tmp_path / "other", CONFIGS["qwen2"] | {"hidden_size": 12})
    no_weights = tmp_path / "no-weights"
    no_weights.mkdir()
    (no_weights / "config.json").write_text((model / "config.json").read_text())
    cases: list[tuple[Path, Path | None, str, int, str]] = [
        (model, adapters, "", 5, "--prompt: must not be empty"),
        (model, adapters, PROMPT, 0, "--max-tokens: must be at least 1"),
        (model, tmp_path, PROMPT, 5, f"--adapter-path {tmp_path}: the folder holds no adapter_config.json"),
        (model, other, PROMPT, 5, f"--adapter-path {other}: ValueError: "),
        (no_weights, None, PROMPT, 5, f"--model {no_weights}: FileNotFoundError: No safetensors found"),
    ]
    for *arguments, expected in cases:
        with pytest.raises(UserError) as caught:
            generate(*arguments)  # type: ignore[arg-type]
        assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert main(["--model", str(no_weights), "--prompt", PROMPT]) == 2
    assert capsys.readouterr().err.startswith(f"python -m mebp_mlx.generate: --model {no_weights}: the folder ")


def test_what_goes_wrong_in_the_child_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^--adapter-path /none: the folder holds no adapter_config\.json$"):
        sample(folders["plain"], "/none", PROMPT)
    with pytest.raises(UserError, match=r"^sampling from .*plain failed: .*mebp_mlx\.generate took more than 0"):
        sample(folders["plain"], None, PROMPT, timeout_s=0.05)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(UserError, match=r"^sampling from .*plain failed: .*exit status 1\)$"):
        sample(folders["plain"], None, PROMPT)
