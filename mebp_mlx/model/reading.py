"""config.json -> ModelSpec: what the family's row (families.py) and the config's keys say, checked by the tensors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..errors import UserError
from ..system.files import read_json_object
from ..weights.safetensors import MappedWeights
from .config import Layer, Linear, ModelSpec
from .families import FAMILIES, Family
from .layers import LayerRules
from .settings import Settings
from .tensors import Tensors

MULTIMODAL = {"gemma3": "gemma3_text", "mistral3": "llama"}  # the decoder under text_config, where that names none
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
_TEXT_TYPES = {"gemma3": ("gemma3_text",), "mistral3": ("ministral3", "llama", "mistral")}


class Reader(Protocol):
    """What asks for a model's tensors: a checkpoint's (tensors.py), or a list to be written (testing/synth.py)."""

    read: list[str]

    def has(self, name: str) -> bool: ...

    def linear(self, name: str, out_dims: int, in_dims: int, bias: bool = False) -> Linear: ...

    def vector(self, name: str, size: int) -> str: ...


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
    tensors = Tensors(weights, config, where)
    spec = describe(config, tensors, where)
    head = f"{prefix}lm_head"
    others = ("model.vision_tower.", "model.multi_modal_projector.") if prefix else ()
    tensors.refuse_unread(prefix, None if spec.head.name == head else head, (*family.ignores, *others))
    return spec


def family_of(config: dict, where: str) -> tuple[dict, Family, str]:
    """The decoder's own config, its family, and what its tensors' names begin with. Raises UserError."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    if name not in MULTIMODAL:
        return config, FAMILIES[name], ""
    text = config.get("text_config")
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
    else:
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
        text = {**text, "tie_word_embeddings": tied}
    return text, FAMILIES[inner], "language_model."


def describe(config: dict, tensors: Reader, where: str = "config.json") -> ModelSpec:
    """The ModelSpec of a config.json, asking `tensors` for every tensor that it implies. Raises UserError."""
    text, family, prefix = family_of(config, where)
    settings = Settings(text, family.defaults, where)
    D, F, L = (settings.integer(key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    H = settings.integer("num_attention_heads")
    K = settings.integer("num_key_value_heads", H)
    head_dim = settings.integer("head_dim", D // H) if family.own_head_dim else D // H
    V = settings.integer("vocab_size")
    if H % K:
        raise UserError(f"{where}: num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
    if head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim} must be even for rotary embeddings")
    qk_norm = settings.flag(family.qk_norm)
    embedding = tensors.linear(f"{prefix}model.embed_tokens", V, D)
    head = _head(family, settings, tensors, embedding, f"{prefix}lm_head")
    rows = {"q": H * head_dim, "k": K * head_dim, "v": K * head_dim, "o": D, "gate": F, "up": F, "down": D}
    norms = dict.fromkeys(family.norms, D)
    modules = dict(family.norms)
    if qk_norm:
        for name, module, heads in zip(("q_norm", "k_norm"), family.qk_norms, (H, K), strict=True):
            modules[name] = f"self_attn.{module}"
            norms[name] = head_dim * heads if family.qk_norm_of_rows else head_dim
    rules = LayerRules(settings, family, head_dim, L)
    layers = []
    for index in range(L):
        layer = f"{prefix}model.layers.{index}"
        matrices = _matrices(family, settings, tensors, layer, rows, D)
        vectors = {name: tensors.vector(f"{layer}.{modules[name]}.weight", size) for name, size in norms.items()}
        window = rules.window(index)
        linears = _projections(family, matrices, rows)
        layers.append(Layer(index, layer, rules.rope(index, window), window, linears, matrices, vectors))
    final_norm = tensors.vector(f"{prefix}model.norm.weight", D)
    return ModelSpec(
        family=config["model_type"],
        D=D,
        F=F,
        H=H,
        K=K,
        head_dim=head_dim,
        V=V,
        L=L,
        norm_eps=settings.number("rms_norm_eps"),
        qk_norm=qk_norm,
        norm_after_rope=family.norm_after_rope,
        norm_offset=family.norm_offset,
        block=family.block,
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        tensors=tuple(tensors.read),
        **_scales(family, settings, D, L, head_dim),
    )


def _head(family: Family, settings: Settings, tensors: Reader, embedding: Linear, name: str) -> Linear:
    stored = tensors.has(name)
    tied = {"always": False, "never": True, "stored": not stored}.get(family.head)
    if tied is None:
        tied = bool(settings.get("tie_word_embeddings", not stored))
    if family.head_base is not None and not stored:
        tied = True  # mlx-lm copies the embedding then, and divides as for a head of its own
    return embedding if tied else tensors.linear(name, embedding.out_dims, embedding.in_dims)


def _matrices(
    family: Family, settings: Settings, tensors: Reader, layer: str, rows: dict[str, int], D: int
) -> dict[str, Linear]:
    """A block's matrices by their names inside it."""
    inputs = {"o": rows["q"], "down": rows["gate"]}
    flags = dict.fromkeys("qkv", family.qkv_bias) | {"o": family.o_bias}
    return {
        key: tensors.linear(
            f"{layer}.{key}",
            sum(rows[short] for short in shorts),
            inputs.get(shorts[0], D),
            bias=settings.flag(flags.get(shorts[0], family.mlp_bias)),
        )
        for key, shorts in family.matrices.items()
    }


def _projections(family: Family, matrices: dict[str, Linear], rows: dict[str, int]) -> dict[str, Linear]:
    """A block's projections by their short names: a matrix, or some rows of one."""
    projections = {}
    for key, shorts in family.matrices.items():
        first = 0
        for short in shorts:
            projections[short] = replace(matrices[key], out_dims=rows[short], first_row=first)
            first += rows[short]
    return {short: projections[short] for short in rows}  # in one order for all families


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
