"""Times the engine from outside: its functions are wrapped, and their results evaluated immediately.

The time of a stage excludes the stages inside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mebp_mlx  # noqa: F401  # isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from mebp_mlx.engine import backprop, base
from mebp_mlx.kernels import cpu
from mebp_mlx.training.update import Updater


class Clock:
    """Seconds by stage, without the stages inside it; floating-point operations of stages with matrix products."""

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
            mx.eval(value)  # evaluates arrays, also in tuples and lists; ignores other values
        finally:
            passed_s = time.perf_counter() - began_s
            own_s = passed_s - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own_s
            self.calls[name] = self.calls.get(name, 0) + 1
            if self._inner:
                self._inner[-1] += passed_s
        return value


class Wraps:
    """Functions replaced by wrappers; `remove` restores them all."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def wrap(self, clock: Clock, owner: Any, name: str, label: Callable[..., str] | str) -> None:
        """Times owner.name as `label` or label(*arguments). The arguments are evaluated first and not timed."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            mx.eval(args)
            stage = label if isinstance(label, str) else label(*args)
            return clock.timed(stage, lambda: original(*args, **kwargs))

        self.replace(owner, name, wrapped)

    def replace(self, owner: Any, name: str, new: Callable[..., Any]) -> None:
        """Replaces owner.name by `new` until `remove`, except for graphs that are only counted or traced."""
        original = getattr(owner, name)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            return (original if cpu._is_off else new)(*args, **kwargs)

        self._undo.append((owner, name, original))
        setattr(owner, name, chosen)

    def remove(self) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
        self._undo.clear()


class Phases(Wraps):
    """The phase of a step that the engine is in: `emb`, `f0` to `fN`, `head`, `bN` to `b0`.

    around(label, run) runs each phase. An update belongs to its block's backward, or to the previous phase.
    """

    def __init__(self, around: Callable[[str, Callable[[], Any]], Any]):
        super().__init__()
        self.now, self._around, self._is_inside = "", around, False
        self._put(base.Pass, "embed", lambda *_: "emb")
        self._put(base.Pass, "forward", lambda _, layer, *__: f"f{layer.index}")
        self._put(base, "cross_entropy", lambda *_: "head")
        self._put(backprop, "cross_entropy", lambda *_: "head")
        self._put(backprop.BackpropEngine, "backward", lambda _, __, layer, *___: f"b{layer.index}")
        self._put(Updater, "sink", lambda *_: self.now)

    def _put(self, owner: Any, name: str, label: Callable[..., str]) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return original(*args, **kwargs)
            self.now, self._is_inside = label(*args), True
            try:
                return self._around(self.now, lambda: original(*args, **kwargs))
            finally:
                self._is_inside = False

        self.replace(owner, name, wrapped)
