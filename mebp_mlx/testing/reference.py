"""mlx-lm's own model, LoRA layers and autograd in float32 or float64: the reference for our gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .tiny import relative_error


def mlx_lm_model(folder: Path, lora: Any, *, dequantized: bool = True) -> Any:
    """mlx-lm's model in float32, with its LoRA layers set to the values of our `lora`.

    dequantized: replace quantized layers by plain ones with the same weights.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    if dequantized:
        dequantize_layers(model)
    model.freeze()
    config = {"rank": lora.rank, "scale": lora.scale, "dropout": 0.0, "keys": list(lora.keys)}
    linear_to_lora_layers(
        model,
        len(model.layers) if lora.num_layers == -1 else lora.num_layers,
        config,
        use_dora=lora.fine_tune_type == "dora",
    )
    assert set(dict(tree_flatten(model.trainable_parameters()))) == set(lora.parameters())
    values = {name: value + 0 for name, value in lora.parameters().items()}  # an update may overwrite the originals
    mx.eval(values)
    model.load_weights(list(values.items()), strict=False)
    return model


def mlx_lm_loss_and_grads(
    folder: Path, lora: Any, tokens: np.ndarray, targets: np.ndarray, dtype: mx.Dtype = mx.float32
) -> tuple[float, dict[str, mx.array]]:
    """Loss (mean over labels) and LoRA gradients of mlx-lm's model, by its parameter names.

    tokens, targets: int [B, T]; a target of -100 is not a label. Quantized weights are dequantized in float32;
    everything else is computed in `dtype`.
    """
    model = mlx_lm_model(folder, lora)
    model.set_dtype(dtype)
    if dtype == mx.float64:
        _replace_convolutions(model)
    _replace_stacks(model, dtype)
    mask = mx.array(targets != -100)

    def loss_fn(model: nn.Module) -> mx.array:
        logits = model(mx.array(tokens))
        assert logits.dtype == dtype
        losses = nn.losses.cross_entropy(logits, mx.array(np.where(targets == -100, 0, targets)))
        return (losses * mask).sum() / mask.sum()

    loss, grads = nn.value_and_grad(model, loss_fn)(model)
    return loss.item(), dict(tree_flatten(grads))


class _Taps(nn.Module):
    """A depthwise nn.Conv1d as a sum over its taps: MLX has no float64 convolution."""

    def __init__(self, weight: mx.array):
        super().__init__()
        self.weight = weight  # [channels, taps, 1]

    def __call__(self, x: mx.array) -> mx.array:
        n_taps = self.weight.shape[1]
        T = x.shape[1] - n_taps + 1
        return mx.stack([self.weight[:, j, 0] * x[:, j : j + T] for j in range(n_taps)]).sum(0)


def _replace_convolutions(model: nn.Module) -> None:
    convolutions = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    model.update_modules(tree_unflatten([(name, _Taps(module.weight)) for name, module in convolutions]))
    model.freeze(keys=["weight"])


class _Stack(nn.Module):
    """mlx-lm's SwitchLinear as products with gathered matrices: on the CPU, MLX's gather_mm supports only float32."""

    def __init__(self, module: Any):
        super().__init__()
        self.weight = module.weight  # [E, out, in]
        if "bias" in module:
            self.bias = module.bias

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = x @ self.weight[indices].swapaxes(-1, -2)
        return y + mx.expand_dims(self.bias[indices], -2) if "bias" in self else y


class _LoraStack(_Stack):
    """mlx-lm's LoRASwitchLinear as such products, without dropout."""

    def __init__(self, module: Any):
        super().__init__(module.linear)
        self.scale, self.lora_a, self.lora_b = module.scale, module.lora_a, module.lora_b

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        low = x @ self.lora_a[indices].swapaxes(-1, -2)
        return super().__call__(x, indices) + self.scale * (low @ self.lora_b[indices].swapaxes(-1, -2))


def _replace_stacks(model: nn.Module, dtype: mx.Dtype) -> None:
    from mlx_lm.models.switch_layers import SwitchLinear
    from mlx_lm.tuner.lora import LoRASwitchLinear

    if dtype == mx.float32:
        return
    modules = dict(model.named_modules())
    found = {name: _LoraStack(module) for name, module in modules.items() if isinstance(module, LoRASwitchLinear)}
    plain = {name: module for name, module in modules.items() if isinstance(module, SwitchLinear)}
    found |= {n: _Stack(m) for n, m in plain.items() if n.removesuffix(".linear") not in found}
    for module in found.values():
        module.freeze(keys=["weight", "bias"])
    model.update_modules(tree_unflatten(list(found.items())))


def dequantize_layers(model: nn.Module) -> None:
    """Replaces quantized layers by plain ones with the same weights."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    for name, module in model.named_modules():
        if not isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)):
            continue
        weight = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            dtype=mx.float32,
        )
        if isinstance(module, nn.QuantizedEmbedding):
            plain: nn.Module = nn.Embedding(*weight.shape)
        elif isinstance(module, QuantizedSwitchLinear):
            plain = SwitchLinear(1, 1, 1, bias="bias" in module)
            if "bias" in module:
                plain.bias = module.bias
        else:
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
            if "bias" in module:
                plain.bias = module.bias
        plain.weight = weight
        model.update_modules(tree_unflatten([(name, plain)]))


def largest_error(loss: Any, grads: dict[str, Any], expected_loss: float, expected: dict[str, Any]) -> float:
    """The largest relative error of the loss and all gradients; asserts that the names agree.

    The error of a gradient whose true value is zero (queries and keys of a one-token row) is taken relative to a
    thousandth of the largest gradient, not to its own rounding noise.
    """
    assert set(grads) == set(expected)
    floor = 1e-3 * max(float(np.max(np.abs(np.asarray(g, np.float64)))) for g in expected.values())
    errors = [relative_error(grads[name], expected[name], floor) for name in expected]
    errors.append(abs(float(loss) - expected_loss) / abs(expected_loss))
    return float("nan") if any(e != e for e in errors) else max(errors)


def rms_error(grads: dict[str, Any], expected: dict[str, Any]) -> float:
    """The relative error of all gradients as one vector, in the L2 norm; it varies less than the largest error."""
    assert set(grads) == set(expected)
    pairs = [(np.asarray(grads[n], np.float64), np.asarray(expected[n], np.float64)) for n in expected]
    return float(np.sqrt(sum(((g - e) ** 2).sum() for g, e in pairs) / sum((e**2).sum() for _, e in pairs)))
