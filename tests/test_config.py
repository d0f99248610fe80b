"""Options: sources of values, refused values, and error messages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mebp_mlx.config import TrainConfig
from mebp_mlx.errors import UserError
from mebp_mlx.options import describe, suggest
from mebp_mlx.system import machine
from mebp_mlx.training.optimizers import CLASSES, learning_rate, make_optimizer

pytestmark = pytest.mark.quick

MLX_LM_EXAMPLE = """\
# The keys of mlx-lm's own example.
model: "bundled"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
data: "bundled"
seed: 7
num_layers: 16
batch_size: 2
iters: 1000
val_batches: 5
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "out"
save_every: 100
test: false
test_batches: 100
max_seq_length: 512
grad_checkpoint: false
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 4
  scale: 10
  dropout: 0.1
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_args(argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_of_the_dataclass() -> None:
    assert TrainConfig.from_args([]) == TrainConfig()


def test_every_option_is_a_flag_a_yaml_key_and_a_saved_value(tmp_path: Path) -> None:
    other: dict[str, Any] = {
        "model": "m", "data": "d", "mask_prompt": True, "max_seq_length": 77, "overlong": "drop", "batch_size": 3,
        "engine": "mezo", "zo_eps": 0.5, "kzoo_seeds": 9, "kzoo_pro": True, "hizoo_alpha": 0.5, "fzoo_samples": 3,
        "arena_dir": "a", "seed": 9, "rank": 5, "scale": 2.5, "dropout": 0.25,
        "keys": ["mlp.up_proj", "mlp.down_proj"], "num_layers": 2, "optimizer": "lion", "learning_rate": 0.5,
        "warmup": 3, "lr_decay": "cosine", "max_grad_norm": 1.5, "grad_accumulation_steps": 4, "iters": 12,
        "steps_per_eval": 6, "val_batches": -1, "test": True, "test_batches": 8, "adapter_path": "p", "resume": True,
        "save_every": 11, "steps_per_report": 13, "sample_prompt": "Once", "project_name": "mine",
        "report_to": ["wandb", "trackio"],
        "memory_budget": "500MB", "over_budget": "warn", "arena_budget": "1MB", "dry_run": True, "device": "a17-pro",
        "dtype": "bfloat16", "weights": "packed", "optimizer_config": {"lion": {"weight_decay": 0.1}},
        "train_on": "completion", "prompt_feature": "p", "completion_feature": "c", "text_feature": "t",
        "chat_feature": "m", "preview": 3, "hf_dataset": [{"path": "org/name", "config": {"name": "part"}}],
        "resume_adapter_file": "f", "patience": 2, "min_delta": 0.5, "save_best": True,
        "fine_tune_type": "dora", "lora_plus_ratio": 4.0,
        "rows_by_speed": True, "reduce_dtype": "bfloat16", "peer_timeout": 5.0,
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names - set(other) == {"config", "epochs", "lr_schedule", "rslora_alpha"}  # a file; exclusive with others
    argv = []
    for name, value in other.items():
        flag = "--" + name.replace("_", "-")
        if name in ("optimizer_config", "hf_dataset"):
            continue
        argv += [flag] if value is True else [flag, *(value if isinstance(value, list) else [str(value)])]
    by_flags = TrainConfig.from_args(argv).to_dict()
    by_yaml = TrainConfig.from_args(["-c", write(tmp_path, json.dumps(other, indent=1))]).to_dict()
    other |= {"memory_budget": 500_000_000, "arena_budget": 1_000_000}
    for name, value in other.items():
        assert by_yaml[name] == value, name
        assert by_flags[name] == value or name in ("optimizer_config", "hf_dataset"), name
    assert json.loads(json.dumps(by_yaml)) == by_yaml
    assert TrainConfig(**by_yaml).to_dict() == by_yaml


def test_mlx_lm_yaml_keeps_its_meaning(tmp_path: Path) -> None:
    config = TrainConfig.from_args(["--config", write(tmp_path, MLX_LM_EXAMPLE)])
    assert (config.rank, config.scale, config.dropout) == (4, 10.0, 0.1)
    assert config.keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert (config.optimizer_name, config.learning_rate, config.iters) == ("adamw", 1e-5, 1000)
    assert config.lr_schedule is not None and config.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]


def test_mlx_lm_schedule_gives_mlx_lm_rates(tmp_path: Path) -> None:
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    import mlx.core as mx

    config = TrainConfig.from_args(["--config", write(tmp_path, MLX_LM_EXAMPLE)])
    ours = learning_rate(config, 500)
    theirs = utils.build_schedule(
        {"name": "cosine_decay", "warmup": 100, "warmup_init": 1e-7, "arguments": [1e-5, 1000, 1e-7]}
    )
    assert callable(ours)
    for step in (0, 1, 50, 99, 100, 101, 102, 600, 2000):
        assert ours(mx.array(step)).item() == theirs(mx.array(step)).item(), step


def test_flags_win_over_yaml_and_yaml_over_saved(tmp_path: Path) -> None:
    path = write(tmp_path, "rank: 3\nbatch_size: 5\nmask_prompt: true\n")
    saved = TrainConfig(rank=9, batch_size=9, seed=9).to_dict()
    config = TrainConfig.from_args(["-c", path, "--rank", "2", "--no-mask-prompt"], saved=saved)
    assert (config.rank, config.batch_size, config.seed, config.mask_prompt) == (2, 5, 9, False)


def test_epochs_and_iters(tmp_path: Path) -> None:
    assert refusal("--iters", "5", "--epochs", "1").startswith("--epochs")
    path = write(tmp_path, "iters: 5\n")
    assert TrainConfig.from_args(["-c", path, "--epochs", "0.5"]).epochs == 0.5
    path = write(tmp_path, "epochs: 2\n")
    assert TrainConfig.from_args(["-c", path, "--iters", "7"]).epochs is None
    assert TrainConfig.from_args(["--iters", "7"], saved=TrainConfig(epochs=2).to_dict()).epochs is None


@pytest.mark.parametrize(
    ("argv", "flag", "reason"),
    [
        (["--rank", "0"], "--rank", "at least 1"),
        (["--rank", "2.5"], "--rank", "whole number"),
        (["--rank", "x"], "--rank", "whole number"),
        (["--dropout", "1"], "--dropout", "less than 1"),
        (["--scale", "inf"], "--scale", "finite"),
        (["--learning-rate", "0"], "--learning-rate", "greater than 0"),
        (["--learning-rate", "nan"], "--learning-rate", "finite"),
        (["--num-layers", "0"], "--num-layers", "or -1"),
        (["--num-layers", "-2"], "--num-layers", "or -1"),
        (["--seed", "-1"], "--seed", "at least 0"),
        (["--batch-size", "0"], "--batch-size", "at least 1"),
        (["--max-seq-length", "1"], "--max-seq-length", "at least 2"),
        (["--zo-eps", "-0.1"], "--zo-eps", "greater than 0"),
        (["--engine", "whole"], "--engine", "did you mean whole-graph?"),
        (["--optimizer", "adamv"], "--optimizer", "adamw, sgd"),
        (["--keys", "q_proj", "vproj"], "--keys", "did you mean"),
        (["--keys"], "--keys", "expected at least one argument"),
        (["--learning-rat", "1"], "--learning-rat", "did you mean --learning-rate?"),
        (["--trust-remote-code"], "--trust-remote-code", "no code from a model's folder is ever run"),
        (["--fine-tune-type", "full"], "--fine-tune-type", "lora with a larger rank"),
        (["--fine-tune-type", "none"], "--fine-tune-type", "not one of lora, dora"),
        (["--lora-layers", "4"], "--lora-layers", "num_layers"),
        (["stray"], "stray", "no such option"),
        (["--model", ""], "--model", "expected text"),
        (["--config", "no-such-file.yaml"], "--config no-such-file.yaml", "No such file"),
    ],
)
def test_wrong_flags_are_named(argv: list[str], flag: str, reason: str) -> None:
    message = refusal(*argv)
    assert message.startswith(flag + ":") and reason in message, message


@pytest.mark.parametrize(
    ("text", "line", "key", "reason"),
    [
        ("rank: 4\nrnak: 4\n", 2, "rnak", "did you mean rank?"),
        ("rank: 4\n\n# more\nlearning_rates: 1\n", 4, "learning_rates", "did you mean learning_rate?"),
        ("rank: eight\n", 1, "rank", "whole number, got 'eight'"),
        ("rank: 0\n", 1, "rank", "at least 1"),
        ("rank: true\n", 1, "rank", "whole number"),
        ("iters: 10.5\n", 1, "iters", "whole number"),
        ("mask_prompt: 1\n", 1, "mask_prompt", "true or false"),
        ("model: 7\n", 1, "model", "expected text"),
        ("keys: 7\n", 1, "keys", "list of names"),
        ("seed: 1\nseed: 2\n", 2, "seed", "first on line 1"),
        ("train: false\n", 1, "train", "must be true"),
        ("fine_tune_type: full\n", 1, "fine_tune_type", "full is not available"),
        ("seed: 1\ntrust_remote_code: true\n", 2, "trust_remote_code", "leave it out"),
        ("seed: 1\nlora_layers: 8\n", 2, "lora_layers", "num_layers"),
        ("wandb: true\n", 1, "wandb", "report_to: wandb"),
        ("report_to: wandb, mlflow\n", 1, "report_to", "'mlflow' is not one of wandb, tensorboard, trackio, swanlab"),
        ("lora_parameters:\n  rank: 2\n  alpha: 16\n", 3, "lora_parameters.alpha", "scale"),
        ("lora_parameters:\n  rank: -2\n", 2, "lora_parameters.rank", "at least 1"),
        ("lora_parameters: 8\n", 1, "lora_parameters", "mapping"),
        ("rank: 2\nlora_parameters:\n  rank: 2\n", 3, "lora_parameters.rank", "twice"),
        ("lr_schedule:\n  name: cosine\n  arguments: [1]\n", 2, "lr_schedule.name", "did you mean cosine_decay?"),
        ("lr_schedule:\n  name: step_decay\n", 1, "lr_schedule.arguments", "needs a value"),
        ("lr_schedule:\n  name: step_decay\n  arguments: 1\n", 3, "lr_schedule.arguments", "list of numbers"),
        ("warmup: 3\nlr_schedule: {name: cosine_decay, arguments: [1, 5]}\n", 1, "warmup", "cannot be combined"),
        ("optimizer_config:\n  adamm: {}\n", 2, "optimizer_config.adamm", "did you mean adam"),
        ("hf_dataset: org/name\n", 1, "hf_dataset", "expected a mapping or a list of mappings"),
        ("hf_dataset:\n  name: org/name\n", 2, "hf_dataset.name", "mlx-lm calls it path"),
        ("hf_dataset:\n- path: a/b\n- path: a/c\n  txt_feature: x\n", 4, "hf_dataset.1.txt_feature", "text_feature?"),
        ("hf_dataset:\n- path: a/b\n- path: 3\n", 3, "hf_dataset.1.path", "expected text"),
        ("seed: 1\nhf_dataset:\n- train_split: train\n", 3, "hf_dataset.0", "needs a path"),
        ("train_on: answers\n", 1, "train_on", "all, completion, assistant"),
        ("optimizer_config:\n  adam: 3\n", 2, "optimizer_config.adam", "mapping"),
    ],
)
def test_wrong_yaml_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str, reason: str) -> None:
    path = write(tmp_path, text)
    message = refusal("-c", path)
    assert message.startswith(f"{path}:{line}: {key}:") and reason in message, message


def test_options_without_effect_are_accepted_with_one_notice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = "train: true\ngrad_checkpoint: true\nclear_cache_threshold: 0\ntrust_remote_code: false\nuse_dora: false\n"
    path = write(tmp_path, old + "wandb: null\nfine_tune_type: lora\nresume_adapter_file: null\nsome_old_key: null\n")
    flags = ["--train", "--grad-checkpoint", "--clear-cache-threshold", "1GB", "--fine-tune-type", "lora"]
    assert TrainConfig.from_args([*flags, "-c", path]).replace(config=None) == TrainConfig()
    (line,) = capsys.readouterr().out.splitlines()
    names = ("grad_checkpoint", "clear_cache_threshold", "trust_remote_code", "use_dora", "some_old_key")
    assert line.startswith("note: ") and all(line.count(f"{name} (") == 1 for name in names)
    assert not any(f" {name} (" in line for name in ("train", "fine_tune_type"))
    TrainConfig.from_args(["-c", write(tmp_path, "train: true\nfine_tune_type: lora\n")])
    assert capsys.readouterr().out == ""


def test_hf_dataset_takes_the_place_of_data(tmp_path: Path) -> None:
    path = write(tmp_path, "data: rows\nhf_dataset:\n  path: org/name\n  text_feature: body\n")
    config = TrainConfig.from_args(["-c", path])
    assert config.data_source == [{"path": "org/name", "text_feature": "body"}]
    assert json.loads(json.dumps(config.to_dict()))["hf_dataset"] == config.data_source
    assert TrainConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert refusal("-c", path, "--data", "rows").startswith("--data: cannot be combined with the hf_dataset of ")


def test_mask_prompt_and_train_on_select_the_labels() -> None:
    assert TrainConfig().row_options.train_on == "all"
    assert TrainConfig(mask_prompt=True).row_options.train_on == "completion"
    assert TrainConfig(train_on="assistant").row_options.train_on == "assistant"
    assert refusal("--mask-prompt", "--train-on", "assistant").startswith("--train-on assistant: contradicts")


@pytest.mark.parametrize("name", ["adapter_path", "arena_dir", "config"])
@pytest.mark.parametrize("spelling", ["flag", "flag=", "yaml"])
def test_a_tilde_is_the_home_folder_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spelling: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").write_text("rank: 3\n")
    flag = "--" + name.replace("_", "-")
    if spelling == "yaml":
        argv = ["-c", write(tmp_path, f"{name}: ~/a\n")]
        if name == "config":
            assert "unknown key" in refusal(*argv)
            return
    else:
        argv = [f"{flag}=~/a"] if spelling == "flag=" else [flag, "~/a"]
    assert getattr(TrainConfig.from_args(argv), name) == str(tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("--learning-rat", ["--learning-rate", "--seed"], "--learning-rate"),
        ("lora_layer", ["lora_parameters", "num_layers"], None),
        ("--versions", ["--overlong", "--seed"], None),
        ("cosine", ["cosine_decay", "step_decay"], "cosine_decay"),
        ("--q", ["--keys", "--quiet"], None),
    ],
)
def test_hints_are_given_only_if_they_help(name: str, known: list[str], meant: str | None) -> None:
    assert suggest(name, known) == (f"; did you mean {meant}?" if meant else "")


def test_choices_are_case_insensitive_as_in_mlx_lm() -> None:
    assert TrainConfig.from_args(["--optimizer", "AdamW"]).optimizer_name == "adamw"


@pytest.mark.parametrize("text", ["a: [1, 2\nb: 3\n", "- 1\n- 2\n", "rank\n", "3: 4\n", "a:\n\t- b\n"])
def test_yaml_that_is_not_a_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert refusal("-c", path).startswith(f"{path}:")


def test_binary_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal("-c", str(path))


@pytest.mark.parametrize("spelling", ["1e-5", "1E-5", "1.0e-5", "0.00001", '"1e-5"', ".1e-4", "+1e-5"])
def test_yaml_exponents_are_numbers(tmp_path: Path, spelling: str) -> None:
    config = TrainConfig.from_args(["-c", write(tmp_path, f"learning_rate: {spelling}\n")])
    assert config.learning_rate == pytest.approx(1e-5, rel=1e-12)


def test_empty_yaml_and_null_values_are_defaults(tmp_path: Path) -> None:
    assert TrainConfig.from_args(["-c", write(tmp_path, "# nothing\n")]).replace(config=None) == TrainConfig()
    assert TrainConfig.from_args(["-c", write(tmp_path, "rank:\nresume: null\n")]).rank == TrainConfig().rank


def test_schedule_in_yaml_excludes_the_flags_that_it_replaces(tmp_path: Path) -> None:
    path = write(tmp_path, "lr_schedule: {name: cosine_decay, arguments: [1e-4, 50]}\n")
    for flags in (["--warmup", "5"], ["--lr-decay", "linear"], ["--learning-rate", "1e-3"]):
        assert refusal("-c", path, *flags).startswith(flags[0] + ":")


def test_python_interface_checks_too() -> None:
    for wrong in (
        {"rank": 0},
        {"engine": "x"},
        {"seed": "a"},
        {"lr_schedule": {"name": "no"}},
        {"optimizer_config": {"x": {}}},
        {"keys": ()},
    ):
        with pytest.raises(UserError) as caught:
            TrainConfig(**wrong)  # type: ignore[arg-type]
        assert next(iter(wrong)).replace("_", "-") in str(caught.value).replace("_", "-")
    with pytest.raises(UserError):
        TrainConfig().replace(dropout=1.0)
    assert TrainConfig().replace(engine="mezo").optimizer_name == "sgd"
    assert TrainConfig().replace(engine="mezo", optimizer="adam").optimizer_name == "adam"


def test_saved_options_of_another_version_are_refused() -> None:
    with pytest.raises(UserError, match=r"--resume.*frobnicate"):
        TrainConfig.from_args([], saved={"frobnicate": 1})


def test_short_names_of_projections() -> None:
    assert TrainConfig.from_args(["--keys", "q_proj,v_proj"]).keys == ("self_attn.q_proj", "self_attn.v_proj")
    assert TrainConfig.from_args(["--keys", "q_proj", "mlp.up_proj"]).keys == ("self_attn.q_proj", "mlp.up_proj")


def test_every_family_s_matrices_are_keys() -> None:
    assert TrainConfig().keys is None
    assert TrainConfig.from_args(["--keys", "qkv_proj", "gate_up_proj"]).keys == (
        "self_attn.qkv_proj",
        "mlp.gate_up_proj",
    )


# Budgets


def test_a_budget_is_a_size_or_a_word() -> None:
    for text, budget_bytes, smallest in (("200MB", 200_000_000, False), ("min", None, True), ("NONE", None, False)):
        config = TrainConfig.from_args(["--memory-budget", text])
        assert (config.budget_bytes, config.smallest) == (budget_bytes, smallest), text
        assert TrainConfig(**config.to_dict()).to_dict() == config.to_dict()
    assert TrainConfig(memory_budget=123).budget_bytes == 123


def test_the_default_budget_is_1_gb_or_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for memory_gb, budget_gb in ((64, 1), (4, 1), (2, 0.5)):
        monkeypatch.setattr(machine, "memory_bytes", lambda n=memory_gb: n * 10**9)
        assert TrainConfig().budget_bytes == budget_gb * 10**9
        assert TrainConfig(device="a17-pro").budget_bytes == 10**9
        assert TrainConfig(device="a17-pro", memory_budget="none").budget_bytes is None
    assert not TrainConfig().smallest


@pytest.mark.parametrize("key", ["memory_budget", "arena_budget"])
@pytest.mark.parametrize(("raw", "meant"), [("300", "300MB"), ("1.5", "1.5MB"), ("2000000000", "2000MB")])
def test_a_size_without_a_unit_is_refused_with_a_hint(tmp_path: Path, key: str, raw: str, meant: str) -> None:
    path = write(tmp_path, f"seed: 1\n{key}: {raw}\n")
    flag = "--" + key.replace("_", "-")
    reason = f"{raw} has no unit; did you mean {meant}?"
    assert refusal(flag, raw) == f"{flag}: {reason}"
    assert refusal("-c", path) == f"{path}:2: {key}: {reason}"
    saved = TrainConfig.from_args([], saved={**TrainConfig().to_dict(), key: 300})  # in bytes, as in a saved run
    assert getattr(saved, key) == 300


def test_help_is_one_line_for_each_option() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "mebp_mlx.train", "--help"],
        capture_output=True,
        text=True,
        env={"COLUMNS": "120", "PATH": "", "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    for spec in describe(TrainConfig).values():
        if not spec.option.yaml_only:
            (line,) = [line for line in lines if re.match(rf"  (-\w, )?{spec.flag}[ ,]", line)]
            assert spec.option.help in line and line.endswith("]"), line


# Optimizers


def test_every_optimizer_name_makes_that_optimizer_and_steps() -> None:
    import mlx.core as mx

    for name, kind in CLASSES.items():
        optimizer = make_optimizer(TrainConfig(optimizer=name), 10)
        assert isinstance(optimizer, kind), name
        before = {"w": mx.ones((4, 3))}
        after = optimizer.apply_gradients({"w": mx.full((4, 3), 0.5)}, before)
        assert mx.all(after["w"] < before["w"]).item(), name


def test_plain_sgd_keeps_no_state_and_momentum_does() -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    for arguments, n_kept in (({}, 0), ({"momentum": 0.9}, 1)):
        optimizer = make_optimizer(TrainConfig(optimizer="sgd", optimizer_config={"sgd": arguments}), 10)
        optimizer.init({"w": mx.ones((4, 3))})
        kept = dict(tree_flatten(optimizer.state))
        assert len(kept) == 2 + n_kept, kept  # step, learning_rate, and v with momentum


def test_wrong_optimizer_arguments_are_named() -> None:
    for arguments, reason in (({"weight_decai": 0.1}, "did you mean weight_decay?"), ({"betas": 3}, "")):
        config = TrainConfig(optimizer="adamw", optimizer_config={"adamw": arguments})
        with pytest.raises(UserError, match=r"optimizer_config\.adamw") as caught:
            make_optimizer(config, 10)
        assert reason in str(caught.value)
    with pytest.raises(UserError, match=r"lr_schedule\.arguments"):
        learning_rate(TrainConfig(lr_schedule={"name": "cosine_decay", "arguments": [1.0]}), 10)


def test_warmup_rises_to_the_rate_and_decay_ends_at_zero() -> None:
    import mlx.core as mx

    n_updates, warmup, peak = 40, 8, 1e-3
    for decay in ("constant", "cosine", "linear"):
        rate = learning_rate(TrainConfig(learning_rate=peak, warmup=warmup, lr_decay=decay), n_updates)
        assert callable(rate)
        rates = [rate(mx.array(step, mx.uint64)).item() for step in range(n_updates + 1)]
        assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1])), rates
        assert rates[0] > 0 and max(rates) == pytest.approx(peak, rel=1e-6)
        assert rates[warmup] == pytest.approx(peak, rel=1e-6)
        assert rates[-1] == pytest.approx(peak if decay == "constant" else 0.0, abs=1e-9)
    assert learning_rate(TrainConfig(learning_rate=peak), n_updates) == peak
