"""Which value is run, saved, loaded, recomputed and dropped when: a block's work as a list of operations.

The set of saved names is the whole memory/time policy. The operations on a value and their
order do not depend on it, so gradients are bit-equal for every policy.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model.decoder import INPUT, OUTPUT, Stage


@dataclass(frozen=True)
class Op:
    """One operation. kind: "run" | "backward" (a stage), "save" | "load" | "drop" (a value).

    wanted: for a backward, the inputs that need a cotangent.
    """

    kind: str
    stage: Stage | None = None
    value: str = ""
    wanted: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        if self.kind == "run":
            assert self.stage is not None
            return self.stage.inputs
        return (self.value,) if self.kind == "save" else ()


def forward_ops(stages: tuple[Stage, ...], saved: frozenset[str], keep: tuple[str, ...] = (OUTPUT,)) -> list[Op]:
    """Every stage once, saved outputs stored as soon as they exist, each value dropped after its last use.

    keep: the values that are left at the end.
    """
    ops = []
    for stage in stages:
        ops.append(Op("run", stage))
        if stage.output in saved:
            ops.append(Op("save", value=stage.output))
    return _with_drops(ops, [op.reads for op in ops], keep)


def needs_gradient(stages: tuple[Stage, ...], trained: frozenset[str], want_dx: bool) -> dict[str, bool]:
    """For every value of the block, whether the loss's gradient with respect to it is of any use."""
    useful = {INPUT: want_dx}
    for stage in stages:
        useful[stage.output] = bool(trained & set(stage.linears)) or any(useful[name] for name in stage.inputs)
    return useful


def backward_ops(
    stages: tuple[Stage, ...], available: frozenset[str], trained: frozenset[str], useful: dict[str, bool]
) -> list[Op]:
    """Cotangents of the stages' outputs in; LoRA gradients of `trained` and the useful cotangents of their inputs out.

    What a backward reads is loaded if it is available, and recomputed from what is otherwise.
    """
    producer = {stage.output: stage for stage in stages}
    ops: list[Op] = []
    reads: list[tuple[str, ...]] = []
    present: set[str] = set()

    def emit(op: Op, read: tuple[str, ...] = ()) -> None:
        ops.append(op)
        reads.append(read)

    def bring(name: str) -> None:
        if name in present:
            return
        present.add(name)
        if name in available:
            emit(Op("load", value=name))
            return
        stage = producer[name]  # what enters the stages is always available, so this ends
        for source in stage.inputs:
            bring(source)
        emit(Op("run", stage), stage.inputs)

    for stage in reversed(stages):
        if not useful[stage.output]:
            continue
        wanted = tuple(name for name in stage.inputs if useful[name])
        needs = stage.needs
        if stage.kind == "projection" and not trained & set(stage.linears):
            needs = ()
        for name in needs:
            bring(name)
        emit(Op("backward", stage, wanted=wanted), needs)
    return _with_drops(ops, reads)


def _with_drops(ops: list[Op], reads: list[tuple[str, ...]], keep: tuple[str, ...] = ()) -> list[Op]:
    """The same operations, with each value dropped right after the last one that reads it."""
    last_read = {name: i for i, names in enumerate(reads) for name in names}
    out = []
    for i, op in enumerate(ops):
        out.append(op)
        out += [Op("drop", value=name) for name, last in last_read.items() if last == i and name not in keep]
    return out
