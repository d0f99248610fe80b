"""MLX's compute device, and the defaults that depend on it.

GPU (Metal or CUDA): the checkpoint's own dtype, and products with packed weights; only Metal uses mapped pages in place
and runs the kernels. CPU, where 16-bit and packed products run at 1/50 of BLAS speed: float32, and weights dequantized
block by block.
"""

from __future__ import annotations

import re

import mlx.core as mx

from ..errors import UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return bool(mx.default_device().type == mx.gpu)


def on_metal() -> bool:
    """Whether MLX computes on a Metal GPU."""
    return on_gpu() and mx.metal.is_available()


def emulates_bfloat16() -> bool:
    """Whether the GPU is of the M1 or M2 generation, which has float16 but not bfloat16 in hardware."""
    if not on_metal():
        return False
    generation = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return generation is not None and int(generation[1]) <= 14


def takes_float16(dtype: mx.Dtype, family: str) -> bool:
    """Whether to compute packed bfloat16 products in float16: on M1 and M2 (1.8 times as fast), except for gemma."""
    return dtype == mx.bfloat16 and emulates_bfloat16() and not family.startswith("gemma")


def compute_dtype(name: str, family: str, own: mx.Dtype = mx.bfloat16) -> mx.Dtype:
    """--dtype as an MLX type. "auto" is `own`, the checkpoint's dtype, on a GPU (as in mlx-lm), float32 on the CPU.

    Gemma's activations exceed float16's range: "auto" replaces float16 by bfloat16, and "float16" raises UserError.
    """
    gemma = family.startswith("gemma")
    if name == "auto":
        if not on_gpu():
            return mx.float32
        return mx.bfloat16 if gemma and own == mx.float16 else own
    if name == "float16" and gemma:
        raise UserError(f"--dtype: {family} cannot be computed in float16: its activations exceed that type's range")
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of an MLX type, such as "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def keeps_packed(name: str) -> bool:
    """Whether products use packed weights, for a value of --weights."""
    return on_gpu() if name == "auto" else name == "packed"
