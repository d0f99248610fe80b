"""The text-model part of real models' public config.json, which memory and time depend on."""

from __future__ import annotations

from typing import Any


def _shape(
    name: str, D: int, layers: int, heads: tuple[int, int], F: int, V: int, tied: bool, **more: Any
) -> dict[str, Any]:
    """A config.json. heads: the number of query heads, and of key and value heads."""
    shape = {
        "model_type": name,
        "hidden_act": "silu",
        "hidden_size": D,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": F,
        "vocab_size": V,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    }
    return shape | more


def _qwen(D: int, layers: int, heads: tuple[int, int], F: int, V: int, tied: bool) -> dict[str, Any]:
    return _shape("qwen2", D, layers, heads, F, V, tied, architectures=["Qwen2ForCausalLM"], use_sliding_window=False)


def _qwen3(D: int, layers: int, heads: tuple[int, int], F: int, tied: bool) -> dict[str, Any]:
    more = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "max_position_embeddings": 40_960}
    return _shape("qwen3", D, layers, heads, F, 151_936, tied, **more)


def _llama32(D: int, layers: int, heads: tuple[int, int], head_dim: int) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    more = {"architectures": ["LlamaForCausalLM"], "head_dim": head_dim, "max_position_embeddings": 131_072}
    more |= {"rope_theta": 500_000.0, "rms_norm_eps": 1e-5}
    more["rope_scaling"] = scaling | {"original_max_position_embeddings": 8192}
    return _shape("llama", D, layers, heads, 8192, 128_256, True, **more)


def _smollm2(D: int, layers: int, heads: tuple[int, int], F: int, theta: float) -> dict[str, Any]:
    more = {"architectures": ["LlamaForCausalLM"], "rope_theta": theta, "rms_norm_eps": 1e-5}
    return _shape("llama", D, layers, heads, F, 49_152, True, max_position_embeddings=8192, **more)


def _ministral3(D: int, layers: int, F: int, tied: bool) -> dict[str, Any]:
    rope = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"original_max_position_embeddings": 16_384, "llama_4_scaling_beta": 0.1, "mscale": 1.0}
    more = {"head_dim": 128, "rope_parameters": rope | {"mscale_all_dim": 1.0}, "max_position_embeddings": 262_144}
    text = _shape("ministral3", D, layers, (32, 8), F, 131_072, tied, rms_norm_eps=1e-5, **more)
    del text["rope_theta"]
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
    }


def _lfm2() -> dict[str, Any]:
    shape = _shape("lfm2", 2048, 16, (32, 8), 12_288, 65_536, True, architectures=["Lfm2ForCausalLM"], norm_eps=1e-5)
    shape |= {"max_position_embeddings": 128_000, "conv_bias": False, "conv_L_cache": 3, "block_dim": 2048}
    shape |= {"block_ff_dim": 12_288, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
    return shape | {"block_auto_adjust_ff_dim": True, "full_attn_idxs": [2, 5, 8, 10, 12, 14]}


def _qwen35(D: int, layers: int, heads: tuple[int, int], F: int, n_values: int, tied: bool) -> dict[str, Any]:
    """n_values: value heads of the gated delta net, which has 16 key heads."""
    rope = {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}
    linear = {"linear_num_key_heads": 16, "linear_num_value_heads": n_values, "linear_key_head_dim": 128}
    linear |= {"linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4}
    text = _shape("qwen3_5_text", D, layers, heads, F, 248_320, tied, head_dim=256, rope_parameters=rope, **linear)
    del text["rope_theta"]
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text | {"max_position_embeddings": 262_144},
    }


def _lfm2_moe() -> dict[str, Any]:
    shape = _lfm2() | {"model_type": "lfm2_moe", "architectures": ["Lfm2MoeForCausalLM"], "num_hidden_layers": 24}
    shape = {key: value for key, value in shape.items() if not key.startswith("block_")}
    shape |= {"intermediate_size": 7168, "moe_intermediate_size": 1792, "num_dense_layers": 2, "use_expert_bias": True}
    shape |= {"num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
    return shape | {"full_attn_idxs": [2, 6, 10, 14, 18, 21]}


def _gemma(name: str, D: int, layers: int, heads: tuple[int, int], F: int, V: int, **more: Any) -> dict[str, Any]:
    shape = _shape(name, D, layers, heads, F, V, True, head_dim=256, query_pre_attn_scalar=256)
    del shape["hidden_act"]
    return shape | {"hidden_activation": "gelu_pytorch_tanh"} | more


def _gemma4(D: int, layers: int, heads: tuple[int, int], F: int, n_shared: int, every: int) -> dict[str, Any]:
    """n_shared: layers that use another's keys and values; every: the period of layers with full attention."""
    kinds = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    full = {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25}
    text = {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": D,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": F,
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_kv_shared_layers": n_shared,
        "use_double_wide_mlp": n_shared == 20,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "attention_bias": False,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "sliding_window": 512,
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "max_position_embeddings": 131_072,
    }
    return {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}


_GEMMA3: dict[str, Any] = {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 6}
_GEMMA3_4B = _GEMMA3 | {"sliding_window": 1024, "max_position_embeddings": 131_072}
_GEMMA3_4B["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
# The published factors grow from about 1 to about 50; only their shape matters for memory and time.
_PHI4_ROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0 + i for i in range(48)]}
_GPT_OSS_ROPE: dict[str, Any] = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
_GPT_OSS_ROPE["original_max_position_embeddings"] = 4096

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(896, 24, (14, 2), 4864, 151_936, tied=True),
    "qwen2.5-1.5b": _qwen(1536, 28, (12, 2), 8960, 151_936, tied=True),
    "qwen2.5-3b": _qwen(2048, 36, (16, 2), 11_008, 151_936, tied=True),
    "qwen2.5-7b": _qwen(3584, 28, (28, 4), 18_944, 152_064, tied=False),
    "gemma3-1b": _gemma(
        "gemma3_text", 1152, 26, (4, 1), 6912, 262_144, architectures=["Gemma3ForCausalLM"], sliding_window=512,
        **_GEMMA3,
    ),
    "gemma3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vocab_size": 262_208,
        "text_config": _gemma("gemma3_text", 2560, 34, (8, 4), 10_240, 262_208, **_GEMMA3_4B),
    },
    "qwen3-0.6b": _qwen3(1024, 28, (16, 8), 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, (16, 8), 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, (32, 8), 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, (32, 8), 12_288, tied=False),
    "llama3.2-1b": _llama32(2048, 16, (32, 8), 64),
    "llama3.2-3b": _llama32(3072, 28, (24, 8), 128),
    "smollm2-135m": _smollm2(576, 30, (9, 3), 1536, 100_000.0),
    "smollm2-360m": _smollm2(960, 32, (15, 5), 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, (32, 32), 8192, 130_000.0),
    "smollm3-3b": _shape(
        "smollm3", 2048, 36, (16, 4), 11_008, 128_256, True, rope_theta=5_000_000.0, max_position_embeddings=65_536,
        architectures=["SmolLM3ForCausalLM"], no_rope_layer_interval=4,
    ),
    "phi4-mini": _shape(
        "phi3", 3072, 32, (24, 8), 8192, 200_064, True, architectures=["Phi3ForCausalLM"], rope_theta=10_000.0,
        rms_norm_eps=1e-5, partial_rotary_factor=0.75, rope_scaling=_PHI4_ROPE, max_position_embeddings=131_072,
        original_max_position_embeddings=4096,
    ),
    "ministral3-3b": _ministral3(3072, 26, 9216, tied=True),
    "ministral3-8b": _ministral3(4096, 34, 14_336, tied=False),
    "granite3.3-2b": _shape(
        "granite", 2048, 40, (32, 8), 8192, 49_159, True, architectures=["GraniteForCausalLM"], rms_norm_eps=1e-5,
        rope_theta=10_000_000.0, max_position_embeddings=131_072, attention_bias=False, mlp_bias=False,
        embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=8.0,
    ),
    "olmo2-1b": _shape(
        "olmo2", 2048, 16, (16, 16), 8192, 100_352, False, architectures=["Olmo2ForCausalLM"], rope_theta=500_000.0,
        max_position_embeddings=4096,
    ),
    "lfm2.5-1.2b": _lfm2(),
    "qwen3.5-0.8b": _qwen35(1024, 24, (8, 2), 3584, 16, tied=True),
    "qwen3.5-2b": _qwen35(2048, 24, (8, 2), 6144, 16, tied=True),
    "qwen3.5-4b": _qwen35(2560, 32, (16, 4), 9216, 32, tied=True),
    "qwen3.5-9b": _qwen35(4096, 32, (16, 4), 12_288, 32, tied=False),
    "qwen3-30b-a3b": _qwen3(2048, 48, (32, 4), 6144, tied=False)
    | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 768}
    | {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1}
    | {"mlp_only_layers": []},
    "olmoe-1b-7b": _shape(
        "olmoe", 2048, 16, (16, 16), 1024, 50_304, False, architectures=["OlmoeForCausalLM"], rope_theta=10_000.0,
        rms_norm_eps=1e-5, max_position_embeddings=4096, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
    ),
    "lfm2-8b-a1b": _lfm2_moe(),
    "gemma4-e2b": _gemma4(1536, 35, (8, 1), 6144, n_shared=20, every=5),
    "gemma4-e4b": _gemma4(2560, 42, (8, 2), 10_240, n_shared=18, every=6),
    "gpt-oss-20b": _shape(
        "gpt_oss", 2880, 24, (64, 8), 2880, 201_088, False, architectures=["GptOssForCausalLM"], head_dim=64,
        rms_norm_eps=1e-5, rope_theta=150_000.0, max_position_embeddings=131_072, sliding_window=128,
        num_local_experts=32, num_experts_per_tok=4, rope_scaling=_GPT_OSS_ROPE,
    ),
    "gemma2-2b": _gemma(
        "gemma2", 2304, 26, (8, 4), 9216, 256_000, architectures=["Gemma2ForCausalLM"], rope_theta=10_000.0,
        max_position_embeddings=8192, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
    ),
}  # fmt: skip
