"""mx.fast.metal_kernel on the CPU: the signature that MLX generates around a kernel's body, and the call."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx
import mlx.core as mx
import numpy as np

from tests.metal_on_cpu.run import Kernel

C_TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "uint64": "uint64_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
    "int64": "int64_t",
    "float16": "float16_t",
    "float32": "float",
    "bfloat16": "bfloat16_t",
}
FEW_ELEMENTS = 8  # MLX passes inputs with fewer elements in the constant address space

_UINT = """dispatch_quadgroups_per_threadgroup dispatch_simdgroups_per_threadgroup quadgroup_index_in_threadgroup
quadgroups_per_threadgroup simdgroup_index_in_threadgroup simdgroups_per_threadgroup thread_execution_width
thread_index_in_quadgroup thread_index_in_simdgroup thread_index_in_threadgroup threads_per_simdgroup"""
_UINT3 = """dispatch_threads_per_threadgroup grid_origin grid_size thread_position_in_grid
thread_position_in_threadgroup threadgroup_position_in_grid threadgroups_per_grid threads_per_grid
threads_per_threadgroup"""
ATTRIBUTES = dict(sorted([*((name, "uint") for name in _UINT.split()), *((name, "uint3") for name in _UINT3.split())]))

Template = Sequence[tuple[str, Any]]


class Signature(NamedTuple):
    """MLX's source around a body: the text, the kernel with its template arguments, and each buffer's role."""

    text: str
    function: str
    buffers: list[tuple[str, int]]  # ("data" | "shape" | "strides" | "ndim", input) or ("out", output)


def mlx_include() -> Path:
    """The folder of MLX's Metal headers, part of its wheel."""
    return next(path for folder in mlx.__path__ if (path := Path(folder) / "include").exists())


def signature(
    name: str,
    input_names: Sequence[str],
    inputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    output_names: Sequence[str],
    output_dtypes: Sequence[mx.Dtype],
    source: str,
    header: str = "",
    template: Template = (),
    atomic_outputs: bool = False,
) -> Signature:
    """The kernel that MLX would generate for inputs of these shapes and dtypes; equal to MLX's text (see the tests)."""
    parameters: list[str] = []
    buffers: list[tuple[str, int]] = []
    suffixes: list[str] = []

    def add(declaration: str, what: str, index: int) -> None:
        parameters.append(f"  {declaration} [[buffer({len(parameters)})]]")
        buffers.append((what, index))

    for index, (input_name, (shape, dtype)) in enumerate(zip(input_names, inputs, strict=True)):
        is_small = int(np.prod(shape)) < FEW_ELEMENTS
        c_type = C_TYPES[_name(dtype)]
        suffixes.append(c_type + ("s" if not shape else "c" if is_small else ""))
        space = "constant" if is_small else "device"
        add(f"const {space} {c_type}{'*' if shape else '&'} {input_name}", "data", index)
        for what, declaration in (("shape", "int*"), ("strides", "int64_t*"), ("ndim", "int&")):
            if shape and f"{input_name}_{what}" in source:
                add(f"const constant {declaration} {input_name}_{what}", what, index)
    for index, (output_name, dtype) in enumerate(zip(output_names, output_dtypes, strict=True)):
        c_type = C_TYPES[_name(dtype)]
        suffixes.append(c_type)
        add(f"device {f'atomic<{c_type}>' if atomic_outputs else c_type}* {output_name}", "out", index)
    attributes = [f"  {kind} {word} [[{word}]]" for word, kind in ATTRIBUTES.items() if word in source]

    values = [str(int(v)) if isinstance(v, bool | int) else C_TYPES[_name(v)] for _, v in template]
    function = f"custom_kernel_{name}"
    if template:
        function += "_" + re.sub(r"\W", "_", "".join(f"_{value}" for value in values))
    function += "".join(f"_{suffix}" for suffix in suffixes)
    kinds = ["bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename" for _, v in template]
    head = (
        f"template <{', '.join(f'{k} {n}' for k, (n, _) in zip(kinds, template, strict=True))}>\n" if template else ""
    )
    text = (
        f"{header}{head}[[kernel]] void {function}(\n" + ",\n".join(parameters + attributes) + f") {{\n{source}\n}}\n"
    )
    if template:
        instance = f"{function}<{', '.join(values)}>"
        text += f'\ntemplate [[host_name("{function}")]] [[kernel]] decltype({instance}) {instance};\n'
        return Signature(text, instance, buffers)
    return Signature(text, function, buffers)


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Mapping[str, str] | None = None,
    *,
    sanitize: str = "",
    seed: int = 0,
) -> Callable[..., list[mx.array]]:
    """`mx.fast.metal_kernel`, run on the CPU.

    `sanitize` is that of `run.Kernel`, `seed` the order of threads. Unwritten outputs read as NaN (or -1). Returns a
    function of inputs, template, grid, threadgroup, output_shapes, output_dtypes, init_value and verbose, which returns
    MLX arrays. Raises MSLError if a fault of the kernel is detected.
    """
    math_mode = {"math_mode": "safe", **(compile_options or {})}
    if len(math_mode) != 1 or math_mode["math_mode"] not in ("safe", "relaxed", "fast"):
        raise ValueError(f"compile_options of a metal kernel: {compile_options}")

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Template = (),
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        raw = [_bits(x, ensure_row_contiguous) for x in arrays]
        generated = signature(
            name,
            input_names,
            [(x.shape, x.dtype) for x in arrays],
            output_names,
            output_dtypes,
            source,
            header,
            list(template or ()),
            atomic_outputs,
        )
        if verbose:
            print(generated.text)
        kernel = Kernel(
            '#include "mlx/backend/metal/kernels/utils.h"\n#line 1 "kernel"\n' + generated.text,
            generated.function,
            [mlx_include()],
            sanitize=sanitize,
            fast_math=math_mode["math_mode"] == "fast",
        )
        outputs = [_output(tuple(s), t, init_value) for s, t in zip(output_shapes, output_dtypes, strict=True)]
        made = {
            "data": lambda i: _storage(raw[i]),
            "shape": lambda i: np.array(raw[i].shape, np.int32),
            "strides": lambda i: np.array([s // raw[i].itemsize for s in raw[i].strides], np.int64),
            "ndim": lambda i: np.array(raw[i].ndim, np.int32),
            "out": lambda i: outputs[i],
        }
        kernel([made[what](i) for what, i in generated.buffers], grid, threadgroup, seed=seed)
        return [_to_mlx(array, dtype) for array, dtype in zip(outputs, output_dtypes, strict=True)]

    return call


def generated_by_mlx(call: Callable[..., Any], *inputs: mx.array) -> str:
    """The Metal source that MLX generates for `call(*inputs)`, one call of a kernel with verbose=True.

    Exporting a function builds its kernels' sources without a GPU, and verbose prints them.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as file:
        with _output_into(file.fileno()):
            mx.export_function(f"{folder}/call.mlxfn", call, *inputs)
        file.seek(0)
        text = file.read().decode()
    return text.split("```\n", 1)[1].rsplit("\n```", 1)[0]


@contextlib.contextmanager
def _output_into(descriptor: int) -> Iterator[None]:
    """Redirects this process's output, also of C++ code, to the file."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(before, 1)
        os.close(before)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).split(".")[-1]


def _bits(x: mx.array, make_contiguous: bool) -> np.ndarray:
    """The array as numpy, with its strides unless it must be made contiguous; bfloat16 as uint16."""
    bits = np.asarray(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
    return np.require(bits, requirements="C") if make_contiguous else bits


def _storage(x: np.ndarray) -> np.ndarray:
    """The memory from an array's first to its last element, for any strides; a read-only view."""
    if not x.size:
        return np.zeros(0, x.dtype)
    n_items = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.strides, strict=True)) // x.itemsize
    return np.lib.stride_tricks.as_strided(x, (n_items,), (x.itemsize,), writeable=False)


def _output(shape: tuple[int, ...], dtype: mx.Dtype, init_value: float | None) -> np.ndarray:
    if init_value is not None:
        return np.array(_bits(mx.full(shape, init_value, dtype), True))
    numpy_dtype = np.dtype(np.uint16 if dtype == mx.bfloat16 else _name(dtype))
    n_bytes = int(np.prod(shape)) * numpy_dtype.itemsize
    return np.full(n_bytes, 0xFF, np.uint8).view(numpy_dtype).reshape(shape)


def _to_mlx(bits: np.ndarray, dtype: mx.Dtype) -> mx.array:
    x = mx.array(bits)
    return x.view(mx.bfloat16) if dtype == mx.bfloat16 else x
