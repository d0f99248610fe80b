"""The counted step: our engine with Metal's defaults and stand-ins for a GPU's work, and mlx-lm's graph."""

from __future__ import annotations

import contextlib
import dataclasses
import time
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
from mlx.utils import tree_map

from bench.dispatch.watch import NUMBERS, STAGES, Watch, nodes_of, non_views
from mebp_mlx.data.dataset import Batch
from mebp_mlx.engine import backprop
from mebp_mlx.engine.backprop import BackpropEngine
from mebp_mlx.engine.base import Pass
from mebp_mlx.kernels.online_softmax import SoftmaxStep
from mebp_mlx.model.config import PROJECTIONS
from mebp_mlx.model.lora import Lora
from mebp_mlx.ops import attention as ops_attention
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
LONG_TOKENS = 4096  # attention over more of them is a stand-in
MLX_LM = {"plain": False, "checkpointed": True}


@contextlib.contextmanager
def emulated(allocating: bool = False, attention: bool = False) -> Iterator[None]:
    """Installs stand-ins: for zero-copy weights without Metal; for packed products and the head's kernel without a GPU.

    allocating: a stand-in allocates its result, which takes a few nodes; otherwise it is one node. attention: stands in
    for attention too, with one node per block of queries; a long row would take hours on a CPU.
    """
    evaluate, known = mx.eval, {}

    def constant(number: float, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32) -> mx.array:
        key = (number, shape, dtype)
        if key not in known:
            known[key] = mx.broadcast_to(mx.array(number, dtype), shape)  # stores one number
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
    ) -> SoftmaxStep:
        p = z * constant(0, (), z.dtype) if allocating else constant(0, z.shape, z.dtype)
        numbers = [constant(number, maximum.shape) for number in (0, 1, 0, 1)]
        return SoftmaxStep(*mx.depends([p, *numbers], [z, maximum, total, target_logit, targets]))

    def attend(heads: Any, q: mx.array, k: mx.array, v: mx.array, start: int, low: int) -> mx.array:
        B, H, n, width = q.shape
        return mx.depends([constant(0, (B, n, H * width), q.dtype)], [q, k, v])[0]

    def attend_backward(
        heads: Any, q: mx.array, k: mx.array, v: mx.array, start: int, low: int, da: mx.array
    ) -> tuple[mx.array, ...]:
        return tuple(mx.depends([constant(0, x.shape, x.dtype) for x in (q, k, v)], [q, k, v, da]))

    def in_place(weights: MappedWeights, name: str) -> mx.array | None:
        info = weights.info(name)
        if not weights.adopt or info.not_adoptable:
            return None
        if name not in weights._adopted:
            adopted = constant(1, info.shape, info.mlx_dtype)
            if on_gpu():
                adopted = mx.array(weights.view(name)).view(info.mlx_dtype)
                evaluate(adopted)
            weights._adopted[name] = adopted
        return weights._adopted[name]

    with contextlib.ExitStack() as stack:
        if not on_metal():
            stack.enter_context(mock.patch.object(MappedWeights, "in_place", in_place))
        if not on_gpu():
            stack.enter_context(mock.patch.object(mx, "quantized_matmul", product))
            stack.enter_context(mock.patch.object(ops_head, "softmax_kernel", softmax))
        if attention and not on_gpu():
            stack.enter_context(mock.patch.object(ops_attention, "forward", attend))
            stack.enter_context(mock.patch.object(ops_attention, "backward", attend_backward))
        yield


class Case:
    """A model with random weights and Metal's defaults, and everything needed for its step.

    budget_bytes: the budget of the plan, chosen as in training; None uses the fastest plan, with `kept_bytes` of kept
    values in memory (None: all).
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
        self.is_long = n_tokens > LONG_TOKENS
        self.lora = mebp_mlx.init_lora(self.model, rank=rank)
        self.make_optimizer = lambda: OPTIMIZERS[optimizer](learning_rate=1e-4)
        tokens, targets = np.random.default_rng(0).integers(0, self.model.spec.V, (2, 1, n_tokens)).astype(np.int32)
        self.batch = Batch(tokens, targets, rows=("random",), n_labels=n_tokens)
        state = lora_sizes(self.model.spec, self.lora.keys, -1, rank, self.make_optimizer()).state
        self.workload = Workload(self.model, self.lora, 1, n_tokens, make_updater=self._updater, state_bytes=state)
        with mock.patch.object(search, "on_gpu", lambda: True):
            if budget_bytes is not None:
                with emulated(allocating=True, attention=self.is_long):
                    self.plan = search.choose(self.workload, budget_bytes).plan
            else:
                fastest = search.ladder(self.workload)[-1]
                # The choice of training if memory suffices.
                saved = SAVE_EVERYTHING if kept_bytes is None else fastest.saved
                self.plan = dataclasses.replace(fastest, saved=saved, kept_bytes=kept_bytes, offload_state=False)

    def _updater(self, lora: Lora, plan: Plan) -> Updater:
        return Updater(self.make_optimizer(), lora, park=plan.offload_state, is_lazy=plan.is_lazy)

    @contextlib.contextmanager
    def steps(self, plan: Plan) -> Iterator[tuple[BackpropEngine, Callable[[], None]]]:
        """Yields an engine with its updater, and a function that runs one step; a first step has already run."""
        updater, engine = self._updater(self.lora, plan), BackpropEngine(self.model, self.lora, plan=plan)

        def step() -> None:
            updater.begin_step()
            n_labels = self.batch.n_labels
            engine.step(self.batch, step=0, micro=0, n_labels=n_labels, sink=lambda gradients: updater.sink(gradients))
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
    result: dict[str, Any] = {}
    with emulated(attention=case.is_long):
        with case.steps(case.plan) as (engine, step):
            with Watch(by_stage=False).open() as whole:
                step()
            mx.synchronize()
            result["kept_bytes"] = engine.store.held_bytes + engine.store.written_bytes
            with Watch(by_stage=True).open() as parts:
                step()
            mx.synchronize()
            began_s = time.perf_counter()
            step()
            mx.synchronize()
            result["step_s"] = time.perf_counter() - began_s if on_gpu() else None
        adopted = [name for name, array in case.model.weights._adopted.items() if array is not None]
    if whole.all_nodes != parts.all_nodes:
        raise AssertionError(f"{whole.all_nodes} nodes in the step, {parts.all_nodes} in its stages")
    result["adopted_tensors"] = len(adopted)
    result["adopted_bytes"] = sum(case.model.weights.info(name).n_bytes for name in adopted)
    result["names"] = {stage: dict(nodes) for stage, nodes in parts.nodes.items() if nodes}
    result["stages"] = {}
    for stage in STAGES:
        nodes = parts.nodes[stage]
        row = {"nodes": sum(nodes.values()), "non_view": non_views(nodes)}
        result["stages"][stage] = {name: whole.numbers[stage][name] for name in NUMBERS} | row
    return result


def peak_bytes(case: Case) -> dict[str, int]:
    """MLX's peak by phase of a step, above LoRA and optimizer state, with kept values in the file.

    A phase's peak includes unfinished work of the previous phase.
    """
    peaks: dict[str, int] = {}

    def phase(name: str, plain: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            mx.reset_peak_memory()
            result = plain(*args, **kwargs)
            peaks[name] = max(peaks.get(name, 0), mx.get_peak_memory() - before)
            return result

        return run

    with emulated(allocating=True, attention=case.is_long), contextlib.ExitStack() as stack:
        _, step = stack.enter_context(case.steps(dataclasses.replace(case.plan, kept_bytes=0)))
        before = mx.get_active_memory()
        phases = ((Pass, "forward", "forward"), (backprop, "cross_entropy", "head"))
        for owner, name, label in (*phases, (BackpropEngine, "backward", "backward")):
            stack.enter_context(mock.patch.object(owner, name, phase(label, getattr(owner, name))))
        step()
        mx.synchronize()
    return peaks


def total(stages: dict[str, dict[str, int]]) -> dict[str, int]:
    """The sum of each count over all stages."""
    return {name: sum(row[name] for row in stages.values()) for name in next(iter(stages.values()))}


def extrapolated(fewer: Any, more: Any, n_blocks: int) -> Any:
    """Counts for `n_blocks` blocks in addition to those of `more`, which has one block more than `fewer`."""
    if isinstance(more, dict):
        return {name: extrapolated(fewer.get(name, 0), number, n_blocks) for name, number in more.items()}
    return more + n_blocks * (more - fewer)


def mlx_lm(config: dict[str, Any], n_tokens: int, optimizer: str, checkpointed: bool, rank: int = 8) -> dict[str, Any]:
    """Counts mlx-lm's step (its model class, LoRA and loss); the graph is built but never evaluated."""
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
    with mock.patch.object(layer, "__call__", layer.__call__):  # grad_checkpoint replaces __call__ of the class
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
