"""Chooses a plan: which values are saved and how large the pieces are, so that memory and arena fit their budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from ..errors import BudgetError
from ..model.lora import DROPOUT_RUN
from .job import Job
from .plan import SAVE_PRODUCTS, Plan
from .predict import predict

ARENA_BUDGET_BYTES = 2_000_000_000
# A budget is kept with this share of the prediction to spare: what measured peaks were above it (bench.plan_check).
MARGIN = 0.08
# Where the search starts: larger pieces are not faster (bench.step), and long sequences stay small.
_TOKENS, _QUERIES, _SCORES_BYTES = 512, 256, 16 << 20
# Below these sizes pieces cost time and save next to nothing.
_SMALLEST = {
    "weight_block_bytes": 256 << 10,
    "head_block_bytes": 512 << 10,
    "logits_block_bytes": 256 << 10,
    "token_block": DROPOUT_RUN,
    "query_block": 16,
}
_STEP_BYTES = 100_000  # budgets in messages are rounded up to this


def choose_plan(
    job: Job, memory_budget_bytes: int | None = None, arena_budget_bytes: int | None = ARENA_BUDGET_BYTES
) -> Plan:
    """The fastest plan whose predicted peak, with a margin, and whose arena fit; None: no limit.

    Raises BudgetError, naming the smallest workable budget, when none does.
    """
    plan = _generous(job)
    if job.engine == "mebp":
        plan = dataclasses.replace(plan, saved=saved_names(job, plan, arena_budget_bytes))
    smallest = math.inf
    for candidate, peak_bytes in _ever_smaller(job, plan):
        wanted_bytes = math.ceil(peak_bytes * (1 + MARGIN))
        if memory_budget_bytes is None or wanted_bytes <= memory_budget_bytes:
            return candidate
        smallest = min(smallest, wanted_bytes)
    assert memory_budget_bytes is not None
    raise BudgetError(
        f"--memory-budget: {memory_budget_bytes / 1e6:.1f} MB is too little for this model, batch size and longest "
        f"row; the smallest workable budget is {_rounded_up(smallest)}MB"
    )


def saved_names(job: Job, plan: Plan, arena_budget_bytes: int | None) -> frozenset[str]:
    """Every product's output, less those that are cheapest to compute again per byte until the arena fits."""
    spec, linears = job.spec, job.spec.layers[0].linears
    names = {"q": "q", "k": "k", "v": "v", "g": "gate", "u": "up", "o": "o", "d": "down"}
    # A byte of a projection's output costs as many products as the projection has inputs, a byte of attention's
    # twice as many as a query has keys.
    cost = {name: linears[linear].in_dims for name, linear in names.items()} | {"a": job.T}
    order = sorted(cost, key=lambda name: cost[name])
    dropped: set[str] = set()
    while True:
        saved = SAVE_PRODUCTS - dropped
        n_layers = spec.L - job.first_trained
        needed = dataclasses.replace(plan, saved=saved).arena_bytes(spec, job.B, job.T, n_layers, job.item_bytes)
        needed += job.parked_bytes
        if arena_budget_bytes is None or needed <= arena_budget_bytes:
            return saved
        if not order:
            raise BudgetError(
                f"--arena-budget: {arena_budget_bytes / 1e6:.1f} MB does not hold the blocks' inputs; the smallest "
                f"workable budget is {_rounded_up(needed)}MB"
            )
        dropped.add(order.pop(0))


def _generous(job: Job) -> Plan:
    """Pieces large enough to lose no time."""
    tokens = max(DROPOUT_RUN, _TOKENS // job.B // DROPOUT_RUN * DROPOUT_RUN)
    queries = _QUERIES
    while queries > _SMALLEST["query_block"] and job.B * job.spec.H * queries * job.T * 4 > _SCORES_BYTES:
        queries //= 2
    return Plan(token_block=tokens, query_block=queries)


def _ever_smaller(job: Job, plan: Plan) -> Iterator[tuple[Plan, int]]:
    """Plans with their predicted peaks, each with one kind of piece half as large as the one before.

    The kind is the one that lowers the peak most; the order does not depend on any budget.
    """
    yield plan, predict(job, plan).peak_bytes
    while True:
        tries: list[tuple[int, int, int, Plan]] = []
        for name, least in _SMALLEST.items():
            size = getattr(plan, name)
            if size > least:
                smaller = dataclasses.replace(plan, **{name: max(least, size // 2)})
                found = predict(job, smaller)
                # Among equals, whatever lowers the other phases too.
                tries.append((found.peak_bytes, sum(found.phases.values()), len(tries), smaller))
        if not tries:
            return
        peak_bytes, _, _, plan = min(tries, key=lambda entry: entry[:3])
        yield plan, peak_bytes


def _rounded_up(n_bytes: float) -> str:
    return f"{math.ceil(n_bytes / _STEP_BYTES) * _STEP_BYTES / 1e6:.1f}"
