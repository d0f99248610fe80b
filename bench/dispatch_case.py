"""Counts what one optimizer step hands to a GPU: the engine and MLX are watched from outside (bench.dispatch)."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mebp_mlx  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import backprop
from mebp_mlx.engine.arena import Arena
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import Pass
from mebp_mlx.families.base import Block, value
from mebp_mlx.kernels.online_softmax import SoftmaxStep as Step
from mebp_mlx.model.config import PROJECTIONS
from mebp_mlx.model.lora import Lora
from mebp_mlx.ops import cross_entropy as ops_head
from mebp_mlx.ops.plan import SAVE_EVERYTHING, Plan
from mebp_mlx.planner import search
from mebp_mlx.planner.sizes import lora_sizes
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system.device import on_gpu, on_metal
from mebp_mlx.training.optimizers import PlainSGD
from mebp_mlx.training.update import Updater
from mebp_mlx.weights.safetensors import MappedWeights

OPTIMIZERS = {"sgd": PlainSGD, "adamw": optim.AdamW}
_VIEWS = """Reshape Slice Transpose Broadcast BroadcastAxes View Squeeze ExpandDims Split Flatten Unflatten AsStrided
    Copy StopGradient Depends CustomTransforms"""  # Copy shares its input's memory, Contiguous is the one that copies
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
_PARTS = dict.fromkeys("qkvo", "projections") | dict.fromkeys("QKa", "attention") | {"d": "MLP"}  # by equation
_NODE = re.compile(r'label ="(\w+)", shape=rectangle')
_READERS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__")  # of an array, by Python
NUMBERS = (  # counts, and bytes: copied to MLX (of weights, gathered rows, the file, all else), of the file
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
MLX_LM = {"plain": False, "checkpointed": True}


def nodes_of(arrays: Any) -> Counter[str]:
    """Primitives that evaluating these arrays (any tree of them) would run, by name."""
    found = _arrays(arrays)
    text = io.StringIO()
    if found:
        mx.export_to_dot(text, *found)
    return Counter(_NODE.findall(text.getvalue()))


def non_views(nodes: Counter[str]) -> int:
    """How many of them are more than another look at memory."""
    return sum(n for name, n in nodes.items() if name not in VIEWS)


def _arrays(tree: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


class Counts:
    """What a step did, by stage: `numbers` as in NUMBERS, and the nodes of its graph by name."""

    def __init__(self) -> None:
        self.numbers: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}
        self.nodes: dict[str, Counter[str]] = {stage: Counter() for stage in STAGES}

    @property
    def all_nodes(self) -> Counter[str]:
        return sum(self.nodes.values(), start=Counter())


class Watch:
    """Counts one step from outside: MLX's and the engine's functions are wrapped while it is open.

    by_stage: everything is evaluated where a stage ends, so that nodes are counted by stage; what is waited for and
    submitted is then not the step's own.
    """

    def __init__(self, by_stage: bool):
        self.by_stage, self.counts = by_stage, Counts()
        self.now, self.direction, self.copying = "rest", "forward", "other"
        self.paused = False
        self._known: weakref.WeakValueDictionary[int, mx.array] = weakref.WeakValueDictionary()  # evaluated ones
        self._plain_eval = mx.eval

    def note(self, what: str, n: int = 1) -> None:
        if not self.paused:
            self.counts.numbers[self.now][what] += n

    def settle(self, tree: Any) -> None:
        """Count the graph of these arrays to the stage of the moment, and evaluate it."""
        if self.by_stage and not self.paused:
            self._count(tree)
            self._plain_eval(*_arrays(tree))

    def _count(self, tree: Any) -> None:
        nodes = nodes_of(tree)
        nodes["StandIn"] = nodes.pop("Depends", 0)  # the engine has none of its own
        self.counts.nodes[self.now] += nodes

    @contextlib.contextmanager
    def stage(self, name: str, inputs: Any) -> Iterator[Callable[[Any], None]]:
        """Inside it a stage is at work on some arrays; it says what it made."""
        before = self.now
        self.settle(inputs)
        self.now = name
        try:
            yield self.settle
        finally:
            self.now = before

    def eval(self, *arrays: Any) -> None:
        """In the place of mx.eval."""
        found = _arrays(list(arrays))
        if any(self._known.get(id(array)) is not array for array in found):
            self.note("waits")
        self._count(found)
        self._plain_eval(*found)
        self._known.update({id(array): array for array in found})

    def read(self, array: Any) -> None:
        """Numpy or Python looks at an array."""
        if isinstance(array, mx.array) and self._known.get(id(array)) is not array:
            self.note("waits")
            self._count(array)
            self._known[id(array)] = array

    @contextlib.contextmanager
    def open(self) -> Iterator[Counts]:
        """Everything wrapped."""
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
        """mx.array in the engine's modules; what it copies is a weight's rows or columns, gathered rows, or else."""

        def inside(what: str) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def copying(*args: Any, **kwargs: Any) -> Any:
                    before, self.copying = self.copying, what
                    try:
                        return plain(*args, **kwargs)
                    finally:
                        self.copying = before

                return copying

            return make

        def moving(what: str) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def move(arena: Arena, *args: Any) -> Any:
                    found = plain(arena, *args)
                    self.note(what, (args[-1] if found is None else found).nbytes)
                    return found

                return move

            return make

        core = _Core(self)
        for name, module in list(sys.modules.items()):
            if name.startswith("mebp_mlx.") and vars(module).get("mx") is mx:
                wrap(module, "mx", lambda _: core)
        wrap(MappedWeights, "rows", inside("weights"))
        wrap(MappedWeights, "columns", inside("weights"))
        wrap(MappedWeights, "gather", inside("gathered"))
        wrap(Arena, "put", moving("written"))
        wrap(Arena, "get", lambda plain: inside("file")(moving("read")(plain)))

    def _wrap_stages(self, wrap: Callable) -> None:
        def whole(stage: str, inputs: Callable[..., Any] = lambda *args: args) -> Callable[[Any], Any]:
            def make(plain: Any) -> Any:
                def run(*args: Any, **kwargs: Any) -> Any:
                    with self.stage(stage, inputs(*args)) as made:
                        found = plain(*args, **kwargs)
                        made(found)
                        return found

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
            """A part of a block, in the direction of the moment; with it go what it keeps and sums up."""

            def make(plain: Any) -> Any:
                def run(b: Block, *args: Any, **kwargs: Any) -> Any:
                    with self.stage(f"{self.direction}: {name}", args) as made:
                        found = plain(b, *args, **kwargs)
                        attention = b.run.attention
                        made([found, b.run.gradients, attention.keys, attention.values, attention.sums()])
                        return found

                return run

            return make

        def unseen(plain: Any) -> Any:
            """A graph that is built for its shapes alone."""

            def run(*args: Any) -> Any:
                self.paused = True
                try:
                    return plain(*args)
                finally:
                    self.paused = False

            return run

        wrap(backprop, "kept_bytes", unseen)
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
    """mlx.core, as the engine's modules see it while a step is watched: arrays made of numpy's are counted."""

    def __init__(self, watch: Watch):
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def array(self, values: Any, *args: Any, **kwargs: Any) -> mx.array:
        if isinstance(values, np.ndarray):
            self._watch.note("copies")
            self._watch.note(f"copied_{self._watch.copying}", values.nbytes)
        return mx.array(values, *args, **kwargs)


@contextlib.contextmanager
def emulated(allocating: bool = False) -> Iterator[None]:
    """Without Metal mapped pages are "adopted" all the same; without a GPU products and kernel are stand-ins.

    allocating: a stand-in's result is memory of its own, which takes a few nodes; else it is one node.
    """
    evaluate, known = mx.eval, {}

    def constant(number: float, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        key = (number, shape, dtype)
        if key not in known:
            known[key] = mx.broadcast_to(mx.array(number, dtype), shape)  # one number in memory
            evaluate(known[key])
        return known[key]

    def product(x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None = None, **how: Any) -> mx.array:
        width = w.shape[0] if how["transpose"] else w.shape[1] * 32 // how["bits"]
        result = constant(0, (*x.shape[:-1], width), x.dtype)
        if allocating:
            result = x[..., :1] * constant(0, (width,), x.dtype)
        return mx.depends([result], [part for part in (x, w, scales, biases) if part is not None])[0]

    def softmax(
        z: mx.array, maximum: mx.array, total: mx.array, target_logit: mx.array, targets: mx.array, first: int
    ) -> Step:
        p = z * constant(0, (), z.dtype) if allocating else constant(0, z.shape, z.dtype)
        numbers = [constant(number, maximum.shape) for number in (0, 1, 0, 1)]
        return Step(*mx.depends([p, *numbers], [z, maximum, total, target_logit, targets]))

    def in_place(weights: MappedWeights, name: str) -> mx.array | None:
        info = weights.info(name)
        if not weights.adopt or info.not_adoptable:
            return None
        if name not in weights._adopted:
            found = constant(1, info.shape, info.mlx_dtype)
            if on_gpu():
                found = mx.array(weights.view(name)).view(info.mlx_dtype)
                evaluate(found)
            weights._adopted[name] = found
        return weights._adopted[name]

    with contextlib.ExitStack() as stack:
        if not on_metal():
            stack.enter_context(mock.patch.object(MappedWeights, "in_place", in_place))
        if not on_gpu():
            stack.enter_context(mock.patch.object(mx, "quantized_matmul", product))
            stack.enter_context(mock.patch.object(ops_head, "softmax_kernel", softmax))
        yield


class Case:
    """A model of the bench's, in Metal's defaults, with what a step of it needs.

    budget_bytes: the plan is the one that training would choose for it; None: the fastest one, with `kept_bytes` of
    kept values in memory (None: all).
    """

    def __init__(
        self,
        folder: Path,
        n_tokens: int,
        optimizer: str,
        kept_bytes: int | None = None,
        budget_bytes: int | None = None,
        rank: int = 8,
    ):
        self.model = mebp_mlx.open_model(folder, "bfloat16", "packed")
        self.model.weights.adopt = True
        self.lora = mebp_mlx.init_lora(self.model, rank=rank)
        self.make_optimizer = lambda: OPTIMIZERS[optimizer](learning_rate=1e-4)
        tokens, targets = np.random.default_rng(0).integers(0, self.model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        self.batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
        state = lora_sizes(self.model.spec, self.lora.keys, -1, rank, self.make_optimizer()).state
        self.workload = Workload(self.model, self.lora, 1, n_tokens, make_updater=self._updater, state_bytes=state)
        with mock.patch.object(search, "on_gpu", lambda: True):
            if budget_bytes is not None:
                with emulated(allocating=True):
                    self.plan = search.choose(self.workload, budget_bytes).plan
            else:
                fastest = search.ladder(self.workload)[-1]
                saved = SAVE_EVERYTHING if kept_bytes is None else fastest.saved  # as training chooses with room for it
                self.plan = dataclasses.replace(fastest, saved=saved, kept_bytes=kept_bytes, offload_state=False)

    def _updater(self, lora: Lora, plan: Plan) -> Updater:
        return Updater(self.make_optimizer(), lora, park=plan.offload_state, is_lazy=plan.is_lazy)

    @contextlib.contextmanager
    def steps(self, plan: Plan) -> Iterator[tuple[BackpropEngine, Callable[[], None]]]:
        """An engine with its updater, and a function that does one step; one has been done."""
        updater, engine = self._updater(self.lora, plan), BackpropEngine(self.model, self.lora, plan=plan)

        def step() -> None:
            updater.begin_step()
            n_labels = self.batch.n_labels
            engine.step(self.batch, step=0, micro=0, n_labels=n_labels, sink=lambda found: updater.sink(found))
            updater.end_step()

        try:
            step()
            mx.synchronize()
            yield engine, step
            mx.synchronize()
        finally:
            engine.close()


def count(case: Case) -> dict[str, Any]:
    """{"stages": {stage: numbers}, "names": {stage: nodes by name}, ...} of one step."""
    found: dict[str, Any] = {}
    with emulated():
        with case.steps(case.plan) as (engine, step):
            with Watch(by_stage=False).open() as whole:
                step()
            mx.synchronize()
            found["kept_bytes"] = engine.store.held_bytes + engine.store.written_bytes
            with Watch(by_stage=True).open() as parts:
                step()
            mx.synchronize()
            began_s = time.perf_counter()
            step()
            mx.synchronize()
            found["step_s"] = time.perf_counter() - began_s if on_gpu() else None
        adopted = [name for name, array in case.model.weights._adopted.items() if array is not None]
    if whole.all_nodes != parts.all_nodes:
        raise AssertionError(f"{whole.all_nodes} in the step, {parts.all_nodes} in its stages")
    found["adopted_tensors"] = len(adopted)
    found["adopted_bytes"] = sum(case.model.weights.info(name).n_bytes for name in adopted)
    found["names"] = {stage: dict(nodes) for stage, nodes in parts.nodes.items() if nodes}
    found["stages"] = {}
    for stage in STAGES:
        nodes = parts.nodes[stage]
        row = {"nodes": sum(nodes.values()), "non_view": non_views(nodes)}
        found["stages"][stage] = {name: whole.numbers[stage][name] for name in NUMBERS} | row
    return found


def peak_bytes(case: Case) -> dict[str, int]:
    """MLX's own peak by phase of a step, over what is there before it (LoRA, optimizer state), kept values in the file.

    What is under way of the phase before counts as well.
    """
    found: dict[str, int] = {}

    def phase(name: str, plain: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            mx.reset_peak_memory()
            result = plain(*args, **kwargs)
            found[name] = max(found.get(name, 0), mx.get_peak_memory() - before)
            return result

        return run

    with emulated(allocating=True), contextlib.ExitStack() as stack:
        _, step = stack.enter_context(case.steps(dataclasses.replace(case.plan, kept_bytes=0)))
        before = mx.get_active_memory()
        phases = ((Pass, "forward", "forward"), (backprop, "cross_entropy", "head"))
        for owner, name, label in (*phases, (BackpropEngine, "backward", "backward")):
            stack.enter_context(mock.patch.object(owner, name, phase(label, getattr(owner, name))))
        step()
        mx.synchronize()
    return found


def total(stages: dict[str, dict[str, int]]) -> dict[str, int]:
    """The numbers of all stages together."""
    return {name: sum(row[name] for row in stages.values()) for name in next(iter(stages.values()))}


def extrapolated(fewer: Any, more: Any, n_blocks: int) -> Any:
    """The numbers with `n_blocks` blocks beyond those of `more`, from a count of one block less and this one."""
    if isinstance(more, dict):
        return {name: extrapolated(fewer.get(name, 0), number, n_blocks) for name, number in more.items()}
    return more + n_blocks * (more - fewer)


def mlx_lm(config: dict[str, Any], n_tokens: int, optimizer: str, checkpointed: bool, rank: int = 8) -> dict[str, Any]:
    """The graph of mlx-lm's own step (its model class, its LoRA, its trainer's loss): built, never evaluated."""
    from mlx_lm.tuner.trainer import grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import _get_classes

    def leaf(array: Any) -> Any:
        if not isinstance(array, mx.array):
            return array
        constant = mx.broadcast_to(mx.array(0, array.dtype), array.shape)
        mx.eval(constant)
        return constant

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    nn.quantize(model, group_size=64, bits=4)
    model.set_dtype(mx.bfloat16)
    model.freeze()
    how = {"rank": rank, "scale": 20.0, "dropout": 0.0, "keys": list(PROJECTIONS.values())}
    linear_to_lora_layers(model, len(model.layers), how)
    model.update(tree_map(leaf, model.parameters()))
    update = OPTIMIZERS[optimizer](learning_rate=1e-4)
    update.init(model.trainable_parameters())
    update._state = tree_map(leaf, update.state)
    tokens = leaf(mx.zeros((1, n_tokens), mx.int32))
    layer = type(model.layers[0])
    with mock.patch.object(layer, "__call__", layer.__call__):  # grad_checkpoint replaces it, for the whole class
        if checkpointed:
            grad_checkpoint(model.layers[0])
        value_and_grad = nn.value_and_grad(model, lambda m: nn.losses.cross_entropy(m(tokens), tokens).mean())
        loss, gradients = value_and_grad(model)
    until: list[Counter[str]] = [Counter(), nodes_of(loss), nodes_of([loss, gradients])]
    update.update(model, gradients)
    until.append(nodes_of([loss, model.trainable_parameters(), update.state]))
    phases = {}
    for phase, before, after in zip(("forward", "backward", "update"), until, until[1:], strict=False):
        nodes = after - before
        phases[phase] = {
            "products": nodes["QuantizedMatmul"],
            "nodes": sum(nodes.values()),
            "non_view": non_views(nodes),
        }
    return {"waits": 1, **total(phases), "phases": phases}
