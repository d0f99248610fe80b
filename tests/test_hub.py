"""Names are resolved by the real huggingface_hub code (a cache, a small hub on localhost) and child processes."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import mebp_mlx
from mebp_mlx.data.rows import RowOptions
from mebp_mlx.errors import UserError
from mebp_mlx.weights import hub
from mebp_mlx.weights.hub import resolve_data, resolve_model, resolve_sets

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL_FILES = {"config.json": "{}", "model.safetensors": "weights", "tokenizer.json": "{}", "pytorch_model.bin": "no"}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def message(function: Any, name: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Folders


def test_local_models(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "model", MODEL_FILES)
    assert resolve_model(str(folder)) == folder
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert resolve_model(str(folder)) == folder
    (folder / "model-00001-of-00001.safetensors").rename(folder / "adapters.safetensors")
    assert message(resolve_model, str(folder)).startswith(f"--model {folder}: ")
    assert "contains no weights" in message(resolve_model, str(folder))
    (folder / "config.json").unlink()
    assert "contains no config.json" in message(resolve_model, str(folder))
    assert "is a file" in message(resolve_model, str(folder / "tokenizer.json"))


def test_local_data(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data", {"train.jsonl": "{}"})
    assert resolve_data(str(folder)) == folder
    assert message(resolve_data, str(tmp_path)) == f"--data {tmp_path}: the folder contains no train.jsonl"
    assert "is a file" in message(resolve_data, str(folder / "train.jsonl"))


@pytest.mark.parametrize("name", ["", "no-slash", "/no/such/folder", "./no/such", "a/b/c", "org/..", "org/a b", "org/"])
def test_names_that_are_neither_folders_nor_hub_names_are_refused(name: str) -> None:
    assert message(resolve_model, name).startswith(f"--model {name}: no such folder, and not the name of a model")
    assert message(resolve_data, name).startswith(f"--data {name}: no such folder, and not the name of a dataset")


def test_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled: Any = types.ModuleType("mebp_mlx.bundled")
    bundled.MODEL_DIR = write_files(tmp_path / "model", MODEL_FILES)
    bundled.DATA_DIR = write_files(tmp_path / "data", {"train.jsonl": ""})
    monkeypatch.setitem(sys.modules, "mebp_mlx.bundled", bundled)
    monkeypatch.setattr(mebp_mlx, "bundled", bundled, raising=False)
    assert resolve_model("bundled") == bundled.MODEL_DIR
    assert resolve_data("bundled") == bundled.DATA_DIR


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("MEBP_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = {"linux": ".cache/mebp_mlx/tokens", "darwin": "Library/Caches/mebp_mlx/tokens"}
    for platform, folder in expected.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert hub.cache_folder() == tmp_path / folder
    monkeypatch.setenv("MEBP_CACHE_DIR", "~/mine")
    assert hub.cache_folder() == tmp_path / "mine"


# The hub


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("MEBP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "hf" / "hub"


def cached(home: Path, repository: str, files: dict[str, str]) -> Path:
    write_files(home / repository, {"refs/main": COMMIT})
    return write_files(home / repository / "snapshots" / COMMIT, files)


def test_a_cached_model_and_dataset_are_found_offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cached(home, "models--org--name", MODEL_FILES)
    incomplete = cached(home, "models--org--half", {"config.json": "{}"})
    data = cached(home, "datasets--org--rows", {"data/train.jsonl": "{}"})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model("org/name") == model
    assert resolve_data("org/rows") == data / "data"
    assert message(resolve_model, "org/half") == f"--model org/half: the folder {incomplete} contains no weights " \
        "(model*.safetensors)"  # fmt: skip


def test_neither_cached_nor_reachable(home: Path) -> None:
    expected = "org/name: no such folder, not complete in the hub's cache, and the hub cannot be reached"
    assert message(resolve_model, "org/name") == f"--model {expected}"
    assert message(resolve_data, "org/name").startswith(f"--data {expected}: `pip install datasets`")


class Hub(BaseHTTPRequestHandler):
    """The parts of the hub that a download needs: one model, one dataset, a gated model."""

    files = MODEL_FILES | {"train.jsonl": '{"text": "a"}\n', "valid.jsonl": "{}", "other.jsonl": "x", "a.parquet": "x"}
    asked: list[str] = []  # noqa: RUF012  (of one test)

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if "org/name" not in path:
            gated = "org/gated" in path
            self.reply(403 if gated else 404, X_Error_Code="GatedRepo" if gated else "RepoNotFound")
        elif path.startswith("/api/") and "/tree/" in path:
            entries = [{"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text.encode()).hexdigest()}
                       for name, text in self.files.items()]  # fmt: skip
            self.reply(200, json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/"):
            info = {"id": "org/name", "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0}
            self.reply(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            name = path.rpartition("/")[2]
            self.asked.append(name)
            body = self.files[name].encode()
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.reply(200, body, ETag=etag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    do_HEAD = do_GET


@pytest.fixture
def small_hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    Hub.asked = []
    yield Hub
    server.shutdown()
    server.server_close()


def test_downloads(small_hub: type[Hub], capfd: pytest.CaptureFixture[str]) -> None:
    folder = resolve_model("org/name")
    assert {path.name for path in folder.iterdir()} == set(Hub.files) - {"pytorch_model.bin", "a.parquet"}
    assert (folder / "model.safetensors").read_text() == "weights"
    small_hub.asked.clear()
    folder = resolve_data("org/name")
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "valid.jsonl"} == set(small_hub.asked)
    for resolve, flag, kind in ((resolve_model, "--model", "model"), (resolve_data, "--data", "dataset")):
        assert message(resolve, "org/none") == (
            f"{flag} org/none: no such folder, and no such {kind} on the hub (a private one needs `hf auth login`)"
        )
    assert message(resolve_model, "org/gated").startswith("--model org/gated: is gated: accept its terms")
    assert "\r" not in capfd.readouterr().err, "progress bars where stderr is not a terminal"


# Datasets of other formats

FAKE_DATASETS = """
class Split(list):
    column_names = list(COLUMNS)
    _fingerprint = "f"

def load_dataset(name, part=None):
    if part is not None:
        rows = [{"text": text} for text in (part, " ", "")]
        return {"train": Split(rows)}
    if name == "org/broken":
        raise ValueError("Config name is missing.\\nPick one.")
    rows = [dict(zip(COLUMNS, values)) for values in VALUES]
    return {SPLIT: Split(rows), "validation": Split(rows[:1]), "extra": Split(rows)}
"""


def library(columns: tuple[str, ...], values: list[Any], split: str = "train") -> str:
    """Source text of a stand-in for the `datasets` library."""
    return f"COLUMNS, VALUES, SPLIT = {columns!r}, {values!r}, {split!r}\n{FAKE_DATASETS}"


def test_other_formats_are_converted_by_the_datasets_library(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(home, "datasets--org--rows", {"README.md": ""})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    expected = "--data org/rows: the dataset contains no train.jsonl: `pip install datasets`"
    assert message(resolve_data, "org/rows").startswith(expected)

    turns = [{"role": "user", "content": "é", "tool_calls": None}]
    values = [(1, turns, None), (2, turns, [{"name": "f", "default": None}])]
    write_files(tmp_path / "fake", {"datasets.py": library(("id", "messages", "tools"), values)})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    folder = resolve_data("org/rows")
    assert folder.is_relative_to(tmp_path / "cache") and resolve_data("org/rows") == folder
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    said = {"messages": [{"role": "user", "content": "é"}]}
    assert rows == [said, said | {"tools": [{"name": "f"}]}]
    assert len((folder / "valid.jsonl").read_text().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["train.jsonl", "valid.jsonl"]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_one_part_of_a_dataset(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like WikiText's; blank lines are not rows."""
    write_files(tmp_path / "fake", {"datasets.py": library(("text",), [])})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    folder = resolve_data("org/texts:part-2")
    assert folder.name.startswith("org--texts--part-2-")
    assert (folder / "train.jsonl").read_text() == '{"text": "part-2"}\n'
    assert message(resolve_data, "org/texts:").startswith("--data org/texts:: no such folder")


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("org/rows", library(("sentence", "label"), [("a", 1)]),
         "no column named text, messages, or prompt and completion (its columns: sentence, label)"),
        ("org/rows", library(("text",), [("a",)], split="everything"),
         "has no split named train (its splits: everything, validation, extra)"),
        ("org/broken", library(("text",), [("a",)]), "cannot be loaded: ValueError: Config name is missing. Pick one."),
    ],
)  # fmt: skip
def test_datasets_that_cannot_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, expected: str
) -> None:
    datasets = types.ModuleType("datasets")
    exec(source, datasets.__dict__)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    with pytest.raises(UserError) as caught:
        hub._convert_dataset(name, f"--data {name}", "", tmp_path / "cache")
    assert str(caught.value) == f"--data {name}: {expected}"


SETS = """
class Rows(list):
    def __init__(self, rows, name):
        super().__init__(rows)
        self.column_names, self._fingerprint = list(rows[0]), name

def load_dataset(path, split=None, name=None, **more):
    print(path, split, name, more)
    if path == "org/none":
        raise FileNotFoundError("no such dataset")
    n = 4 if ":" in split else 3
    if path == "org/pairs":
        return Rows([{"id": i, "q": f"q{i} {split} {name}", "a": "yes"} for i in range(n)], path + split)
    return Rows([{"body": f"text {i} {split}"} for i in range(n)] + [{"body": " "}], path + split)
"""


def test_sets_of_the_hub_are_joined_under_one_name_for_each_key(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlx-lm's hf_dataset: slices and their defaults, columns by name, one part of a set."""
    pairs = {"path": "org/pairs", "prompt_feature": "q", "completion_feature": "a", "config": {"name": "part"}}
    texts = {"path": "org/texts", "text_feature": "body", "train_split": "train", "test_split": "test[:2]"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert message(resolve_sets, [pairs]).startswith("hf_dataset org/pairs: `pip install datasets`")
    write_files(tmp_path / "fake", {"datasets.py": SETS})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    folder = resolve_sets([pairs, texts])
    assert resolve_sets([pairs, texts]) == folder != resolve_sets([texts, pairs])
    read = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.iterdir()}
    train = [{"prompt": f"q{i} train[:80%] part", "completion": "yes"} for i in range(4)]
    assert read["train"] == [*train, *({"text": f"text {i} train"} for i in range(3))]
    assert [row.get("text") for row in read["valid"]] == [None] * 4 + [f"text {i} train[-10%:]" for i in range(4)]
    assert read["test"] == [{"text": f"text {i} test[:2]"} for i in range(4)]
    wrong: Any = {**texts, "text_feature": "txt"}
    assert message(resolve_sets, [wrong]) == (
        "hf_dataset org/texts: no column named txt, messages, or prompt and completion (its columns: body)"
    )
    assert "org/none: cannot be loaded: FileNotFoundError" in message(resolve_sets, [{"path": "org/none"}])


def test_columns_of_a_dataset_may_have_other_names(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(home, "datasets--org--rows", {"README.md": ""})
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_files(tmp_path / "fake", {"datasets.py": library(("q", "a", "id"), [("one", "two", 3)])})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    folder = resolve_data("org/rows", RowOptions(prompt_feature="q", completion_feature="a").columns)
    assert json.loads((folder / "train.jsonl").read_text()) == {"q": "one", "a": "two"}
    assert "no column named text, messages, or prompt and completion" in message(resolve_data, "org/rows")


def test_the_keys_of_rows_are_those_of_datasets() -> None:
    assert RowOptions().columns == hub.COLUMNS
    assert {*hub.FEATURES.values(), "tools"} == set(hub.COLUMNS)
