"""Counts the work that one optimizer step submits to a GPU; MLX and the engine are watched from outside."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mebp_mlx.engine import backprop
from mebp_mlx.engine.arena import Arena
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import Pass
from mebp_mlx.families.base import Block, value
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.training.update import Updater

_VIEWS = """Reshape Slice Transpose Broadcast BroadcastAxes View Squeeze ExpandDims Split Flatten Unflatten AsStrided
    Copy StopGradient Depends CustomTransforms"""  # Copy shares its input's memory; Contiguous copies
VIEWS = frozenset(_VIEWS.split())
STAGES = (
    "embed",
    "forward: projections",
    "forward: attention",
    "forward: MLP",
    "forward: norms, residuals",
    "head",
    "backward: MLP",
    "backward: attention",
    "backward: projections",
    "backward: norms, residuals",
    "update",
    "rest",
)
# Part by equation name.
_PARTS = dict.fromkeys("qkvo", "projections") | dict.fromkeys("QKa", "attention") | {"d": "MLP"}
_NODE = re.compile(r'label ="(\w+)", shape=rectangle')
_READERS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__")  # methods by which Python reads an array
# Counts; bytes copied to MLX (weights, gathered rows, the file, all else); bytes written to and read from the file.
NUMBERS = (
    "waits",
    "submissions",
    "products",
    "copies",
    "copied_weights",
    "copied_gathered",
    "copied_file",
    "copied_other",
    "written",
    "read",
)


def nodes_of(arrays: Any) -> Counter[str]:
    """The primitives that evaluating these arrays (in any tree) would run, counted by name."""
    leaves = _arrays(arrays)
    text = io.StringIO()
    if leaves:
        mx.export_to_dot(text, *leaves)
    return Counter(_NODE.findall(text.getvalue()))


def non_views(nodes: Counter[str]) -> int:
    """The number of primitives that are not just views of memory."""
    return sum(n for name, n in nodes.items() if name not in VIEWS)


def _arrays(tree: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


class Counts:
    """Counts of a step by stage: `numbers` with the keys of NUMBERS, and `nodes` of its graph by name."""

    def __init__(self) -> None:
        self.numbers: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
        self.nodes: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}

    @property
    def all_nodes(self) -> Counter[str]:
        return sum(self.nodes.values(), start=Counter())


class Watch:
    """Counts one step from outside: functions of MLX and the engine are wrapped while it is open.

    by_stage: evaluates everything at the end of each stage, to count nodes by stage; waits and submissions then differ
    from the step's own.
    """

    def __init__(self, by_stage: bool):
        self.by_stage, self.counts = by_stage, Counts()
        self.now, self.direction, self.copying = "rest", "forward", "other"
        self.paused = False
        self._known: weakref.WeakValueDictionary[int, mx.array] = weakref.WeakValueDictionary()  # evaluated arrays
        self._plain_eval = mx.eval

    def note(self, what: str, n: int = 1) -> None:
        if not self.paused:
            self.counts.numbers[self.now][what] += n

    def settle(self, tree: Any) -> None:
        """Counts the graph of these arrays for the current stage, and evaluates it."""
        if self.by_stage and not self.paused:
            self._count(tree)
            self._plain_eval(*_arrays(tree))

    def _count(self, tree: Any) -> None:
        nodes = nodes_of(tree)
        nodes["StandIn"] = nodes.pop("Depends", 0)  # the engine itself uses no Depends
        self.counts.nodes[self.now] += nodes

    @contextlib.contextmanager
    def stage(self, name: str, inputs: Any) -> Iterator[Callable[[Any], None]]:
        """A stage that works on `inputs`; call the yielded function with its results."""
        before = self.now
        self.settle(inputs)
        self.now = name
        try:
            yield self.settle
        finally:
            self.now = before

    def eval(self, *arrays: Any) -> None:
        """Replaces mx.eval."""
        evaluated = _arrays(list(arrays))
        if any(self._known.get(id(array)) is not array for array in evaluated):
            self.note("waits")
        self._count(evaluated)
        self._plain_eval(*evaluated)
        self._known.update({id(array): array for array in evaluated})

    def read(self, array: Any) -> None:
        """Called when numpy or Python reads an array."""
        if isinstance(array, mx.array) and self._known.get(id(array)) is not array:
            self.note("waits")
            self._count(array)
            self._known[id(array)] = array

    @contextlib.contextmanager
    def open(self) -> Iterator[Counts]:
        """Wraps MLX and the engine, and yields the counts."""
        with contextlib.ExitStack() as stack:

            def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

            self._wrap_mlx(wrap)
            self._wrap_copies(wrap)
            self._wrap_stages(wrap)
            yield self.counts

    def _wrap_mlx(self, wrap: Callable) -> None:
        def submitted(plain: Any) -> Any:
            def async_eval(*arrays: Any) -> None:
                self.note("submissions")
                self._count(list(arrays))
                plain(*arrays)

            return async_eval

        def reading(plain: Any) -> Any:
            def convert(array: Any, *args: Any, **kwargs: Any) -> Any:
                self.read(array)
                return plain(array, *args, **kwargs)

            return convert

        def product(plain: Any) -> Any:
            def quantized_matmul(*args: Any, **kwargs: Any) -> Any:
                self.note("products")
                return plain(*args, **kwargs)

            return quantized_matmul

        wrap(mx, "eval", lambda _: self.eval)
        wrap(mx, "async_eval", submitted)
        wrap(mx, "quantized_matmul", product)
        wrap(np, "asarray", reading)
        wrap(np, "array", reading)
        for name in _READERS:
            if name in vars(mx.array):
                wrap(mx.array, name, reading)

    def _wrap_copies(self, wrap: Callable) -> None:
        """Counts mx.array's copies in the engine: of weights, gathered rows, the file, or anything else."""

        def inside(what: str) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def copying(*args: Any, **kwargs: Any) -> Any:
                    before, self.copying = self.copying, what if self.copying == "other" else self.copying
                    try:
                        return plain(*args, **kwargs)
                    finally:
                        self.copying = before

                return copying

            return make

        def moving(what: str) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def move(arena: Arena, *args: Any) -> Any:
                    result = plain(arena, *args)
                    self.note(what, (args[-1] if result is None else result).nbytes)
                    return result

                return move

            return make

        core = _Core(self)
        for name, module in list(sys.modules.items()):
            if name.startswith("mebp_mlx.") and vars(module).get("mx") is mx:
                wrap(module, "mx", lambda _: core)
        wrap(Tensor, "__getitem__", inside("weights"))
        wrap(Model, "gather", inside("gathered"))
        wrap(Arena, "put", moving("written"))
        wrap(Arena, "get", lambda plain: inside("file")(moving("read")(plain)))

    def _unseen(self, plain: Any) -> Any:
        """Pauses counting in a function that builds a graph only for its shapes."""

        def run(*args: Any) -> Any:
            self.paused = True
            try:
                return plain(*args)
            finally:
                self.paused = False

        return run

    def _wrap_stages(self, wrap: Callable) -> None:
        def whole(stage: str, inputs: Callable[..., Any] = lambda *args: args) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def run(*args: Any, **kwargs: Any) -> Any:
                    with self.stage(stage, inputs(*args)) as made:
                        result = plain(*args, **kwargs)
                        made(result)
                        return result

                return run

            return make

        def block(direction: str) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                staged = whole(f"{direction}: norms, residuals")(plain)

                def run(*args: Any, **kwargs: Any) -> Any:
                    self.direction = direction
                    return staged(*args, **kwargs)

                return run

            return make

        def part(name: str) -> Callable[[Any], Any]:
            """Wraps a part of a block, in the current direction, including the values that it keeps and sums."""

            def make(plain: Any) -> Any:
                def run(b: Block, *args: Any, **kwargs: Any) -> Any:
                    with self.stage(f"{self.direction}: {name}", args) as made:
                        result = plain(b, *args, **kwargs)
                        attention = b.run.attention
                        made([result, b.run.gradients, attention.keys, attention.values, attention.sums()])
                        return result

                return run

            return make

        wrap(backprop, "kept_bytes", self._unseen)
        wrap(Pass, "embed", whole("embed"))
        wrap(Pass, "forward", block("forward"))
        wrap(BackpropEngine, "backward", block("backward"))
        wrap(backprop, "cross_entropy", whole("head", lambda work, x, *_: x))
        wrap(Updater, "sink", whole("update"))
        for owner in (Block, *Block.__subclasses__()):
            for name, equation in list(vars(owner).items()):
                if isinstance(equation, value):
                    wrap(equation, "equation", part(_PARTS.get(name, "norms, residuals")))
        for name, stage in (("linear", "projections"), ("attend", "attention"), ("mlp", "MLP")):
            wrap(Block, f"{name}_backward", part(stage))


class _Core:
    """Replaces mlx.core in the engine's modules during a watched step, and counts arrays made from numpy arrays."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def array(self, values: Any, *args: Any, **kwargs: Any) -> mx.array:
        if isinstance(values, np.ndarray):
            self._watch.note("copies")
            self._watch.note(f"copied_{self._watch.copying}", values.nbytes)
        return mx.array(values, *args, **kwargs)
