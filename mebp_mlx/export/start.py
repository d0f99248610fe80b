"""The values that a new run starts from: an adapter file of ours or mlx-lm's, checked against the run's options."""

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
    """The file that is meant: itself, or the adapters of a folder. Raises UserError where there is none."""
    file = Path(path) / ADAPTERS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{FLAG} {path}: {'no such file' if file == Path(path) else f'the folder holds no {ADAPTERS}'}")
    return file


def start_from(file: Path, lora: Lora, spec: ModelSpec) -> None:
    """Replaces the values of a fresh Lora, one at a time. The file's rank and names must be those of `lora`, and so
    must kind and scale where an adapter_config.json beside the file says them: UserError gives the options that go on.
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
        if name.rpartition(".")[0] not in linears:
            raise UserError(f"{FLAG} {file}: {name}: the model has no {name.rpartition('.')[0]} that LoRA goes on")
    ranks = {shape[1] for name, shape in shapes.items() if name.endswith(".lora_a") and len(shape) >= 2}
    if len(ranks) != 1:
        raise UserError(f"{FLAG} {file}: " + ("has pairs of several ranks" if ranks else "holds no LoRA pair"))
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
        raise UserError(f"{differing[0]}: is {ours}, {FLAG} {file} has {theirs}; {options} goes on from it")
    for name in sorted(own.keys() ^ shapes.keys()):
        raise UserError(f"{FLAG} {file}: {name} is {'missing' if name in own else 'not of this run'}")


def _kind(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return "dora" if any(name.endswith(".m") for name in shapes) else "lora"
