"""Resolves the names of models and data: a folder, "bundled", or a hub id.

The training process does not import huggingface_hub: downloads run in a child, `python -m mebp_mlx.weights.hub`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import ChildFailure, answer, one_line, run_child

# The files that mlx-lm requests, so that each program finds the other's download complete; no *.py is ever run.
MODEL_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "*.py",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
)
SPLITS = ("train", "valid", "test")
DATA_PATTERNS = tuple(f"{folder}{split}.jsonl" for folder in ("", "data/") for split in SPLITS)
COLUMNS = ("prompt", "completion", "text", "messages", "tools")  # the order of RowOptions.columns
# mlx-lm's default slices for a set in `hf_dataset`, and the row key for each of its *_feature options
SLICES = {"train": "train[:80%]", "valid": "train[-10%:]", "test": None}
FEATURES = {"prompt": "prompt", "completion": "completion", "text": "text", "chat": "messages"}
SPLIT_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATASET = re.compile(rf"{_HUB_ID.pattern}(:[\w.-]+)?")  # with the configuration, load_dataset's `name`


def cache_folder() -> Path:
    """$MEBP_CACHE_DIR, or `mebp_mlx/tokens` in the user's cache folder on this platform."""
    if chosen := os.environ.get("MEBP_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mebp_mlx" / "tokens"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mebp_mlx" / "tokens"


# Names to folders


def resolve_model(name: str) -> Path:
    """The folder of a model: `name` is "bundled", a local folder, or a hub id (downloaded to the hub's cache).

    Raises UserError naming --model if there is no such folder or model, or it lacks config.json or weights.
    """
    if name == "bundled":
        from mebp_mlx import bundled

        return _checked_model(Path(bundled.MODEL_DIR), name)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        folder = Path(_from_hub(name, flag="--model", kind="model", patterns=MODEL_PATTERNS))
    return _checked_model(folder, name)


def resolve_data(name: str, columns: Sequence[str] = COLUMNS, split: str = "train") -> Path:
    """The folder that contains a split's file: `name` is "bundled", a local folder, or the hub id of a dataset.

    columns: the columns to keep when a dataset is converted. A dataset without JSONL files is converted with the
    optional `datasets` library, and so is a dataset's configuration ("Salesforce/wikitext:wikitext-2-raw-v1").
    Raises UserError naming --data.
    """
    if name == "bundled":
        from mebp_mlx import bundled

        return Path(bundled.DATA_DIR)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        return Path(_from_hub(name, flag="--data", kind="dataset", patterns=DATA_PATTERNS, columns=columns))
    if not folder.is_dir():
        raise UserError(f"--data {name}: is a file; name the folder that contains {split}.jsonl")
    if not (folder / f"{split}.jsonl").is_file():
        raise UserError(f"--data {name}: the folder contains no {split}.jsonl")
    return folder


def resolve_sets(sets: Sequence[Mapping[str, Any]]) -> Path:
    """The folder of mlx-lm's `hf_dataset`: slices of one or more datasets, concatenated, as JSONL.

    Each set has path and, optionally, config (for load_dataset), *_split (SLICES) and *_feature (FEATURES).
    Raises UserError naming the set.
    """
    request = {"sets": [dict(each) for each in sets], "cache": str(cache_folder())}
    try:
        return Path(run_child(["mebp_mlx.weights.hub"], request, offline=False, pass_stderr=True)["folder"])
    except ChildFailure as error:
        raise UserError(f"hf_dataset: the download failed: {one_line(error)}") from error


def _checked_model(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--model {name}: is a file; name the folder that contains config.json and the weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: the folder {folder} contains no config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        config = {}  # the config's reader reports it in more detail
    if isinstance(config, dict) and "model_file" in config:
        raise UserError(f"{folder / 'config.json'}: model_file: no code from a model's folder is ever run")
    if not any(file.is_file() for file in folder.glob("model*.safetensors")):
        raise UserError(f"--model {name}: the folder {folder} contains no weights (model*.safetensors)")
    return folder


def _from_hub(name: str, *, flag: str, kind: str, patterns: Sequence[str], columns: Sequence[str] = ()) -> str:
    if not (_DATASET if kind == "dataset" else _HUB_ID).fullmatch(name):
        raise UserError(f"{flag} {name}: no such folder, and not the name of a {kind} on the hub (org/name)")
    request = {
        "name": name,
        "flag": flag,
        "kind": kind,
        "patterns": list(patterns),
        "columns": list(columns),
        "cache": str(cache_folder()),
    }
    try:
        return run_child(["mebp_mlx.weights.hub"], request, offline=False, pass_stderr=True)["folder"]
    except ChildFailure as error:
        raise UserError(f"{flag} {name}: the download failed: {one_line(error)}") from error


# The child that downloads


def _download(request: dict[str, Any], _progress: Callable[[Any], None]) -> dict[str, Any]:
    cache = Path(request["cache"]) / "datasets"
    if "sets" in request:
        return {"folder": str(_convert_sets(request["sets"], cache))}
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError(f"the hub needs huggingface_hub: pip install huggingface_hub ({one_line(error)})") from error
    (name, _, part), kind = request["name"].partition(":"), request["kind"]
    where = f"{request['flag']} {request['name']}"
    if part:
        return {"folder": str(_convert_dataset(name, where, where, cache, request["columns"], part))}
    folder, problem = None, f"{where}: the dataset contains no train.jsonl"
    try:
        folder = Path(snapshot_download(name, repo_type=kind, allow_patterns=request["patterns"]))
    except GatedRepoError as error:
        raise UserError(f"{where}: is gated: accept its terms on its hub page, then run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such folder, and no such {kind} on the hub (a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        problem = f"{where}: no such folder, not complete in the hub's cache, and the hub cannot be reached"
        if kind == "model":
            raise UserError(problem) from error
    except Exception as error:
        raise UserError(f"{where}: cannot be downloaded: {type(error).__name__}: {one_line(error)}") from error
    if kind == "model":
        return {"folder": str(folder)}
    for candidate in (folder, folder / "data") if folder is not None else ():
        if (candidate / "train.jsonl").is_file():
            return {"folder": str(candidate)}
    return {"folder": str(_convert_dataset(name, where, problem, cache, request["columns"]))}


def _load_dataset(where: str, problem: str, *names: str, **how: Any) -> Any:
    """Loads a dataset with the `datasets` library. Raises UserError, which begins with `problem` if that is missing."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        remedy = "`pip install datasets` to convert other formats, or name a folder with train.jsonl"
        raise UserError(f"{problem}: {remedy}") from error
    try:
        return load_dataset(*names, **how)
    except Exception as error:
        raise UserError(f"{where}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error


def _convert_sets(sets: Sequence[dict[str, Any]], cache: Path) -> Path:
    """Writes the sets of mlx-lm's `hf_dataset`, one after another, as JSONL with uniform column names."""
    chosen: dict[str, list[tuple[Any, dict[str, str]]]] = {}
    for each in sets:
        where = f"hf_dataset {each['path']}"
        columns = {key: each.get(f"{key}_feature") or name for key, name in FEATURES.items()}
        for split, default in SLICES.items():
            slice_ = each.get(f"{split}_split", default)
            if slice_ is None:
                continue
            rows = _load_dataset(where, where, each["path"], split=slice_, **(each.get("config") or {}))
            chosen.setdefault(split, []).append((rows, _kind_of_columns(rows.column_names, columns, where)))
    state = [sets, {split: [_fingerprint(rows) for rows, _ in parts] for split, parts in chosen.items()}]
    parts = {split: itertools.chain.from_iterable(_renamed(*part) for part in each) for split, each in chosen.items()}
    return _write_folder(parts, "--".join(each["path"].replace("/", "--") for each in sets)[:80], state, cache)


def _kind_of_columns(names: Sequence[str], columns: dict[str, str], where: str) -> dict[str, str]:
    """{key of a row: column}, for the kind that mlx-lm would choose for a set with these column names."""
    for keys in (("prompt", "completion"), ("chat",), ("text",)):
        if all(columns[key] in names for key in keys):
            return {FEATURES[key]: columns[key] for key in keys} | {"tools": "tools"}
    known = f"{columns['text']}, {columns['chat']}, or {columns['prompt']} and {columns['completion']}"
    raise UserError(f"{where}: no column named {known} (its columns: {', '.join(names)})")


def _renamed(rows: Any, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    return ({key: row.get(column) for key, column in columns.items()} for row in rows)


def _fingerprint(rows: Any) -> str:
    return getattr(rows, "_fingerprint", uuid.uuid4().hex)


def _convert_dataset(
    name: str, where: str, problem: str, cache: Path, columns: Sequence[str] = COLUMNS, part: str = ""
) -> Path:
    """Writes the splits of a dataset in any format as JSONL. part: the dataset's configuration, "" for the default."""
    splits = _load_dataset(where, problem, name, *([part] if part else []))
    chosen: dict[str, Any] = {}
    for split, rows in splits.items():
        if split in SPLIT_NAMES:
            chosen.setdefault(SPLIT_NAMES[split], rows)
    if "train" not in chosen:
        raise UserError(f"{where}: has no split named train (its splits: {', '.join(splits)})")
    stored = chosen["train"].column_names
    prompt, completion, text, chat, *_ = columns
    if not {text, chat} & set(stored) and not {prompt, completion} <= set(stored):
        known = f"{text}, {chat}, or {prompt} and {completion}"
        raise UserError(f"{where}: no column named {known} (its columns: {', '.join(stored)})")
    state = {split: _fingerprint(rows) for split, rows in chosen.items()}
    kept = {key: key for key in columns}
    parts = {split: _renamed(rows, kept) for split, rows in chosen.items()}
    return _write_folder(parts, "--".join((*name.split("/"), *part.split())), [state, list(columns)], cache)


def _write_folder(parts: Mapping[str, Iterable[dict[str, Any]]], stem: str, state: Any, cache: Path) -> Path:
    """Streams the rows of each split as JSONL into a folder, which is renamed when complete; does nothing if it exists.

    state: everything that the rows depend on. Rows of blank text are skipped.
    """
    folder = cache / f"{stem}-{hashlib.sha256(json.dumps(state).encode()).hexdigest()[:16]}"
    if (folder / "train.jsonl").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".tmp-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        for split, rows in parts.items():
            with open(made / f"{split}.jsonl", "w", encoding="utf-8") as file:
                kept = (_without_nulls(row) for row in rows)
                file.writelines(json.dumps(row) + "\n" for row in kept if not _is_blank(row))
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "train.jsonl").is_file():  # not just because another process was faster
                raise
    return folder


def _is_blank(row: dict[str, Any]) -> bool:
    """Whether a row is nothing but blank text, like WikiText's empty lines."""
    values = list(row.values())
    return len(values) == 1 and isinstance(values[0], str) and not values[0].strip()


def _without_nulls(value: Any) -> Any:
    """Removes null entries: columns have one type for all rows, so `datasets` fills a row's missing keys with null."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    answer(_download)
