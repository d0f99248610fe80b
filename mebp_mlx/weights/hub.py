"""Models and data by name: a folder, "bundled", or a hub id.

The training process does not import huggingface_hub: `python -m mebp_mlx.weights.hub` is the child that downloads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import ChildFailure, answer, one_line, run_child

# The same files as mlx-lm asks for, so that each finds the other's download complete; no *.py is ever run.
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
ROW_KEYS = ("text", "prompt", "completion", "messages", "tools")
SPLIT_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "test": "test"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATASET = re.compile(rf"{_HUB_ID.pattern}(:[\w.-]+)?")  # with the part of it that load_dataset calls its name


def cache_folder() -> Path:
    """$MEBP_CACHE_DIR, or `mebp_mlx/tokens` in the user's cache folder of this platform."""
    if chosen := os.environ.get("MEBP_CACHE_DIR"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mebp_mlx" / "tokens"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mebp_mlx" / "tokens"


# Names to folders


def resolve_model(name: str) -> Path:
    """The folder of a model: `name` is "bundled", a local folder, or a hub id (downloaded to its cache).

    Raises UserError naming --model when there is no such folder or model, or it lacks config.json or weights.
    """
    if name == "bundled":
        from mebp_mlx import bundled

        return _checked_model(Path(bundled.MODEL_DIR), name)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        folder = Path(_from_hub(name, flag="--model", kind="model", patterns=MODEL_PATTERNS))
    return _checked_model(folder, name)


def resolve_data(name: str, split: str = "train") -> Path:
    """The folder that holds a split's file: `name` is "bundled", a local folder, or the hub id of a dataset.

    A dataset without JSONL files is converted through the optional `datasets` library, and so is one part of
    a dataset ("Salesforce/wikitext:wikitext-2-raw-v1").
    Raises UserError naming --data.
    """
    if name == "bundled":
        from mebp_mlx import bundled

        return Path(bundled.DATA_DIR)
    folder = Path(name).expanduser()
    if not name or not folder.exists():
        return Path(_from_hub(name, flag="--data", kind="dataset", patterns=DATA_PATTERNS))
    if not folder.is_dir():
        raise UserError(f"--data {name}: is a file; name the folder that holds {split}.jsonl")
    if not (folder / f"{split}.jsonl").is_file():
        raise UserError(f"--data {name}: the folder holds no {split}.jsonl")
    return folder


def _checked_model(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        raise UserError(f"--model {name}: is a file; name the folder that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {name}: the folder {folder} holds no config.json")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"--model {name}: the folder {folder} holds no weights (model*.safetensors)")
    return folder


def _from_hub(name: str, *, flag: str, kind: str, patterns: Sequence[str]) -> str:
    if not (_DATASET if kind == "dataset" else _HUB_ID).fullmatch(name):
        raise UserError(f"{flag} {name}: no such folder, and not the name of a {kind} on the hub (org/name)")
    request = {
        "name": name,
        "flag": flag,
        "kind": kind,
        "patterns": list(patterns),
        "cache": str(cache_folder()),
    }
    try:
        return run_child(["mebp_mlx.weights.hub"], request, offline=False, pass_stderr=True)["folder"]
    except ChildFailure as error:
        raise UserError(f"{flag} {name}: the download failed: {one_line(error)}") from error


# The child that downloads


def _download(request: dict[str, Any], _progress: Callable[[Any], None]) -> dict[str, Any]:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError(
            f"the hub needs huggingface_hub: pip install huggingface_hub ({one_line(error)})"
        ) from error
    (name, _, part), kind = request["name"].partition(":"), request["kind"]
    where = f"{request['flag']} {request['name']}"
    if part:
        return {"folder": str(_convert_dataset(name, where, where, Path(request["cache"]) / "datasets", part))}
    folder, problem = None, f"{where}: the dataset holds no train.jsonl"
    try:
        folder = Path(snapshot_download(name, repo_type=kind, allow_patterns=request["patterns"]))
    except GatedRepoError as error:
        raise UserError(f"{where}: is gated: accept its terms on its page of the hub, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such folder, and no such {kind} on the hub (a private one needs `hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:
        problem = f"{where}: no such folder, not complete in the hub's cache, and the hub cannot be reached"
        if kind == "model":
            raise UserError(problem) from error
    except Exception as error:
        raise UserError(
            f"{where}: cannot be downloaded: {type(error).__name__}: {one_line(error)}"
        ) from error
    if kind == "model":
        return {"folder": str(folder)}
    for candidate in (folder, folder / "data") if folder is not None else ():
        if (candidate / "train.jsonl").is_file():
            return {"folder": str(candidate)}
    return {"folder": str(_convert_dataset(name, where, problem, Path(request["cache"]) / "datasets"))}


def _convert_dataset(name: str, where: str, problem: str, cache: Path, part: str = "") -> Path:
    """Write the splits of a dataset of any format as JSONL, streamed; the folder gets its name when done.

    part: of the dataset, "" for a dataset of one part. Rows of blank text are left out.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        remedy = "`pip install datasets` to have other formats converted, or give a folder with train.jsonl"
        raise UserError(f"{problem}: {remedy}") from error
    try:
        splits = load_dataset(name, part) if part else load_dataset(name)
    except Exception as error:
        raise UserError(f"{where}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    chosen: dict[str, Any] = {}
    for split, rows in splits.items():
        if split in SPLIT_NAMES:
            chosen.setdefault(SPLIT_NAMES[split], rows)
    if "train" not in chosen:
        raise UserError(f"{where}: has no split named train (its splits: {', '.join(splits)})")
    columns = chosen["train"].column_names
    if not {"text", "messages"} & set(columns) and not {"prompt", "completion"} <= set(columns):
        known = "text, messages, or prompt and completion"
        raise UserError(f"{where}: no column named {known} (its columns: {', '.join(columns)})")
    state = json.dumps(
        {split: getattr(rows, "_fingerprint", uuid.uuid4().hex) for split, rows in chosen.items()}
    )
    folder = cache / f"{'--'.join((*name.split('/'), *part.split()))}-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    if (folder / "train.jsonl").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".tmp-") as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        for split, rows in chosen.items():
            with open(made / f"{split}.jsonl", "w", encoding="utf-8") as file:
                kept = (_without_nulls({key: row.get(key) for key in ROW_KEYS}) for row in rows)
                file.writelines(json.dumps(row) + "\n" for row in kept if row.get("text", "text").strip())
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "train.jsonl").is_file():  # not another process that was faster
                raise
    return folder


def _without_nulls(value: Any) -> Any:
    """Columns have one type for all rows: what a row does not have is null there, and absent in JSONL."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    answer(_download)
