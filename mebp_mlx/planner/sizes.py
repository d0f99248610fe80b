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

ITEM_BYTES = 4  # LoRA parameters and their gradients are always float32


@dataclass(frozen=True)
class LoraSizes:
    """Bytes. parameters: of all LoRA pairs, and of all their gradients; block_gradients: of the block with the most;
    state: of the optimizer's arrays.
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
    """The sizes of LoRA pairs of `rank` on `keys` (None: all matrices) of the last `num_layers` blocks (-1: all).

    optimizer: its own state is not used; None means no state. With an optimizer, rank must be below 2^31, MLX's longest
    axis.
    """
    blocks = spec.layers if num_layers == -1 else spec.layers[-num_layers:]
    chosen = frozenset(spec.lora_keys if keys is None else keys)
    per_block = [ITEM_BYTES * sum(map(prod, _shapes(layer, chosen, rank, is_dora))) for layer in blocks]
    shapes = [shape for layer in blocks for shape in _shapes(layer, chosen, rank, is_dora)]
    state = {shape: 0 if optimizer is None else _state_bytes(optimizer, shape) for shape in set(shapes)}
    return LoraSizes(sum(per_block), max(per_block), sum(state[shape] for shape in shapes))


@dataclass(frozen=True)
class ExpertSizes:
    """A model with mixtures of experts: the bytes of all experts, and of the most that a batch's tokens can reach."""

    stored: int
    reached: int
    n_layers: int
    n_reached: int  # experts per layer


def expert_sizes(model: Model, n_tokens: int) -> ExpertSizes | None:
    """The most that a pass over n_tokens reads of the experts; None if the model has none.

    A router without preferences reaches nearly as many; a router that treats all tokens alike reaches n_chosen.
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
    """Bytes of one parameter's state, from the optimizer's own initialisation, whose arrays are never evaluated."""
    entry: dict[str, mx.array] = {}
    optimizer.init_single(mx.zeros(shape), entry)
    arrays: dict[str, mx.array] = tree_flatten(entry, destination={})  # type: ignore[assignment]
    return sum(int(array.nbytes) for array in arrays.values())
