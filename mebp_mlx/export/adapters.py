"""Adapters on disk as mlx-lm loads them: adapters.safetensors and adapter_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..system.files import write_json
from ..weights.writer import write_arrays

ADAPTERS, ADAPTER_CONFIG = "adapters.safetensors", "adapter_config.json"


class Adapters(Protocol):
    """What is saved of a Lora."""

    rank: int
    scale: float
    dropout: float
    keys: Any
    num_layers: int

    def parameters(self) -> dict[str, mx.array]: ...


def numbered(iteration: int) -> str:
    """The name of an iteration's own copy."""
    return f"{iteration:07d}_{ADAPTERS}"


def save_adapters(folder: Path, lora: Adapters, iteration: int, about: Mapping[str, Any], copy: bool = False) -> None:
    """Writes both files. about: more keys of adapter_config.json; copy: 0000100_adapters.safetensors, too.

    Raises NonFiniteLoss, and writes nothing, when a parameter is NaN or infinite; UserError when the disk refuses.
    """
    parameters, when, flag = lora.parameters(), f"iteration {iteration}", "--adapter-path"
    write_arrays(folder / ADAPTERS, parameters, when, flag)  # first: nothing is written if a value is not finite
    if copy:
        write_arrays(folder / numbered(iteration), parameters, when, flag)
    config = {
        "fine_tune_type": "lora",
        "num_layers": lora.num_layers,
        "lora_parameters": {"rank": lora.rank, "scale": lora.scale, "dropout": lora.dropout, "keys": list(lora.keys)},
        **about,
        "iters": iteration,
    }
    write_json(folder / ADAPTER_CONFIG, config, flag)
