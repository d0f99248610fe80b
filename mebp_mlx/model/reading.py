"""config.json -> ModelSpec, from the family's row (families.py) and the config's keys, checked against the tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import UserError
from ..system.files import read_json_object
from ..weights.safetensors import MappedWeights
from .config import Layer, LayerInputs, Linear, ModelSpec
from .families import FAMILIES, Family
from .kinds import Kind, Reader, kinds_of, without_keys
from .layers import LayerRules
from .settings import Settings
from .sharing import Variant
from .tensors import Tensors

MULTIMODAL = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_text",
    "mistral3": "llama",
    "qwen3_5": "qwen3_5_text",
}  # default model_type of text_config
_TEXT_TYPES = {
    "gemma3": ("gemma3_text",),
    "gemma4": ("gemma4_text",),
    "gemma4_unified": ("gemma4_text", "gemma4_unified_text"),
    "mistral3": ("ministral3", "llama", "mistral"),
    "qwen3_5": ("qwen3_5_text", "qwen3_5"),
}


# Prefixes of a multimodal model's tensors outside the decoder.
_OTHER_MODULES = (
    "vision_tower", "multi_modal_projector", "visual", "audio_tower", "embed_audio", "embed_vision", "vision_embedder"
)  # fmt: skip
# Far above any model's sizes. Libraries that read config.json allocate lists of these lengths.
SIZE_LIMITS = {
    "num_hidden_layers": 10_000,
    "hidden_size": 10**7,
    "intermediate_size": 10**7,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**6,
    "head_dim": 10**6,
    "global_head_dim": 10**6,
    "vocab_size_per_layer_input": 10**8,
    "vocab_size": 10**8,
}


def read_config(folder: Path) -> dict:
    """config.json of a model folder as a dict. Raises UserError if it is missing, not a JSON object, or has a size
    beyond SIZE_LIMITS.
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

    config: config.json; weights: the checkpoint, whose shapes are checked against it; tensors of a multimodal model are
    renamed from transformers' names to mlx-lm's. Raises UserError for an unknown family, a missing key, or a tensor
    that contradicts the config.
    """
    family, prefix = family_of(config, where)[1:]
    weights.rename_parts(family.renamed_parts)
    if prefix:
        weights.rename({f"model.{prefix}": f"{prefix}model.", "lm_head.": f"{prefix}lm_head."})
        if "text_config" not in config:
            weights.rename({"model.": f"{prefix}model."})
    tensors = Tensors(weights, config, where)
    if fused := next((name for name in weights.names if ".mlp.experts.gate_up_proj" in name), None):
        raise UserError(
            f"{weights.info(fused).file}: {fused}: experts whose gate and up rows alternate are not supported; "
            "mlx_lm.convert separates them"
        )
    spec = describe(config, tensors, where)
    head = f"{prefix}lm_head"
    others = [f"model.{name}." for name in _OTHER_MODULES] if prefix else []
    sharers = [layer.prefix for layer in spec.layers if layer.donor is not None]
    others += [f"{layer}.self_attn.{name}." for layer in sharers for name in ("k_proj", "v_proj", "k_norm")]
    spare = None if spec.head.name == head else head
    tensors.refuse_unread(prefix, spare, (*family.ignores, *others), family.ignored_ends)
    return spec


def family_of(config: dict, where: str) -> tuple[dict, Family, str]:
    """The decoder's config, its family, and the prefix of its tensors' names. Raises UserError."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    if name not in MULTIMODAL:
        return config, _row(FAMILIES[name], config), ""
    text = config.get("text_config", config if name == "qwen3_5" else None)
    if not isinstance(text, dict):
        raise UserError(f"{where}: {name} needs an object 'text_config'")
    inner = text.get("model_type", MULTIMODAL[name])
    if inner not in _TEXT_TYPES[name]:
        known = ", ".join(_TEXT_TYPES[name])
        raise UserError(f"{where}: model_type {inner!r} of text_config is not supported in {name}; supported: {known}")
    if name == "gemma3":
        # As in mlx-lm: heads default to the 4B model's; vocab_size comes from the outer config.
        outer = {"vocab_size": config.get("vocab_size", 262_208)}
        text = {"num_attention_heads": 8, "num_key_value_heads": 4, **text, **outer}
    elif name in ("gemma4", "gemma4_unified"):
        text = {**text, "vocab_size": config.get("vocab_size", 262_144)}
        if name == "gemma4_unified":
            text = {"hidden_size_per_layer_input": 0, **text}  # transformers has no such key
    elif name == "mistral3":
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        text = {**text, "tie_word_embeddings": tied}
    return text, _row(FAMILIES[inner if inner in FAMILIES else name], text), "language_model."


def _row(family: Family, text: dict) -> Family:
    has_inputs = text.get("hidden_size_per_layer_input", family.defaults.get("hidden_size_per_layer_input"))
    return family if has_inputs or family.without_inputs is None else family.without_inputs


def describe(config: dict, tensors: Reader, where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config.json; requests every tensor that it implies from `tensors`. Raises UserError."""
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
    layers, without, is_torchs = _layers(
        family, settings, tensors, f"{prefix}model.layers", (D, F, L), (H, K, head_dim)
    )
    layer_inputs = _layer_inputs(settings, tensors, f"{prefix}model", D, L) if family.layer_inputs else None
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
        norm_offset=without.offset_in_torch_layout if is_torchs and without is not None else family.norm_offset,
        delta=None if without is None else without.widths.delta,
        routing=None if family.mixture is None else family.mixture.routing(settings),
        layer_inputs=layer_inputs,
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        tensors=tuple(tensors.read),
        spare_head=spare_head,
        remarks=_remarks(family, settings, layers),
        **_scales(family, settings, D, L, head_dim),
    )


def _layers(
    family: Family,
    settings: Settings,
    tensors: Reader,
    name: str,
    sizes: tuple[int, int, int],
    heads: tuple[int, int, int],
) -> tuple[list[Layer], Kind | None, bool]:
    """The layers; the kind of layer without attention; whether its kernels have torch's layout.

    sizes: D, F, L; heads: of queries, of keys and values, and their width.
    """
    (D, F, L), (H, K, head_dim) = sizes, heads
    rules, is_torchs, layers = LayerRules(settings, family, L), False, []
    windows = [rules.window(index) for index in range(L)]
    variants = [Variant(head_dim, F)] * L
    if family.variants is not None:
        variants = family.variants(settings, L, windows, head_dim, F)
    kinds = {own: kinds_of(family, settings, D, own.F, (H, K, own.head_dim)) for own in dict.fromkeys(variants)}
    without = kinds[variants[0]][1]
    for index, (own, window) in enumerate(zip(variants, windows, strict=True)):
        prefix = f"{name}.{index}"
        has_attention = without is None or family.hybrid is None or family.hybrid.has_attention(settings, index)
        kind = kinds[own][0] if without is None or has_attention else without
        if own.donor is not None:
            kind = without_keys(kind, own.donor)
        if family.mixture is not None and family.mixture.has_experts(settings, index):
            kind = kind.with_experts(family.mixture, settings)
        rope = rules.rope(index, window, own.head_dim) if has_attention else None
        layers.append(kind.layer(tensors, index, prefix, rope, window if has_attention else None))
        is_torchs |= not has_attention and kind.is_in_torch_layout(tensors, prefix)
    return layers, without, is_torchs


def _layer_inputs(settings: Settings, tensors: Reader, name: str, D: int, L: int) -> LayerInputs:
    """The second embedding, with the projection of the first that is added to it."""
    P, V = settings.integer("hidden_size_per_layer_input"), settings.integer("vocab_size_per_layer_input")
    if settings.integer("vocab_size") > V:
        raise UserError(f"{settings.where}: vocab_size_per_layer_input={V} is less than vocab_size")
    return LayerInputs(
        P,
        tensors.linear(f"{name}.embed_tokens_per_layer", V, L * P),
        tensors.linear(f"{name}.per_layer_model_projection", L * P, D),
        tensors.vector(f"{name}.per_layer_projection_norm.weight", P),
    )


def _remarks(family: Family, settings: Settings, layers: list[Layer]) -> tuple[str, ...]:
    """Differences from mlx-lm's rotation: most of its classes ignore rope_parameters (from transformers 5)."""
    if family.reads_rope_parameters or not settings.get("rope_parameters"):
        return ()
    config = {key: value for key, value in settings.config.items() if key != "rope_parameters"}
    theirs = LayerRules(Settings(config, settings.defaults, settings.where), family, len(layers))
    for layer in layers:
        ours = layer.rope
        if ours is None:
            continue
        try:
            rope = theirs.rope(layer.index, layer.window, layer.head_dim)
        except UserError:
            return ("mlx-lm cannot open this model: it ignores rope_parameters, and config.json has no rope_theta",)
        if rope is not None and (rope != ours or rope.freqs is not ours.freqs):
            what = "a different rope scaling"
            if rope.base != ours.base:
                what = f"rope_theta {rope.base:g} instead of {ours.base:g}"
            return (f"mlx-lm reads this model differently: it ignores rope_parameters and uses {what}",)
    return ()


def _head(family: Family, settings: Settings, tensors: Reader, embedding: Linear, name: str) -> Linear:
    stored = tensors.has(name)
    tied = {"always": False, "never": True, "stored": not stored}.get(family.head)
    if tied is None:
        tied = bool(settings.get("tie_word_embeddings", not stored))
    if family.head_base is not None and not stored:
        tied = True  # then mlx-lm copies the embedding and divides as for an untied head
    return embedding if tied else tensors.linear(name, embedding.out_dims, embedding.in_dims)


def _scales(family: Family, settings: Settings, D: int, L: int, head_dim: int) -> dict[str, Any]:
    """The scale factors and caps of a ModelSpec."""

    def number(key: str | float | None) -> float | None:
        return settings.number(key) if isinstance(key, str) else key

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
        "logit_cap": None if settings.config.get(family.logit_cap or "", 1) is None else number(family.logit_cap),
    }
