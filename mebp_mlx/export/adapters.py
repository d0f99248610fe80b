"""Adapter folders in mlx-lm's format: reading, with every name and shape checked, and saving."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..model.base import Model, Tensor
from ..model.config import Linear, ModelSpec
from ..model.lora import Lora
from ..system.files import read_json_object, write_json
from ..weights.safetensors import MappedWeights
from ..weights.writer import Entry, Shard, write_arrays

ADAPTERS, ADAPTER_CONFIG, RUN = "adapters.safetensors", "adapter_config.json", "run.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
FLAG = "--adapter-path"


def read_about(folder: Path, flag: str = FLAG) -> dict[str, Any]:
    """The contents of adapter_config.json. Raises UserError, naming `flag`, if it is missing or damaged."""
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    try:
        return read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{flag} {folder}: the folder contains no {ADAPTER_CONFIG}") from None


def trained_with(folder: Path) -> dict[str, Any]:
    """The options that the adapters were trained with, by name: adapter_config.json, overridden by run.json if this
    package trained them. Raises UserError like `read_about`.
    """
    options = read_about(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # mlx-lm writes no run.json
        options = {**options, **json.loads((folder / RUN).read_text(encoding="utf-8"))["options"]}
    return options


def load_adapters(folder: Path, spec: ModelSpec, flag: str = FLAG) -> Lora:
    """The LoRA pairs in a folder, float32. Raises UserError for unsupported kinds of adapter, and for pairs that are
    incomplete, do not match the shapes of the model's matrices, or belong to modules without LoRA support.
    """
    about = read_about(folder, flag)
    where = folder / ADAPTER_CONFIG
    if "peft_type" in about:
        raise UserError(f"{flag} {folder}: holds PEFT adapters; python -m mebp_mlx.export --from-peft converts them")
    kind = about.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise UserError(f"{where}: fine_tune_type {kind!r} is not supported, only lora and dora")
    parameters = about.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise UserError(f"{where}: lora_parameters is missing")
    numbers = {key: _number(parameters, key, where) for key in ("rank", "scale")}
    if not (folder / ADAPTERS).is_file():
        raise UserError(f"{flag} {folder}: the folder contains no {ADAPTERS}")
    dropout = parameters.get("dropout", 0.0)
    return read_pairs(
        folder / ADAPTERS, spec, int(numbers["rank"]), numbers["scale"], dropout if isinstance(dropout, float) else 0.0
    )


def adapters_of(folder: Path, model_path: Path) -> Lora:
    """`load_adapters` for the model in the folder `model_path`; only the headers of its weights are read."""
    model = Model(model_path)
    model.close()
    return load_adapters(folder, model.spec)


def read_pairs(file: Path, spec: ModelSpec, rank: int, scale: float, dropout: float) -> Lora:
    """The LoRA pairs in a safetensors file with mlx-lm's names. Raises UserError naming file and tensor."""
    linears = {linear.name: linear for layer in spec.layers for linear in layer.matrices.values()}
    weights = MappedWeights(file)
    try:
        parameters = {name: _parameter(weights, name, linears, rank) for name in sorted(weights.names)}
    finally:
        weights.close()
    return as_lora(parameters, spec, rank, scale, dropout, file)


def as_lora(
    parameters: dict[str, mx.array], spec: ModelSpec, rank: int, scale: float, dropout: float, file: Path
) -> Lora:
    """The matrices of `file` as a Lora. Their names, already checked, determine its keys and number of layers.

    Raises UserError if a pair is incomplete or there is no pair at all.
    """
    is_dora = any(name.endswith(".m") for name in parameters)
    for name in parameters:
        for part in ("lora_a", "lora_b", *(["m"] if is_dora else [])):
            if f"{name.rpartition('.')[0]}.{part}" not in parameters:
                raise UserError(f"{file}: {name} has no matching {part}")
    if not parameters:
        raise UserError(f"{file}: contains no LoRA pair")
    layers = [layer for layer in spec.layers if any(name.startswith(f"{layer.prefix}.") for name in parameters)]
    keys = tuple(key for key in spec.lora_keys if any(f".{key}.lora_" in name for name in parameters))
    n_layers = spec.L - layers[0].index
    return Lora(parameters, rank=rank, scale=scale, dropout=dropout, keys=keys, num_layers=n_layers)


def numbered(iteration: int) -> str:
    """The file name of the copy that is saved at an iteration."""
    return f"{iteration:07d}_{ADAPTERS}"


def save_adapters(folder: Path, lora: Lora, iteration: int, about: Mapping[str, Any], copy: bool = False) -> None:
    """Replaces both files in a run's folder.

    about: extra keys for adapter_config.json; copy: also write the numbered copy, such as 0000100_adapters.safetensors.
    Raises NonFiniteLoss, and writes nothing, if a parameter is NaN or infinite; UserError if writing fails.
    """
    parameters, when = lora.parameters(), f"iteration {iteration}"
    write_arrays(folder / ADAPTERS, parameters, when, FLAG)  # first: nothing is written if a value is not finite
    if copy:
        write_arrays(folder / numbered(iteration), parameters, when, FLAG)
    write_json(folder / ADAPTER_CONFIG, {**_described(lora), **about, "iters": iteration}, FLAG)


def write_adapters(folder: Path, lora: Lora, about: dict[str, Any]) -> None:
    """Writes both files, in mlx-lm's format, to an existing folder that has neither.

    about: extra keys for adapter_config.json. Raises OSError.
    """
    write_tensors(folder / ADAPTERS, lora.parameters())
    with open(folder / ADAPTER_CONFIG, "x", encoding="utf-8") as file:
        file.write(json.dumps({**_described(lora), **about}, indent=4) + "\n")


def _described(lora: Lora) -> dict[str, Any]:
    return {
        "fine_tune_type": lora.fine_tune_type,
        "num_layers": lora.num_layers,
        "lora_parameters": {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": list(lora.keys)},
    }


def write_tensors(path: Path, arrays: dict[str, mx.array]) -> None:
    """Writes arrays to a new safetensors file and flushes it to disk. Raises OSError."""
    names = sorted(arrays)
    with open(path, "xb") as file, Shard(file, [Entry.of(name, arrays[name]) for name in names]) as shard:
        for name in names:
            shard.append(name, arrays[name])


def _parameter(weights: MappedWeights, name: str, linears: dict[str, Linear], rank: int) -> mx.array:
    """One matrix of a LoRA pair, in float32."""
    info = weights.info(name)
    module, _, part = name.rpartition(".")
    if part not in ("lora_a", "lora_b", "m"):
        raise UserError(f"{info.file}: {name} is not a LoRA matrix (lora_a, lora_b) or DoRA's m")
    if module not in linears:
        raise UserError(f"{info.file}: {name}: the model has no module {module} that supports LoRA")
    linear = linears[module]
    shapes = {**dict(zip(("lora_a", "lora_b"), linear.pair_shapes(rank), strict=True)), "m": (linear.out_dims,)}
    wanted: tuple[int, ...] = shapes[part]
    return checked_matrix(weights, name, wanted, rank)


def checked_matrix(weights: MappedWeights, name: str, shape: tuple[int, ...], rank: int) -> mx.array:
    """One matrix of a LoRA pair, in float32. Raises UserError if the shape is wrong or values are not finite floats."""
    info = weights.info(name)
    if info.shape != shape:
        raise UserError(
            f"{info.file}: {name} has shape {list(info.shape)}, but the model and rank {rank} require {list(shape)}"
        )
    if not mx.issubdtype(info.mlx_dtype, mx.floating):
        raise UserError(f"{info.file}: {name} has dtype {info.dtype}, which is not a float type")
    value = Tensor(weights, name)[...].astype(mx.float32)
    if not mx.isfinite(value).all().item():
        raise UserError(f"{info.file}: {name} contains values that are not finite")
    return value


def _number(parameters: dict[str, Any], key: str, where: Path) -> float:
    value: Any = parameters.get(key)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and abs(value) <= sys.float_info.max and (key != "rank" or (value >= 1 and value == int(value))):
        return value
    wanted = "a positive whole number" if key == "rank" else "a number"
    problem = "is missing" if value is None else f"must be {wanted}, found {str(value)[:100]}"
    raise UserError(f"{where}: lora_parameters.{key} {problem}")
