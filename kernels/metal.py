"""A kernel's source file as a function: built once, at first use."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

Template = list[tuple[str, Any]]
factory: Any = mx.fast.metal_kernel  # tests put an emulator here


def available() -> bool:
    """Whether kernels can run: Metal is available, and MLX computes on the GPU."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


class Source:
    """The kernel in `name`.metal. MLX writes its signature from these names, in this order.

    header: the name of a file of functions that it shares with others, or "".
    """

    def __init__(self, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str = ""):
        self.name, self.inputs, self.outputs, self.header = name, inputs, outputs, header

    @cached_property
    def text(self) -> str:
        return _text_of(self.name)

    @cached_property
    def header_text(self) -> str:
        return _text_of(self.header) if self.header else ""

    @cached_property
    def _kernel(self) -> Any:
        return factory(
            name=self.name,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            source=self.text,
            header=self.header_text,
        )

    def __call__(self, inputs: list[Any], template: Template, **call: Any) -> list[mx.array]:
        """The outputs, lazily; `call`: grid, threadgroup, output_shapes, output_dtypes."""
        outputs: list[mx.array] = self._kernel(inputs=inputs, template=template, **call)
        return outputs


def _text_of(name: str) -> str:
    return (Path(__file__).parent / f"{name}.metal").read_text(encoding="utf-8")
