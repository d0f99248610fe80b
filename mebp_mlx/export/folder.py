"""A model's new folder: tensors as a Repack writes them, config.json, tokenizer; whole or not there at all."""

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
_TEXT_BYTES = 256 << 20  # what is larger is no tokenizer


def write_folder(
    out: NewFolder,
    source: Path,
    repack: Repack,
    config: dict[str, Any],
    say: Say,
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes the folder and gives it its name. Raises UserError; whatever is raised, there is no folder then.

    source: where the tokenizer comes from; config: the new config.json; say: called with a line for each file;
    check: looks at the complete folder before it gets its name, and may add files or refuse it.
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
            Model(out.partial).close()  # what is published can be opened
            check(out.partial)
            out.publish()


def new_folder(path: str, flag: str) -> NewFolder:
    """A folder whose name is free. Raises UserError naming the flag."""
    out = NewFolder(path, flag)
    with errors_of_the_disk(out):
        out.check()
    return out


def check_outside(out: NewFolder, source: Path) -> None:
    """Raises UserError when the folder would be inside the source."""
    if out.path.is_relative_to(source.resolve()):
        raise UserError(f"{out.shown}: is inside the source {source}")


@contextlib.contextmanager
def errors_of_the_disk(out: NewFolder) -> Iterator[None]:
    """Turns OSError into a UserError that names the folder's flag."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out.shown}: {error.strerror or error}") from None


def new_config(
    config: dict[str, Any], recipe: Recipe | None, others: Mapping[str, Quantization], dtype: str | None
) -> dict[str, Any]:
    """config.json of a converted model as mlx-lm writes it: sorted, without the vision tower that is not there.

    recipe: of the matrices, None: what the config says of them stays; others: matrices that are packed otherwise than
    most; dtype: of all that is not packed, None: as it was.
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
        for key in ("quantization", "quantization_config"):  # of a source that was packed
            part.pop(key, None)
    if recipe.packing is not None:
        described = {name: _described(how) for name, how in others.items()}
        config["quantization"] = {**_described(recipe.packing.stored), **described}
        config["quantization_config"] = config["quantization"]
    return dict(sorted(config.items()))


def _described(how: Quantization) -> dict[str, Any]:
    return {"group_size": how.group_size, "bits": how.bits, "mode": how.mode}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """A new file, indented and flushed to the disk. Raises OSError."""
    write_text(path, json.dumps(content, indent=4) + "\n")


def write_text(path: Path, text: str) -> None:
    """A new file, flushed to the disk. Raises OSError."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        flush(file)


def _text_files(source: Path) -> list[Path]:
    """Tokenizer, chat template and the like. Raises UserError for a link that leads out of the source."""
    home = source.resolve()
    if home.parent.name == "snapshots":  # the hub's cache: a snapshot's files are links to its blobs
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
            raise UserError(f"{path}: is a link to {path.resolve()}, outside of the model; it is not copied")
    return files


def _index(report: Report, weight_map: dict[str, str]) -> dict[str, Any]:
    about = {"total_size": report.bytes_after, "total_parameters": report.n_parameters}
    return {"metadata": about, "weight_map": dict(sorted(weight_map.items()))}
