"""The Python interface: opens a model, creates LoRA parameters, computes the loss and exact gradients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .config import TrainConfig
from .engine.backprop import BackpropEngine
from .engine.base import Pass, WholeBatch
from .errors import UserError
from .export.adapters import load_adapters as _load_adapters
from .export.adapters import write_adapters
from .export.folder import errors_of_the_disk, new_folder
from .model import NO_LABEL
from .model.base import Model
from .model.lora import Lora
from .model.lora import init_lora as _init_lora
from .model.opening import open_model as _open_model
from .ops.plan import Plan
from .planner.search import choose
from .planner.sizes import lora_sizes
from .planner.workload import Workload
from .system.machine import default_budget_bytes, memory_bytes
from .weights.hub import resolve_model

__all__ = [
    "Plan",
    "TrainConfig",
    "init_lora",
    "load_adapters",
    "loss",
    "loss_and_grads",
    "open_model",
    "save_adapters",
]


def open_model(name: str | Path, dtype: str = "auto", weights: str = "auto") -> Model:
    """Opens a model, memory-mapped. name: a folder in mlx-lm's layout, a hub id (downloaded), or "bundled".

    dtype, weights and errors: as in model.opening.open_model; also raises UserError if no such model is found.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = resolve_model(str(name))
    return _open_model(folder, dtype, weights)


def save_adapters(folder: str | Path, lora: Lora, model: Model) -> Path:
    """Writes adapters.safetensors and adapter_config.json, in mlx-lm's format, to a new folder; returns its path.

    Raises UserError if the folder exists and is not empty, or if writing fails.
    """
    out = new_folder(str(folder), "folder")
    with errors_of_the_disk(out), out:
        write_adapters(out.partial, lora, {"model": str(model.path)})
        out.publish()
    return out.path


def load_adapters(folder: str | Path, model: Model) -> Lora:
    """Reads the LoRA or DoRA adapters in a folder, from mebp_mlx or mlx-lm. Raises UserError if they do not fit the
    model.
    """
    return _load_adapters(Path(folder).expanduser(), model.spec, "folder")


def init_lora(  # noqa: PLR0913 - the options of LoRA, by keyword
    model: Model,
    rank: int = 8,
    scale: float = 20.0,
    dropout: float = 0.0,
    keys: Iterable[str] | None = None,
    num_layers: int = -1,
    seed: int = 0,
    fine_tune_type: str = "lora",
) -> Lora:
    """Fresh LoRA parameters for the matrices `keys` (default: all of the family's) of the last `num_layers` blocks (-1:
    all).

    A is uniform in +-1/sqrt(in), B is zero, both float32; fine_tune_type "dora" adds the row lengths. Raises UserError
    for an unknown key, and for parameters that exceed the machine's memory, because MLX's CPU backend would crash.
    """
    if fine_tune_type not in ("lora", "dora"):
        raise UserError(f"fine_tune_type: {fine_tune_type!r} is not one of lora, dora")
    keys = None if keys is None else tuple(keys)
    n_bytes = lora_sizes(model.spec, keys, num_layers, rank, is_dora=fine_tune_type == "dora").parameters
    if n_bytes > (most := memory_bytes()):
        raise UserError(
            f"rank {rank}: LoRA takes {n_bytes / 1e6:,.1f} MB, the machine's memory is {most / 1e6:,.1f} MB"
        )
    return _init_lora(
        model.spec,
        rank=rank,
        scale=scale,
        dropout=dropout,
        keys=keys,
        num_layers=num_layers,
        seed=seed,
        lengths=model.row_lengths if fine_tune_type == "dora" else None,
    )


def loss_and_grads(
    model: Model, lora: Lora, tokens: Any, targets: Any, plan: Plan | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """The mean loss over labelled tokens, and its exact gradient for every LoRA parameter.

    tokens, targets: int [B, T], arrays or nested lists; target -100 = no label; plan: how the step is divided (None:
    chosen as in training, within the default budget, at the first call and again for a larger batch). Dropout is off.
    Returns (float32 scalar, {parameter name: float32 gradient}). Raises UserError if shapes differ, a token id is
    outside the vocabulary, or there is no label.
    """
    batch = _checked(model, tokens, targets)
    gradients: dict[str, mx.array] = {}
    engine = _engine(model, lora, plan, *batch.tokens.shape)
    loss_value = engine.step(batch, step=0, micro=0, n_labels=batch.n_labels, sink=gradients.update)
    return mx.array(loss_value), gradients


class _Session(NamedTuple):
    """An engine, and the arguments it was created for: the given plan (or None), a batch's rows and positions."""

    model: Model
    plan: Plan | None
    B: int
    T: int
    engine: BackpropEngine


def _engine(model: Model, lora: Lora, plan: Plan | None, B: int, T: int) -> BackpropEngine:
    """The engine of this Lora's last call if it fits this one, so that not every call makes a plan and files."""
    known = lora.session
    if isinstance(known, _Session):
        if known.model is model and known.plan == plan and B <= known.B and T <= known.T:
            return known.engine
        known.engine.close()
    chosen = plan or choose(Workload(model, lora, B, T), default_budget_bytes()).plan
    engine = BackpropEngine(model, lora, plan=chosen, dropout=False)
    lora.session = _Session(model, plan, B, T, engine)
    return engine


def loss(model: Model, lora: Lora, tokens: Any, targets: Any, plan: Plan | None = None) -> mx.array:
    """The mean loss over labelled tokens, from a forward pass that keeps nothing. Arguments as in loss_and_grads."""
    loss_sum, n_labels, _ = Pass(model, plan or Plan(), lora).loss(_checked(model, tokens, targets))
    return mx.array(loss_sum / n_labels)


def _checked(model: Model, tokens: Any, targets: Any) -> WholeBatch:
    batch = WholeBatch(np.asarray(tokens, dtype=np.int32), np.asarray(targets, dtype=np.int32))
    if batch.tokens.ndim != 2 or batch.tokens.shape != batch.targets.shape or batch.tokens.size == 0:
        raise UserError(
            f"tokens and targets must both be [B, T], found {list(batch.tokens.shape)} and {list(batch.targets.shape)}"
        )
    labels = batch.targets[batch.targets != NO_LABEL]
    if labels.size == 0:
        raise UserError("targets: every target is -100, so the loss is undefined")
    for name, ids in (("tokens", batch.tokens), ("targets", labels)):
        if ids.min() < 0 or ids.max() >= model.spec.V:
            raise UserError(f"{name}: ids must be in [0, {model.spec.V}), found {ids.min()} to {ids.max()}")
    return batch
