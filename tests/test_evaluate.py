"""Loss, perplexity and accuracy on any rows equal mlx-lm's, for every file and budget."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from mebp_mlx import bundled, evaluate, train
from mebp_mlx.config import TrainConfig
from mebp_mlx.data import dataset
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.testing.tiny import CONFIGS, write_model
from mebp_mlx.training.evaluate import evaluate_alone, table
from tests.adapters import make_adapters, mlx_lm_loss
from tests.runs import arguments, contents, refused, tokenize_here
from tests.texts import write_rows, write_tokenizer

ROWS = [{"text": text} for text in ("the cat sat on the mat", "what is the capital of France? It is Paris.", "moon")]


@pytest.fixture
def tokens_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize_here(tmp_path, monkeypatch)


def measured(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, dict[str, float]]:
    assert evaluate.main([str(part) for part in argv] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_losses_equal_mlx_lms(
    tmp_path: Path, tokens_here: None, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tokenizer(tmp_path / "model", chat=False)
    write_model(model, CONFIGS[family] | {"vocab_size": 320}, seed=3)
    write_rows(tmp_path / "data", ROWS, "test")
    adapters = make_adapters(tmp_path / "adapters", model, data=str(tmp_path / "data"))
    actual = measured(capsys, "--adapter-path", adapters, "--batch-size", 2)
    rows = dataset.prepare_rows(str(tmp_path / "data"), "test", model, RowOptions("all", 64, "error"))
    tokens = [[*batch.tokens[0].tolist(), int(batch.targets[0, -1])] for batch in dataset.eval_batches(rows, 1, -1)]
    for name, folder in (("model", None), ("adapters", adapters)):
        expected = mlx_lm_loss(model, folder, tokens)
        assert abs(actual[name]["loss"] / expected - 1) <= 1e-5, name
        assert actual[name]["n_rows"] == 3 and actual[name]["n_labels"] == sum(len(row) - 1 for row in tokens)
        assert math.isclose(actual[name]["perplexity"], math.exp(actual[name]["loss"]))
    assert abs(actual["model"]["loss"] - actual["adapters"]["loss"]) > 1e-4


def test_any_file_and_any_split_within_a_budget(
    home: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = home / "model"
    whole = measured(capsys, "--model", model, "--data", home / "data", "--split", "valid")["model"]
    file = home / "data" / "valid.jsonl"
    assert measured(capsys, "--model", model, "--data", file, "--memory-budget", "none")["model"] == whole
    least = measured(capsys, "--model", model, "--data", file, "--memory-budget", "min")["model"]
    assert abs(least["loss"] / whole["loss"] - 1) <= 1e-6 and least["n_labels"] == whole["n_labels"]
    two = measured(capsys, "--model", model, "--data", file, "--batch-size", 1, "--test-batches", 2)["model"]
    assert two["n_rows"] == 2
    assert evaluate.main(["--model", str(model), "--data", str(file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("valid.jsonl: 6 rows, ") and f"{whole['loss']:.4f}" in said and "peak footprint" in said


def test_labels_are_those_of_training(
    home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "what is the capital", "completion": "Paris"}]
    file = write_rows(tmp_path, rows, "test") / "test.jsonl"
    adapters = make_adapters(tmp_path / "adapters", home / "model", data=str(file), mask_prompt=True)
    masked = measured(capsys, "--adapter-path", adapters)
    assert masked == measured(capsys, "--adapter-path", adapters, "--mask-prompt")
    assert (
        masked["model"]["n_labels"]
        < measured(capsys, "--adapter-path", adapters, "--no-mask-prompt")["model"]["n_labels"]
    )


def test_a_budget_that_is_too_small_is_refused(
    home: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model", str(home / "model"), "--data", str(home / "data"), "--memory-budget", "1MB"]
    assert evaluate.main(argv) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: --memory-budget: 1.0 MB is too little") and said.count("\n") == 1


def test_without_training_only_test_rows_are_needed(
    home: Path, tmp_path: Path, tokens_made_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = home / "model", write_rows(tmp_path / "data", ROWS, "test")
    adapters = make_adapters(tmp_path / "adapters", model)
    config = TrainConfig(model=str(model), data=str(data), adapter_path=str(adapters), test=True)
    rows, actual = evaluate_alone(config, model)
    expected = measured(capsys, "--model", model, "--data", data, "--adapter-path", adapters)
    assert len(rows) == 3 and {name: q.loss for name, q in actual.items()} == {
        name: q["loss"] for name, q in expected.items()
    }
    assert [line.split()[0] for line in table(rows, actual)] == ["test.jsonl:", "loss", "model", "adapters"]
    nothing = config.replace(adapter_path=str(tmp_path / "none"))
    assert list(evaluate_alone(nothing, model)[1]) == ["model"]


@pytest.mark.parametrize("more", [[], ["--iters", "0"]], ids=["no training rows", "no iterations"])
def test_test_without_training_only_measures(
    home: Path, tmp_path: Path, tokens_made_here: None, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "data", ROWS, "test")
    if more:
        write_rows(data, ROWS, "train")
    adapters = make_adapters(tmp_path / "adapters", home / "model")
    before = contents(tmp_path)
    argv = ["--model", home / "model", "--data", data, "--adapter-path", adapters, "--test", *more]
    assert train.main([str(part) for part in argv]) == 0
    said = capsys.readouterr().out
    expected = measured(capsys, "--model", home / "model", "--data", data, "--adapter-path", adapters)
    for name, q in expected.items():
        assert f"{name:<10}{q['loss']:>10.4f}{q['perplexity']:>14,.2f}{q['accuracy']:>10.1%}" in said
    assert "iter " not in said and contents(tmp_path) == before


def test_no_iterations_without_test_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, arguments(home, tmp_path / "out", "--iters", "0")).startswith("--iters: 0 trains nothing")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--split", "dev"], "--split: 'dev' is not one of"),
        (["--adapter-path", "{home}/none"], "--adapter-path {home}/none: no such folder"),
        (["--adapter-path", "{home}/data"], "--adapter-path {home}/data: the folder contains no adapter_config.json"),
        (["--data", "{home}/none.jsonl"], "--data {home}/none.jsonl: no such folder"),
        (["--data", "{home}/model"], "--data {home}/model: the folder contains no test.jsonl"),
        (["--test-batches", "0"], "--test-batches: must be at least 1"),
        (["--memory-budget", "500"], "--memory-budget: 500 has no unit"),
        (["--tset"], "--tset: no such option"),
        (["--model", "{home}/data"], "--model {home}/data: the folder {home}/data contains no config.json"),
    ],
)
def test_bad_input_is_one_line(
    home: Path, tokens_made_here: None, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", "{home}/model", "--data", "{home}/data", *argv]
    assert evaluate.main([part.format(home=home) for part in given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message.format(home=home)}") and said.count("\n") == 1, said


def test_the_whole_process_stays_within_the_budget(tmp_path: Path) -> None:
    """Exit code 3 if the measured peak exceeds it."""
    adapters = make_adapters(tmp_path / "adapters", Path(bundled.MODEL_DIR))
    command = [sys.executable, "-m", "mebp_mlx.evaluate", "--model", "bundled", "--adapter-path", str(adapters)]
    more = ["--data", "bundled", "--test-batches", "2", "--memory-budget", "60MB"]
    done = subprocess.run([*command, *more], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    peak_mb = int(done.stdout.partition("peak footprint ")[2].partition(" MB")[0])
    assert 0 < peak_mb <= 60
