"""Runs the project's Metal kernels: on Metal if it exists, otherwise their sources in tests/metal_on_cpu."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import mlx.core as mx
import pytest

from mebp_mlx import kernels
from mebp_mlx.kernels import metal, selfcheck
from tests import metal_on_cpu

SOURCES = {name: kernels.sources[name] for name in kernels.KERNELS}


@contextlib.contextmanager
def running(
    seed: int = 0, sanitize: str = "", change: Callable[[str], str] | None = None, pretend: bool = False
) -> Iterator[None]:
    """A context that runs kernels on Metal, or emulated with the given order of threads and sanitizer.

    change: replaces each kernel's source text; pretend: calls without `impl` also find Metal.
    """
    on_metal = mx.metal.is_available()
    if not on_metal and (reason := metal_on_cpu.why_not(sanitize)):
        pytest.skip(reason)
    if on_metal and (seed or sanitize):
        pytest.skip("an order of threads or a sanitizer: emulated only")
    with contextlib.ExitStack() as stack:
        if on_metal:
            stack.callback(mx.set_default_device, mx.default_device())
            mx.set_default_device(mx.gpu)
        else:
            emulator = partial(metal_on_cpu.metal_kernel, sanitize=sanitize, seed=seed)
            stack.enter_context(mock.patch.object(metal, "factory", emulator))
        if pretend:
            stack.enter_context(mock.patch.object(metal, "available", lambda: True))
        for source in SOURCES.values():
            texts = {"text": source.text, "header_text": source.header_text}
            built = {name: text if change is None else change(text) for name, text in texts.items()}
            stack.enter_context(mock.patch.dict(source.__dict__, built))
            source.__dict__.pop("_kernel", None)
        for kernel in selfcheck.KERNELS.values():
            stack.enter_context(mock.patch.object(kernel, "problems", {}))
        yield
    for source in SOURCES.values():
        source.__dict__.pop("_kernel", None)
