"""What MLX computes on, and the defaults that follow from it.

On a GPU (Metal or CUDA): the checkpoint's own dtype and products with packed weights; Metal alone adopts mapped pages
and runs the kernels. On the CPU backend, where 16-bit and packed products run at 1/50 of the BLAS's speed:
float32, and weights decompressed block by block.
"""

from __future__ import annotations

import re

import mlx.core as mx

from ..errors import UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, Metal's or CUDA's."""
    return bool(mx.default_device().type == mx.gpu)


def on_metal() -> bool:
    """Whether MLX computes on a Metal GPU."""
    return on_gpu() and mx.metal.is_available()


def emulates_bfloat16() -> bool:
    """Whether the GPU is one of M1's or M2's generation, which have float16 in hardware and bfloat16 not."""
    if not on_metal():
        return False
    generation = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return generation is not None and int(generation[1]) <= 14


def takes_float16(dtype: mx.Dtype, family: str) -> bool:
    """Whether packed products of bfloat16 are made in float16: there these take 1.8 times as long. Not for gemma."""
    return dtype == mx.bfloat16 and emulates_bfloat16() and not family.startswith("gemma")


def compute_dtype(name: str, family: str, own: mx.Dtype = mx.bfloat16) -> mx.Dtype:
    """--dtype as an MLX type; "auto": `own`, the checkpoint's, on a GPU (as in mlx-lm), float32 on the CPU.

    gemma in float16 is bfloat16 by "auto", a UserError by name: its activations pass float16's range.
    """
    gemma = family.startswith("gemma")
    if name == "auto":
        if not on_gpu():
            return mx.float32
        return mx.bfloat16 if gemma and own == mx.float16 else own
    if name == "float16" and gemma:
        raise UserError(f"--dtype: {family} cannot be computed in float16, its activations pass that type's range")
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """An MLX type's own name: "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def keeps_packed(name: str) -> bool:
    """--weights as a decision: whether products are made with packed weights."""
    return on_gpu() if name == "auto" else name == "packed"
