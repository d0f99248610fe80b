"""Bytes of trained parameters, optimizer state and experts, from shapes alone: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from ..model.base import Model
from ..model.config import Layer, ModelSpec

ITEM_BYTES = 4  # LoRA parameters and their gradients are float32 always


@dataclass(frozen=True)
class LoraSizes:
    """Bytes. parameters: of all LoRA pairs, and so of all their gradients; block_gradients: of the block that has
    the most; state: of the optimizer's arrays.
    """

    parameters: int
    block_gradients: int
    state: int


def lora_sizes(
    spec: ModelSpec,
    keys: Iterable[str] | None,
    num_layers: int,
    rank: int,
    optimizer: optim.Optimizer | None = None,
    is_dora: bool = False,
) -> LoraSizes:
    """What LoRA pairs of `rank` on `keys` (None: all matrices) of the last `num_layers` blocks (-1: all) will take.

    optimizer: with or without state, which is not used; None: there is no state. With one, rank must
    be below 2^31, MLX's longest axis.
    """
    blocks = spec.layers if num_layers == -1 else spec.layers[-num_layers:]
    chosen = frozenset(spec.lora_keys if keys is None else keys)
    per_block = [ITEM_BYTES * sum(map(prod, _shapes(layer, chosen, rank, is_dora))) for layer in blocks]
    shapes = [shape for layer in blocks for shape in _shapes(layer, chosen, rank, is_dora)]
    state = {shape: 0 if optimizer is None else _state_bytes(optimizer, shape) for shape in set(shapes)}
    return LoraSizes(sum(per_block), max(per_block), sum(state[shape] for shape in shapes))


@dataclass(frozen=True)
class ExpertSizes:
    """Of a model with mixtures of experts: stored bytes of all experts, and of the most that a batch's tokens reach."""

    stored: int
    reached: int
    n_layers: int
    n_reached: int  # experts of a layer


def expert_sizes(model: Model, n_tokens: int) -> ExpertSizes | None:
    """What a pass over n_tokens reads of experts at most; None: the model has none.

    A router that favours no expert reaches nearly as many, one that sends all tokens alike its n_chosen.
    """
    if (routing := model.spec.routing) is None:
        return None
    stacks = [stack for layer in model.spec.layers for stack in layer.experts.values()]
    stored = sum(model.weights.info(name).n_bytes for stack in stacks for name in stack.tensors)
    n_reached = min(routing.n_experts, n_tokens * routing.n_chosen)
    n_layers = sum(bool(layer.experts) for layer in model.spec.layers)
    return ExpertSizes(stored, stored * n_reached // routing.n_experts, n_layers, n_reached)


def _shapes(layer: Layer, keys: frozenset[str], rank: int, is_dora: bool) -> Iterator[tuple[int, ...]]:
    """The shapes of a block's A and B (Linear.pair_shapes), and of DoRA's m [out]."""
    for key, linear in layer.matrices.items():
        if key in keys:
            yield from linear.pair_shapes(rank)
            if is_dora:
                yield (linear.out_dims,)


def _state_bytes(optimizer: optim.Optimizer, shape: tuple[int, ...]) -> int:
    """Of one parameter's state, as the optimizer itself starts it: MLX arrays take no memory until evaluated."""
    entry: dict[str, mx.array] = {}
    optimizer.init_single(mx.zeros(shape), entry)
    arrays: dict[str, mx.array] = tree_flatten(entry, destination={})  # type: ignore[assignment]
    return sum(int(array.nbytes) for array in arrays.values())
