"""A decoder block on one tile of the sequence, as named equations; and what the tiles of a block share.

A family's block is a subclass of Block: its values, and beside them its backward. What was kept stands in its
equation's place, what was not is computed again by being asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar, Protocol

import mlx.core as mx

from ..model.config import Layer
from ..ops.attention import Attention, Heads
from ..ops.gated_mlp import Gate, GatedMlp
from ..ops.layer_input import LayerInput
from ..ops.lora_linear import LoraLinear, Shared
from ..ops.moe import Moe
from ..ops.plan import Context


class Kept(Protocol):
    """Values kept between a block's forward and its backward, by layer, name and the position of their tile."""

    def put(self, layer: int, name: str, position: int, value: mx.array) -> bool:
        """Keep a value; whether its array stays in use."""

    def get(self, layer: int, name: str, position: int) -> mx.array | None:
        """A kept value, or None."""

    def take(self, layer: int, name: str, position: int) -> mx.array | None:
        """The same, handed over: the caller holds the only reference."""


class BlockKept:
    """What one block keeps in its forward pass, and finds again in its backward pass (ops/lora_linear.py: Memory).

    names: of the values to keep in a forward pass; None in a backward pass.
    """

    def __init__(self, kept: Kept | None, layer: int, names: frozenset[str] | None):
        self.kept, self.layer, self.names = kept, layer, names

    def keeps(self, name: str) -> bool:
        """Whether values of that name, without their number, may be kept."""
        return self.kept is not None and (self.names is None or name in self.names)

    def put(self, name: str, position: int, value: mx.array) -> bool:
        """Keep a value if the plan says so, in a forward pass; whether its array stays in use."""
        if self.kept is None or self.names is None or name.partition(".")[0] not in self.names:
            return False
        return self.kept.put(self.layer, name, position, value)

    def get(self, name: str, position: int) -> mx.array | None:
        """A kept value, in a backward pass."""
        return None if self.kept is None or self.names is not None else self.kept.get(self.layer, name, position)

    def take(self, name: str, position: int) -> mx.array | None:
        """The same, given away."""
        return None if self.kept is None or self.names is not None else self.kept.take(self.layer, name, position)


class value:
    """An equation `value(lambda block, input, ...: result)` of a block; its parameters name its inputs.

    Computed when first asked for. In a forward pass an input is given up when its last reader has read it.
    """

    def __init__(self, equation: Callable[..., mx.array]):
        self.equation = equation
        code = equation.__code__
        self.inputs = code.co_varnames[1 : code.co_argcount]

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, block: Any, owner: type | None = None) -> Any:
        if block is None:
            return self
        value = block.run.kept.get(self.name, block.position)
        if value is None:
            value = self.equation(block, *[getattr(block, name) for name in self.inputs])
            block.was_read(self.inputs)
            block.run.barrier.value(value)
            block.run.kept.put(self.name, block.position, value)
        block.__dict__[self.name] = value  # from now on the attribute itself
        return value


class BlockRun:
    """One block at work on a sequence in tiles: its norms, projections and attention, and its gradients.

    block: its class; kept: where values are kept, None: nowhere; names: of the values to keep, None in a backward pass.
    """

    def __init__(
        self,
        context: Context,
        layer: Layer,
        block: type[Block],
        kept: Kept | None = None,
        names: frozenset[str] | None = frozenset(),
    ):
        model, spec = context.model, context.model.spec
        self.barrier, self.kept = context.barrier, BlockKept(kept, layer.index, names)
        self.norm_eps, self.residual_scale, self.dtype = spec.norm_eps, spec.residual_scale, model.dtype
        self.block, self.delta = block, spec.delta
        self.norms, self.arrays = model.norms(layer), model.arrays(layer)
        self.shared = Shared(context, self.kept)
        self.gradients = self.shared.gradients  # of the pairs by parameter name, float32
        self.linear = {short: LoraLinear(self.shared, short, linear) for short, linear in layer.linears.items()}
        self.trained = frozenset(short for short, linear in self.linear.items() if linear.pair is not None)
        self.mlp: GatedMlp | None = None
        self.moe: Moe | None = None
        if layer.experts:
            self.moe = Moe(context, layer, block.gate, self.arrays.get("selection_bias"), self.gradients)
        else:
            self.mlp = GatedMlp(self.linear["gate"], self.linear["up"], self.linear["down"], block.gate)
        qk_norms = {"q": self.norms.get("q_norm"), "k": self.norms.get("k_norm")}
        heads = Heads(
            layer.head_dim,
            spec.attention_scale,
            layer.window,
            layer.rope,
            spec.norm_eps,
            qk_norms,
            spec.norm_after_rope,
            spec.attention_cap,
            self.arrays.get("sinks"),
        )
        self.attention = Attention(heads, context.plan.query_block, self.barrier, self.kept.keeps("a"))
        self.index = layer.index
        self.blocks: list[Block] = []  # of a backward pass, a tile each
        self.states: dict[int, mx.array] = {}  # of a backward pass, by the number of the tile that they stand before
        self.carried: dict[str, mx.array] = {}  # from tile to tile: values in a forward pass, cotangents in a backward

    @cached_property
    def layer_input(self) -> LayerInput:
        """What the layer reads of its tokens, in families that have this."""
        return LayerInput(self.shared, self.index)

    def begin(self, n_positions: int) -> None:
        """The tiles of a row of that length follow."""
        self.attention.choose(self.dtype, n_positions)

    def look_back(self) -> None:
        """Bring the keys and values of all tiles back, for a backward pass; once."""
        if self.attention.keys is None:
            for block in self.blocks:
                block.show_keys()
                block.drop("v", "k", "h", "x")


class Block:
    """The values of a block on one tile.

    run: what its tiles share; position: of the tile's first row; shape: (B, tile); x: the block's input [B, tile, D],
    None in a backward pass, which finds it among what was kept.
    """

    gate: ClassVar[Gate]
    not_read: ClassVar[frozenset[str]] = frozenset({"y"})  # by the backward: of no use when kept
    always: ClassVar[frozenset[str]] = frozenset({"x"})  # kept whatever the plan says
    serves: ClassVar[dict[str, str]] = {}  # values that the backward reads only to make another one
    names: ClassVar[frozenset[str]]  # of its values, those inside the MLP and xA of the pairs among them
    readers: ClassVar[Counter[str]]

    x = value(lambda b: b.without_input())  # given to a forward pass, kept for a backward pass
    Q: value  # what every family has: rotated queries and keys, values, and the block's output
    K: value
    v: value
    y: value

    def __init_subclass__(cls) -> None:
        values = [getattr(cls, name) for name in dir(cls) if isinstance(getattr(cls, name, None), value)]
        cls.names = frozenset(equation.name for equation in values) | {"g", "u", "low"}
        cls.readers = Counter(name for equation in values for name in equation.inputs)

    def __init__(self, run: BlockRun, position: int, shape: tuple[int, ...], x: mx.array | None = None):
        self.run, self.position, self.shape = run, position, shape
        self.unread = None if x is None else Counter(self.readers)  # in a forward pass
        if x is not None:
            self.x = x
            run.kept.put("x", position, x)

    def was_read(self, names: tuple[str, ...]) -> None:
        """Release values that have no further reader."""
        if self.unread is None:
            return
        self.unread.subtract(names)
        self.drop(*(name for name in names if not self.unread[name]))

    def without_input(self) -> mx.array:
        raise AssertionError("a block kept no input")

    def drop(self, *names: str) -> None:
        """Give up values; asked for again, they are computed again."""
        for name in names:
            self.__dict__.pop(name, None)

    def left_out(self, shapes: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]) -> mx.array:
        """In place of y where a probe leaves this tile out: zeros stand for keys, values and what is kept (shapes)."""
        for name, (shape, dtype) in shapes.items():
            if name != "x":
                self.run.kept.put(name, self.position, mx.zeros(shape, dtype))
        attention, dtype = self.run.attention, self.run.dtype
        k, v = (mx.zeros((*self.shape, self.run.linear[short].linear.out_dims), dtype) for short in "kv")
        attention.append(attention.heads.split(k), v)
        x: mx.array = self.x
        return x

    # The vocabulary of equations

    def evaluated(self, x: mx.array) -> mx.array:
        """x, a value of its own where the plan evaluates values."""
        self.run.barrier.value(x)
        return x

    def linear(self, short: str, x: mx.array) -> mx.array:
        """A projection's output."""
        return self.run.linear[short](x, self.position)

    def linear_backward(self, source: str, need_dx: bool, g: dict[str, mx.array]) -> mx.array | None:
        """dL/d(source), or None, from g = dL/dy of each projection of that value, emptied; pairs' gradients add up."""
        dx: mx.array | None = None
        dtype = self.run.dtype
        for short in list(g):
            x = getattr(self, source) if short in self.run.trained else None
            part = self.run.linear[short].backward(x, g.pop(short), self.position, need_dx)
            dx = part if dx is None or part is None else dx + part
            if dx is not None:
                self.run.barrier.piece(dx)
        self.drop(source)
        return None if dx is None else self.evaluated(dx.astype(dtype))

    def branch(self, x: mx.array) -> mx.array:
        """A branch's output as it joins the stream, and its cotangent as it comes from there."""
        scale = self.run.residual_scale
        return x if scale == 1 else x * scale

    def norm(self, name: str, x: mx.array) -> mx.array:
        """x / rms(x) * weight."""
        return mx.fast.rms_norm(x, self.run.norms[name], self.run.norm_eps)

    def norm_backward(self, name: str, x: mx.array, g: mx.array) -> mx.array:
        """dL/dx of that norm."""
        return self.evaluated(mx.vjp(lambda x: self.norm(name, x), [x], [g])[1][0])

    def rotate(self, short: str, x: mx.array) -> mx.array:
        """Q or K [B, heads, tile, head_dim] of a projection's output."""
        return self.run.attention.heads.rotated(short, x, self.position)

    def rotate_backward(self, short: str, g: mx.array) -> mx.array:
        """dL/dq or dL/dk from dL/dQ or dL/dK."""
        heads = self.run.attention.heads
        x = getattr(self, short) if heads.norms.get(short) is not None else None
        self.drop(short)
        return self.evaluated(heads.rotated_backward(short, x, g, self.position))

    def attend(self, Q: mx.array) -> mx.array:
        """Attention of a tile's queries; its keys and values join those of the tiles before it."""
        if self.unread is not None:
            self.show_keys()
        else:
            self.run.look_back()
        a, fused = self.run.attention(Q, self.position), self.run.attention.fused
        if self.unread is not None and self.position in fused:
            self.run.kept.put("a.lse", self.position, fused.pop(self.position)[1])  # kept where `a` is
        return a

    def show_keys(self) -> None:
        """The tile's keys and values join those that attention sees."""
        self.run.attention.append(self.K, self.v)
        self.drop("K", "v")

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        """dL/d of each projection before attention, of a tile; later tiles must have been visited."""
        dq = self.query_backward(da)
        dK, dv = self.run.attention.cotangents(self.position, self.shape[1])
        return {"q": dq, "k": self.rotate_backward("k", dK), "v": self.evaluated(dv)}

    def query_backward(self, da: mx.array) -> mx.array:
        """dL/dq of a tile; its part of dL/dK and dL/dV is summed up."""
        self.run.look_back()
        attention, lse = self.run.attention, self.run.kept.get("a.lse", self.position)
        if attention.is_fused and lse is not None and (a := self.run.kept.get("a", self.position)) is not None:
            attention.fused[self.position] = (a, lse)
            del a
        dQ = attention.backward(self.Q, da, self.position)
        self.drop("Q")
        return self.rotate_backward("q", dQ)

    def mlp(self, x: mx.array) -> mx.array:
        """The gated MLP's output."""
        assert self.run.mlp is not None
        return self.run.mlp(x, self.position)

    def mlp_backward(self, source: str, dy: mx.array, need_dx: bool) -> mx.array | None:
        """dL/d(source) of the gated MLP of that value, or None."""
        assert self.run.mlp is not None
        x = getattr(self, source)
        self.drop(*self.names)  # the MLP holds the most; what this value was made of can be had again
        return self.run.mlp.backward(x, dy, self.position, need_dx)

    def trains(self, *shorts: str) -> bool:
        """Whether one of these projections has a pair."""
        return not self.run.trained.isdisjoint(shorts)

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dx from dy = dL/dy, or None; the pairs' gradients on the way. Tiles come from the last to the first."""
        raise NotImplementedError
