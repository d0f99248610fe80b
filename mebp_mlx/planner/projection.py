"""`--device`: this machine as a proxy for a phone. An app's memory limit is applied; the speed is projected."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from ..kernels import attention
from ..ops.plan import Plan
from ..system.child import ChildFailure, run_child
from ..system.phone import Phone, thermal_state
from ..system.units import megabytes
from .work import Rates, Work, bound_s, count, on_phone
from .workload import Workload


def impose(phone: Phone, budget_bytes: int | None) -> str:
    """Limits MLX's cache to the phone's and returns a line that reports it. The wired limit is not changed.

    budget_bytes: None if the options set no size.
    """
    before_bytes = mx.set_cache_limit(phone.cache_bytes)
    cache_bytes = min(before_bytes, phone.cache_bytes)
    mx.set_cache_limit(cache_bytes)
    state = thermal_state()
    warm = "" if state is None else f", thermal state {state}"
    budget = "no budget in bytes" if budget_bytes is None else f"budget {megabytes(budget_bytes)}"
    return f"device     as {phone.chip}: {budget}, cache at most {megabytes(cache_bytes)}, no wired memory{warm}"


def host_rates() -> Rates | None:
    """This machine's rates, measured in a child process; None if that fails."""
    try:
        rates = run_child(["mebp_mlx.system.rates"], {}, offline=True, timeout_s=60)
    except (ChildFailure, TimeoutError):
        return None
    return Rates(rates["flops"], rates["memory_bytes"])


def project(
    phone: Phone, workload: Workload, plan: Plan, step_s: float | None = None, host: Rates | None = None
) -> Iterator[str]:
    """Lines with a step's counts, its least time on the phone, and a measured time scaled by the two rooflines."""
    rates = Rates(phone.flops[2], phone.bandwidth)
    with attention.assumed():
        there = count(on_phone(workload), plan)
    total, least_s = sum(there.values(), Work()), bound_s(there, rates)
    yield (
        f"projected  {phone.chip}: a micro-batch of {workload.B} x {workload.T:,} tokens is "
        f"{total.flops / 1e9:,.1f} GFLOP and {total.memory_bytes / 1e9:,.2f} GB, at least {least_s:.3g} s"
    )
    if step_s is not None and host is not None:
        ratio = least_s / bound_s(count(workload, plan), host)
        rates_here = f"{host.flops / 1e9:,.0f} GFLOP/s and {host.memory_bytes / 1e9:.1f} GB/s, measured"
        yield (
            f"  {step_s:.3g} s per step on this machine ({rates_here}): {step_s * ratio:.3g} s on the phone at the "
            "same utilization"
        )
    for text in phone.assumptions:
        yield f"  assumed: {text}"
    yield "  not measured on a phone; bench.projection compares the paper's steps with their least times"
