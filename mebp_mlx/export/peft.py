"""Reads and writes PEFT's LoRA folders: adapter_config.json and adapter_model.safetensors.

PEFT computes W x + (alpha / r) B (A x) with A [r, in] and B [out, r] (alpha / sqrt(r) if use_rslora is set): its
matrices are ours transposed, and our scale is alpha / r. Names are `base_model.model.` plus transformers' module names.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..model.config import ModelSpec
from ..model.lora import Lora
from ..system.files import NewFolder
from ..weights.safetensors import MappedWeights
from .adapters import ADAPTER_CONFIG, PEFT_WEIGHTS, as_lora, checked_matrix, read_about, write_adapters, write_tensors
from .folder import errors_of_the_disk, write_json

_NAME = re.compile(
    r"base_model\.model\.(?:model|language_model\.model|model\.language_model)\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight"
)
# Settings that change the function beyond a plain LoRA pair; all are absent, false or empty for plain LoRA.
_NOT_PLAIN = (
    "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "layer_replication",
    "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "use_qalora",
)  # fmt: skip


def write_peft(out: NewFolder, lora: Lora, spec: ModelSpec, base: str) -> None:
    """Writes a new folder for `PeftModel.from_pretrained`. base: the model's name. UserError if writing fails."""
    stacks = [stack.name for layer in spec.layers for stack in layer.experts.values()]
    if names := [name for name in stacks if name in lora.pairs]:
        raise UserError(f"--peft: {names[0]} holds pairs of experts, which PEFT has no form for; train other --keys")
    tensors = {}
    for name, value in lora.parameters().items():
        module, _, part = name.rpartition(".")
        tensors[f"base_model.model.{_transformers_name(module)}.lora_{part[-1].upper()}.weight"] = mx.contiguous(
            value.T
        )
    with errors_of_the_disk(out), out:
        write_tensors(out.partial / PEFT_WEIGHTS, tensors)
        write_json(out.partial / ADAPTER_CONFIG, _peft_config(lora, spec, base))
        out.publish()


def read_peft(folder: Path, spec: ModelSpec, flag: str) -> Lora:
    """The LoRA pairs of a PEFT folder, float32. Raises UserError if they are not plain LoRA, or if a name or shape does
    not match the model.
    """
    about, where = read_about(folder, flag), folder / ADAPTER_CONFIG
    if about.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {about.get('peft_type')!r}, not LORA")
    for key in _NOT_PLAIN:
        if about.get(key):
            raise UserError(f"{where}: {key}: {about[key]!r} is not supported")
    if about.get("bias", "none") != "none":
        raise UserError(f"{where}: bias: {about['bias']!r} is not supported")
    rank, alpha = about.get("r"), about.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise UserError(f"{where}: r must be a positive whole number and lora_alpha a number")
    if not (folder / PEFT_WEIGHTS).is_file():
        raise UserError(f"{flag} {folder}: the folder contains no {PEFT_WEIGHTS}")
    weights = MappedWeights(folder / PEFT_WEIGHTS)
    try:
        parameters = dict(_matrix(weights, name, spec, rank) for name in sorted(weights.names))
    finally:
        weights.close()
    scale = alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)
    return as_lora(parameters, spec, rank, scale, float(about.get("lora_dropout") or 0.0), folder / PEFT_WEIGHTS)


def write_ours(out: NewFolder, lora: Lora, base: str) -> None:
    """Writes a new adapter folder that this package and mlx-lm load. Raises UserError if writing fails."""
    with errors_of_the_disk(out), out:
        write_adapters(out.partial, lora, {"model": base})
        out.publish()


def _matrix(weights: MappedWeights, name: str, spec: ModelSpec, rank: int) -> tuple[str, mx.array]:
    """One matrix, transposed, with its name in our format."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[1]) >= spec.L or match[2] not in spec.layers[int(match[1])].matrices:
        raise UserError(f"{weights.info(name).file}: {name}: the model has no such module that supports LoRA")
    if spec.layers[int(match[1])].matrices[match[2]].n_experts:
        raise UserError(f"{weights.info(name).file}: {name}: pairs of experts are not read from PEFT's folders")
    linear = spec.layers[int(match[1])].matrices[match[2]]
    wanted = (rank, linear.in_dims) if match[3] == "A" else (linear.out_dims, rank)
    value = checked_matrix(weights, name, wanted, rank)
    return f"{linear.name}.lora_{match[3].lower()}", mx.contiguous(value.T)


def _transformers_name(module: str) -> str:
    """mlx-lm puts a multimodal model's decoder under language_model.model, transformers under model.language_model."""
    inner = module.removeprefix("language_model.model.")
    return module if inner == module else f"model.language_model.{inner}"


def _peft_config(lora: Lora, spec: ModelSpec, base: str) -> dict[str, Any]:
    modules = sorted({_transformers_name(name.rpartition(".")[0]) for name in lora.parameters()})
    layers = sorted({int(name.partition(".layers.")[2].partition(".")[0]) for name in modules})
    shorts = sorted({name.rpartition(".")[2] for name in modules})
    is_regular = len(modules) == len(layers) * len(shorts)
    # A vision tower has layers with the same names, and short names would match them, too.
    by_short_name = is_regular and not spec.final_norm.startswith("language_model.")
    alpha = lora.scale * lora.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": lora.dropout,
        "target_modules": shorts if by_short_name else modules,
        "layers_to_transform": layers if by_short_name and len(layers) < spec.L else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
    }


def model_name(about: dict[str, Any], given: str | None) -> str:
    """The model that the adapters belong to: `given`, or else the one in their config. Raises UserError if neither
    exists.
    """
    model = given or about.get("model") or about.get("base_model_name_or_path")
    if not isinstance(model, str):
        raise UserError(f"--model: is required, since {ADAPTER_CONFIG} names no model: {json.dumps(model)}")
    return model
