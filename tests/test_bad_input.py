"""Bad input ends with exit code 2 and one line that names it; nothing is written."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mebp_mlx import convert, train
from mebp_mlx import generate as sample
from mebp_mlx.errors import BudgetError
from mebp_mlx.training import train as training_train
from tests.runs import arguments, events, refused
from tests.texts import write_rows

pytestmark = pytest.mark.usefixtures("tokens_made_here")


def _cut_weights(model: Path, data: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _overlap(model: Path, data: Path) -> None:
    path = model / "model.safetensors"
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    names = [name for name in header if name != "__metadata__"]
    same_size = [name for name in names if header[name]["shape"] == header[names[-1]]["shape"]]
    header[same_size[0]]["data_offsets"] = header[names[-1]]["data_offsets"]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n :])


def _edit_config(**changes: Any) -> Callable[[Path, Path], None]:
    def edit(model: Path, data: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))

    return edit


def _append(text: str) -> Callable[[Path, Path], None]:
    return lambda model, data: (data / "train.jsonl").write_text((data / "train.jsonl").read_text() + text) and None


BAD_INPUT: dict[str, tuple[Callable[[Path, Path], Any], list[str], list[str]]] = {
    "no model": (lambda model, data: shutil.rmtree(model), [], ["model"]),
    "no config": (lambda model, data: (model / "config.json").unlink(), [], ["config.json"]),
    "no weights": (lambda model, data: (model / "model.safetensors").unlink(), [], ["safetensors"]),
    "no tokenizer": (lambda model, data: (model / "tokenizer.json").unlink(), [], ["tokenizer"]),
    "truncated weights": (_cut_weights, [], ["model.safetensors"]),
    "overlapping weights": (_overlap, [], ["model.safetensors"]),
    "unknown family": (_edit_config(model_type="mamba"), [], ["config.json", "mamba", "supported"]),
    "contradicting shape": (_edit_config(intermediate_size=76), [], ["mlp", "config.json"]),
    "no data": (lambda model, data: shutil.rmtree(data), [], ["data"]),
    "no train file": (lambda model, data: (data / "train.jsonl").unlink(), [], ["train.jsonl"]),
    "not JSON": (_append('{"text": "a"\n'), [], ["train.jsonl:41:"]),
    "unknown keys": (_append('{"txt": "a"}\n'), [], ["train.jsonl:41:"]),
    "overlong row": (_append(json.dumps({"text": "a" * 5000}) + "\n"), ["--overlong", "error"], ["train.jsonl:41:"]),
    "empty file": (lambda model, data: (data / "train.jsonl").write_text(""), [], ["train.jsonl"]),
    "no test file": (lambda model, data: (data / "test.jsonl").unlink(), ["--test"], ["--test"]),
    "too many layers": (lambda model, data: None, ["--num-layers", "3"], ["--num-layers"]),
    "arena in a file": (lambda model, data: None, ["--arena-dir", "no-such-folder"], ["--arena-dir"]),
    "unwritable": (lambda model, data: None, ["--adapter-path", "/proc/x"], ["--adapter-path"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(
    home: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, more, parts = BAD_INPUT[case]
    for name in ("model", "data"):
        shutil.copytree(home / name, tmp_path / name)
    spoil(tmp_path / "model", tmp_path / "data")
    out = tmp_path / "out"
    message = refused(
        capsys, arguments(home, out, "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), *more)
    )
    for part in parts:
        assert part in message, message
    assert not out.exists() or not any(out.iterdir())


def test_unknown_yaml_keys_are_refused_with_file_and_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nbatchsize: 2\n")
    message = refused(capsys, arguments(home, tmp_path / "out", "--config", str(path)))
    assert message == f"{path}:2: batchsize: unknown key; did you mean batch_size?"
    assert not (tmp_path / "out").exists()


def test_a_budget_that_cannot_be_met_is_exit_3(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_small(*_: Any, **__: Any) -> None:
        raise BudgetError("--memory-budget: 10 MB\nis too small; 104 MB would do")

    monkeypatch.setattr(training_train, "make_engine", too_small)
    assert train.main(arguments(home, tmp_path / "out")) == 3
    assert capsys.readouterr().err == "error: --memory-budget: 10 MB is too small; 104 MB would do\n"
    assert not (tmp_path / "out").exists()


NO_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 763. MiB for an array"),
    RuntimeError("[malloc] Unable to allocate 800000000 bytes."),
    RuntimeError("[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed"),
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
    RuntimeError("can't start new thread"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_a_failed_allocation_is_one_line(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(training_train, "make_engine", fail)
    monkeypatch.setattr(convert, "convert", fail)
    monkeypatch.setattr(sample, "_run", fail)
    texts = []
    for run, code in (
        (lambda: train.main(arguments(home, tmp_path / "out")), 3),
        (lambda: convert.main(["--model", "bundled", "--out", str(tmp_path / "converted")]), 3),
        (lambda: sample.main(["--model", "bundled", "--prompt", "x"]), 3),
    ):
        capsys.readouterr()
        assert run() == code
        (line,) = capsys.readouterr().err.splitlines()
        texts.append(line)
    for text in texts:
        assert f"out of memory: {error}" in text or "out of memory: MemoryError" in text, text
    assert not (tmp_path / "out").exists()


def test_other_errors_keep_their_traceback(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RuntimeError("a bug"), OSError(errno.EIO, "Input/output error")):

        def fail(*_: Any, error: BaseException = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(training_train, "make_engine", fail)
        with pytest.raises(type(error)):
            train.main(arguments(home, tmp_path / "out"))


def test_rows_without_labels_are_counted_and_refused_if_there_are_no_others(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"prompt": "what", "completion": "it is the moon"}
    bad = {"prompt": "what is the capital " * 20, "completion": "it"}
    argv = arguments(
        home,
        tmp_path / "out",
        "--data",
        str(tmp_path / "data"),
        "--mask-prompt",
        "--iters",
        "1",
        "--max-seq-length",
        "40",
    )
    write_rows(tmp_path / "data", [bad, bad])
    assert "rows is usable" in refused(capsys, argv)
    write_rows(tmp_path / "data", [good, bad])
    assert train.main(argv) == 0
    assert "1 skipped (no label)" in capsys.readouterr().out
    assert events(tmp_path / "out", "start")[0]["data"]["train"]["n_masked_rows"] == 1


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = arguments(home, out, "--learning-rate", "1e30", "--save-every", "1", "--val-batches", "0")
    message = refused(capsys, argv)
    assert "iteration" in message and "train.jsonl:" in message and str(out) in message
    last = max(event["iter"] for event in events(out, "save"))
    assert f"iteration {last + 1}" in message
    for name, value in mx.load(str(out / "adapters.safetensors")).items():
        assert mx.isfinite(value).all().item(), name
    assert refused(capsys, ["--resume", "--adapter-path", str(out)]) == message


def test_a_state_whose_validation_is_not_finite_is_not_kept(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    argv = arguments(home, out, "--iters", "1", "--learning-rate", "1e30")
    message = refused(capsys, argv)
    assert "valid loss is" in message and "iteration 1 " in message and "valid.jsonl:1" in message
    assert not (out / "adapters.safetensors").exists()
    assert events(out)[-1]["event"] == "notice"
