"""Writes a model's new folder (tensors from a Repack, config.json, tokenizer), either complete or not at all."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..model.base import Model
from ..model.config import Quantization
from ..system.files import NewFolder, flush
from ..weights.safetensors import INDEX_NAME
from .quantize import Recipe
from .requantize import Repack, Report, Say

_TEXT_FILES = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_MADE_HERE = ("config.json", INDEX_NAME, "hf_quant_config.json")
_TEXT_BYTES = 256 << 20  # no tokenizer file is larger


def write_folder(
    out: NewFolder,
    source: Path,
    repack: Repack,
    config: dict[str, Any],
    say: Say,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the folder under a temporary name, then renames it. Raises UserError; after any error no folder exists.

    source: the folder with the tokenizer; config: the new config.json; say: called with a line for each file;
    check: called with the complete folder before it is renamed; it may add files, or raise to reject the folder.
    """
    texts = _text_files(source)
    with errors_of_the_disk(out):
        out.remove_leftovers()
        for folder in out.removed:
            say(f"removed {folder}, which a killed process left behind")
        out.check_space(repack.report.bytes_after + sum(path.stat().st_size for path in texts))
        with out:
            weight_map = repack.write(out.partial, say)
            for path in texts:
                with open(path, "rb") as old, open(out.partial / path.name, "xb") as new:
                    shutil.copyfileobj(old, new)
                    flush(new)
            write_json(out.partial / "config.json", config)
            write_json(out.partial / INDEX_NAME, _index(repack.report, weight_map))
            Model(out.partial).close()  # publish only a folder that can be opened
            check(out.partial)
            out.publish()


def new_folder(path: str, flag: str) -> NewFolder:
    """A NewFolder at `path`. Raises UserError naming the flag if the name is taken."""
    out = NewFolder(path, flag)
    with errors_of_the_disk(out):
        out.check()
    return out


def check_outside(out: NewFolder, source: Path) -> None:
    """Raises UserError if the folder would be inside the source."""
    if out.path.is_relative_to(source.resolve()):
        raise UserError(f"{out.shown}: is inside the source {source}")


@contextlib.contextmanager
def errors_of_the_disk(out: NewFolder) -> Iterator[None]:
    """Converts OSError to a UserError that names the folder's flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out.shown}: {error.strerror or error}") from None


def new_config(
    config: dict[str, Any], recipe: Recipe | None, others: Mapping[str, Quantization], dtype: str | None
) -> dict[str, Any]:
    """config.json of a converted model as mlx-lm writes it: sorted, without the vision tower, which is not copied.

    recipe: how matrices are packed; None keeps the source's quantization entries. others: matrices whose packing
    differs from the recipe's main one; dtype: for tensors that are not packed; None keeps the source's entry.
    """
    config = {key: value for key, value in sorted(config.items()) if key not in ("_name_or_path", "vision_config")}
    if recipe is None:
        return config
    text = config.get("text_config")
    for part in (config, text):
        if not isinstance(part, dict):
            continue
        for key in ("torch_dtype", "dtype"):
            if dtype and key in part:
                part[key] = dtype
        for key in ("quantization", "quantization_config"):  # the source's, if it was packed
            part.pop(key, None)
    if recipe.packing is not None:
        described = {name: _described(how) for name, how in others.items()}
        config["quantization"] = {**_described(recipe.packing.stored), **described}
        config["quantization_config"] = config["quantization"]
    return dict(sorted(config.items()))


def _described(how: Quantization) -> dict[str, Any]:
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a new file with indented JSON and flushes it to disk. Raises OSError."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a new text file and flushes it to disk. Raises OSError."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        flush(file)


def _text_files(source: Path) -> list[Path]:
    """The tokenizer, chat template and other small text files. Raises UserError for a link that leaves the source."""
    home = source.resolve()
    if home.parent.name == "snapshots":  # in the hub's cache a snapshot's files are links to its blobs
        home = home.parent.parent
    files = [
        path
        for path in sorted(source.iterdir())
        if path.suffix in _TEXT_FILES
        and path.name not in _MADE_HERE
        and not path.name.endswith(".index.json")
        and path.is_file()
        and path.stat().st_size <= _TEXT_BYTES
    ]
    for path in files:
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise UserError(f"{path}: is a link to {path.resolve()}, outside the model's folder; it is not copied")
    return files


def _index(report: Report, weight_map: dict[str, str]) -> dict[str, Any]:
    about = {"total_size": report.bytes_after, "total_parameters": report.n_parameters}
    return {"metadata": about, "weight_map": dict(sorted(weight_map.items()))}
