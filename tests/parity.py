"""mlx-lm's own model, LoRA layers and autograd: the loss and gradients that ours are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tests.tiny import relative_error


def mlx_lm_loss_and_grads(
    folder: Path, lora: Any, tokens: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, mx.array]]:
    """Loss (mean over labels) and LoRA gradients of mlx-lm's model in float32, by its parameter names."""
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    model.freeze()
    config = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0, "keys": list(lora.keys)}
    n_layers = len(model.layers) if lora.num_layers == -1 else lora.num_layers
    linear_to_lora_layers(model, n_layers, config)
    names = dict(tree_flatten(model.trainable_parameters()))
    assert set(names) == set(lora.parameters())
    model.load_weights(list(lora.parameters().items()), strict=False)
    mask = mx.array(targets != -100)

    def loss_fn(model: nn.Module) -> mx.array:
        logits = model(mx.array(tokens)).astype(mx.float32)
        losses = nn.losses.cross_entropy(logits, mx.array(np.where(targets == -100, 0, targets)))
        return (losses * mask).sum() / mask.sum()

    loss, grads = nn.value_and_grad(model, loss_fn)(model)
    return loss.item(), dict(tree_flatten(grads))


def largest_error(loss: Any, grads: dict[str, Any], expected_loss: float, expected: dict[str, Any]) -> float:
    """The worst relative error over the loss and every gradient; asserts that the names agree."""
    assert set(grads) == set(expected)
    errors = [relative_error(grads[name], expected[name]) for name in expected]
    errors.append(abs(float(loss) - expected_loss) / abs(expected_loss))
    worst = max(errors)
    return float("nan") if any(e != e for e in errors) else worst
