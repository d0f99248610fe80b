"""What a run keeps on disk: adapters for mlx-lm, one checkpoint for an exact resume, and run.json.

Every file is written beside its final name, flushed to the disk and then renamed over it, so a reader finds
the old state or the new one. checkpoint.safetensors holds LoRA parameters, optimizer state and step together.
Arrays are written one after the other, and nothing is copied: a save takes no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import mlx.core as mx
import numpy as np

from ..config import TrainConfig
from ..errors import NonFiniteLoss, UserError
from ..options import describe
from ..weights.writer import Array, Entry, Shard

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"
CHECKPOINT, RUN, LOG = "checkpoint.safetensors", "run.json", "log.jsonl"
FORMAT = "mebp_mlx checkpoint 1"
_Loaded = tuple[dict[str, mx.array], dict[str, str]]
_LORA, _OPTIMIZER, _ENGINE = "lora/", "optimizer/", "engine/"


class Adapters(Protocol):
    """What this module needs of a Lora."""

    rank: int
    scale: float
    dropout: float
    keys: Any
    num_layers: int

    def parameters(self) -> dict[str, mx.array]: ...


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state between two optimizer updates. step: updates done; options: TrainConfig.to_dict().

    origin: fingerprints of what the options `model` and `data` stood for; engine: what a zeroth-order estimator keeps.
    The optimizer's arrays, in dicts of dicts, may be numpy's views of a file.
    """

    lora: dict[str, mx.array]
    optimizer: dict[str, Any]
    step: int
    options: dict[str, Any]
    origin: dict[str, str]
    engine: dict[str, mx.array] = dataclasses.field(default_factory=dict)

    def arrays(self) -> dict[str, Array]:
        """All arrays under the names that they have in the file."""
        parts: tuple[tuple[str, Mapping[str, Array]], ...] = (
            (_LORA, self.lora),
            (_OPTIMIZER, _flat(self.optimizer)),
            (_ENGINE, self.engine),
        )
        return {prefix + name: value for prefix, part in parts for name, value in part.items()}


# Folder


def check_unused(folder: Path) -> None:
    """Raises UserError when a new run in `folder` would overwrite something of another run."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--adapter-path {folder}: is a file, not a folder")
    names = [name for name in (CHECKPOINT, ADAPTERS, ADAPTER_CONFIG, RUN, LOG) if (folder / name).exists()]
    if names:
        remedy = "--resume continues it, " if CHECKPOINT in names else "remove the folder, or "
        raise UserError(
            f"--adapter-path {folder}: already holds a run ({names[0]}); {remedy}"
            "another --adapter-path starts a new one"
        )


def make_folder(folder: Path) -> None:
    """Creates the folder of a run. Raises UserError when that is not possible or it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "not writable"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--adapter-path {folder}: {reason}")


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Replaces `path` by what `write` puts into a binary file, or leaves it as it was. Raises UserError (disk)."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"--adapter-path {path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _write_arrays(
    path: Path, arrays: Mapping[str, Array], when: str, metadata: Mapping[str, str] | None = None
) -> None:
    def write(file: BinaryIO) -> None:
        names = sorted(arrays)
        with Shard(file, [Entry.of(name, arrays[name]) for name in names], metadata) as shard:
            for name in names:
                if not _is_finite(arrays[name]):
                    raise NonFiniteLoss(f"{name} is no longer finite after {when}; the last good state stays as it is")
                shard.append(name, arrays[name])

    write_atomically(path, write)


def _is_finite(value: Array) -> bool:
    library: Any = mx if isinstance(value, mx.array) else np
    return not library.issubdtype(value.dtype, library.floating) or bool(library.isfinite(value).all())


# Saving


def save_adapters(folder: Path, lora: Adapters, config: TrainConfig, iteration: int, numbered: bool) -> None:
    """adapters.safetensors and adapter_config.json, as mlx-lm loads them; `numbered`: 0000100_adapters.safetensors too.

    Raises NonFiniteLoss, and writes nothing, when a parameter is NaN or infinite.
    """
    parameters, when = lora.parameters(), f"iteration {iteration}"
    about = {
        "fine_tune_type": "lora",
        "model": config.model,
        "num_layers": lora.num_layers,
        "lora_parameters": {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": list(lora.keys)},
        "data": config.data_source,
        "seed": config.seed,
        "iters": iteration,
    }
    _write_arrays(folder / ADAPTERS, parameters, when)  # first: nothing else is written if a value is not finite
    if numbered:
        _write_arrays(folder / f"{iteration:07d}_{ADAPTERS}", parameters, when)
    write_json(folder / ADAPTER_CONFIG, about)


def save_checkpoint(folder: Path, state: Checkpoint) -> None:
    """checkpoint.safetensors. Raises NonFiniteLoss, and keeps the last one, when a value is NaN or infinite."""
    about = {"step": state.step, "options": state.options, "origin": state.origin}
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    _write_arrays(folder / CHECKPOINT, state.arrays(), f"update {state.step}", metadata)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """{"a.b": {"m": x}} -> {"a.b/m": x}; parameter names have dots, so the separator is another one."""
    flat: dict[str, Array] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def _nested(flat: Mapping[str, mx.array]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = name.split("/")
        inner = state
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return state


# Resuming


def load_checkpoint(folder: Path) -> Checkpoint:
    """The saved state of a run, its arrays still on the disk. Raises UserError when there is none or it is damaged."""
    path = folder / CHECKPOINT
    if not path.exists():
        raise UserError(
            f"--resume: nothing is saved in {folder} yet; start without --resume"
            + (f", after removing {folder / RUN}" if (folder / RUN).exists() else "")
        )
    try:
        arrays, metadata = cast(_Loaded, mx.load(str(path), return_metadata=True))
        about = json.loads(metadata["about"]) if metadata.get("format") == FORMAT else None
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"--resume: {path} is damaged: {str(error).splitlines()[0]}") from None
    if about is None:
        raise UserError(f"--resume: {path} is not a checkpoint of this version ({metadata.get('format')!r})")
    lora, optimizer, engine = (
        {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        for prefix in (_LORA, _OPTIMIZER, _ENGINE)
    )
    return Checkpoint(lora, _nested(optimizer), about["step"], about["options"], about["origin"], engine)


def saved_options(folder: Path) -> dict[str, Any]:
    """The options that a resumed run starts from. Raises UserError like `load_checkpoint`."""
    options = load_checkpoint(folder).options
    try:
        newer = json.loads((folder / RUN).read_text())["options"]  # iters may have been raised since the save
        options.update(
            {
                name: newer[name]
                for name in describe(TrainConfig)
                if name in newer and describe(TrainConfig)[name].option.may_change
            }
        )
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return options


def check_same_run(config: TrainConfig, checkpoint: Checkpoint, origin: Mapping[str, str]) -> None:
    """Raises UserError naming the first option by which a resumed run would no longer be the same run."""
    for name, now in config.fixed_by_run().items():
        flag, before = describe(TrainConfig)[name].flag, checkpoint.options.get(name)
        if name in origin:  # what the name stands for counts: a folder may have moved
            if checkpoint.origin.get(name) != origin[name]:
                what = f"{before}, not {now}" if before != now else f"{now} as it was then; it has changed since"
                raise UserError(f"{flag}: the run in {config.adapter_path} uses {what}")
        elif json.dumps(before) != json.dumps(now):
            raise UserError(
                f"{flag}: the run in {config.adapter_path} has {_shown(before)}, not {_shown(now)}; "
                "a resumed run keeps it"
            )


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


def check_arrays(checkpoint: Checkpoint, fresh: Checkpoint) -> None:
    """Raises UserError when the checkpoint's names or shapes are not those of this run; reads nothing.

    fresh: the state of a new run with the same options.
    """
    wanted, found = fresh.arrays(), checkpoint.arrays()
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found or name not in wanted:
            raise UserError(f"--resume: {CHECKPOINT}: {name} is {'missing' if name in wanted else 'not of this run'}")
        if found[name].shape != wanted[name].shape:
            shapes = f"shape {found[name].shape}, not {wanted[name].shape}"
            raise UserError(f"--resume: {CHECKPOINT}: {name} has {shapes}")


# Fingerprints


def model_fingerprint(path: Path) -> str:
    """Hash of a model folder: config.json, and size and first megabyte of every safetensors file."""
    return _fingerprint([path / "config.json", *sorted(path.glob("*.safetensors"))], 1 << 20)


def data_fingerprint(tokens: Path) -> str:
    """Hash of the training rows: all of their tokens and labels. `tokens`: DataSets.cache_dir."""
    return _fingerprint([tokens / f"train.{name}" for name in ("offsets", "labels", "tokens")])


def _fingerprint(files: Sequence[Path], n_bytes_of_each: int | None = None) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            left = sys.maxsize if n_bytes_of_each is None else n_bytes_of_each
            while block := file.read(min(left, 1 << 18)):
                digest.update(block)
                left -= len(block)
    return digest.hexdigest()[:16]
