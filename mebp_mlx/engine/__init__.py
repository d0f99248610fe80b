"""Engines own memory and the order of evaluation. Each turns a batch into a loss and per-block gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..model.base import Model
from ..model.lora import Lora
from ..ops.plan import Plan
from .backprop import BackpropEngine
from .base import Engine
from .whole_graph import WholeGraphEngine
from .zeroth_order import Estimator, ZerothOrderEngine


def make_engine(  # noqa: PLR0913 - the options of three engines, by keyword
    name: str,
    model: Model,
    lora: Lora,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    estimator: Estimator | None = None,
    arena_dir: str | Path | None = None,
    total: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> Engine:
    """The engine called `name`. Raises ValueError for an unknown name.

    estimator, total: for zeroth-order engines only (make_estimator with the same name; ZerothOrderEngine).
    """
    if name == "mebp":
        return BackpropEngine(model, lora, plan=plan, seed=seed, arena_dir=arena_dir)
    if name == "whole-graph":
        return WholeGraphEngine(model, lora, seed=seed)
    if estimator is not None:
        return ZerothOrderEngine(model, lora, estimator, plan=plan, seed=seed, total=total)
    raise ValueError(f"unknown engine {name!r}")
