"""Writes LoRA pairs to a GGUF file for llama.cpp's `--lora`, in the format of its convert_lora_to_gguf.py.

Tensors are named after the matrix they adapt: `blk.N.attn_q.weight.lora_a` [r, in] and `.lora_b` [out, r].
llama.cpp multiplies their product by adapter.lora.alpha / r. Everything is float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from ..errors import UserError
from ..model.config import ModelSpec
from ..model.lora import Lora
from .adapters import FLAG

# Family -> llama.cpp's name for it.
_ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}  # fmt: skip
_TENSORS = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip


def write_gguf(path: Path, lora: Lora, spec: ModelSpec, name: str, flag: str) -> None:
    """Writes a new file, complete or not at all. name: the adapters' display name. Raises UserError naming `flag`."""
    if lora.scale == 0:
        raise UserError(f"{FLAG}: scale 0 cannot be expressed for llama.cpp, which reads alpha 0 as no scaling")
    if spec.family not in _ARCHITECTURES:
        raise UserError(f"--gguf: {spec.family} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    if _interleaves(spec) and any(layer.rope is not None and layer.rope.traditional for layer in spec.layers):
        raise UserError("--gguf: rope_traditional in config.json: llama.cpp's converters do not support such a model")
    if path.suffix != ".gguf":
        raise UserError(f"{flag} {path}: must end with .gguf")
    if path.exists():
        raise UserError(f"{flag} {path}: exists")
    tensors = dict(_tensors(lora, spec))
    metadata: dict[str, mx.array | str | list[str]] = {
        "general.architecture": _ARCHITECTURES[spec.family],
        "general.type": "adapter",
        "general.name": name,
        "adapter.type": "lora",
        "adapter.lora.alpha": mx.array(lora.scale * lora.rank, mx.float32),
    }
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial.gguf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mx.save_gguf(str(partial), tensors, metadata)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.rename(partial, path)
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{flag} {path}: cannot be written: {reason}") from None
    finally:
        partial.unlink(missing_ok=True)


def _tensors(lora: Lora, spec: ModelSpec) -> Iterator[tuple[str, mx.array]]:
    for layer in spec.layers:
        for short, linear in layer.linears.items():
            if (pair := lora.pairs.get(linear.name)) is None:
                continue
            b = pair.b.T
            if short in "qk" and _interleaves(spec):
                b = interleaved(b, spec.H if short == "q" else spec.K)
            name = f"blk.{layer.index}.{_TENSORS[short]}.weight"
            yield f"{name}.lora_a", mx.contiguous(pair.a.T)
            yield f"{name}.lora_b", mx.contiguous(b)


def _interleaves(spec: ModelSpec) -> bool:
    """Whether llama.cpp rotates elements i and i + 1 of a head, where transformers rotates i and i + head_dim / 2."""
    return _ARCHITECTURES[spec.family] == "llama"


def interleaved(rows: mx.array, n_heads: int) -> mx.array:
    """Reorders rows [heads * head_dim, r] of a query or key projection so that both rotations give the same result."""
    n_rows, rank = rows.shape
    return rows.reshape(n_heads, 2, n_rows // n_heads // 2, rank).swapaxes(1, 2).reshape(n_rows, rank)
