"""Accumulation and clipping of gradients, and the optimizer's update of each block."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..kernels import cpu
from ..model.lora import Lora
from ..system.group import Group
from .offload import ParkedState, parked_bytes


class Updater:
    """Applies gradients to a Lora with an mlx optimizer.

    Without clipping and accumulation each block is updated as soon as its gradients arrive, and they are freed before
    the next block's exist. Otherwise gradients are gathered and applied by end_step. The optimizer's state is one flat
    dict under the parameters' names.

    max_grad_norm: clip the global L2 norm to this, None: do not clip; gather: a step has several micro-batches; park:
    keep the state in a mapped file in arena_dir (training/offload.py); is_lazy: the update of a block is part of the
    block's graph, instead of being evaluated one parameter at a time; in_place: on the CPU, write new values into the
    parameters' memory, which nothing else may use, because new arrays among old ones leave gaps in the C heap; b_ratio:
    LoRA+'s ratio, for an optimizer of optimizers.with_ratio; group: the machines whose gradients are summed.
    """

    def __init__(  # noqa: PLR0913 - options of the update, by keyword
        self,
        optimizer: Any,
        lora: Lora,
        *,
        max_grad_norm: float | None = None,
        gather: bool = False,
        park: bool = False,
        is_lazy: bool = False,
        in_place: bool = False,
        arena_dir: str | Path | None = None,
        b_ratio: float = 1.0,
        group: Group | None = None,
    ):
        self.group = group or Group()
        self.optimizer, self.lora, self.b_ratio = optimizer, lora, b_ratio
        self.max_grad_norm, self.is_lazy = max_grad_norm, is_lazy and not park
        self.in_place = in_place and not is_lazy  # a lazy graph may read the old values later
        self.gather = gather or max_grad_norm is not None
        self._gathered: dict[str, mx.array] = {}
        self._n_missing: dict[str, int] = {}  # micro-batches of this step whose gradients have not arrived
        self._step: mx.array = optimizer.step
        if not optimizer._initialized:
            optimizer.init(lora.parameters())
        self._parked: ParkedState | None = None
        if park and parked_bytes(optimizer.state):
            self._parked = ParkedState(optimizer.state, arena_dir)  # computes one parameter's state at a time
        mx.eval(optimizer.state)

    @property
    def parked_bytes(self) -> int:
        """Bytes of the file with the state; each step writes all of them once."""
        return 0 if self._parked is None else self._parked.n_bytes

    def state(self) -> dict[str, Any]:
        """The optimizer's complete state, for a checkpoint.

        Entries in the file are returned as numpy views, which are valid until the next step.
        """
        state = self.optimizer.state
        return state if self._parked is None else self._parked.views(state)

    def begin_step(self, n_micro_batches: int = 1) -> None:
        """Starts an optimizer step; sink() then takes each block's gradients of n_micro_batches micro-batches."""
        self._gathered.clear()
        self._n_missing = dict.fromkeys(self.lora.parameters(), n_micro_batches)
        self._step = self.optimizer.step

    def sink(self, gradients: dict[str, mx.array]) -> list[mx.array]:
        """Takes one block's gradients (float32, by parameter name) of one micro-batch; returns arrays to evaluate.

        With several machines it applies the previous block, whose sum has arrived in the meantime.
        """
        if not self.gather:
            return self._apply(self.group.exchange(gradients))
        for name, gradient in gradients.items():
            known = self._gathered.get(name)
            self._gathered[name] = gradient if known is None else known + gradient
            self._n_missing[name] -= 1
        own = {name: self._gathered[name] for name in gradients}
        if not any(self._n_missing[name] for name in own):
            self._gathered.update(self.group.exchange(own))
        return list(own.values())

    def end_step(self) -> float | None:
        """Applies gathered gradients. Returns their L2 norm before clipping, or None without clipping."""
        norm, rest = None, self.group.rest()
        if not self.gather:
            mx.eval(self._apply(rest))
        else:
            self._gathered.update(rest)
            if self.max_grad_norm is not None:
                norm = math.sqrt(sum(float(np.asarray(mx.square(g).sum())) for g in self._gathered.values()))
                if norm > self.max_grad_norm:
                    factor = self.max_grad_norm / norm
                    self._gathered = {name: g * factor for name, g in self._gathered.items()}
            mx.eval(self._apply(self._gathered))  # an unevaluated graph would keep all gradients alive
            self._gathered = {}
        return norm

    def _apply(self, gradients: dict[str, mx.array]) -> list[mx.array]:
        state = self.optimizer.state
        if not gradients:
            return []
        if self.is_lazy:
            updated: dict[str, mx.array] = {}
            of_b = {name for name in gradients if self.b_ratio != 1 and name.endswith(".lora_b")}
            for names in (gradients.keys() - of_b, of_b):
                if names:
                    updated.update(self._updated({name: gradients[name] for name in gradients if name in names}))
            self.lora.update(updated)
            states: list[Any] = [entry[1] for name in gradients for entry in tree_flatten(state[name])]
            return [*updated.values(), *states, state["step"]]
        # One at a time: an optimizer works on copies, and the old state is freed only when the new one is evaluated.
        own = self.lora.parameters() if self.in_place else {}
        for name, gradient in gradients.items():
            state = self.optimizer.state
            if self._parked is not None:
                state[name] = self._parked.take(name)
            updated = self._updated({name: gradient})
            mx.eval(updated, state[name], state["step"])
            if self.in_place and cpu.serves(*updated.values()):
                np.copyto(cpu.buffer_of(own[name]), np.asarray(updated[name]))
            else:
                self.lora.update(updated)
            if self._parked is not None:
                self._parked.put(name, state)
        return []

    def _updated(self, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """New values of some parameters, all with the same learning rate."""
        parameters, optimizer = self.lora.parameters(), self.optimizer
        # Each call would count as a step (bias correction, schedules); all calls of a step must count as one.
        optimizer.state["step"] = self._step
        if self.b_ratio != 1:
            optimizer.ratio = self.b_ratio if next(iter(gradients)).endswith(".lora_b") else 1.0
        updated: dict[str, mx.array] = optimizer.apply_gradients(
            gradients, {name: parameters[name] for name in gradients}
        )
        if self.b_ratio != 1:
            optimizer.ratio = 1.0
        return updated
