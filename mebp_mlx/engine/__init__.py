"""Engines: who owns memory and order. Each turns a batch into a loss and per-block gradients."""

from __future__ import annotations

from pathlib import Path

from ..model.base import Model
from ..model.lora import Lora
from ..ops.plan import Plan
from .backprop import BackpropEngine
from .base import Engine
from .whole_graph import WholeGraphEngine
from .zeroth_order import Estimator, ZerothOrderEngine


def make_engine(
    name: str,
    model: Model,
    lora: Lora,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    estimator: Estimator | None = None,
    arena_dir: str | Path | None = None,
) -> Engine:
    """The engine of that name; ValueError for another.

    estimator: the zeroth-order engines' own (make_estimator of the same name).
    """
    if name == "mebp":
        return BackpropEngine(model, lora, plan=plan, seed=seed, arena_dir=arena_dir)
    if name == "whole-graph":
        return WholeGraphEngine(model, lora, seed=seed)
    if estimator is not None:
        return ZerothOrderEngine(model, lora, estimator, plan=plan, seed=seed)
    raise ValueError(f"unknown engine {name!r}")
