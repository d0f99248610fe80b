"""LoRA pairs under mlx-lm's names, their initial values, dropout, and random keys.

    y = x W^T + b + s * (dropout(x) A) B,   A [in, r],  B [r, out]

The gradients of that projection (implemented once, in ops/lora_linear.py) are
    dB = s (x A)^T g,   dA = s x^T (g B^T),   dx = g W + s (g B^T) A^T.

DoRA (Liu et al. 2024, arXiv 2402.09353; mlx-lm's form) also trains the length m of each row of the adapted matrix:
    y = (m / n) (x W^T + s (dropout(x) A) B) + b,   n = |W + s (A B)^T| by rows, a constant for the gradients.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from ..errors import UserError
from .config import Layer, Linear, ModelSpec

DROPOUT_RUN, DROPOUT_COLUMNS = 64, 512  # positions and columns of one dropout draw


_SIDES = {"lora_a": "a", "lora_b": "b", "m": "m"}  # last parts of parameter names, as in mlx-lm


class Pair(NamedTuple):
    """The two LoRA matrices of one projection: a [in, r], b [r, out]; m [out], row lengths, for DoRA only.

    For a stack of experts: a [E, r, in], b [E, out, r], as in mlx-lm.
    """

    a: mx.array
    b: mx.array
    m: mx.array | None = None

    def expert(self, index: int) -> Pair:
        """One expert's pair of a stack's: a [in, r], b [r, out]."""
        return Pair(self.a[index].T, self.b[index].T)


@dataclass
class Adapter:
    """LoRA pairs by the name of their projection, for a block; a missing pair is not trained.

    pairs: not copied, so that an adapter of a Lora's own pairs holds no replaced value.
    """

    pairs: Mapping[str, Pair]
    scale: float
    dropout: float


def first_trained(adapter: Adapter, layers: Sequence[Layer]) -> int:
    """The lowest block with a pair; the number of blocks if none has one."""
    for layer in layers:
        if any(linear.name in adapter.pairs for linear in layer.matrices.values()):
            return layer.index
    return len(layers)


class Lora(Adapter):
    """The trainable parameters: a flat dict of float32 arrays under mlx-lm's adapter names."""

    def __init__(
        self,
        parameters: dict[str, mx.array],
        *,
        rank: int,
        scale: float,
        dropout: float,
        keys: tuple[str, ...],
        num_layers: int,
    ):
        self._pairs = pairs_of(parameters)
        super().__init__(self._pairs, scale, dropout)
        self.rank, self.keys, self.num_layers = rank, keys, num_layers
        self.session: object = None  # the engine that loss_and_grads reuses (api.py)

    def parameters(self) -> dict[str, mx.array]:
        """A new flat dict of the current parameters: `{layer prefix}.{key}.lora_a`, `.lora_b`, and DoRA's `.m`, in the
        shapes of Pair.
        """
        return flat(self._pairs)

    @property
    def fine_tune_type(self) -> str:
        """mlx-lm's name of the kind: lora or dora."""
        return "dora" if any(pair.m is not None for pair in self._pairs.values()) else "lora"

    def update(self, parameters: dict[str, mx.array]) -> None:
        """Replaces parameters by name, as float32. Raises ValueError for an unknown name or a different shape."""
        for name, value in parameters.items():
            linear, _, part = name.rpartition(".")
            pair, side = self._pairs.get(linear), _SIDES.get(part, "")
            if pair is None or getattr(pair, side, None) is None:
                raise ValueError(f"{name} is not a parameter of this LoRA")
            shape = getattr(pair, side).shape
            if tuple(value.shape) != tuple(shape):
                raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
            self._pairs[linear] = pair._replace(**{side: value.astype(mx.float32)})


def pairs_of(parameters: Mapping[str, mx.array]) -> dict[str, Pair]:
    """Pairs by projection name, from parameters by parameter name."""
    names = [name.removesuffix(".lora_a") for name in parameters if name.endswith(".lora_a")]
    return {
        name: Pair(parameters[f"{name}.lora_a"], parameters[f"{name}.lora_b"], parameters.get(f"{name}.m"))
        for name in names
    }


def flat(pairs: Mapping[str, Pair]) -> dict[str, mx.array]:
    """The pairs' arrays by parameter name: `{projection}.lora_a`, `.lora_b`, `.m`."""
    return {
        f"{name}.{part}": value
        for name, pair in pairs.items()
        for part, side in _SIDES.items()
        if (value := getattr(pair, side)) is not None
    }


def init_lora(  # noqa: PLR0913 - the options of LoRA, by keyword
    spec: ModelSpec,
    *,
    rank: int,
    scale: float,
    dropout: float = 0.0,
    keys: Iterable[str] | None = None,
    num_layers: int = -1,
    seed: int = 0,
    lengths: Callable[[Linear], mx.array] | None = None,
) -> Lora:
    """New LoRA pairs: A uniform in +-1/sqrt(in), B zero, as in mlx-lm.

    keys: projection names inside a block (default: all of the family); num_layers: the last N
    blocks, -1 for all. Each A depends only on (seed, its name). lengths: row lengths of a frozen matrix, float32 [out],
    the initial m of DoRA; None: plain LoRA. Raises UserError.
    """
    chosen = spec.lora_keys if keys is None else tuple(dict.fromkeys(keys))
    unknown = [key for key in chosen if key not in spec.lora_keys]
    if unknown or not chosen:
        known = ", ".join(spec.lora_keys)
        raise UserError(f"--keys: {', '.join(unknown) or 'none given'}; modules that support LoRA: {known}")
    if rank < 1:
        raise UserError(f"--rank: must be at least 1, found {rank}")
    if not 0 <= dropout < 1:
        raise UserError(f"--dropout: must be in [0, 1), found {dropout}")
    if num_layers == 0 or num_layers < -1 or num_layers > spec.L:
        raise UserError(f"--num-layers: must be -1 (all) or 1 to {spec.L}, found {num_layers}")
    parameters = {}
    for layer in spec.layers if num_layers == -1 else spec.layers[-num_layers:]:
        for key, linear in layer.matrices.items():
            if key not in chosen:
                continue
            bound = 1 / math.sqrt(linear.in_dims)
            if lengths is not None and linear.n_experts:
                raise UserError(
                    f"--fine-tune-type dora: {key} holds experts, which support only LoRA; exclude it by --keys"
                )
            shape_a, shape_b = linear.pair_shapes(rank)
            a = mx.random.uniform(-bound, bound, shape_a, key=random_key("lora", seed, linear.name))
            parameters[f"{linear.name}.lora_a"], parameters[f"{linear.name}.lora_b"] = a, mx.zeros(shape_b)
            if lengths is not None:
                parameters[f"{linear.name}.m"] = lengths(linear)
    mx.eval(parameters)
    return Lora(parameters, rank=rank, scale=scale, dropout=dropout, keys=chosen, num_layers=num_layers)


def random_key(*parts: int | str) -> mx.array:
    """A random key that is a pure function of its parts: the same on every machine, for any order of calls."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else struct.pack("<q", part)
        digest.update(struct.pack("<q", len(raw)) + raw)
    return mx.random.key(int.from_bytes(digest.digest(), "little"))


class Dropout:
    """Inverted dropout; masks are redrawn at each use.

    rate in (0, 1); parts: inputs of the random keys besides projection, position, column and row: the index of the
    batch's first row in the whole micro-batch, then seed, step and micro-batch.
    """

    def __init__(self, rate: float, parts: tuple[int, ...]):
        self.rate, (self.first_row, *self.parts) = rate, parts

    def mask(
        self, name: str, shape: tuple[int, ...], position: int, columns: tuple[int, int], dtype: mx.Dtype
    ) -> mx.array:
        """The factor, 1 / (1 - rate) or 0, on columns of a projection's input: [B, T, columns]; shape: (B, T).

        Drawn in cells of a row, DROPOUT_RUN positions and DROPOUT_COLUMNS columns with a key for each, so that it does
        not depend on how work is cut into ranges or rows are distributed; a range must begin with a cell.
        """
        (B, T), (start, stop) = shape, columns
        assert position % DROPOUT_RUN == 0 and start % DROPOUT_COLUMNS == 0
        runs = []
        for first in range(position, position + T, DROPOUT_RUN):
            n_positions = min(DROPOUT_RUN, position + T - first)
            cells = []
            for column in range(start, stop, DROPOUT_COLUMNS):
                rows = []
                for row in range(self.first_row, self.first_row + B):
                    key = random_key("dropout", *self.parts, name, first, column, row)
                    rows.append(mx.random.bernoulli(1 - self.rate, (DROPOUT_RUN, DROPOUT_COLUMNS), key))
                cells.append(mx.stack(rows)[:, :n_positions, : stop - column])
            runs.append(mx.concatenate(cells, axis=2))
        return mx.concatenate(runs, axis=1).astype(dtype) * (1 / (1 - self.rate))
