"""Timing the engine from outside: its functions are wrapped, and what they return is evaluated at once.

A stage's time is what is left after the stages inside it are taken away.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx


class Clock:
    """Seconds by stage, each without the stages inside it; flops by stage for those with matrix products."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.flops: dict[str, float] = {}
        self.shapes: dict[str, tuple[int, int, int]] = {}
        self._inner: list[float] = []

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        self._inner.append(0.0)
        began_s = time.perf_counter()
        try:
            value = run()
            evaluate(value)
        finally:
            passed_s = time.perf_counter() - began_s
            own_s = passed_s - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own_s
            self.calls[name] = self.calls.get(name, 0) + 1
            if self._inner:
                self._inner[-1] += passed_s
        return value

    def move(self, source: str, target: str, seconds: float) -> None:
        """Count `seconds` of one stage as another's."""
        self.seconds[source] -= seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def outside(self, run: Callable[[], Any]) -> float:
        """Seconds of something that belongs to no stage."""
        began_s = time.perf_counter()
        run()
        passed_s = time.perf_counter() - began_s
        if self._inner:
            self._inner[-1] += passed_s
        return passed_s


def evaluate(value: Any) -> None:
    """Evaluates an array, or those in a tuple or list."""
    if isinstance(value, mx.array | tuple | list):
        mx.eval([item for item in value if isinstance(item, mx.array)] if isinstance(value, tuple) else value)


class Wraps:
    """Functions with the clock around them; `remove` takes everything off again."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        """Times owner.name as label(*its arguments). What it waits for belongs to the one that made it."""
        original, clock = getattr(owner, name), self.clock

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            evaluate(args)
            return clock.timed(label(*args), lambda: original(*args, **kwargs))

        self.replace(owner, name, wrapped)

    def replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        """Puts `new` in the place of owner.name until `remove`."""
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def remove(self) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()
