"""What MLX computes on, and the defaults that follow from it.

On Metal: 16-bit activations, products with packed weights, mapped pages adopted in place. On the CPU backend, where
16-bit and packed products run at a fiftieth of the BLAS's speed: float32, and weights decompressed block by block.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def on_metal() -> bool:
    """Whether MLX computes on a Metal GPU."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def on_gpu() -> bool:
    """Whether MLX computes on a GPU."""
    return mx.default_device().type == mx.gpu


def compute_dtype(name: str, family: str) -> mx.Dtype:
    """--dtype as an MLX type; "auto": bfloat16 on Metal (float16 where the GPU lacks it), else float32.

    UserError for gemma in float16: its activations pass float16's range.
    """
    gemma = family.startswith("gemma")
    if name == "auto":
        if not on_metal():
            return mx.float32
        return mx.bfloat16 if gemma or _has_bfloat16() else mx.float16
    if name == "float16" and gemma:
        raise UserError(f"--dtype: {family} cannot be computed in float16, its activations pass that type's range")
    return DTYPES[name]


def dtype_name(dtype: mx.Dtype) -> str:
    """An MLX type's own name: "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def keeps_packed(name: str) -> bool:
    """--weights as a decision: whether products are made with packed weights."""
    return on_metal() if name == "auto" else name == "packed"


def _has_bfloat16() -> bool:
    """Whether this GPU compiles and runs a product in bfloat16 (before macOS 14 none does)."""
    try:
        ones = mx.ones((8, 8), mx.bfloat16)
        mx.eval(ones @ ones)
    except RuntimeError:
        return False
    return True
