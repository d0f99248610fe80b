"""A decoder block on one tile of the sequence, as named equations, and the state that a block's tiles share.

A family's block is a subclass of Block with its values and its backward. A kept value replaces its equation; any other
is recomputed when it is read.
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
        """Keeps a value; returns whether its array stays in use."""

    def get(self, layer: int, name: str, position: int) -> mx.array | None:
        """A kept value, or None."""

    def take(self, layer: int, name: str, position: int) -> mx.array | None:
        """Removes and returns a kept value, or None; the caller holds the only reference."""


class BlockKept:
    """The values that one block keeps in its forward pass and reads in its backward pass (ops/lora_linear.py: Memory).

    names: of the values to keep in a forward pass; None in a backward pass.
    """

    def __init__(self, kept: Kept | None, layer: int, names: frozenset[str] | None):
        self.kept, self.layer, self.names = kept, layer, names

    def keeps(self, name: str) -> bool:
        """Whether values of that name (without its number suffix) may be kept."""
        return self.kept is not None and (self.names is None or name in self.names)

    def put(self, name: str, position: int, value: mx.array) -> bool:
        """In a forward pass, keeps a value if the plan names it; returns whether its array stays in use."""
        if self.kept is None or self.names is None or name.partition(".")[0] not in self.names:
            return False
        return self.kept.put(self.layer, name, position, value)

    def get(self, name: str, position: int) -> mx.array | None:
        """In a backward pass, a kept value, or None."""
        return None if self.kept is None or self.names is not None else self.kept.get(self.layer, name, position)

    def take(self, name: str, position: int) -> mx.array | None:
        """In a backward pass, removes and returns a kept value, or None."""
        return None if self.kept is None or self.names is not None else self.kept.take(self.layer, name, position)


class value:
    """An equation `value(lambda block, input, ...: result)` of a block; its parameters name its inputs.

    It is computed at first access. In a forward pass, an input is released after its last reader.
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
        block.__dict__[self.name] = value  # later accesses find the attribute
        return value


class BlockRun:
    """One run of a block over a sequence in tiles: its norms, projections, attention and gradients.

    block: its class; kept: stores values, None keeps none; names: of the values to keep, None in a backward pass.
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
        self.gradients = self.shared.gradients  # of the LoRA pairs, by parameter name, float32
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
        self.blocks: list[Block] = []  # in a backward pass, one per tile
        self.states: dict[int, mx.array] = {}  # in a backward pass: the state before each tile, by tile index
        self.carried: dict[str, mx.array] = {}  # from tile to tile: values in a forward pass, cotangents backward

    @cached_property
    def layer_input(self) -> LayerInput:
        """The layer's input computed from its tokens, in families that have one."""
        return LayerInput(self.shared, self.index)

    def begin(self, n_positions: int) -> None:
        """Call it before the tiles of a row of that length."""
        self.attention.choose(self.dtype, n_positions)

    def look_back(self) -> None:
        """For a backward pass, restores the keys and values of all tiles, once."""
        if self.attention.keys is None:
            for block in self.blocks:
                block.show_keys()
                block.drop("v", "k", "h", "x")


class Block:
    """The values of a block on one tile.

    run: state shared by the block's tiles; position: of the tile's first row; shape: (B, tile); x: the block's input
    [B, tile, D]; None in a backward pass, which reads the kept input.
    """

    gate: ClassVar[Gate]
    not_read: ClassVar[frozenset[str]] = frozenset({"y"})  # not read by the backward pass: useless to keep
    always: ClassVar[frozenset[str]] = frozenset({"x"})  # kept under every plan
    serves: ClassVar[dict[str, str]] = {}  # values read by the backward only to compute another
    names: ClassVar[frozenset[str]]  # of its values, including the MLP's and the pairs' xA
    readers: ClassVar[Counter[str]]

    x = value(lambda b: b.without_input())  # passed to a forward pass, kept for the backward pass
    Q: value  # in every family: rotated queries and keys, values, and the block's output
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
        """Releases values that have no further reader."""
        if self.unread is None:
            return
        self.unread.subtract(names)
        self.drop(*(name for name in names if not self.unread[name]))

    def without_input(self) -> mx.array:
        raise AssertionError("a block kept no input")

    def drop(self, *names: str) -> None:
        """Releases values; a later access recomputes them."""
        for name in names:
            self.__dict__.pop(name, None)

    def left_out(self, shapes: Mapping[str, tuple[tuple[int, ...], mx.Dtype]]) -> mx.array:
        """x in place of y, if a probe skips this tile: keys, values and kept values (of these shapes) are zeros."""
        for name, (shape, dtype) in shapes.items():
            if name != "x":
                self.run.kept.put(name, self.position, mx.zeros(shape, dtype))
        attention, dtype = self.run.attention, self.run.dtype
        k, v = (mx.zeros((*self.shape, self.run.linear[short].linear.out_dims), dtype) for short in "kv")
        attention.append(attention.heads.split(k), v)
        x: mx.array = self.x
        return x

    # Building blocks of the equations

    def evaluated(self, x: mx.array) -> mx.array:
        """x, evaluated if the plan's grain evaluates values."""
        self.run.barrier.value(x)
        return x

    def linear(self, short: str, x: mx.array) -> mx.array:
        """A projection's output."""
        return self.run.linear[short](x, self.position)

    def linear_backward(self, source: str, need_dx: bool, g: dict[str, mx.array]) -> mx.array | None:
        """dL/d(source), or None, from g = dL/dy of its projections (emptied); accumulates the pairs' gradients."""
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
        """A branch's output, scaled for the residual stream; applied to its cotangent too."""
        scale = self.run.residual_scale
        return x if scale == 1 else x * scale

    def norm(self, name: str, x: mx.array) -> mx.array:
        """x / rms(x) * weight."""
        return mx.fast.rms_norm(x, self.run.norms[name], self.run.norm_eps)

    def norm_backward(self, name: str, x: mx.array, g: mx.array) -> mx.array:
        """dL/dx of norm(name, x) from g."""
        return self.evaluated(mx.vjp(lambda x: self.norm(name, x), [x], [g])[1][0])

    def rotate(self, short: str, x: mx.array) -> mx.array:
        """Q or K [B, heads, tile, head_dim] from a projection's output."""
        return self.run.attention.heads.rotated(short, x, self.position)

    def rotate_backward(self, short: str, g: mx.array) -> mx.array:
        """dL/dq or dL/dk from dL/dQ or dL/dK."""
        heads = self.run.attention.heads
        x = getattr(self, short) if heads.norms.get(short) is not None else None
        self.drop(short)
        return self.evaluated(heads.rotated_backward(short, x, g, self.position))

    def attend(self, Q: mx.array) -> mx.array:
        """Attention of a tile's queries; in a forward pass, appends its keys and values to those of earlier tiles."""
        if self.unread is not None:
            self.show_keys()
        else:
            self.run.look_back()
        a, fused = self.run.attention(Q, self.position), self.run.attention.fused
        if self.unread is not None and self.position in fused:
            self.run.kept.put("a.lse", self.position, fused.pop(self.position)[1])  # kept if `a` is
        return a

    def show_keys(self) -> None:
        """Appends the tile's keys and values to those that attention reads."""
        self.run.attention.append(self.K, self.v)
        self.drop("K", "v")

    def attend_backward(self, da: mx.array) -> dict[str, mx.array]:
        """dL/d(output) of each projection before attention, for a tile; visit later tiles first."""
        dq = self.query_backward(da)
        dK, dv = self.run.attention.cotangents(self.position, self.shape[1])
        return {"q": dq, "k": self.rotate_backward("k", dK), "v": self.evaluated(dv)}

    def query_backward(self, da: mx.array) -> mx.array:
        """dL/dq of a tile; accumulates its part of dL/dK and dL/dV."""
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
        """dL/d(source) from dy = dL/d(mlp(source)), or None."""
        assert self.run.mlp is not None
        x = getattr(self, source)
        self.drop(*self.names)  # the MLP needs the most memory; these values can be recomputed
        return self.run.mlp.backward(x, dy, self.position, need_dx)

    def trains(self, *shorts: str) -> bool:
        """Whether any of these projections has a LoRA pair."""
        return not self.run.trained.isdisjoint(shorts)

    def backward(self, dy: mx.array, need_dx: bool) -> mx.array | None:
        """dL/dx from dy = dL/dy, or None; accumulates the pairs' gradients. Call it from the last tile to the first."""
        raise NotImplementedError
