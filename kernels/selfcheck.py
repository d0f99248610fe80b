"""Checks each kernel against its reference at first use, on the machine it runs on.

At the first use for a (dtype, group size), kernel and reference run on a small sample, and both are compared with the
reference in float32 on the CPU. After a compile error or a mismatch one warning is issued and the reference is used.

MEBP_KERNELS=off   never use a kernel
             on    use kernels wherever Metal is available, unchecked
             check do the first-use check, and compare every call with the reference (slow: for debugging)
             unset do the first-use check
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mebp_mlx.errors import UserError

from . import metal as backend

MODES = ("", "off", "on", "check")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# The allowed excess of a kernel's error over its reference's, relative to the largest value: a few roundings.
TOLERANCE = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@dataclass
class Kernel:
    """A kernel, its reference, and its check results by (dtype, group size); "" means passed."""

    name: str
    metal: Callable[..., Any]
    reference: Callable[..., Any]
    sample: Callable[..., tuple]
    group_sizes: tuple[int, ...]
    sizes_are: str
    problems: dict[tuple[mx.Dtype, int], str] = field(default_factory=dict)


KERNELS: dict[str, Kernel] = {}


def register(
    name: str,
    metal: Callable[..., Any],
    reference: Callable[..., Any],
    sample: Callable[..., tuple],
    group_sizes: tuple[int, ...],
    sizes_are: str = "groups of",
) -> None:
    """Registers a kernel. sample(dtype, group_size, **sizes) returns arguments for both functions; sizes_are: words for
    what a kernel has in place of group sizes.
    """
    KERNELS[name] = Kernel(name, metal, reference, sample, group_sizes, sizes_are)


def mode() -> str:
    """The value of MEBP_KERNELS. Raises UserError for an unknown value."""
    setting = os.environ.get("MEBP_KERNELS", "")
    if setting not in MODES:
        raise UserError(f"MEBP_KERNELS={setting}: must be off, on or check, or unset")
    return setting


def run(name: str, arguments: tuple, impl: str | None, dtype: mx.Dtype, group_size: int = 0) -> Any:
    """The result of a kernel or its reference. impl: "metal", "reference", or None to let the check decide."""
    if impl not in (None, "metal", "reference"):
        raise ValueError(f"impl={impl!r}: must be 'metal', 'reference' or None")
    kernel = KERNELS[name]
    if impl is None:
        if not uses_metal(name, dtype, group_size):
            return kernel.reference(*arguments)
        if mode() == "check":
            return _compared(kernel, arguments, (dtype, group_size))
    return (kernel.reference if impl == "reference" else kernel.metal)(*arguments)


def uses_metal(name: str, dtype: mx.Dtype, group_size: int = 0) -> bool:
    """Whether a call without `impl` uses the kernel."""
    setting = mode()
    if setting == "off" or not backend.available() or dtype not in DTYPES:
        return False
    return setting == "on" or passes(name, dtype, group_size)


def passes(name: str, dtype: mx.Dtype, group_size: int = 0) -> bool:
    """Whether a kernel passed its check, which runs at the first call and warns on failure."""
    kernel = KERNELS[name]
    key = (dtype, group_size)
    if key not in kernel.problems:
        _record(kernel, key, check(kernel, dtype, group_size))
    return kernel.problems[key] == ""


def check(kernel: Kernel, dtype: mx.Dtype, group_size: int) -> str:
    """Checks a kernel on this machine. Returns one line that describes the failure; "" if it is correct."""
    arguments = kernel.sample(dtype, group_size)
    try:
        result = kernel.metal(*arguments)
        mx.eval(result)
    except Exception as error:  # compile errors have no specific type
        lines = str(error).splitlines() or [type(error).__name__]
        reported = next((line for line in lines if "error:" in line), lines[0])  # compilers print the location first
        return " ".join(reported.split())[:300]
    with mx.stream(mx.cpu):
        truth = kernel.reference(*(_widened(argument) for argument in arguments))
        expected = kernel.reference(*arguments)
        return _difference(result, expected, truth, dtype)


def _compared(kernel: Kernel, arguments: tuple, key: tuple[mx.Dtype, int]) -> Any:
    """The kernel's result if it matches the reference within tolerance, else the reference's result."""
    result, expected = kernel.metal(*arguments), kernel.reference(*arguments)
    problem = _difference(result, expected, expected, key[0])
    if not problem:
        return result
    _record(kernel, key, problem)
    return expected


def _record(kernel: Kernel, key: tuple[mx.Dtype, int], problem: str) -> None:
    kernel.problems[key] = problem
    if problem:
        dtype, group_size = key
        what = str(dtype).rpartition(".")[2] + (f", {kernel.sizes_are} {group_size}" if group_size else "")
        warnings.warn(
            f"Metal kernel {kernel.name} ({what}) is not used on {device_name()}: {problem}; "
            "plain MLX operations are used instead",
            UserWarning,
            stacklevel=3,
        )


def device_name() -> str:
    """The GPU's name, or the device's kind."""
    info: dict[str, Any] = mx.device_info() if backend.available() else {}
    return str(info.get("device_name") or mx.default_device().type.name)


def _widened(argument: Any) -> Any:
    is_16_bit = isinstance(argument, mx.array) and argument.dtype in (mx.float16, mx.bfloat16)
    return argument.astype(mx.float32) if is_16_bit else argument


def _difference(result: Any, expected: Any, truth: Any, dtype: mx.Dtype) -> str:
    """A description of the first output whose error in `result` exceeds that in `expected` by more than the dtype's
    tolerance; "" if there is none.
    """
    for number, (f, e, t) in enumerate(zip(_tuple(result), _tuple(expected), _tuple(truth), strict=True)):
        f, e, t = (array.astype(mx.float32) for array in (f, e, t))
        error, of_reference, size = (float(np.asarray(mx.abs(x).max())) for x in (f - t, e - t, t))
        allowed = of_reference + TOLERANCE[dtype] * max(size, 1.0)
        if not error <= allowed:
            return f"output {number} is off by {error:.2g} (at most {allowed:.2g} expected)"
    return ""


def _tuple(outputs: Any) -> tuple[mx.array, ...]:
    return (outputs,) if isinstance(outputs, mx.array) else tuple(outputs)
