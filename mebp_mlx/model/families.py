"""The differences between decoder families: one row per config.json model_type.

The equations are those of mlx-lm's class of the same name; a string in a row is the config key that holds the setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .experts import Mixture, above_dense_layers, by_sparse_step, every_layer
from .hybrid import Hybrid, conv_widths, delta_widths, has_every_nth, has_listed_attention, lfm2_width
from .settings import Settings
from .sharing import Variant, gemma4_layers

# Stored matrices of a block, and the projections that each holds.
Matrices = dict[str, tuple[str, ...]]
_QKV: Matrices = {"self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",)}
_FUSED_QKV: Matrices = {"self_attn.qkv_proj": ("q", "k", "v")}
_O: Matrices = {"self_attn.o_proj": ("o",)}
_GATE_UP: Matrices = {"mlp.gate_proj": ("gate",), "mlp.up_proj": ("up",)}
_FUSED_GATE_UP: Matrices = {"mlp.gate_up_proj": ("gate", "up")}
_DOWN: Matrices = {"mlp.down_proj": ("down",)}
CLASSIC: Matrices = _QKV | _O | _GATE_UP | _DOWN

_LFM2_CONV: Matrices = {"conv.in_proj": ("in",), "conv.out_proj": ("out",)}
_LFM2_MOE_MLP: Matrices = {f"feed_forward.{short}_proj": (short,) for short in ("gate", "up", "down")}
_LFM2_MLP: Matrices = {"feed_forward.w1": ("gate",), "feed_forward.w3": ("up",), "feed_forward.w2": ("down",)}

# Norms of a block: names in its equations -> modules.
_PRE = {name: name for name in ("input_layernorm", "post_attention_layernorm")}
_LFM2_NORMS = {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm"}
_POST = {name: name for name in ("post_attention_layernorm", "post_feedforward_layernorm")}


@dataclass(frozen=True)
class Family:
    """See the module's docstring.

    block: name of its equations; matrices, norms: see above; qk_norms: modules of the norms of queries and keys, over a
    head or over a whole row, before the rotation or after it.
    """

    block: str = "llama"
    matrices: Matrices = field(default_factory=lambda: CLASSIC)
    norms: Mapping[str, str] = field(default_factory=lambda: _PRE)
    norm_offset: float = 0.0  # added to every norm's weight
    qk_norm: bool | str = False
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    qk_norm_of_rows: bool = False
    norm_after_rope: bool = False
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    variants: Callable[[Settings, int, list[int | None], int, int], list[Variant]] | None = None  # sharing.py
    layer_inputs: bool = False  # a second embedding exists; every layer reads part of it
    without_inputs: Family | None = None  # the row for a config without it
    arrays: Mapping[str, str] = field(default_factory=dict)  # modules of numbers [1] in every layer, by name
    own_head_dim: bool = True  # False: head_dim is always hidden_size / heads
    sinks: bool = False  # one extra score in each head's softmax
    gated_query: bool = False  # q_proj holds each head's query and output gate
    hybrid: Hybrid | None = None  # layers without attention
    mixture: Mixture | None = None  # experts, in layers without an MLP
    norm_eps: str = "rms_norm_eps"
    final_norm: str = "model.norm"
    width: Callable[[Settings], int] | None = None  # the MLP's width, instead of intermediate_size
    keeps_head: bool = False  # mlx-lm requires a stored head with a tied embedding, but does not use it
    head: str = "config"  # config key that ties it to the embedding; or "stored", "always", "never"

    layer_types: bool = False  # whether the config's layer_types is read
    window_pattern: bool = False  # whether sliding_window_pattern is read if layer_types is missing
    window_theta: str = "rope_theta"  # key of the rotary base in layers with a window
    window_rope_is_plain: bool = False  # layers with a window do not scale their rope
    rope_in_windows_only: bool = False  # if the config has a pattern
    rope_skips_layers: bool = False  # those of no_rope_layers or no_rope_layer_interval
    reads_rope_parameters: bool = False  # so does mlx-lm
    partial_rope: bool = False  # only partial_rotary_factor of a head is rotated
    traditional: bool = False  # pairs (2j, 2j + 1) are rotated, unless rope_traditional is false

    embed_scale: str | None = None
    embed_scale_is_root: bool = False  # sqrt(hidden_size)
    embed_scale_is_rounded: bool = False  # to bfloat16, in every compute dtype: gemma 3 was trained so
    attention_scale: str | float | None = None  # instead of head_dim^-1/2
    query_scalar: str | None = None  # the scale is its power -1/2
    residual_scale: str | None = None
    residual_scale_per_root_layer: bool = False  # divided by sqrt(layers)
    head_divisor: str | None = None
    head_base: str | None = None  # hidden_size / this divides the rows of an untied head
    attention_cap: str | None = None
    logit_cap: str | None = None

    ignores: tuple[str, ...] = ()  # prefixes of tensors outside the blocks
    renamed_parts: Mapping[str, str] = field(default_factory=dict)  # tensor names as transformers writes them
    ignored_ends: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)


_THETA = {"rope_theta": 10_000.0}
_BIASES: dict[str, Any] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"}
_LLAMA = Family(**_BIASES, layer_types=True, defaults=_THETA)
_MINISTRAL3 = Family(layer_types=True, reads_rope_parameters=True)
_GEMMA2 = Family(
    block="gemma3",
    norms=_PRE | {name: name for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")},
    norm_offset=1.0,
    head="never",
    embed_scale_is_root=True,
    query_scalar="query_pre_attn_scalar",
    attention_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    defaults=_THETA | {"query_pre_attn_scalar": 144.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
)
_GEMMA3 = replace(
    _GEMMA2,
    head="stored",
    embed_scale_is_rounded=True,
    qk_norm=True,
    layer_types=True,
    window_pattern=True,
    window_theta="rope_local_base_freq",
    window_rope_is_plain=True,
    attention_cap=None,
    logit_cap=None,
    defaults={
        "hidden_size": 1152,
        "num_hidden_layers": 26,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262_144,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
)
_GEMMA4_PLAIN = replace(
    _GEMMA2,
    block="gemma4_plain",
    norm_offset=0.0,
    head="config",
    query_scalar=None,
    attention_cap=None,
    qk_norm=True,
    variants=gemma4_layers,
    reads_rope_parameters=True,
    arrays={"layer_scalar": "layer_scalar"},
    layer_types=True,
    window_pattern=True,
    attention_scale=1.0,
    ignored_ends=(".input_min", ".input_max", ".output_min", ".output_max"),
    defaults={
        "hidden_size": 1536,
        "num_hidden_layers": 35,
        "intermediate_size": 6144,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "rms_norm_eps": 1e-6,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "use_double_wide_mlp": True,
        "sliding_window": 512,
        "sliding_window_pattern": 5,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1e6, "rope_type": "proportional", "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_theta": 10_000.0, "rope_type": "default"},
        },
    },
)
_GEMMA4 = replace(
    _GEMMA4_PLAIN,
    block="gemma4",
    matrices=CLASSIC | {name: (name,) for name in ("per_layer_input_gate", "per_layer_projection")},
    norms={**_GEMMA4_PLAIN.norms, "post_per_layer_input_norm": "post_per_layer_input_norm"},
    layer_inputs=True,
    without_inputs=_GEMMA4_PLAIN,
)
_OLMO2 = Family(**_BIASES, block="olmo2", norms=_POST, qk_norm=True, qk_norm_of_rows=True, defaults=_THETA)

_LFM2 = Family(
    matrices=_QKV | {"self_attn.out_proj": ("o",)} | _LFM2_MLP,
    norms=_LFM2_NORMS,
    qk_norm=True,
    qk_norms=("q_layernorm", "k_layernorm"),
    own_head_dim=False,
    hybrid=Hybrid(
        block="lfm2",
        matrices=_LFM2_CONV | _LFM2_MLP,
        norms=_LFM2_NORMS,
        arrays={"conv": "conv.conv.weight"},
        widths=conv_widths,
        has_attention=has_listed_attention,
    ),
    norm_eps="norm_eps",
    final_norm="model.embedding_norm",
    reads_rope_parameters=True,
    width=lfm2_width,
    head="never",
    defaults={"rope_theta": 1_000_000.0},
)
assert _LFM2.hybrid is not None
_LFM2_MOE = replace(
    _LFM2,
    matrices={key: shorts for key, shorts in _LFM2.matrices.items() if key not in _LFM2_MLP} | _LFM2_MOE_MLP,
    hybrid=replace(_LFM2.hybrid, matrices=_LFM2_CONV | _LFM2_MOE_MLP),
    mixture=Mixture(
        router="feed_forward.gate",
        experts="feed_forward.switch_mlp",
        apart="feed_forward.experts.{}",
        width="moe_intermediate_size",
        has_experts=above_dense_layers,
        score="sigmoid",
        eps=1e-6,
        selection_bias=("feed_forward.expert_bias", "use_expert_bias"),
        packs_router=True,
    ),
    width=None,
    renamed_parts={"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
)

FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True, own_head_dim=False, defaults={"rope_theta": 1_000_000.0}),
    "qwen3": Family(qk_norm=True, reads_rope_parameters=True),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "iquestcoder": _LLAMA,
    "xverse": _LLAMA,
    "ministral3": _MINISTRAL3,
    "mistral3": _LLAMA,  # or the model_type of its text_config (reading.py)
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "gemma4_text": _GEMMA4,
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "smollm3": replace(_LLAMA, rope_skips_layers=True, defaults=_THETA | {"no_rope_layer_interval": 4}),
    "granite": Family(
        **_BIASES,
        own_head_dim=False,
        embed_scale="embedding_multiplier",
        attention_scale="attention_multiplier",
        residual_scale="residual_multiplier",
        head_divisor="logits_scaling",
    ),
    "minicpm": Family(
        own_head_dim=False,
        embed_scale="scale_emb",
        residual_scale="scale_depth",
        residual_scale_per_root_layer=True,
        head_base="dim_model_base",
        defaults={"rope_theta": 1_000_000.0},
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(
        _OLMO2,
        mlp_bias=False,
        layer_types=True,
        window_pattern=True,
        window_rope_is_plain=True,
        defaults={"sliding_window_pattern": 4},
    ),
    "exaone4": Family(block="olmo2", norms=_POST, qk_norm=True, window_pattern=True, rope_in_windows_only=True),
    "hunyuan_v1_dense": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="use_qk_norm",
        qk_norms=("query_layernorm", "key_layernorm"),
        norm_after_rope=True,
        defaults=_THETA | {"use_qk_norm": True},
    ),
    "mimo": Family(qkv_bias=True, own_head_dim=False, ignores=("model.mtp_layers.",), defaults=_THETA),
    "seed_oss": Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias", defaults=_THETA),
    "internlm3": Family(qkv_bias="qkv_bias", o_bias="qkv_bias", mlp_bias="bias", own_head_dim=False, defaults=_THETA),
    "ernie4_5": Family(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", traditional=True),
    "helium": Family(
        qkv_bias="attention_bias", mlp_bias="mlp_bias", own_head_dim=False, traditional=True, keeps_head=True
    ),
    "glm4": Family(
        block="glm4",
        matrices=_QKV | _O | _FUSED_GATE_UP | _DOWN,
        norms={
            "input_layernorm": "input_layernorm",
            "post_attention_layernorm": "post_self_attn_layernorm",
            "pre_feedforward_layernorm": "post_attention_layernorm",
            "post_feedforward_layernorm": "post_mlp_layernorm",
        },
        qkv_bias="attention_bias",
        head="always",
        partial_rope=True,
        traditional=True,
    ),
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2_MOE,
    "qwen3_5": Family(
        block="qwen3_5",
        qk_norm=True,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        gated_query=True,
        hybrid=Hybrid(
            block="gated_delta",
            matrices={
                **{f"linear_attn.in_proj_{name}": (name,) for name in ("qkv", "z", "b", "a")},
                "linear_attn.out_proj": ("out",),
                **_GATE_UP,
                **_DOWN,
            },
            norms=_PRE,
            arrays={
                "conv": "linear_attn.conv1d.weight",
                "A_log": "linear_attn.A_log",
                "dt_bias": "linear_attn.dt_bias",
                "norm": "linear_attn.norm.weight",
            },
            widths=delta_widths,
            has_attention=has_every_nth,
            offset_in_torch_layout=1.0,
        ),
        reads_rope_parameters=True,
        partial_rope=True,
        defaults={"partial_rotary_factor": 0.25, "rope_theta": 100_000.0, "full_attention_interval": 4},
    ),
    "qwen3_moe": Family(
        qk_norm=True,
        mixture=Mixture(
            router="mlp.gate",
            experts="mlp.switch_mlp",
            apart="mlp.experts.{}",
            width="moe_intermediate_size",
            has_experts=by_sparse_step,
            packs_router=True,
        ),
    ),
    "olmoe": Family(
        **_BIASES,
        qk_norm=True,
        qk_norm_of_rows=True,
        mixture=Mixture(
            router="mlp.gate",
            experts="mlp.switch_mlp",
            apart="mlp.experts.{}",
            width="intermediate_size",
            has_experts=every_layer,
        ),
        defaults=_THETA,
    ),
    "gpt_oss": Family(
        block="gpt_oss",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        sinks=True,
        layer_types=True,
        window_pattern=True,
        mixture=Mixture(
            router="mlp.router",
            experts="mlp.experts",
            apart="mlp.experts.{}",
            width="intermediate_size",
            has_experts=every_layer,
            score="softmax of the chosen",
            packs_router=True,
            router_bias=True,
            n_experts="num_local_experts",
        ),
        head="always",
        defaults={
            "hidden_size": 2880,
            "num_hidden_layers": 36,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "vocab_size": 201_088,
            "rope_theta": 150_000.0,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
        },
    ),
    "phi3": Family(
        matrices=_FUSED_QKV | _O | _FUSED_GATE_UP | _DOWN, own_head_dim=False, partial_rope=True, defaults=_THETA
    ),
}
LORA_KEYS = tuple(
    dict.fromkeys(
        key
        for family in FAMILIES.values()
        for keys in (
            family.matrices,
            family.hybrid.matrices if family.hybrid is not None else (),
            family.mixture.keys if family.mixture is not None else (),
        )
        for key in keys
    )
)
