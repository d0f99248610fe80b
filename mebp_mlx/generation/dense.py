"""Dequantizes a model in memory, as far as a budget allows.

On MLX's CPU backend products with packed or 16-bit weights run at a fiftieth of the BLAS's speed, for every token.
So matrices are converted to float32 once, before the first token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import BudgetError
from ..system.device import on_gpu
from ..system.footprint import footprint_bytes
from ..system.units import megabytes

_RESERVE_BYTES = 48 << 20  # cached keys and values, activations, memory that libraries allocate at the first token
_STEP_BYTES = 1_000_000  # budgets in messages are rounded up to this
_GATHERED = "embed_tokens_per_layer"  # half of Gemma 4: a token takes a row of it, in no product


def room_bytes(model: nn.Module, budget_bytes: int | None) -> float:
    """The bytes of a budget that remain after a lazily loaded model's weights are read as stored; infinite without a
    budget. Raises BudgetError, naming the smallest workable budget, if nothing remains.
    """
    if budget_bytes is None:
        return math.inf
    stored = sum(value.nbytes for _, value in _parameters(model))
    transient = max((4 * _n_weights(module) for _, module in _slow_matrices(model)), default=0)
    widened = 0 if on_gpu() else sum(value.nbytes for _, _, value in _small(model))
    widened += sum(_growth(module) for _, module in _slow_matrices(model) if _must_grow(module))
    least = footprint_bytes() + stored + widened + transient + _RESERVE_BYTES
    if least > budget_bytes:
        raise BudgetError(
            f"--memory-budget: {budget_bytes / 1e6:.1f} MB is too little to generate with this model; the smallest "
            f"workable budget is {math.ceil(least / _STEP_BYTES)}MB"
        )
    return budget_bytes - least


def make_dense(model: nn.Module, room: float, say: Callable[[str], None]) -> None:
    """Converts matrices to float32, one after another, while their growth fits in `room` bytes; small arrays always.

    say: called with progress lines.
    """
    matrices = list(_slow_matrices(model))
    wanted = sum(4 * _n_weights(module) for _, module in matrices)
    if matrices:
        say(f"decompressing the weights once, {megabytes(wanted)}")
    n_left = 0
    for name, module in matrices:
        growth = _growth(module)
        if growth > room and not _must_grow(module):
            n_left += 1
            continue
        room -= growth
        _replace(model, name, module)
    if n_left:
        say(f"the budget has no room to decompress {n_left} of {len(matrices)} matrices; products with them are slower")
    for module, key, value in list(_small(model)):
        module[key] = value.astype(mx.float32)


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    parameters: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # type: ignore[assignment]
    return parameters


def _stacks() -> tuple[type, type]:
    """mlx-lm's stacks of experts, packed and not."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return QuantizedSwitchLinear, SwitchLinear


def _is_packed(module: Any) -> bool:
    return isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding, _stacks()[0]))


def _slow_matrices(model: nn.Module) -> Iterator[tuple[str, Any]]:
    plain = (nn.Linear, nn.Embedding, _stacks()[1])
    for name, module in model.named_modules():
        if name.endswith(_GATHERED):
            continue
        is_plain = isinstance(module, plain)
        if _is_packed(module) or (is_plain and module.weight.dtype != mx.float32):
            yield name, module


def _n_weights(module: Any) -> int:
    return int(module.weight.size) * 32 // module.bits if _is_packed(module) else int(module.weight.size)


def _growth(module: Any) -> int:
    """The bytes that a matrix grows by."""
    return 4 * _n_weights(module) - sum(value.nbytes for _, value in _parameters(module))


def _must_grow(module: Any) -> bool:
    """Whether MLX cannot multiply by it as it is stored: a stack in 16 bits on the CPU."""
    return isinstance(module, _stacks()[1]) and not on_gpu()


def _replace(model: nn.Module, name: str, module: Any) -> None:
    """Replaces a module's weight by an evaluated float32 one, so that the old weight is freed."""
    if not _is_packed(module):
        module.weight = module.weight.astype(mx.float32)
        mx.eval(module.weight)
        return
    scales, biases = module.scales, module.get("biases")
    if biases is not None:  # widened first: 16-bit arithmetic would round the weights
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    how: dict[str, Any] = dict(group_size=module.group_size, bits=module.bits, mode=module.mode, dtype=mx.float32)
    weight = mx.dequantize(module.weight, scales, biases, **how)
    mx.eval(weight)
    if isinstance(module, nn.QuantizedEmbedding):
        new: Any = nn.Embedding(1, 1)
    elif isinstance(module, nn.QuantizedLinear):
        new = nn.Linear(1, 1, bias="bias" in module)
    else:
        new = _stacks()[1](1, 1, 1, bias="bias" in module)
    new.weight = weight
    if "bias" in module:
        new.bias = module.bias
    model.update_modules(tree_unflatten([(name, new)]))


def _small(model: nn.Module) -> Iterator[tuple[Any, str, mx.array]]:
    """Vectors, and the scales and biases of packed matrices: 16-bit ones would make all activations 16-bit, too."""
    for _, module in model.named_modules():
        for key, value in module.items():
            is_float = isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)
            if is_float and (value.ndim == 1 or key == "bias" or _is_packed(module)):
                yield module, key, value
