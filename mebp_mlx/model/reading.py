"""config.json -> ModelSpec: what the family's row (families.py) and the config's keys say, checked by the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..system.files import read_json_object
from ..weights.safetensors import MappedWeights
from .config import Layer, Linear, ModelSpec
from .families import FAMILIES, Family
from .kinds import Reader, kinds_of
from .layers import LayerRules
from .settings import Settings
from .tensors import Tensors

MULTIMODAL = {
    "gemma3": "gemma3_text",
    "mistral3": "llama",
    "qwen3_5": "qwen3_5_text",
}  # the decoder under text_config, where that names none
_TEXT_TYPES = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("ministral3", "llama", "mistral"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5"),
}


# Far above any model's. Libraries that read config.json make lists of these lengths.
SIZE_LIMITS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10**7,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**6,
    "head_dim": 10**6,
    "vocab_size": 10**8,
}


def read_config(folder: Path) -> dict:
    """config.json of a model folder as a dict; UserError when it is missing, not a JSON object, or gives a size beyond
    SIZE_LIMITS.
    """
    path = folder / "config.json"
    try:
        config = read_json_object(path)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --model needs a folder with config.json and *.safetensors") from None
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        for key, limit in SIZE_LIMITS.items():
            value = section.get(key)
            if isinstance(value, (int, float)) and not 0 < value <= limit:
                raise UserError(f"{path}: {key} must be a positive integer up to {limit:,}, found {str(value)[:40]}")
    return config


def read_spec(config: dict, weights: MappedWeights, where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a checkpoint.

    config: config.json; weights: the checkpoint, whose shapes are checked against it; tensors of a multimodal model
    that transformers has named are called as mlx-lm calls them from here on. Raises UserError for an unknown family, a
    missing key, or a tensor that contradicts the config.
    """
    family, prefix = family_of(config, where)[1:]
    if prefix:
        weights.rename({f"model.{prefix}": f"{prefix}model.", "lm_head.": f"{prefix}lm_head."})
        if "text_config" not in config:
            weights.rename({"model.": f"{prefix}model."})
    tensors = Tensors(weights, config, where)
    spec = describe(config, tensors, where)
    head = f"{prefix}lm_head"
    others = ("model.vision_tower.", "model.multi_modal_projector.", "model.visual.") if prefix else ()
    tensors.refuse_unread(prefix, None if spec.head.name == head else head, (*family.ignores, *others))
    return spec


def family_of(config: dict, where: str) -> tuple[dict, Family, str]:
    """The decoder's own config, its family, and what its tensors' names begin with. Raises UserError."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    if name not in MULTIMODAL:
        return config, FAMILIES[name], ""
    text = config.get("text_config", config if name == "qwen3_5" else None)
    if not isinstance(text, dict):
        raise UserError(f"{where}: {name} needs an object 'text_config'")
    inner = text.get("model_type", MULTIMODAL[name])
    if inner not in _TEXT_TYPES[name]:
        known = ", ".join(_TEXT_TYPES[name])
        raise UserError(f"{where}: model_type {inner!r} of text_config is not supported in {name}; supported: {known}")
    if name == "gemma3":
        # As in mlx-lm: the heads default to the 4B model's, the vocabulary is the outer config's.
        outer = {"vocab_size": config.get("vocab_size", 262_208)}
        text = {"num_attention_heads": 8, "num_key_value_heads": 4, **text, **outer}
    elif name == "mistral3":
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        text = {**text, "tie_word_embeddings": tied}
    return text, FAMILIES[name if name == "qwen3_5" else inner], "language_model."


def describe(config: dict, tensors: Reader, where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config.json, asking `tensors` for every tensor that it implies. Raises UserError."""
    text, family, prefix = family_of(config, where)
    settings = Settings(text, family.defaults, where)
    D, L = settings.integer("hidden_size"), settings.integer("num_hidden_layers")
    F = settings.integer("intermediate_size") if family.width is None else family.width(settings)
    H = settings.integer("num_attention_heads")
    K = settings.integer("num_key_value_heads", H)
    head_dim = settings.integer("head_dim", D // H) if family.own_head_dim else D // H
    V = settings.integer("vocab_size")
    if H % K:
        raise UserError(f"{where}: num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
    if head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim} must be even for rotary embeddings")
    embedding = tensors.linear(f"{prefix}model.embed_tokens", V, D)
    head = _head(family, settings, tensors, embedding, f"{prefix}lm_head")
    layers, offset = [], family.norm_offset
    with_attention, without = kinds_of(family, settings, D, F, (H, K, head_dim))
    rules = LayerRules(settings, family, head_dim, L)
    for index in range(L):
        name = f"{prefix}model.layers.{index}"
        if without is None or family.hybrid is None or family.hybrid.has_attention(settings, index):
            window = rules.window(index)
            layers.append(with_attention.layer(tensors, index, name, rules.rope(index, window), window))
            continue
        layers.append(without.layer(tensors, index, name, None, None))
        if without.is_in_torch_layout(tensors, name):
            offset = without.offset_in_torch_layout
    final_norm = tensors.vector(f"{prefix}{family.final_norm}.weight", D)
    spare_head = None
    if family.keeps_head and head is embedding and tensors.has(f"{prefix}lm_head"):
        spare_head = tensors.linear(f"{prefix}lm_head", V, D)
    return ModelSpec(
        family=config["model_type"],
        D=D,
        F=F,
        H=H,
        K=K,
        head_dim=head_dim,
        V=V,
        L=L,
        norm_eps=settings.number(family.norm_eps),
        norm_after_rope=family.norm_after_rope,
        norm_offset=offset,
        delta=None if without is None else without.widths.delta,
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        tensors=tuple(tensors.read),
        spare_head=spare_head,
        remarks=_remarks(family, settings, head_dim, layers),
        **_scales(family, settings, D, L, head_dim),
    )


def _remarks(family: Family, settings: Settings, head_dim: int, layers: list[Layer]) -> tuple[str, ...]:
    """Where mlx-lm's rotation is another one: most of its classes read no rope_parameters (transformers 5's)."""
    if family.reads_rope_parameters or not settings.get("rope_parameters"):
        return ()
    config = {key: value for key, value in settings.config.items() if key != "rope_parameters"}
    theirs = LayerRules(Settings(config, settings.defaults, settings.where), family, head_dim, len(layers))
    for layer in layers:
        ours = layer.rope
        if ours is None:
            continue
        try:
            rope = theirs.rope(layer.index, layer.window)
        except UserError:
            return ("mlx-lm does not open this model: it reads no rope_parameters, and config.json has no rope_theta",)
        if rope is not None and (rope != ours or rope.freqs is not ours.freqs):
            what = "another scaling of the rotation"
            if rope.base != ours.base:
                what = f"rope_theta {rope.base:g} instead of {ours.base:g}"
            return (f"mlx-lm reads this model differently: it reads no rope_parameters, and takes {what}",)
    return ()


def _head(family: Family, settings: Settings, tensors: Reader, embedding: Linear, name: str) -> Linear:
    stored = tensors.has(name)
    tied = {"always": False, "never": True, "stored": not stored}.get(family.head)
    if tied is None:
        tied = bool(settings.get("tie_word_embeddings", not stored))
    if family.head_base is not None and not stored:
        tied = True  # mlx-lm copies the embedding then, and divides as for a head of its own
    return embedding if tied else tensors.linear(name, embedding.out_dims, embedding.in_dims)


def _scales(family: Family, settings: Settings, D: int, L: int, head_dim: int) -> dict[str, Any]:
    """The factors and caps of a ModelSpec."""

    def number(key: str | None) -> float | None:
        return None if key is None else settings.number(key)

    embed_scale = D**0.5 if family.embed_scale_is_root else number(family.embed_scale)
    if embed_scale is not None and family.embed_scale_is_rounded:
        embed_scale = mx.array(embed_scale, mx.bfloat16).astype(mx.float32).item()
    scalar, residual_scale = number(family.query_scalar) or head_dim, number(family.residual_scale) or 1.0
    head_divisor = number(family.head_divisor) or 1.0
    if family.head_base is not None and not settings.get("tie_word_embeddings", False):
        head_divisor = D / settings.number(family.head_base)
    return {
        "embed_scale": embed_scale,
        "attention_scale": number(family.attention_scale) or scalar**-0.5,
        "residual_scale": residual_scale / L**0.5 if family.residual_scale_per_root_layer else residual_scale,
        "head_divisor": head_divisor,
        "attention_cap": number(family.attention_cap),
        "logit_cap": number(family.logit_cap),
    }
