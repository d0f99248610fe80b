"""Small runs of the command for tests: a model with a tokenizer, rows of text, and the results of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mebp_mlx import train
from mebp_mlx.data import dataset, tokenize
from mebp_mlx.testing.tiny import CONFIGS, write_model
from mebp_mlx.training import log as run_log
from tests.texts import write_rows, write_tokenizer

ROOT = Path(__file__).parent.parent
FILES = {"adapters.safetensors", "adapter_config.json", "checkpoint.safetensors", "run.json", "log.jsonl"}
WORDS = ["the", "cat", "sat", "on", "mat", "and", "looked", "at", "moon", "what", "is", "capital", "of", "France"]


def write_home(home: Path) -> Path:
    """Writes a folder with `model` and `data`: a random model of two layers, 40 + 6 + 4 rows of 2 to 11 words."""
    write_tokenizer(home / "model", chat=True)
    write_model(home / "model", CONFIGS["qwen3"] | {"vocab_size": 320, "num_hidden_layers": 2}, seed=3)
    rng = np.random.default_rng(0)
    for split, n_rows in (("train", 40), ("valid", 6), ("test", 4)):
        rows = [{"text": " ".join(rng.choice(WORDS, rng.integers(2, 12)))} for _ in range(n_rows)]
        write_rows(home / "data", rows, split)
    return home


def tokenize_here(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Writes token files to `home`, in this process, because a child takes seconds to import its libraries."""
    patch.setenv("MEBP_CACHE_DIR", str(home / "cache"))
    patch.setattr(dataset, "run_child", lambda arguments, request, **_: tokenize.tokenize(request))


def arguments(home: Path, out: Path, *more: str) -> list[str]:
    """Options of a run of six iterations."""
    given = {
        "--model": home / "model",
        "--data": home / "data",
        "--adapter-path": out,
        "--batch-size": 2,
        "--iters": 6,
        "--learning-rate": 0.01,
        "--rank": 4,
        "--steps-per-report": 1,
        "--steps-per-eval": 4,
    }
    return [str(part) for pair in given.items() for part in pair] + list(more)


def child(*command: str, **options: Any) -> subprocess.Popen[str]:
    """Runs `python COMMAND` and captures both outputs."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def events(out: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events in a run's log, of one kind or all."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if kind in (None, entry["event"])]


def losses(out: Path) -> list[tuple[str, int, float]]:
    """(kind, iteration, loss) of every training report, validation and test."""
    return [(e["event"], e["iter"], e["loss"]) for e in events(out) if e["event"] in ("train", "valid", "test")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2, without `error: `."""
    capsys.readouterr()
    assert train.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def listen_to_signals(patch: pytest.MonkeyPatch) -> None:
    """Runs handle signals even if pytest was started with them ignored (nohup, `&`)."""
    patch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)


def interrupt_at(patch: pytest.MonkeyPatch, iteration: int) -> None:
    """Sends Ctrl-C during the given iteration."""
    listen_to_signals(patch)
    advance = run_log.RunLog.advance

    def advance_and_kill(self: run_log.RunLog, now: int) -> None:
        advance(self, now)
        if now == iteration:
            os.kill(os.getpid(), signal.SIGINT)

    patch.setattr(run_log.RunLog, "advance", advance_and_kill)
