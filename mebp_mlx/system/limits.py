"""The system's limits on this process's memory (`ulimit -d`, `ulimit -v`, prlimit), expressed as a footprint.

If an allocation fails, MLX's CPU backend does not raise: malloc returns NULL and the process dies with SIGSEGV. So a
limit is treated as a memory budget before anything is allocated.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import BudgetError
from .footprint import footprint_bytes
from .machine import default_budget_bytes, usable_cores

# Threads that start later (of the BLAS and MLX) each reserve a stack and, in address space, a glibc heap.
_MORE_THREADS = 2
_STACK_BYTES, _HEAP_BYTES = 8 << 20, 128 << 20
_LIMITS = (("ulimit -d", "RLIMIT_DATA", "VmData", 0), ("ulimit -v", "RLIMIT_AS", "VmSize", _HEAP_BYTES))


SMALLEST, UNLIMITED = "min", "none"  # words that --memory-budget accepts instead of a size


def named_budget(budget: int | str | None) -> tuple[int | None, bool]:
    """--memory-budget as (bytes, or None for no limit; whether the smallest footprint is requested). The default is
    1 GB or a quarter of the machine's memory, whichever is less.
    """
    if isinstance(budget, int):
        return budget, False
    return (default_budget_bytes() if budget is None else None), budget == SMALLEST


def check_peak(budget_bytes: int | None, peak_bytes: int) -> None:
    """Raises BudgetError if the measured peak exceeds the budget."""
    if budget_bytes is not None and not peak_bytes <= budget_bytes:
        raise BudgetError(
            f"--memory-budget: the budget of {budget_bytes / 1e6:.1f} MB is exceeded: the footprint reached "
            f"{peak_bytes / 1e6:.1f} MB"
        )


@dataclass(frozen=True)
class Limit:
    """A memory limit. name: the shell command that sets it; limit_bytes: the limit on reserved memory;
    footprint_bytes: the largest possible footprint within it.
    """

    name: str
    limit_bytes: int
    footprint_bytes: int

    def __str__(self) -> str:
        return (
            f"the limit of this process (`{self.name}`, {self.limit_bytes / 1e6:.1f} MB) leaves a footprint of "
            f"{self.footprint_bytes / 1e6:.1f} MB"
        )


def process_limit() -> Limit | None:
    """The tightest limit on this process's memory, given its current reservations; None without a limit.

    Linux only. Reserved memory exceeds the footprint; the difference is assumed to stay constant, except for threads
    that have not started yet. Mapped files also take address space (`ulimit -v`): those mapped now are counted, the
    file of saved activations is not.
    """
    if not sys.platform.startswith("linux"):
        return None
    limits = []
    for name, kind, field, per_thread in _LIMITS:
        limit_bytes = resource.getrlimit(getattr(resource, kind))[0]
        if limit_bytes != resource.RLIM_INFINITY:
            to_come = (usable_cores() + _MORE_THREADS) * (_stack_bytes() + per_thread)
            room = max(0, limit_bytes - _reserved_bytes(field) - to_come)
            limits.append(Limit(name, limit_bytes, footprint_bytes() + room))
    return min(limits, key=lambda limit: limit.footprint_bytes, default=None)


def _stack_bytes() -> int:
    stack_bytes = resource.getrlimit(resource.RLIMIT_STACK)[0]
    return _STACK_BYTES if stack_bytes == resource.RLIM_INFINITY else stack_bytes


def _reserved_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0
