"""The training command: files, log, lengths, accumulation, and small memory."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mebp_mlx import convert, train
from mebp_mlx.system import device
from mebp_mlx.training import report
from mebp_mlx.weights.safetensors import MappedWeights
from tests import adoption
from tests.runs import FILES, arguments, child, events, losses
from tests.texts import write_rows

pytestmark = pytest.mark.usefixtures("tokens_made_here")


@pytest.mark.parametrize("engine", ["mebp", "whole-graph", "mezo"])
def test_a_run_writes_its_files_and_log(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    out = tmp_path / "out"
    more = ["--engine", engine, "--save-every", "4", "--test", "--val-batches", "-1"]
    assert train.main(arguments(home, out, *more)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert {path.name for path in out.iterdir()} == {*FILES, "0000004_adapters.safetensors"}
    actual = losses(out)
    assert [iteration for kind, iteration, _ in actual if kind == "train"] == [1, 2, 3, 4, 5, 6]
    assert [iteration for kind, iteration, _ in actual if kind == "valid"] == [0, 4, 6]
    assert [iteration for kind, iteration, _ in actual if kind == "test"] == [6]
    assert [event["iter"] for event in events(out, "save")] == [4, 6]
    assert events(out)[0]["event"] == "start" and events(out)[-1]["event"] == "end"
    if engine != "mezo":
        assert actual[-2][2] < actual[0][2] - 0.1, actual
    report = events(out, "train")[-1]
    assert report["peak_bytes"] >= report["footprint_bytes"] > 1e6
    assert report["tokens_per_s"] > 0 and report["step_s"] > 0 and report["learning_rate"] == pytest.approx(0.01)
    saved = json.loads((out / "run.json").read_text())
    assert saved["options"]["engine"] == engine and saved["options"]["keys"] and saved["machine"]
    for part in ("BLAS", "40 rows", "before the model is opened", "parameters", "validation loss", str(out)):
        assert part in printed.out, part


def test_adapters_give_the_same_loss_in_mlx_lm(home: Path, tmp_path: Path) -> None:
    mlx_lm = pytest.importorskip("mlx_lm")
    out = tmp_path / "out"
    assert train.main(arguments(home, out, "--num-layers", "1", "--keys", "q_proj", "down_proj")) == 0
    model, tokenizer = mlx_lm.load(str(home / "model"), adapter_path=str(out))[:2]
    rows = [json.loads(line) for line in (home / "data" / "valid.jsonl").read_text().splitlines()]
    (ours, accuracy), n_tokens = (events(out, "valid")[-1][key] for key in ("loss", "accuracy")), 0
    sum_of_theirs, n_correct = 0.0, 0
    for row in rows:
        n = len(tokenizer.encode(row["text"]))  # an end token is added; the first token has no prediction
        tokens = mx.array([*tokenizer.encode(row["text"]), tokenizer.eos_token_id])[None]
        logits = model(tokens[:, :-1])[0]
        picked = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), tokens[0, 1:, None], -1)
        sum_of_theirs, n_tokens = sum_of_theirs - picked.sum().item(), n_tokens + n
        n_correct += (logits.argmax(-1) == tokens[0, 1:]).sum().item()
    assert abs(accuracy * n_tokens - n_correct) <= 1  # two tokens may be equally likely
    assert abs(ours - sum_of_theirs / n_tokens) <= 1e-4 * ours


def test_validation_and_training_start_at_the_models_loss(home: Path, tmp_path: Path) -> None:
    """B starts at zero, so the first losses of every engine are the frozen model's."""
    first = {}
    for engine in ("mebp", "whole-graph"):
        out = tmp_path / engine
        assert train.main(arguments(home, out, "--engine", engine, "--iters", "1", "--dropout", "0.5")) == 0
        first[engine] = [loss for _, iteration, loss in losses(out) if iteration == 0]
        first[engine] += [event["accuracy"] for event in events(out, "valid")[:1]]
    assert first["mebp"] == pytest.approx(first["whole-graph"], rel=1e-5)


# Lengths and accumulation


def test_iters_are_micro_batches_and_only_whole_updates_run(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train.main(arguments(home, out, "--iters", "7", "--grad-accumulation-steps", "3")) == 0
    assert [e["iter"] for e in events(out, "train")] == [3, 6]
    assert "6 iterations, not 7" in capsys.readouterr().out
    assert train.main(arguments(home, tmp_path / "other", "--iters", "2", "--grad-accumulation-steps", "3")) == 2
    assert capsys.readouterr().err.startswith("error: --iters")


def test_epochs_are_passes_over_the_rows(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = arguments(home, out, "--epochs", "1.5", "--batch-size", "8")
    del given[given.index("--iters") : given.index("--iters") + 2]
    assert train.main(given) == 0
    assert events(out, "train")[-1]["iter"] == math.ceil(1.5 * 40 / 8)


def test_accumulation_is_weighted_by_tokens(home: Path, tmp_path: Path) -> None:
    """One update from a batch of all rows equals one from the same rows one by one, for any lengths."""
    texts = ["the cat", "what is the capital of France it is the moon and the mat", "moon", "the cat sat on"]
    write_rows(tmp_path / "data", [{"text": text} for text in texts])
    adapters = []
    for batch_size, accumulate in ((4, 1), (1, 4), (2, 2)):
        out = tmp_path / f"out{batch_size}"
        assert (
            train.main(
                arguments(
                    home,
                    out,
                    "--data",
                    str(tmp_path / "data"),
                    "--batch-size",
                    str(batch_size),
                    "--iters",
                    str(accumulate),
                    "--grad-accumulation-steps",
                    str(accumulate),
                    "--optimizer",
                    "sgd",
                    "--learning-rate",
                    "1",
                )
            )
            == 0
        )
        adapters.append(mx.load(str(out / "adapters.safetensors")))
        assert "no valid.jsonl" in events(out, "notice")[0]["text"]
    for other in adapters[1:]:
        for name, value in adapters[0].items():
            assert mx.abs(value - other[name]).max().item() <= 1e-5 * mx.abs(value).max().item(), name
    assert any(value.abs().max().item() > 0 for name, value in adapters[0].items() if name.endswith("lora_b"))


# Memory


def test_the_training_process_imports_no_tokenizer_library(home: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from mebp_mlx import train; code = train.main(sys.argv[1:])\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(code, sorted(names & {'transformers', 'mlx_lm', 'huggingface_hub', 'datasets', 'tokenizers',"
        " 'yaml', 'rich', 'torch'}))"
    )
    argv = arguments(home, tmp_path / "out", "--sample-prompt", "the")
    process = child("-c", script, *argv)
    printed, errors = process.communicate(timeout=120)
    assert printed.splitlines()[-1] == "0 []", printed + errors
    assert "--- before" in printed and "--- after" in printed, printed + errors


def test_a_checkpoint_that_cannot_be_adopted_is_reported_once(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only if the device adopts pages (MLX's CPU backend does not); aligned tensors are not mentioned."""
    monkeypatch.setattr(device, "on_metal", lambda: True)
    monkeypatch.setattr(report, "WORTH_ALIGNING_BYTES", 1)
    shutil.copytree(home / "model", tmp_path / "odd")
    adoption.place(tmp_path / "odd" / "model.safetensors", 1)
    assert convert.main(["--mode", "keep", "--model", str(tmp_path / "odd"), "--out", str(tmp_path / "even")]) == 0
    told = {}
    for model in ("odd", "even"):
        assert train.main(arguments(home, tmp_path / f"{model} run", "--model", str(tmp_path / model))) == 0
        told[model] = [e["text"] for e in events(tmp_path / f"{model} run", "notice") if "aligned" in e["text"]]
    n_tensors = len(MappedWeights(tmp_path / "odd"))
    assert told["even"] == [] and len(told["odd"]) == 1
    assert f"{n_tensors} tensors are not aligned" in told["odd"][0] and "--mode keep" in told["odd"][0]
    assert losses(tmp_path / "odd run") == losses(tmp_path / "even run")
