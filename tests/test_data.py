"""Token rows: the order of batches, resuming, the cache, the child process, and bad folders."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mebp_mlx.data import dataset, tokenize
from mebp_mlx.data.dataset import TokenRows, batches, eval_batches, n_batches_per_epoch, prepare
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.errors import UserError
from tests.texts import CHAT_TEMPLATE, OPTIONS, request, tokenize_rows, write_rows, write_tokenizer, write_tokenizers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_tokenizers(tmp_path_factory.mktemp("models"))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Tokenizes in this process instead of a child (saves seconds); the list collects the requests."""
    requests: list[dict[str, Any]] = []

    def run(_module: Any, request: dict[str, Any], **_: Any) -> dict[str, Any]:
        requests.append(request)
        return tokenize.tokenize(json.loads(json.dumps(request)))

    monkeypatch.setattr(dataset, "run_child", run)
    return requests


# Order


@pytest.fixture(scope="module")
def some_rows(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder, [{"text": "x" * (1 + n * 7 % 23)} for n in range(101)])
    tokenize_rows(folder, models["plain"])
    return TokenRows(folder / "out", "train")


def take(stream: Any, n: int) -> list[Any]:
    return [next(stream) for _ in range(n)]


def same(a: Any, b: Any) -> bool:
    return a.rows == b.rows and np.array_equal(a.tokens, b.tokens) and np.array_equal(a.targets, b.targets)


@pytest.mark.parametrize("batch_size", [1, 4, 25, 101, 200])
def test_every_epoch_has_every_row_once_among_rows_of_its_length(
    some_rows: TokenRows, seed: int, batch_size: int
) -> None:
    per_epoch = n_batches_per_epoch(some_rows, batch_size)
    stream = batches(some_rows, batch_size, seed)
    epochs = [take(stream, per_epoch) for _ in range(2)]
    for epoch in epochs:
        names = [name for batch in epoch for name in batch.rows]
        assert sorted(names) == sorted(f"train.jsonl:{n + 1}" for n in range(101))
        assert sum(len(batch.rows) == batch_size for batch in epoch) >= per_epoch - 1
        spans = sorted((min(lengths), max(lengths)) for lengths in map(_lengths, epoch))
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    if batch_size < 101:
        other_seed = take(batches(some_rows, batch_size, seed + 1), per_epoch)
        for other in (epochs[1], other_seed):
            assert [b.rows for b in epochs[0]] != [b.rows for b in other]


def _lengths(batch: Any) -> list[int]:
    return [int((row != -100).sum()) for row in batch.targets]


def test_starting_at_k_equals_skipping_k(some_rows: TokenRows, seed: int) -> None:
    for batch_size in (3, 8):
        per_epoch = n_batches_per_epoch(some_rows, batch_size)
        whole = take(batches(some_rows, batch_size, seed), 3 * per_epoch)
        for start in (0, per_epoch - 1, per_epoch, *random.Random(seed).sample(range(len(whole)), 6)):
            n = min(5, len(whole) - start)
            resumed = take(batches(some_rows, batch_size, seed, start), n)
            assert all(map(same, resumed, whole[start : start + n])), (batch_size, start)


def test_a_start_in_a_late_epoch_costs_nothing(some_rows: TokenRows) -> None:
    started_s = time.perf_counter()
    next(batches(some_rows, 4, 0, start=10**12))
    assert time.perf_counter() - started_s < 1


def test_validation_has_the_same_batches_every_time(some_rows: TokenRows) -> None:
    names = [f"train.jsonl:{n + 1}" for n in range(101)]
    assert [name for batch in eval_batches(some_rows, 8, -1) for name in batch.rows] == names
    assert [name for batch in eval_batches(some_rows, 8, 2) for name in batch.rows] == names[:16]
    assert [len(batch.rows) for batch in eval_batches(some_rows, 8, 99)] == [8] * 12 + [5]
    assert not list(eval_batches(some_rows, 8, 0))


# Cache


def test_the_cache_is_used_for_the_same_content_and_for_no_other(
    models: dict[str, Path], in_process: list[Any], tmp_path: Path
) -> None:
    model = write_tokenizer(tmp_path / "model", chat=True)
    folder = write_rows(tmp_path / "data", [{"text": "one"}, {"text": "two"}])

    def runs(**changes: Any) -> bool:
        before = len(in_process)
        data = changes.pop("data", str(folder))
        sets = prepare(data, model, RowOptions(**OPTIONS | changes), tmp_path / "cache")
        assert sets.cache_dir.parent == tmp_path / "cache" and sets.counts["train"]["rows"] == len(sets.train)
        return len(in_process) > before

    assert runs() and not runs()
    os.utime(folder / "train.jsonl", (1, 1))
    moved = write_rows(tmp_path / "moved", [{"text": "one"}, {"text": "two"}])
    assert not runs() and not runs(data=str(moved))
    assert runs(max_seq_length=100) and runs(overlong="drop") and not runs()
    write_rows(folder, [{"text": "new"}], "valid")
    assert runs() and not runs()
    write_rows(folder, [{"text": "one"}, {"text": "tow"}])
    assert runs() and not runs()
    config = model / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"<|im_end|>"', '"<|endoftext|>"'))
    assert runs() and not runs()
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE + " ")
    assert runs() and not runs()
    out = Path(in_process[-1]["out"])
    for damage in ("meta.json", "train.tokens", "valid.lines"):
        (out / damage).write_bytes((out / damage).read_bytes()[:-1])
        assert runs() and not runs(), damage
    (out / "train.offsets").unlink()
    assert runs() and not runs()
    assert not list((tmp_path / "cache").glob(".*")), "temporary folders are left"


def test_killed_and_concurrent_children(models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "data", [{"text": f"{n} " * 60} for n in range(1000)])
    cache = tmp_path / "cache"
    cache.mkdir()
    job = json.dumps(request(folder, models["plain"], cache / "out"))
    command = [sys.executable, "-m", "mebp_mlx.data.tokenize", job]

    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(cache.glob(".tmp-*/train.tokens")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert [path.name[:5] for path in cache.iterdir()] == [".tmp-"]
    os.utime(next(cache.iterdir()), (1, 1))  # a day later it is removed

    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    replies = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    assert [child.returncode for child in children] == [0, 0] and replies[0] == replies[1]
    assert [path.name for path in cache.iterdir()] == ["out"]
    assert tokenize.read_meta(cache / "out") == replies[0]
    assert len(TokenRows(cache / "out", "train")) == 1000


def test_the_training_process_stays_light_and_gets_the_childs_messages(models: dict[str, Path], tmp_path: Path) -> None:
    pair = {"prompt": "a", "completion": "b"}
    good = write_rows(tmp_path / "good", [pair])
    bad = write_rows(tmp_path / "bad", [pair, pair | {"completion": 3}])
    script = f"""
import sys
from pathlib import Path
from mebp_mlx.data.dataset import prepare
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.errors import UserError
for folder in {str(good)!r}, {str(bad)!r}:
    try:
        sets = prepare(folder, Path({str(models["chat"])!r}), RowOptions("completion", 64))
        print(sets.train.batch([0]).rows, sets.cache_dir.parent)
    except UserError as error:
        print(error)
print(sorted({{"transformers", "tokenizers", "mlx_lm", "huggingface_hub", "mlx", "datasets"}} & set(sys.modules)))
"""
    environment = os.environ | {"MEBP_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"('train.jsonl:1',) {tmp_path / 'cache'}",
        f'{bad}/train.jsonl:2: "completion" must be a string, found a number',
        "[]",
    ]
    assert done.stderr == ""


def test_progress_is_one_line_that_is_cleared(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[Any] = []
    folder = write_rows(tmp_path, [{"text": "a"}] * 4)
    tokenize.tokenize(request(folder, models["plain"], tmp_path / "quick"), states.append)
    assert not states
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(tokenize.time, "monotonic", lambda: next(clock))
    tokenize.tokenize(request(folder, models["plain"], tmp_path / "slow"), states.append)
    assert [state["rows"] for state in states] == [1, 2, 3, 4] and states[-1]["fraction"] == 1

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    for is_terminal in (False, True):
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        with dataset._progress_line() as show:
            for state in states:
                show(state)
        assert ("train.jsonl: 4 rows, 100%" in screen.getvalue()) is is_terminal
        assert "\n" not in screen.getvalue() and screen.getvalue().endswith("\r\x1b[K" if is_terminal else "")


def test_bad_folders(models: dict[str, Path], in_process: Any, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", [{"text": "a b"}])
    broken = write_tokenizer(tmp_path / "broken", chat=True)
    (broken / "tokenizer.json").write_text('{"version": ')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")

    def message(folder: Path = rows, model: Path = models["chat"], cache: str = "cache", **changes: Any) -> str:
        with pytest.raises(UserError) as caught:
            prepare(str(folder), model, RowOptions(**OPTIONS | changes), tmp_path / cache)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert message(tmp_path / "none").startswith(f"--data {tmp_path}/none: no such folder")
    assert message(tmp_path / "empty") == f"--data {tmp_path}/empty: the folder contains no train.jsonl"
    assert "is a file" in message(tmp_path / "file")
    assert message(model=tmp_path / "empty").startswith(f"--model {tmp_path}/empty: the folder contains no tokenizer")
    assert message(model=broken).startswith(f"--model {broken}: its tokenizer cannot be loaded: ")
    assert "file: " in message(cache="file") and "$MEBP_CACHE_DIR" in message(cache="file/below")
    assert message(max_seq_length=1).startswith("--max-seq-length: ")
    assert message(overlong="cut").startswith("--overlong: ")
    assert message(train_on="answers").startswith("--train-on: ")
