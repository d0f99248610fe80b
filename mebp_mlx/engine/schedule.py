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


def forward_ops(stages: tuple[Stage, ...], saved: frozenset[str]) -> list[Op]:
    """x in, y out: every stage once, saved values stored as soon as they exist, each dropped after its last use."""
    ops = [Op("save", value=INPUT)] if INPUT in saved else []
    for stage in stages:
        ops.append(Op("run", stage))
        if stage.output in saved:
            ops.append(Op("save", value=stage.output))
    return _with_drops(ops, [op.reads for op in ops], keep=OUTPUT)


def needs_gradient(stages: tuple[Stage, ...], trained: frozenset[str], want_dx: bool) -> dict[str, bool]:
    """For every value of the block, whether the loss's gradient with respect to it is of any use."""
    useful = {INPUT: want_dx}
    for stage in stages:
        useful[stage.output] = stage.name in trained or any(useful[name] for name in stage.inputs)
    return useful


def backward_ops(stages: tuple[Stage, ...], saved: frozenset[str], trained: frozenset[str], want_dx: bool) -> list[Op]:
    """The cotangent of y in; LoRA gradients of `trained`, and the cotangent of x if wanted, out.

    What a backward reads is loaded if it was saved, and recomputed from what was saved otherwise.
    """
    useful = needs_gradient(stages, trained, want_dx)
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
        if name in saved:
            emit(Op("load", value=name))
            return
        stage = producer[name]  # INPUT is always saved, so this ends
        for source in stage.inputs:
            bring(source)
        emit(Op("run", stage), stage.inputs)

    for stage in reversed(stages):
        if not useful[stage.output]:
            continue
        wanted = tuple(name for name in stage.inputs if useful[name])
        needs = stage.needs
        if stage.kind == "projection" and stage.name not in trained:
            needs = ()
        for name in needs:
            bring(name)
        emit(Op("backward", stage, wanted=wanted), needs)
    return _with_drops(ops, reads)


def _with_drops(ops: list[Op], reads: list[tuple[str, ...]], keep: str = "") -> list[Op]:
    """The same operations, with each value dropped right after the last one that reads it."""
    last_read = {name: i for i, names in enumerate(reads) for name in names}
    out = []
    for i, op in enumerate(ops):
        out.append(op)
        out += [Op("drop", value=name) for name, last in last_read.items() if last == i and name != keep]
    return out
