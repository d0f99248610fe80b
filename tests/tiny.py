"""Small random models of every family, built by mlx-lm's own classes and saved in its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

import mebp_mlx  # noqa: F401  (loads the BLAS before anything computes)

_BASE: dict[str, Any] = {
    "hidden_size": 54,
    "intermediate_size": 75,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 131,
    "rope_theta": 5000.0,
    "max_position_embeddings": 256,
}
_GEMMA = _BASE | {
    "num_hidden_layers": 4,
    "head_dim": 10,
    "query_pre_attn_scalar": 7,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 300.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": _BASE | {"model_type": "qwen2", "hidden_size": 60, "tie_word_embeddings": True},
    "qwen2-untied": _BASE | {"model_type": "qwen2", "hidden_size": 60, "tie_word_embeddings": False},
    "qwen3": _BASE | {"model_type": "qwen3", "head_dim": 14, "tie_word_embeddings": True},
    "llama": _BASE
    | {"model_type": "llama", "hidden_size": 60, "tie_word_embeddings": False, "rope_scaling": _LLAMA3}
    | {"attention_bias": True, "mlp_bias": True},
    "llama-sliding": _BASE
    | {"model_type": "llama", "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 5}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_traditional": True},
    "mistral": _BASE
    | {"model_type": "mistral", "head_dim": 12, "tie_word_embeddings": False}
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    "gemma3_text": _GEMMA | {"model_type": "gemma3_text"},
    "gemma3_text-untied": _GEMMA | {"model_type": "gemma3_text", "tie_word_embeddings": False},
    "gemma3": {"model_type": "gemma3", "vocab_size": 139, "text_config": _GEMMA | {"model_type": "gemma3_text"}},
}
# Packed sizes need in_dims that the group size divides.
PACKED = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}


def packed_config(name: str) -> dict[str, Any]:
    """CONFIGS[name] with sizes that can be packed in groups of 32."""
    config = json.loads(json.dumps(CONFIGS[name]))
    (config["text_config"] if "text_config" in config else config).update(PACKED)
    return config


def write_model(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    quantization: dict[str, Any] | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """Write a random model; quantization as in mlx-lm's config.json, overrides by path included."""
    from mlx_lm.utils import _get_classes

    folder.mkdir(parents=True, exist_ok=True)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    rng = np.random.default_rng(seed)

    def randomize(path: str, p: mx.array) -> mx.array:
        spread = 0.3 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5
        centre = 1.0 if p.ndim == 1 and "norm" in path and "gemma" not in config["model_type"] else 0.0
        return mx.array(centre + spread * rng.standard_normal(p.shape), mx.float32)

    model.update(tree_map_with_path(randomize, model.parameters()))
    tied = config["model_type"].startswith("gemma3") and config.get("tie_word_embeddings", True)
    if tied:
        getattr(model, "language_model", model).pop("lm_head", None)
    model.set_dtype(dtype)
    written = dict(config)
    if quantization is not None:
        overrides = {k: v for k, v in quantization.items() if isinstance(v, dict) or v is False}
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            mode=quantization.get("mode", "affine"),
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and overrides.get(path, True),
        )
        written["quantization"] = quantization
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def random_batch(seed: int, B: int, T: int, V: int, masking: str = "ragged") -> tuple[np.ndarray, np.ndarray]:
    """tokens, targets int32 [B, T]. masking: "none", "ragged" (padded on the right), "prompt", "holes"."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    lengths = rng.integers(2, T + 1, B)
    lengths[0] = T
    for b in range(B):
        if masking != "none":
            tokens[b, lengths[b] :] = 0
            targets[b, lengths[b] :] = -100
        if masking == "prompt":
            targets[b, : rng.integers(0, lengths[b])] = -100
        if masking == "holes":
            targets[b, rng.random(T) < 0.4] = -100
    targets[0, T - 1] = 1
    return tokens, targets


def randomize_lora(lora: Any, seed: int, spread: float = 0.05) -> None:
    """Give every LoRA matrix random values: with B = 0 half of the gradients would be zero."""
    rng = np.random.default_rng(seed)
    lora.update(
        {n: mx.array(spread * rng.standard_normal(p.shape), mx.float32) for n, p in sorted(lora.parameters().items())}
    )


def relative_error(found: Any, expected: Any, floor: float = 1e-30) -> float:
    """Largest absolute difference over the largest absolute expected entry (at least floor); NaN if any is NaN."""
    f, e = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert f.shape == e.shape, (f.shape, e.shape)
    return float(np.max(np.abs(f - e)) / max(float(np.max(np.abs(e))), floor))
