"""Finds a plan by measuring candidates, starting with the smallest, as long as the next one fits the budget."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.backprop import KeptSizes
from ..errors import BudgetError
from ..model.lora import DROPOUT_RUN
from ..ops.cross_entropy import ROWS
from ..ops.plan import SAVE_ATTENTION, SAVE_EVERYTHING, SAVE_PRODUCTS, Plan
from ..system.device import on_gpu
from ..system.footprint import footprint_bytes
from .probe import WHOLE_TILES, Probe, probe
from .workload import Workload

ARENA_BUDGET_BYTES = 2_000_000_000
LONG_ROWS_BYTES = 5_000_000_000  # default limit of --arena-budget for long rows
MARGIN = 0.08  # added to a prediction, because a run's peak can exceed its probe's (bench.plan_check)
_SCORES_BYTES = 16 << 20  # of attention at a time: larger blocks are not faster
_LOGITS_BYTES = 64 << 20  # largest chunk on a GPU; more columns would not speed up its two products
_COLUMNS = 4096  # of a chunk on a GPU: with fewer, the running sum [rows, D] dominates the time
_STEP_BYTES = 100_000  # budgets in messages are rounded up to this
_MIB = 1 << 20


@dataclass(frozen=True)
class Prediction:
    """phases: peak footprint in bytes by phase; kept_bytes: of a micro-batch's kept values, in memory and in the
    file; arena_bytes: size of the files, including the optimizer's state; written_bytes: written per micro-batch.
    """

    phases: dict[str, int]
    kept_bytes: int = 0
    arena_bytes: int = 0
    written_bytes: int = 0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_bytes(self) -> int:
        return self.phases[self.peak_phase]


@dataclass(frozen=True)
class Planned:
    """A plan with its prediction; budget_bytes: None if there is no budget."""

    workload: Workload
    plan: Plan
    predicted: Prediction
    budget_bytes: int | None


def query_block(most: int, query_bytes: int, limit_bytes: int = _SCORES_BYTES) -> int:
    """Queries per block of attention: a multiple of 16, at least 16, whose scores fit into limit_bytes; query_bytes: of
    one query's scores.
    """
    return max(16, min(most, limit_bytes // query_bytes // 16 * 16))


def ladder(workload: Workload) -> list[Plan]:
    """Candidate plans from the smallest to the fastest. All keep values and optimizer state in files."""
    steps: list[dict[str, Any]] = [
        dict(grain="op", token_block=128, query_block=64, logits_block_bytes=1 * _MIB, weight_block_bytes=1 * _MIB),
        dict(grain="op", token_block=256, query_block=128, logits_block_bytes=4 * _MIB, weight_block_bytes=2 * _MIB),
        dict(grain="op", token_block=512, query_block=256, logits_block_bytes=8 * _MIB, weight_block_bytes=4 * _MIB),
    ]
    if on_gpu():
        whole: dict[str, Any] = dict(weight_block_bytes=None, head_block_bytes=None)
        steps[1:] = [
            dict(grain="tile", token_block=128, query_block=128, logits_block_bytes=2 * _MIB, **whole),
            dict(grain="tile", token_block=256, query_block=256, logits_block_bytes=8 * _MIB, **whole),
            dict(grain="block", token_block=512, query_block=256, logits_block_bytes=8 * _MIB, **whole),
        ]
        rows = min(workload.B * workload.T, ROWS)
        steps[-1]["logits_block_bytes"] = max(8 * _MIB, rows * _COLUMNS * workload.model.dtype.size)
    plans = []
    for step in steps:
        step.setdefault("head_block_bytes", step["logits_block_bytes"])
        step["token_block"] = max(DROPOUT_RUN, step["token_block"] // workload.B // DROPOUT_RUN * DROPOUT_RUN)
        scores, limit = 4 * workload.B * workload.model.spec.H * workload.T_scored, _SCORES_BYTES
        if step["grain"] == "block":  # every block of queries costs launches, forward and backward
            scores, limit = scores * workload.model.dtype.size // 4, 2 * limit
        step["query_block"] = query_block(step["query_block"], scores, limit)
        if step["grain"] == "block" and WHOLE_TILES * step["token_block"] < workload.T:
            step["grain"] = "tile"  # keeps only two tiles in flight; a tile of a long row hides its wait
        plans.append(Plan(kept_bytes=0, offload_state=workload.is_exact, **step))
    return plans


def choose(
    workload: Workload,
    budget_bytes: int | None = None,
    *,
    smallest: bool = False,
    arena_budget_bytes: int | None = None,
    known: Plan | None = None,
    arena_dir: str | Path | None = None,
) -> Planned:
    """The fastest plan whose predicted peak, plus a margin, is within the budget (None: no limit).

    smallest: choose the plan with the smallest footprint; known: preferred if it fits; arena_dir: folder of the files;
    arena_budget_bytes: None means 2 GB, or for long rows the size of block inputs and attention's outputs, up to 5 GB.
    Raises BudgetError naming the smallest workable budget if none fits.
    """
    if known is not None:
        predicted = predict(workload, known, probe(workload, known, arena_dir))
        if budget_bytes is None or predicted.peak_bytes <= budget_bytes:
            return Planned(workload, known, predicted, budget_bytes)
    plans = [dataclasses.replace(plan, saved=_saved(workload, plan, arena_budget_bytes)) for plan in ladder(workload)]
    start_bytes = footprint_bytes()
    if smallest:
        plans = plans[:1]
    elif budget_bytes is None:
        plans = plans[-1:]
    taken: tuple[Plan, Probe] | None = None
    for plan in plans:
        if taken is not None and budget_bytes is not None:
            # A candidate's blocks are at most twice as large as the previous one's, so its peak grows at most so much.
            peak = predict(workload, *taken).peak_bytes
            if _spared(peak + max(0, peak - start_bytes - _whole_rows(workload, *taken))) > budget_bytes:
                break
        measured = probe(workload, plan, arena_dir)
        needed = _spared(predict(workload, plan, measured).peak_bytes)
        if budget_bytes is not None and needed > budget_bytes:
            if taken is not None:
                break
            raise BudgetError(
                f"--memory-budget: {budget_bytes / 1e6:.1f} MB is too little for this model, batch size and longest "
                f"row; the smallest workable budget is {math.ceil(needed / _STEP_BYTES) * _STEP_BYTES / 1e6:.1f}MB"
            )
        taken = plan, measured
    assert taken is not None
    if not smallest:
        taken = _in_memory(workload, *taken, budget_bytes)
    if on_gpu() and not smallest and taken[0].token_block == plans[-1].token_block:
        taken = _large_chunks(workload, *taken, budget_bytes, arena_dir)
    return Planned(workload, taken[0], predict(workload, *taken), budget_bytes)


def predict(workload: Workload, plan: Plan, measured: Probe) -> Prediction:
    """Predicts a run's memory from a probe of its plan, by adding the values that the other blocks keep."""
    kept = measured.kept_bytes
    in_memory = kept if plan.kept_bytes is None else min(kept, plan.kept_bytes)
    gathered = workload.lora_bytes if workload.gathers or workload.make_updater is None else 0
    gathered += workload.travelling_bytes
    more = {"forward": in_memory, "head": in_memory, "backward": in_memory + gathered, "update": in_memory + gathered}
    if not workload.is_exact:
        more, in_memory = {}, 0
    state = 0 if plan.offload_state else workload.state_bytes
    order = ("forward", "head", "backward", "update")
    phases = {n: measured.phases[n] + state + more.get(n, 0) for n in order if n in measured.phases}
    in_file = kept - in_memory
    return Prediction(phases, kept, in_file + (workload.state_bytes if plan.offload_state else 0), in_file)


def _in_memory(workload: Workload, plan: Plan, measured: Probe, budget_bytes: int | None) -> tuple[Plan, Probe]:
    """The plan with as many kept values and as much optimizer state in memory as the budget allows."""
    room = math.inf
    if budget_bytes is not None:
        # One byte less, because multiplying by 1 + MARGIN rounds.
        room = int(budget_bytes / (1 + MARGIN)) - 1 - predict(workload, plan, measured).peak_bytes
    if not workload.is_exact:
        return plan, measured
    offload_state = workload.state_bytes > room
    room -= 0 if offload_state else workload.state_bytes
    if on_gpu() and plan.saved == SAVE_PRODUCTS:
        everything = dataclasses.replace(plan, saved=SAVE_EVERYTHING)
        kept_bytes = sum(_kept_sizes(workload, everything).of(everything))
        if kept_bytes <= room:
            plan, measured = everything, dataclasses.replace(measured, kept_bytes=kept_bytes)
    in_memory = None if measured.kept_bytes <= room else max(0, int(room))
    return dataclasses.replace(plan, kept_bytes=in_memory, offload_state=offload_state), measured


def _large_chunks(
    workload: Workload, plan: Plan, measured: Probe, budget_bytes: int | None, arena_dir: str | Path | None
) -> tuple[Plan, Probe]:
    """The plan with chunks of the vocabulary as large as the budget allows, measured again."""
    rows, most = min(workload.B * workload.T, ROWS), _LOGITS_BYTES
    if budget_bytes is not None:
        # Two chunks are in flight, and each consists of logits, their gradients and the product with those.
        room = int(budget_bytes / (1 + MARGIN)) - 1 - predict(workload, plan, measured).phases["head"]
        most = min(most, plan.logits_block_bytes + room // 6)
    larger = min(most, rows * workload.model.spec.V * workload.model.dtype.size)
    if larger <= plan.logits_block_bytes:
        return plan, measured
    plan_with = dataclasses.replace(plan, logits_block_bytes=larger)
    again = dataclasses.replace(probe(workload, plan_with, arena_dir), kept_bytes=measured.kept_bytes)
    fits = budget_bytes is None or _spared(predict(workload, plan_with, again).peak_bytes) <= budget_bytes
    return (plan_with, again) if fits else (plan, measured)


def _whole_rows(workload: Workload, plan: Plan, measured: Probe) -> int:
    """Bytes of a peak that do not depend on block sizes: a block's input and output, and with lazy graphs the kept
    values of the two blocks in flight.
    """
    stream = 2 * workload.B * workload.T * workload.model.spec.D * workload.model.dtype.size
    of_two = 2 * measured.kept_bytes // max(1, workload.model.spec.L - workload.first_trained)
    return stream + (of_two if plan.is_lazy and workload.is_exact else 0)


def _kept_sizes(workload: Workload, plan: Plan) -> KeptSizes:
    """The bytes that blocks keep under plans with the same block sizes as this one."""
    return KeptSizes(workload.model, plan, workload.lora, workload.first_trained, workload.B, workload.T)


def _saved(workload: Workload, plan: Plan, arena_budget_bytes: int | None) -> frozenset[str]:
    """The values to keep: all products' outputs, minus the cheapest to recompute per byte until the file fits."""
    saved = SAVE_PRODUCTS
    if not workload.is_exact:
        return saved
    sizes = _kept_sizes(workload, plan)
    if arena_budget_bytes is None:
        arena_budget_bytes = _long_rows_budget(workload, plan, sizes)
    spec = workload.model.spec
    # Cost per byte: a projection's output needs as many multiplications as the projection has inputs, attention's
    # twice as many as a query has keys.
    cost = {"q": spec.D, "k": spec.D, "v": spec.D, "g": spec.D, "u": spec.D}
    cost |= dict.fromkeys(("bcx", "qg", "qkv", "z", "p", "pg", "logits"), spec.D)
    cost["pp"] = spec.D if spec.layer_inputs is None else spec.layer_inputs.width
    cost |= {"o": spec.H * spec.head_dim, "d": spec.F, "a": workload.T}
    order = sorted(cost, key=lambda name: cost[name])
    while True:
        needed = sum(sizes.of(dataclasses.replace(plan, saved=saved))) + workload.state_bytes
        if needed <= arena_budget_bytes:
            return saved
        if not order:
            raise BudgetError(
                f"--arena-budget: {arena_budget_bytes / 1e6:.1f} MB is too little for the blocks' inputs; the smallest "
                f"workable budget is {math.ceil(needed / _STEP_BYTES) * _STEP_BYTES / 1e6:.1f}MB"
            )
        saved -= {order.pop(0)}


def _long_rows_budget(workload: Workload, plan: Plan, sizes: KeptSizes) -> int:
    """The default --arena-budget. Attention's outputs of long rows are by far the most expensive to recompute."""
    kept = sum(sizes.of(dataclasses.replace(plan, saved=SAVE_ATTENTION)))
    return max(ARENA_BUDGET_BYTES, min(kept + workload.state_bytes, LONG_ROWS_BYTES))


def _spared(n_bytes: float) -> int:
    return math.ceil(n_bytes * (1 + MARGIN))
