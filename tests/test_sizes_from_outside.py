"""Sizes from files and options are checked before memory is allocated: one line, exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mebp_mlx import train
from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import UserError
from mebp_mlx.export.adapters import load_adapters
from mebp_mlx.model.base import Model
from mebp_mlx.options import read_yaml
from mebp_mlx.training.checkpoint import load_checkpoint
from mebp_mlx.training.optimizers import make_optimizer
from tests.runs import arguments, events, refused

pytestmark = pytest.mark.usefixtures("tokens_made_here")
HUGE, DIGITS = 10**400, "1" * 5000

CONFIGS: dict[str, dict[str, Any]] = {
    "num_hidden_layers": {"num_hidden_layers": 10**9},
    "num_hidden_layers, a fraction": {"num_hidden_layers": 1e300},
    "hidden_size": {"hidden_size": 10**12},
    "vocab_size": {"vocab_size": HUGE},
    "head_dim": {"head_dim": 2 * 10**12},
    "num_attention_heads": {"num_attention_heads": float("nan")},
    "rope_theta": {"rope_theta": "a"},
    "rope_theta, a list": {"rope_theta": [1]},
    "rope_theta, huge": {"rope_theta": HUGE},
    "rope_theta, negative": {"rope_theta": -1.0},
    "rope_theta, nested": {"rope_parameters": {"rope_theta": "a"}},
    "rope_scaling": {"rope_scaling": "x"},
    "factor": {"rope_scaling": {"type": "linear", "factor": HUGE}},
    "frequencies": {"rope_scaling": {"type": "yarn", "factor": 8, "beta_fast": 0}},
    "frequencies, by base": {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 8}},
    "frequencies, infinite": {"rope_scaling": {"type": "yarn", "factor": 1e300}},
    "frequencies, none": {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 0}},
    "rms_norm_eps": {"rms_norm_eps": HUGE},
}


@pytest.fixture(scope="module")
def model_path(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(home / "model", tmp_path_factory.mktemp("sizes") / "model"))


@pytest.mark.parametrize("case", CONFIGS)
def test_sizes_of_config_json(home: Path, model_path: Path, case: str) -> None:
    config = json.loads((home / "model" / "config.json").read_text())
    (model_path / "config.json").write_text(json.dumps(config | CONFIGS[case]))
    with pytest.raises(UserError, match="config.json.*" + case.partition(",")[0]) as refusal:
        Model(model_path)
    assert len(str(refusal.value)) < 400


def test_sizes_of_config_json_are_checked_before_a_library_reads_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers makes a list of num_hidden_layers entries."""
    shutil.copytree(home / "model", tmp_path / "model")
    config = json.loads((home / "model" / "config.json").read_text())
    monkeypatch.setattr("mebp_mlx.training.inputs.prepare", None)
    for text in (json.dumps(config | {"num_hidden_layers": 10**9}), f'{{"num_hidden_layers": {DIGITS}}}'):
        (tmp_path / "model" / "config.json").write_text(text)
        message = refused(capsys, [*arguments(home, tmp_path / "out"), "--model", str(tmp_path / "model")])
        assert message.startswith(f"{tmp_path / 'model' / 'config.json'}: ")


def _bomb(head: str, item: str, more: Callable[[str], str]) -> str:
    lines = [f"{new}: &{new} {more(old)}" for old, new in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join([f"{head}: &a {item}", *lines]) + "\n"


YAML = {
    "list bomb": (_bomb("a", "[x, x, x, x, x, x, x, x, x]", lambda old: f"[{','.join([f'*{old}'] * 9)}]"), "values"),
    "map bomb": (
        _bomb("a", "{x: 1}", lambda old: "{" + ",".join(f"k{i}: *{old}" for i in range(9)) + "}"),
        "values",
    ),
    "cycle": ("optimizer_config: &a {adam: *a}\n", "deep"),
    "cycle of lists": ("keys: &a [*a]\n", "deep"),
    "deep": (f"seed: {'[' * 3000}{']' * 3000}\n", "deep"),
    "deep maps": (f"seed: {'{a: ' * 3000}1{'}' * 3000}\n", "deep"),
    "5,000 digits": (f"seed: {DIGITS}\n", "not a valid int"),
    "5,000 digits, a size": (f"rank: 3\nmemory_budget: {DIGITS}\n", ":2: not a valid int"),
    "hexadecimal": (f"seed: 0x{'f' * 50000}\n", "whole number"),
    "no digits": ("seed: 0x_\n", "not a valid int"),
    "no date": ("seed: 2020-13-45\n", "not a valid timestamp"),
    "tagged int": ("seed: !!int abc\n", "not a valid int"),
    "tagged float": ("seed: !!float abc\n", "not a valid float"),
    "tagged time": ("seed: !!timestamp abc\n", "not a valid timestamp"),
    "tagged bool": ("seed: !!bool abc\n", "not a valid bool"),
    "a megabyte": (f"model: {'x' * 1_000_000}\n", "larger than"),
}


@pytest.mark.parametrize("case", YAML)
def test_sizes_of_a_yaml_file(tmp_path: Path, case: str) -> None:
    text, reason = YAML[case]
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as refusal:
        TrainConfig.from_args(["--config", str(path)])
    assert str(path) in str(refusal.value) and len(str(refusal.value)) < 400


def test_aliases_of_normal_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("keys: &k [q_proj, v_proj]\noptimizer_config: {adam: {betas: [0.8, 0.9]}}\n")
    assert read_yaml(str(path)).values["keys"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "given",
    [
        ["--rank", "1e18"],
        ["--rank", DIGITS],
        ["--kzoo-seeds", "1e12"],
        ["--fzoo-samples", "1e12"],
        ["--batch-size", "1e300"],
        ["--iters", "1e300"],
        ["--warmup", "1e12"],
        ["--grad-accumulation-steps", "1e12"],
        ["--num-layers", "1e300"],
        ["--seed", DIGITS],
        ["--memory-budget", "1e300GB"],
    ],
    ids=lambda given: " ".join(given)[:30],
)
def test_sizes_of_options(given: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{given[0]}: ") as refusal:
        TrainConfig.from_args(given)
    assert len(str(refusal.value)) < 300


def test_a_rank_beyond_any_memory_is_refused_before_it_is_allocated(home: Path, tmp_path: Path) -> None:
    assert train.main(arguments(home, tmp_path / "out", "--rank", "1000000000")) == 3
    assert not (tmp_path / "out").exists()


SCHEDULES: list[tuple[str, list[float]]] = [
    ("cosine_decay", [1e-4, 1e30]),
    ("linear_schedule", [1e-4, 0, 0]),
    ("exponential_decay", [1e-4, 1e300]),
    ("exponential_decay", [-1e-4, 0.9]),
    ("step_decay", [1e-4, 0.1, 0]),
    ("step_decay", [1, 2, 3, 4, 5]),
]


@pytest.mark.parametrize(("name", "numbers"), SCHEDULES, ids=lambda value: str(value))
def test_schedule_arguments_out_of_range(name: str, numbers: list[float]) -> None:
    config = TrainConfig(lr_schedule={"name": name, "arguments": numbers})
    with pytest.raises(UserError, match=r"^lr_schedule\.arguments: "):
        make_optimizer(config, 100)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("adam", {"betas": [0.9]}), ("adam", {"betas": "ab"}), ("sgd", {"momentum": "x"}), ("lion", {"betas": []})],
)
def test_optimizer_arguments_that_only_an_update_reads(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^optimizer_config\.{name}: "):
        make_optimizer(TrainConfig(optimizer=name, optimizer_config={name: arguments}), 100)


@pytest.mark.parametrize("option", ["--adapter-path", "--model", "--data", "--arena-dir", "--config"])
def test_names_longer_than_a_file_system_takes(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    message = refused(capsys, [*arguments(home, tmp_path / "out"), option, "n" * 300])
    assert "n" * 300 in message and "File name too long" in message


@pytest.mark.parametrize("name", ["s" * 300, "é" * 200, "..", "a/b", ""])
def test_shard_names_that_are_not_file_names(home: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(home / "model", tmp_path / "model")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name, "b": "c"}}))
    with pytest.raises(UserError, match=r"index\.json"):
        Model(model)


def test_weights_that_are_not_a_file(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(home / "model", tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    assert "no weights" in refused(capsys, [*arguments(home, tmp_path / "out"), "--model", str(model)])


@pytest.mark.parametrize("number", [HUGE, float("inf"), float("nan"), True, 0, "8"])
def test_ranks_of_adapters(home: Path, tmp_path: Path, number: Any) -> None:
    parameters = {"rank": number, "scale": 1.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": parameters}))
    with pytest.raises(UserError, match=r"lora_parameters\.rank must be"):
        load_adapters(tmp_path, Model(home / "model").spec)


# Checkpoint and log of a run


@pytest.fixture(scope="module")
def finished(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.runs import tokenize_here

    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tokenize_here(home, patch)
        assert train.main(arguments(home, out, "--iters", "2")) == 0
    return out


@pytest.mark.parametrize(
    "about",
    ["[]", "5", "[" * 3000, DIGITS, *(f'{{"step": {s}, "options": {{}}, "origin": {{}}}}' for s in
     ("-3", '"4"', "true", "2.5", "Infinity", "1" * 30)), '{"step": 1, "options": 3, "origin": {}}',
     '{"step": 1, "options": {}, "origin": [1]}'],
    ids=lambda about: about[:20],
)  # fmt: skip
def test_an_about_of_the_wrong_type(finished: Path, tmp_path: Path, about: str) -> None:
    arrays, metadata = mx.load(str(finished / "checkpoint.safetensors"), return_metadata=True)  # type: ignore[misc]
    mx.save_safetensors(str(tmp_path / "checkpoint.safetensors"), arrays, {**metadata, "about": about})
    with pytest.raises(UserError, match=r"^--resume: .*checkpoint\.safetensors is damaged"):
        load_checkpoint(tmp_path)


def test_names_in_a_checkpoint_that_contradict_each_other(finished: Path, tmp_path: Path) -> None:
    arrays, metadata = mx.load(str(finished / "checkpoint.safetensors"), return_metadata=True)  # type: ignore[misc]
    arrays |= {"optimizer/a": mx.zeros(1), "optimizer/a/b": mx.zeros(1)}
    mx.save_safetensors(str(tmp_path / "checkpoint.safetensors"), arrays, metadata)
    with pytest.raises(UserError, match="is damaged"):
        load_checkpoint(tmp_path)


def test_events_of_the_wrong_type_are_skipped(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "run")
    strange = ['{"event":"valid"}', '{"event":["x"]}', '{"event":"save","iter":"x"}', '{"event":"test","iter":[1]}',
               '{"event":"valid","loss":"a"}', '{"event":"train"}', "[" * 5000, DIGITS, "\x00"]  # fmt: skip
    with open(out / "log.jsonl", "a") as log:
        log.write("\n".join(strange[-3:] + strange[:-3]) + "\n")
    assert train.main(["--resume", "--adapter-path", str(out), "--iters", "4", "--test"]) == 0
    kept = [line for line in (out / "log.jsonl").read_text().splitlines() if line not in strange]
    (out / "log.jsonl").write_text("\n".join(kept) + "\n")
    assert events(out, "save")[-1]["iter"] == 4
