"""Folders of random adapters for small models, and their loss in mlx-lm's model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mebp_mlx
from mebp_mlx.export.adapters import write_adapters
from mebp_mlx.testing.tiny import randomize_lora


def make_adapters(
    folder: Path,
    model_path: Path,
    *,
    rank: int = 3,
    scale: float = 2.0,
    spread: float = 0.3,
    keys: Iterable[str] | None = None,
    num_layers: int = -1,
    **about: Any,
) -> Path:
    """Writes a folder of random adapters for a model."""
    model = mebp_mlx.open_model(model_path)
    lora = mebp_mlx.init_lora(model, rank=rank, scale=scale, keys=keys, num_layers=num_layers)
    randomize_lora(lora, seed=5, spread=spread)
    folder.mkdir(parents=True)
    write_adapters(folder, lora, {"model": str(model_path), **about})
    model.weights.close()
    return folder


def mlx_lm_loss(model_path: Path, adapters: Path | None, rows: list[list[int]]) -> float:
    """The mean loss over all tokens except each row's first, computed by mlx-lm's model in float32."""
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model = load_model(model_path)[0]
    model.set_dtype(mx.float32)
    if adapters is not None:
        model = load_adapters(model, str(adapters))
    model.eval()
    total, n_labels = 0.0, 0
    for row in rows:
        logits = model(mx.array([row[:-1]]))[0]
        losses = nn.losses.cross_entropy(logits.astype(mx.float32), mx.array(row[1:]))
        total += float(np.asarray(losses, np.float64).sum())
        n_labels += len(row) - 1
    return total / n_labels
