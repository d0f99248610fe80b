"""Models of real shapes with random weights, in the layout that mlx-lm writes and loads.

Memory, time and file sizes of a run depend on shapes alone, so tests and benchmarks need no download. Files are
streamed: the header first, then each tensor in pieces, so memory does not grow with the model.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..system.files import NewFolder

SHARD_BYTES = 1_000_000_000
_PIECE_BYTES = 16 << 20
_WEIGHT_STD = 0.02
_BITS = (2, 3, 4, 5, 6, 8, 16)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4}
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "gemma3")


def _qwen(D: int, layers: int, H: int, K: int, F: int, V: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": D,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": K,
        "intermediate_size": F,
        "vocab_size": V,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


_GEMMA = {
    "model_type": "gemma3_text",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
_GEMMA_1B = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "hidden_size": 1152,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 6912,
    "vocab_size": 262_144,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
_GEMMA_4B_TEXT = _GEMMA | {
    "hidden_size": 2560,
    "num_hidden_layers": 34,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 10240,
    "sliding_window": 1024,
    "max_position_embeddings": 131_072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# The public config.json of each model, as far as it concerns the text model.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": _qwen(896, 24, 14, 2, 4864, 151_936, tied=True),
    "qwen2.5-1.5b": _qwen(1536, 28, 12, 2, 8960, 151_936, tied=True),
    "qwen2.5-3b": _qwen(2048, 36, 16, 2, 11008, 151_936, tied=True),
    "qwen2.5-7b": _qwen(3584, 28, 28, 4, 18944, 152_064, tied=False),
    "gemma3-1b": _GEMMA_1B,
    "gemma3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vocab_size": 262_208,
        "text_config": _GEMMA_4B_TEXT,
    },
}


@dataclass(frozen=True)
class Layer:
    """A parameter of the model before packing; kind: "matrix" [out, in], "norm" or "bias"."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors file. Its values are random words for U32, else centre + std * noise.

    The noise is normal, or uniform in [-1, 1] for scales and biases of quantized weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    centre: float = 0.0
    std: float = 0.0
    uniform: bool = False

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def model_config(shape: str | dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """The config.json of a named shape, or a copy of a given one, cut to `layers` blocks; UserError if unknown."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise UserError(f"SHAPE {shape} is not one of {', '.join(SHAPES)}")
    config = copy.deepcopy(SHAPES[shape] if isinstance(shape, str) else shape)
    if config.get("model_type") not in FAMILIES:
        raise UserError(f"model_type {config.get('model_type')} is not one of {', '.join(FAMILIES)}")
    if layers is not None:
        if layers < 1:
            raise UserError(f"--layers {layers}: at least 1")
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][:layers]
    return config


def layers_of(config: dict[str, Any]) -> list[Layer]:
    """Every parameter of the model that a config.json describes, in order of use, under mlx-lm's names."""
    family = config["model_type"]
    gemma = family.startswith("gemma3")
    prefix = "language_model." if family == "gemma3" else ""
    text = config["text_config"] if family == "gemma3" else config
    V, D = config["vocab_size"], text["hidden_size"]
    head_dim, projections = _projections(family, text)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if gemma:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    layers = [Layer(f"{prefix}model.embed_tokens", (V, D), "matrix")]
    for index in range(text["num_hidden_layers"]):
        block = f"{prefix}model.layers.{index}"
        layers += [Layer(f"{block}.{norm}", (D,), "norm") for norm in norms]
        if gemma or family == "qwen3":
            layers += [Layer(f"{block}.self_attn.{norm}", (head_dim,), "norm") for norm in ("q_norm", "k_norm")]
        for name, n_out, n_in, has_bias in projections:
            layers.append(Layer(f"{block}.{name}", (n_out, n_in), "matrix"))
            if has_bias:
                layers.append(Layer(f"{block}.{name}", (n_out,), "bias"))
    layers.append(Layer(f"{prefix}model.norm", (D,), "norm"))
    if not text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)):
        layers.append(Layer(f"{prefix}lm_head", (V, D), "matrix"))
    return layers


def _projections(family: str, text: dict[str, Any]) -> tuple[int, list[tuple[str, int, int, bool]]]:
    """Head size, and (name, out, in, has a bias) of a block's seven projections."""
    D, F, H = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    K = text.get("num_key_value_heads") or H
    head_dim = D // H if family == "qwen2" else text.get("head_dim") or D // H
    qkv_bias = family == "qwen2" or bool(text.get("attention_bias"))
    o_bias = family != "qwen2" and bool(text.get("attention_bias"))
    mlp_bias = bool(text.get("mlp_bias"))
    return head_dim, [
        ("self_attn.q_proj", H * head_dim, D, qkv_bias),
        ("self_attn.k_proj", K * head_dim, D, qkv_bias),
        ("self_attn.v_proj", K * head_dim, D, qkv_bias),
        ("self_attn.o_proj", D, H * head_dim, o_bias),
        ("mlp.gate_proj", F, D, mlp_bias),
        ("mlp.up_proj", F, D, mlp_bias),
        ("mlp.down_proj", D, F, mlp_bias),
    ]


def _tensors(config: dict[str, Any], bits: int, group_size: int, dtype: str) -> Iterator[Tensor]:
    gemma = config["model_type"].startswith("gemma3")
    for layer in layers_of(config):
        if layer.kind == "norm":
            yield Tensor(f"{layer.name}.weight", dtype, layer.shape, 0.0 if gemma else 1.0, 0.05)
        elif layer.kind == "bias":
            yield Tensor(f"{layer.name}.bias", dtype, layer.shape, 0.0, _WEIGHT_STD)
        elif bits == 16 or layer.shape[1] % group_size:  # mlx-lm does not quantize what it cannot group either
            yield Tensor(f"{layer.name}.weight", dtype, layer.shape, 0.0, _WEIGHT_STD)
        else:
            n_out, n_in = layer.shape
            groups = (n_out, n_in // group_size)
            scale = _WEIGHT_STD * math.sqrt(12 / (4**bits - 1))  # levels 0 .. 2^bits - 1, equally likely
            centre = -(2**bits - 1) / 2 * scale
            yield Tensor(f"{layer.name}.weight", "U32", (n_out, n_in * bits // 32))
            yield Tensor(f"{layer.name}.scales", dtype, groups, scale, 0.1 * scale, uniform=True)
            yield Tensor(f"{layer.name}.biases", dtype, groups, centre, 0.1 * scale, uniform=True)


def write_model(
    shape: str | dict[str, Any],
    folder: str | Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: str = "bfloat16",
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """Writes config.json and model*.safetensors into `folder` and returns it; about 100 MB of memory at any size.

    shape: a name of SHAPES, or a config.json as a dict. bits: 2 to 8 affine quantization, 16 none. dtype: of scales,
    norms and everything else that is not quantized. sparse: headers and holes only; every weight is zero. The folder
    appears only when it is complete. Raises UserError if it exists and is not empty, if it cannot be written, if the
    disk is too full, and for an unknown shape, bits, group size or dtype.
    """
    config = model_config(shape)
    _check_format(bits, group_size, dtype)
    if bits < 16:
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        config["quantization_config"] = dict(config["quantization"])
    config.get("text_config", config)["torch_dtype"] = dtype
    shards = _shards(list(_tensors(config, bits, group_size, DTYPES[dtype])))

    new = NewFolder(folder, "DIR")
    new.check()
    try:
        new.remove_leftovers()
        if not sparse:
            new.check_space(sum(tensor.n_bytes for shard in shards for tensor in shard))
        with new:
            _write_shards(new.partial, shards, None if sparse else seed)
            text = json.dumps(config, indent=4) + "\n"
            (new.partial / "config.json").write_text(text, encoding="utf-8")
            new.publish()
    except OSError as error:
        raise UserError(f"DIR {folder}: {error.strerror or error}") from None
    return Path(folder)


def _check_format(bits: int, group_size: int, dtype: str) -> None:
    if bits not in _BITS:
        raise UserError(f"--bits {bits} is not one of {', '.join(map(str, _BITS))}")
    if group_size not in (32, 64, 128):
        raise UserError(f"--group-size {group_size} is not one of 32, 64, 128")
    if dtype not in DTYPES or (bits == 16 and dtype == "float32"):
        raise UserError(f"--dtype {dtype} is not one of {', '.join(list(DTYPES)[: 2 if bits == 16 else 3])}")


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if shards[-1] and n_bytes + tensor.n_bytes > SHARD_BYTES:
            shards.append([])
            n_bytes = 0
        shards[-1].append(tensor)
        n_bytes += tensor.n_bytes
    return shards


def _write_shards(folder: Path, shards: list[list[Tensor]], seed: int | None) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                weight_map[tensor.name] = name
                if seed is not None:
                    _write_values(file, tensor, seed)
            if seed is None:
                file.truncate(file.tell() + sum(tensor.n_bytes for tensor in shard))
    total_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def _header(shard: list[Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in shard:
        offsets = [offset, offset + tensor.n_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, tensor: Tensor, seed: int) -> None:
    """The values depend on seed and name alone, neither on the other tensors nor on the shards."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    left = math.prod(tensor.shape)
    while left:
        n = min(left, _PIECE_BYTES // 4)
        left -= n
        if tensor.dtype == "U32":
            file.write(rng.bytes(4 * n))
            continue
        noise = rng.random(n, np.float32) * 2 - 1 if tensor.uniform else rng.standard_normal(n, np.float32)
        noise *= np.float32(tensor.std)
        noise += np.float32(tensor.centre)
        file.write(_encoded(noise, tensor.dtype).data)


def _encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32, rounded
        return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16) if dtype == "F16" else values
