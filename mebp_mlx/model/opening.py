"""Opens a checkpoint: chooses the weights' form in memory and the compute dtype."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..kernels.selfcheck import mode as kernel_mode
from ..system import allocator, device
from .base import Model

WEIGHTS = ("auto", "packed", "decompressed")


def open_model(path: str | Path, dtype: str = "auto", weights: str = "auto") -> Model:
    """A checkpoint folder (config.json + *.safetensors, mlx-lm's layout), memory-mapped; nothing is read yet.

    dtype: of the computation, "float32", "bfloat16", "float16"; weights: "packed" (products with packed weights) or
    "decompressed" (block by block); "auto": the checkpoint's own dtype (that of its embedding, or of the embedding's
    scales) and packed on a GPU, float32 and decompressed on the CPU backend. LoRA parameters and their gradients are
    always float32. Raises UserError for a missing or damaged file, an unknown family, shapes that contradict
    config.json, or a dtype that the family does not support. Afterwards MLX's buffer cache is almost off in this
    process: cached buffers would count as footprint.
    """
    for flag, value, known in (("--dtype", dtype, ("auto", *device.DTYPES)), ("--weights", weights, WEIGHTS)):
        if value not in known:
            raise UserError(f"{flag}: {value!r} is none of {', '.join(known)}")
    kernel_mode()  # refuse an invalid MEBP_KERNELS before computing anything
    allocator.settle()
    model = Model(path, packed=device.keeps_packed(weights), adopt=device.on_metal())
    model.dtype = device.compute_dtype(dtype, model.spec.family, _own_dtype(model))
    model.half_products = device.takes_float16(model.dtype, model.spec.family)
    return model


def _own_dtype(model: Model) -> mx.Dtype:
    """mlx-lm's compute dtype: activations take the dtype of the embedding, or of its scales."""
    embedding = model.spec.embedding
    part = "scales" if embedding.quantization else "weight"
    dtype = model.weights.info(f"{embedding.name}.{part}").mlx_dtype
    if not mx.issubdtype(dtype, mx.floating):  # mxfp4 scales are bytes
        dtype = model.weights.info(model.spec.final_norm).mlx_dtype
    return dtype if dtype in device.DTYPES.values() else mx.bfloat16
