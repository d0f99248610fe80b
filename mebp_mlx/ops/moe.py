"""A mixture of experts: each token goes through a few of many gated MLPs; only chosen ones are read.

    p = softmax(r) or sigmoid(r),  r = router(h);   c = the k experts of the largest p (sigmoid: of p + selection bias)
    s = p[c];   normalized: s / (sum s + eps);   times a scale;   or s = softmax(r[c]), which equals normalized p[c]
    y = sum_j E_c[j](h, s_j);   E(x, s) = (s m) Wd^T + s bd,   m = act(x Wg^T) * (x Wu^T),  each W with its LoRA pair

with g = dL/dy on the rows x of an expert (c is a constant; applying s before the last product, which is equivalent,
gives dL/ds without the expert's output):
    d(s m) = g Wd,   ds = sum(m * g Wd) + sum(g * bd),   dm = s g Wd;   the rest as in gated_mlp.py
    dr: by autograd through s on [tokens, experts]; dense if s is not normalized
(mlx-lm's qwen3_moe, olmoe, lfm2_moe and gpt_oss.) argpartition breaks ties as in mlx-lm, except in olmoe, where mlx-lm
partitions -p and may choose differently. An expert's matrices are read in blocks, like all others; sums over experts
are float32, in the experts' order. An expert without rows is not read and has zero gradients.

Reading the chosen experts requires c: one blocking wait per mixture and tile, only in the forward pass. Every plan
keeps c, so that the backward pass visits the same experts without a wait; s follows from r, which is recomputed to the
same bits. In a traced graph no value is known, so each expert takes all rows, with s = 0 if it was not chosen. On a
model without weights, used for counting, tokens are spread evenly, over as many experts as they can reach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..model.config import Layer, Linear
from ..model.lora import Pair
from .gated_mlp import Gate
from .lora_linear import Backward, Input, LoraLinear, Shared
from .plan import Context

_SHORTS = ("gate", "up", "down")


class _Nowhere:
    """Keeps nothing (lora_linear.py: Memory): an expert's values are recomputed from the weights that its backward
    reads in any case, and its rows are few."""

    def keeps(self, name: str) -> bool:
        return False

    def put(self, name: str, position: int, value: mx.array) -> bool:
        return False

    def take(self, name: str, position: int) -> mx.array | None:
        return None


class Needs(NamedTuple):
    """The gradients that a backward pass needs besides the pairs': of the mixture's input and the router's output."""

    dx: bool
    dr: bool


class Visit(NamedTuple):
    """The rows of one expert in a tile. at: indices into flat [tokens, k], int [n]; None: every token, with s or 0."""

    expert: int
    at: np.ndarray | None


class ExpertLinear(LoraLinear):
    """One matrix of an expert on rows [1, n, in]. whole: the stack's pair; mask: dropout factors of those rows."""

    def __init__(self, shared: Shared, short: str, linear: Linear, whole: Pair | None, mask: mx.array | None):
        self._whole, self.mask = whole, mask
        self.found: dict[str, mx.array] = {}  # gradients in the stack's layout
        super().__init__(shared, short, linear)

    def pair_of(self) -> Pair | None:
        return self._whole

    def dropped(self, x: mx.array, rows: mx.array, position: int, start: int = 0, stop: int | None = None) -> mx.array:
        return x if self.mask is None else x * self.mask[..., start:stop]

    def add(self, part: str, gradient: mx.array) -> None:
        self.found[part] = gradient.T
        self.barrier.piece(self.found[part])


class Expert:
    """One gated MLP of the mixture, on its own rows."""

    def __init__(self, gate: ExpertLinear, up: ExpertLinear, down: ExpertLinear, act: Gate):
        self.gate, self.up, self.down, self.act, self.barrier = gate, up, down, act, down.barrier
        linear = down.linear
        self.blocks = down.plan.column_blocks(linear.in_dims, down.model.copied_bytes(linear, linear.out_dims))

    def __call__(self, x: mx.array, s: mx.array) -> mx.array:
        """x [1, n, D], s [1, n, 1] -> [1, n, D]."""
        gate_low, up_low = self.gate.low_rank(x, 0), self.up.low_rank(x, 0)
        down = Input(self.down, 0)
        for start, stop in self.blocks:
            g, u = self.gate.rows(x, gate_low, start, stop), self.up.rows(x, up_low, start, stop)
            self.barrier.piece(g, u)
            m = self.act(g, u, in_place=True) * s
            self.barrier.piece(m)
            del g, u
            down.add(start, stop, m)
        return down.output()

    def backward(self, x: mx.array, s: mx.array, dy: mx.array, need: Needs) -> tuple[mx.array | None, mx.array | None]:
        """(dL/dx [1, n, D], not rounded to the compute dtype, dL/ds [1, n, 1] without the bias's part); or None."""
        inner = need.dx or self.gate.pair is not None or self.up.pair is not None
        down = Input(self.down, 0, dy)
        gate, up = (Backward(linear, x, 0, need.dx) for linear in (self.gate, self.up))
        ds: mx.array | None = None
        for start, stop in self.blocks:
            gates, ups = self.gate.block(start, stop), self.up.block(start, stop)
            g, u = self.gate.rows(x, gate.low, start, stop, gates), self.up.rows(x, up.low, start, stop, ups)
            self.barrier.piece(g, u)
            m = self.act(g, u)
            self.barrier.piece(m)
            down.take(start, stop, m * s)
            if not inner and not need.dr:
                continue
            dm = down.cotangent(start, stop)
            part = (m.astype(mx.float32) * dm).sum(axis=-1, keepdims=True)
            ds = part if ds is None else ds + part
            dm = dm * s
            self.barrier.piece(ds, dm)
            del m
            if inner:
                _, dg, du = self.act.backward(g, u, dm)
                del g, u, dm
                self.barrier.piece(dg, du)
                gate.take(start, stop, dg, gates)
                up.take(start, stop, du, ups)
        down.finish()
        d_gate, d_up = gate.finish(), up.finish()
        return None if d_gate is None or d_up is None else d_gate + d_up, ds


class Moe:
    """The mixture of one layer, applied tile by tile.

    selection_bias: float32 [E] or None; gradients: accumulates those of the stacks' pairs, by parameter name.
    """

    def __init__(
        self,
        context: Context,
        layer: Layer,
        act: Gate,
        selection_bias: mx.array | None,
        gradients: dict[str, mx.array],
    ):
        routing = context.model.spec.routing
        assert routing is not None
        self.routing, self.selection_bias = routing, selection_bias
        self.model, self.barrier, self.act, self.ahead = context.model, context.barrier, act, context.ahead
        self.stacks, self.gradients = layer.experts, gradients
        self.shared = Shared(context, _Nowhere())
        self.pairs = {short: context.adapter.pairs.get(stack.name) for short, stack in layer.experts.items()}
        self.is_copied = any(self.model.copied_bytes(stack, stack.in_dims) for stack in layer.experts.values())

    def choose(self, r: mx.array) -> mx.array:
        """The experts of each token, uint32 [B, tile, k], unordered; evaluated, except in a traced graph."""
        p, k = self._scores(r), self.routing.n_chosen
        if self.selection_bias is not None:
            p = p.astype(mx.float32) + self.selection_bias
        choice = mx.stop_gradient(mx.argpartition(p, kth=-k, axis=-1)[..., -k:])
        if self.barrier.grain is not None:
            choice = mx.contiguous(choice)  # a view would hold the array of all experts
            self.barrier.wait(choice)
        return choice

    def _scores(self, r: mx.array) -> mx.array:
        if self.routing.score == "softmax of the chosen":
            return r
        return mx.sigmoid(r) if self.routing.score == "sigmoid" else mx.softmax(r, axis=-1, precise=True)

    def weights(self, r: mx.array, choice: mx.array) -> mx.array:
        """s [B, tile, k]."""
        s = mx.take_along_axis(self._scores(r), choice, axis=-1)
        if self.routing.score == "softmax of the chosen":
            s = mx.softmax(s, axis=-1, precise=True)
        elif self.routing.normalizes:
            s = s / (s.sum(axis=-1, keepdims=True) + self.routing.eps)
        return s if self.routing.scale == 1 else s * self.routing.scale

    def __call__(self, x: mx.array, r: mx.array, choice: mx.array, position: int) -> mx.array:
        """x [B, tile, D] from a position on -> y [B, tile, D]."""
        rows, s, masks = _flat(x), self.weights(r, choice), self._masks(x, position)
        y = mx.zeros(rows.shape, _wide(rows.dtype))
        for visit in self._visits(choice):
            own, s_own = self._own(rows, visit), self._weights_of(s, choice, visit)
            part = self._expert(visit, masks)(own, s_own)
            if (bias := self._bias(visit)) is not None:
                part = part + s_own * bias
            y = self._added(y, part, visit)
            self._submit(y)
        return y.astype(x.dtype).reshape(x.shape)

    def backward(
        self, x: mx.array, r: mx.array, choice: mx.array, dy: mx.array, position: int, need: Needs
    ) -> tuple[mx.array | None, mx.array | None]:
        """(dL/dx [B, tile, D] without the router's part, not rounded to the compute dtype, dL/dr [B, tile, E]); or
        None. Accumulates the pairs' gradients.
        """
        rows, g = _flat(x), _flat(dy)
        s, masks = self.weights(r, choice), self._masks(x, position)
        dx = mx.zeros(rows.shape, _wide(rows.dtype)) if need.dx else None
        ds: list[mx.array] = []
        found: dict[str, dict[int, mx.array]] = {}
        for visit in self._visits(choice):
            expert, g_own = self._expert(visit, masks), self._own(g, visit)
            s_own = self._weights_of(s, choice, visit)
            part, ds_own = expert.backward(self._own(rows, visit), s_own, g_own, need)
            if need.dr and ds_own is not None:
                if (bias := self._bias(visit)) is not None:
                    ds_own = ds_own + (g_own.astype(mx.float32) * bias).sum(axis=-1, keepdims=True)
                ds.append(ds_own)
            if dx is not None and part is not None:
                dx = self._added(dx, part, visit)
            for linear in (expert.gate, expert.up, expert.down):
                for name, gradient in linear.found.items():
                    found.setdefault(f"{self.stacks[linear.short].name}.{name}", {})[visit.expert] = gradient
            self._submit(*ds[-1:], *([] if dx is None else [dx]))
        self._sum_up(found)
        dr = self._router_backward(r, choice, mx.concatenate(ds, axis=1)) if need.dr else None
        return None if dx is None else dx.reshape(x.shape), dr

    def _router_backward(self, r: mx.array, choice: mx.array, ds: mx.array) -> mx.array:
        """dL/dr from ds [1, tokens * k, 1], expert by expert."""
        order = np.concatenate([visit.at for visit in self._visits(choice, asks=False) if visit.at is not None])
        back = np.empty_like(order)
        back[order] = np.arange(order.size)
        ds = ds.reshape(-1)[mx.array(back)].reshape(choice.shape).astype(r.dtype)
        (dr,) = mx.vjp(lambda r: self.weights(r, choice), [r], [ds])[1]
        self.barrier.piece(dr)
        return dr

    def _visits(self, choice: mx.array, asks: bool = True) -> Iterator[Visit]:
        """The experts that a tile's tokens chose, in order. asks: prefetch their pages."""
        E = self.routing.n_experts
        if self.model.is_unread:
            chosen = np.arange(choice.size) % E
        elif self.barrier.grain is None:
            yield from (Visit(expert, None) for expert in range(E))
            return
        else:
            chosen = np.asarray(choice).reshape(-1)
        order = np.argsort(chosen, kind="stable").astype(np.int32)
        experts, starts = np.unique(chosen[order], return_index=True)
        if self.ahead is not None and asks:
            for stack in self.stacks.values():
                self.ahead.experts(stack, experts.tolist())
        for expert, at in zip(experts, np.split(order, starts[1:]), strict=True):
            yield Visit(int(expert), at)

    def _tokens(self, visit: Visit) -> mx.array:
        assert visit.at is not None
        return mx.array(visit.at // self.routing.n_chosen)

    def _own(self, rows: mx.array, visit: Visit) -> mx.array:
        """The expert's rows [1, n, width] of [tokens, width]."""
        own = (rows if visit.at is None else rows[self._tokens(visit)])[None]
        self.barrier.piece(own)
        return own

    def _added(self, total: mx.array, part: mx.array, visit: Visit) -> mx.array:
        """total [tokens, D] plus the expert's part [1, n, D] on its rows, which are distinct."""
        part = part[0].astype(total.dtype)
        total = total + part if visit.at is None else total.at[self._tokens(visit)].add(part)
        self.barrier.piece(total)
        return total

    def _weights_of(self, s: mx.array, choice: mx.array, visit: Visit) -> mx.array:
        """s [1, n, 1] of the expert's rows."""
        if visit.at is None:
            s = mx.where(choice == visit.expert, s, mx.zeros_like(s)).sum(axis=-1)
            return s.reshape(1, -1, 1)
        return s.reshape(-1)[mx.array(visit.at)].reshape(1, -1, 1)

    def _bias(self, visit: Visit) -> mx.array | None:
        """The last matrix's bias [D]."""
        down = self.stacks["down"].expert(visit.expert)
        return self.model.bias(down, 0, down.out_dims)

    def _expert(self, visit: Visit, masks: Mapping[str, mx.array]) -> Expert:
        linears = {}
        for short in _SHORTS:
            stack, whole = self.stacks[short], self.pairs[short]
            pair = None if whole is None else whole.expert(visit.expert)
            mask = self._own(masks[short], visit) if short in masks else None
            own = stack.expert(visit.expert)
            linears[short] = ExpertLinear(self.shared, short, own if short != "down" else own.without_bias, pair, mask)
        return Expert(linears["gate"], linears["up"], linears["down"], self.act)

    def _masks(self, x: mx.array, position: int) -> dict[str, mx.array]:
        """Dropout factors [tokens, in] of each stack with a pair; a token has the same in all of its experts."""
        dropout, masks = self.shared.dropout, {}
        for short, stack in self.stacks.items():
            if dropout is not None and self.pairs[short] is not None:
                masks[short] = _flat(dropout.mask(stack.name, x.shape[:2], position, (0, stack.in_dims), x.dtype))
                self.barrier.piece(masks[short])
        return masks

    def _sum_up(self, found: dict[str, dict[int, mx.array]]) -> None:
        """Adds a tile's gradients, by parameter name and expert, as stacks."""
        for short, pair in self.pairs.items():
            for part, like in zip(("lora_a", "lora_b"), pair[:2] if pair is not None else (), strict=False):
                name = f"{self.stacks[short].name}.{part}"
                own, none = found.pop(name, {}), mx.zeros(like.shape[1:])
                stack = mx.stack([own.get(expert, none) for expert in range(self.routing.n_experts)])
                self.gradients[name] = self.gradients[name] + stack if name in self.gradients else stack
                self.barrier.piece(self.gradients[name])

    def _submit(self, *sums: mx.array) -> None:
        """If expert weights are copied, limits unfinished work to two experts."""
        self.shared.clear()
        if self.is_copied and self.barrier.is_lazy:
            self.barrier.chunk(*sums)


def _flat(x: mx.array) -> mx.array:
    """[B, tile, width] as [B * tile, width]."""
    return x.reshape(-1, x.shape[-1])


def _wide(dtype: mx.Dtype) -> mx.Dtype:
    return dtype if dtype.size > 4 else mx.float32
