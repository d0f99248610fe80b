"""The initial values of a new run: an adapter file from mebp_mlx or mlx-lm, checked against the run's options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..model.config import ModelSpec
from ..model.lora import Lora
from ..system.files import read_json_object
from ..weights.safetensors import MappedWeights
from .adapters import ADAPTER_CONFIG, ADAPTERS, checked_matrix

FLAG = "--resume-adapter-file"


def start_file(path: str) -> Path:
    """The adapter file: `path` itself, or the adapters in that folder. Raises UserError if it is missing."""
    file = Path(path) / ADAPTERS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        problem = "no such file" if file == Path(path) else f"the folder contains no {ADAPTERS}"
        raise UserError(f"{FLAG} {path}: {problem}")
    return file


def start_from(file: Path, lora: Lora, spec: ModelSpec) -> None:
    """Replaces the values of a fresh Lora, one at a time. The file's rank, names and kind must match `lora`, and so
    must the scale if an adapter_config.json next to the file gives it; otherwise UserError lists options that match.
    """
    weights = MappedWeights(file)
    try:
        shapes = {name: weights.info(name).shape for name in sorted(weights.names)}
        _check(file, lora, spec, shapes)
        for name, value in lora.parameters().items():
            matrix = checked_matrix(weights, name, tuple(value.shape), lora.rank)
            mx.eval(matrix)
            lora.update({name: matrix})
    finally:
        weights.close()


def _check(file: Path, lora: Lora, spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]]) -> None:
    linears = {linear.name for layer in spec.layers for linear in layer.matrices.values()}
    for name in shapes:
        if (module := name.rpartition(".")[0]) not in linears:
            raise UserError(f"{FLAG} {file}: {name}: the model has no module {module} that supports LoRA")
    ranks = {shape[1] for name, shape in shapes.items() if name.endswith(".lora_a") and len(shape) >= 2}
    if len(ranks) != 1:
        raise UserError(f"{FLAG} {file}: " + ("has pairs of different ranks" if ranks else "contains no LoRA pair"))
    own = lora.parameters()
    beside = file.parent / ADAPTER_CONFIG
    about = read_json_object(beside) if beside.is_file() else {}
    parameters = about.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    layers = [layer.index for layer in spec.layers if any(name.startswith(f"{layer.prefix}.") for name in shapes)]
    keys = [key for key in spec.lora_keys if any(f".{key}.lora_" in name for name in shapes)]
    trained = [layer.index for layer in spec.layers if any(name.startswith(f"{layer.prefix}.") for name in own)]
    wanted = {
        "--fine-tune-type": (lora.fine_tune_type, _kind(shapes)),
        "--rank": (lora.rank, ranks.pop()),
        "--scale": (lora.scale, lora.scale if scale is None else scale),
        "--keys": (" ".join(key for key in spec.lora_keys if key in lora.keys), " ".join(keys)),
        "--num-layers": (spec.L - trained[0], spec.L - layers[0]),
    }
    if differing := [flag for flag, (ours, theirs) in wanted.items() if ours != theirs]:
        ours, theirs = wanted[differing[0]]
        options = " ".join(f"{flag} {wanted[flag][1]}" for flag in differing)
        raise UserError(f"{differing[0]}: is {ours}, but {FLAG} {file} has {theirs}; use {options}")
    for name in sorted(own.keys() ^ shapes.keys()):
        raise UserError(f"{FLAG} {file}: {name} is {'missing' if name in own else 'not a parameter of this run'}")


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "dora" if any(name.endswith(".m") for name in shapes) else "lora"
