"""config.json -> what the architecture is, as data.

A family is a row of FAMILIES; everything below the row reads the config, and checks
that the checkpoint's tensors have the shapes it promises before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..system.files import read_json_object
from ..weights.safetensors import MappedWeights
from .rope import Rope, is_positive, make_rope

PROJECTIONS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """What distinguishes one family of decoders from another."""

    qkv_bias: bool | str = False  # a string names the config key that decides
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    own_head_dim: bool = True  # False: head_dim is always hidden_size / heads
    layer_types: bool = True  # False: the config's layer_types are not read (as in mlx-lm)
    qk_norm: bool = False
    gemma: bool = False  # four norms a block, norm weights as 1 + w, scaled embeddings, gelu
    defaults: dict[str, Any] = field(default_factory=dict)


_LLAMA = Family(
    qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias", defaults={"rope_theta": 10_000.0}
)
_GEMMA3 = Family(
    qk_norm=True,
    gemma=True,
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
FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True, own_head_dim=False, layer_types=False, defaults={"rope_theta": 1_000_000.0}),
    "qwen3": Family(qk_norm=True, layer_types=False),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
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
FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode -> bits, group size: it has no others


@dataclass(frozen=True)
class Quantization:
    """How a packed weight is laid out: mx.dequantize's own terms."""

    bits: int
    group_size: int
    mode: str  # "affine", or one of FLOAT_MODES


@dataclass(frozen=True)
class Linear:
    """A frozen matrix in the checkpoint: [out_dims, in_dims], perhaps packed, perhaps with a bias."""

    name: str
    out_dims: int
    in_dims: int
    bias: bool = False
    quantization: Quantization | None = None

    @cached_property
    def tensors(self) -> list[str]:
        """The names of the weight and of what it is dequantized with."""
        parts = ["weight"]
        if self.quantization is not None:
            parts += ["scales", "biases"] if self.quantization.mode == "affine" else ["scales"]
        return [f"{self.name}.{part}" for part in parts]


@dataclass(frozen=True)
class Layer:
    """One decoder block: where its tensors are and what its attention may see."""

    index: int
    prefix: str
    rope: Rope
    window: int | None  # sliding window in tokens, None = all earlier tokens
    linears: dict[str, Linear]  # by the short names of PROJECTIONS
    norms: dict[str, str]  # tensors of norms' weights by the last part of the module's name ("input_layernorm")


@dataclass(frozen=True)
class ModelSpec:
    """Everything the engine needs to know about a checkpoint besides its bytes."""

    family: str
    D: int
    F: int
    H: int
    K: int
    head_dim: int
    V: int
    L: int
    norm_eps: float
    attention_scale: float
    embed_scale: float | None  # multiplies the embeddings, rounded to bfloat16 as the model was trained
    qk_norm: bool
    gemma: bool
    layers: tuple[Layer, ...]
    embedding: Linear
    head: Linear
    final_norm: str
    tensors: tuple[str, ...] = ()  # every one that the model reads

    @property
    def tied(self) -> bool:
        return self.head.name == self.embedding.name


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

    config: config.json; weights: the checkpoint, whose shapes are checked against it.
    Raises UserError for an unknown family, a missing key, or a tensor that contradicts the config.
    """
    family_name = config.get("model_type")
    if not isinstance(family_name, str) or family_name not in FAMILIES:
        raise UserError(f"{where}: model_type {family_name!r} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[family_name]
    reader = _Reader(config, family, where)
    prefix = "language_model." if family_name == "gemma3" else ""

    D, F, L = reader.integer("hidden_size"), reader.integer("intermediate_size"), reader.integer("num_hidden_layers")
    H = reader.integer("num_attention_heads")
    K = reader.integer("num_key_value_heads", H)
    head_dim = reader.integer("head_dim", D // H) if family.own_head_dim else D // H
    V = reader.integer("vocab_size")
    if H % K:
        raise UserError(f"{where}: num_attention_heads={H} is not a multiple of num_key_value_heads={K}")
    if head_dim % 2:
        raise UserError(f"{where}: head_dim={head_dim} must be even for rotary embeddings")

    tensors = _Tensors(weights, config, where)
    embedding = tensors.linear(f"{prefix}model.embed_tokens", V, D)
    head_name = f"{prefix}lm_head"
    has_head = f"{head_name}.weight" in weights
    tied = not has_head if family.gemma else reader.get("tie_word_embeddings", not has_head)
    layers = []
    for index in range(L):
        layer_prefix = f"{prefix}model.layers.{index}"
        shapes = {"q": (H * head_dim, D), "k": (K * head_dim, D), "v": (K * head_dim, D), "o": (D, H * head_dim)}
        shapes |= {"gate": (F, D), "up": (F, D), "down": (D, F)}
        biases = dict.fromkeys("qkv", reader.flag(family.qkv_bias)) | {"o": reader.flag(family.o_bias)}
        linears = {
            short: tensors.linear(
                f"{layer_prefix}.{PROJECTIONS[short]}", *shape, bias=biases.get(short, reader.flag(family.mlp_bias))
            )
            for short, shape in shapes.items()
        }
        window = reader.window(index)
        norms = {
            norm.rpartition(".")[2]: tensors.vector(f"{layer_prefix}.{norm}.weight", size)
            for norm, size in _norm_sizes(family, D, head_dim).items()
        }
        layers.append(Layer(index, layer_prefix, reader.rope(head_dim, window), window, linears, norms))
    final_norm = f"{prefix}model.norm.weight"
    tensors.vector(final_norm, D)
    head = embedding if tied else tensors.linear(head_name, V, D)
    tensors.refuse_unread(prefix, head_name if tied else None)
    scale = reader.number("query_pre_attn_scalar") if family.gemma else head_dim
    return ModelSpec(
        family=family_name,
        D=D,
        F=F,
        H=H,
        K=K,
        head_dim=head_dim,
        V=V,
        L=L,
        norm_eps=reader.number("rms_norm_eps"),
        attention_scale=scale**-0.5,
        embed_scale=D**0.5 if family.gemma else None,
        qk_norm=family.qk_norm,
        gemma=family.gemma,
        layers=tuple(layers),
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        tensors=tuple(tensors.read),
    )


def _norm_sizes(family: Family, D: int, head_dim: int) -> dict[str, int]:
    """A block's norms, by the name of their module inside the block."""
    sizes = {"input_layernorm": D, "post_attention_layernorm": D}
    if family.gemma:
        sizes |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
    if family.qk_norm:
        sizes |= {"self_attn.q_norm": head_dim, "self_attn.k_norm": head_dim}
    return sizes


class _Reader:
    """Typed access to config.json with the family's defaults, and errors that name the key."""

    def __init__(self, config: dict, family: Family, where: str):
        text = config.get("text_config")
        self.config = dict(config)
        if config["model_type"] == "gemma3":
            if not isinstance(text, dict):
                raise UserError(f"{where}: gemma3 needs an object 'text_config'")
            # As in mlx-lm: the heads default to the 4B model's, the vocabulary is the outer config's.
            outer = {"vocab_size": config.get("vocab_size", 262_208)}
            self.config = {"num_attention_heads": 8, "num_key_value_heads": 4, **text, **outer}
        self.family, self.where = family, where

    def get(self, key: str, default: Any = None) -> Any:
        value = self.config.get(key)
        return self.family.defaults.get(key, default) if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        return self.positive(key, self.get(key, default))

    def positive(self, key: str, value: Any) -> float:
        if value is None:
            raise UserError(f"{self.where}: {key} is missing")
        if not is_positive(value):
            raise UserError(f"{self.where}: {key} must be a positive number, found {str(value)[:100]!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise UserError(f"{self.where}: {key} must be an integer, found {value!r}")
        return int(value)

    def flag(self, value: bool | str) -> bool:
        return value if isinstance(value, bool) else bool(self.get(value, False))

    def window(self, index: int) -> int | None:
        """The sliding window of a layer: by layer_types where the config lists them, by gemma's pattern otherwise."""
        types = self.get("layer_types") if self.family.layer_types else None
        if types is not None:
            if index >= len(types):
                raise UserError(f"{self.where}: layer_types lists {len(types)} layers, num_hidden_layers says more")
            sliding = types[index] == "sliding_attention"
        else:
            sliding = self.family.gemma and (index + 1) % self.integer("sliding_window_pattern") != 0
        return self.integer("sliding_window") if sliding else None

    def rope(self, head_dim: int, window: int | None) -> Rope:
        """A layer's rope, from the keys at the top level or from rope_parameters, which may hold a set a layer type.

        Both may stand there (mlx-lm reads the old keys only) if they say the same.
        """
        local = self.family.gemma and window is not None
        nested = self._rope_parameters("sliding_attention" if window is not None else "full_attention")
        key = "rope_local_base_freq" if local else "rope_theta"
        old_scaling = None if local else self.get("rope_scaling")
        given = (self.config.get(key), nested.get("rope_theta"))
        bases = [float(self.positive(key, value)) for value in given if value is not None]
        base = bases[0] if bases else float(self.number(key))
        if old_scaling is not None and not isinstance(old_scaling, dict):
            raise UserError(f"{self.where}: rope_scaling must be an object, found {str(old_scaling)[:100]!r}")
        scalings = [found for found in (old_scaling, nested) if found]
        traditional = bool(self.get("rope_traditional", False))
        ropes = [make_rope(head_dim, base, found, traditional=traditional, where=self.where) for found in scalings]
        differ = any(rope != ropes[0] or rope.freqs is not ropes[0].freqs for rope in ropes)  # made once for a setting
        if len(set(bases)) > 1 or differ:
            old = key if len(set(bases)) > 1 else "rope_scaling"
            raise UserError(f"{self.where}: {old} and rope_parameters contradict each other; remove one of them")
        return ropes[0] if ropes else make_rope(head_dim, base, None, traditional=traditional, where=self.where)

    def _rope_parameters(self, layer_type: str) -> dict:
        """The rope_parameters of a layer type; {} where the config has none."""
        nested = self.get("rope_parameters") or {}
        if isinstance(nested, dict) and nested.keys() & {"full_attention", "sliding_attention"}:
            nested = nested.get(layer_type) or {}
        if not isinstance(nested, dict):
            raise UserError(f"{self.where}: rope_parameters must hold objects, found {nested!r}")
        return nested


class _Tensors:
    """Checks the checkpoint's tensors against the config, and infers how each matrix is packed."""

    def __init__(self, weights: MappedWeights, config: dict, where: str):
        self.weights, self.where = weights, where
        self.quantized = config.get("quantization") or config.get("quantization_config")
        self.read: list[str] = []

    def _shape(self, name: str) -> tuple[int, ...]:
        if name not in self.weights:
            raise UserError(f"{self.where} asks for the tensor {name}, which the checkpoint does not have")
        return tuple(self.weights.info(name).shape)

    def _expect(self, name: str, want: tuple[int, ...]) -> None:
        shape = self._shape(name)
        if shape != want:
            file = self.weights.info(name).file.name
            raise UserError(f"{file}: {name} has shape {list(shape)}, but {self.where} asks for {list(want)}")
        self.read.append(name)

    def vector(self, name: str, size: int) -> str:
        self._expect(name, (size,))
        return name

    def linear(self, name: str, out_dims: int, in_dims: int, bias: bool = False) -> Linear:
        if bias:
            self._expect(f"{name}.bias", (out_dims,))
        if f"{name}.scales" not in self.weights:
            self._expect(f"{name}.weight", (out_dims, in_dims))
            return Linear(name, out_dims, in_dims, bias)
        return Linear(name, out_dims, in_dims, bias, self._packing(name, out_dims, in_dims))

    def refuse_unread(self, prefix: str, tied_head: str | None) -> None:
        """UserError for a tensor of the decoder that nothing reads: the loss would be another model's.

        Buffers of frequencies are computed here; the head's matrix beside a tied embedding is the embedding.
        """
        spare = [] if tied_head is None else [f"{tied_head}.{part}" for part in ("weight", "scales", "biases")]
        known = {*self.read, *spare}
        for name in self.weights.names:
            if name in known or name.endswith("rotary_emb.inv_freq"):
                continue
            if name.startswith(("model.", "lm_head", f"{prefix}model.", f"{prefix}lm_head")):
                file = self.weights.info(name).file.name
                raise UserError(f"{file}: nothing reads the tensor {name}, so {self.where} describes another model")

    def _packing(self, name: str, out_dims: int, in_dims: int) -> Quantization:
        """Bits and group size follow from the shapes; what config.json says of them must agree."""
        said: dict = self.quantized if isinstance(self.quantized, dict) else {}
        own = said.get(name, said)
        packed, scales = self._shape(f"{name}.weight"), self._shape(f"{name}.scales")
        bits = packed[-1] * 32 // in_dims
        group_size = in_dims // scales[-1] if scales[-1] else 0
        mode = self._mode(name, own if isinstance(own, dict) else {}, bits, group_size)
        self._expect(f"{name}.weight", (out_dims, in_dims * bits // 32))
        self._expect(f"{name}.scales", (out_dims, in_dims // group_size if group_size else 0))
        if mode == "affine":
            self._expect(f"{name}.biases", (out_dims, in_dims // group_size))
        if bits not in (2, 3, 4, 5, 6, 8) or not group_size or in_dims % group_size:
            raise UserError(f"{name}: {bits} bits in groups of {group_size} over {in_dims} inputs cannot be unpacked")
        named = isinstance(own, dict) and own is not said and "bits" in own
        if named and (own["bits"], own.get("group_size", group_size)) != (bits, group_size):
            raise UserError(
                f"{self.where}: {name} is said to have {own['bits']} bits in groups of {own.get('group_size')}, "
                f"but its shapes give {bits} bits in groups of {group_size}"
            )
        return Quantization(bits, group_size, mode)

    def _mode(self, name: str, own: dict, bits: int, group_size: int) -> str:
        """The mode that the tensors have, where config.json names another one or one that is not supported: UserError.

        Byte scales belong to one of FLOAT_MODES, each of which has one number of bits and one group size.
        """
        method = own.get("quant_method")
        said = own.get("mode") or (method if method in FLOAT_MODES else None)
        if said is not None and said not in ("affine", *FLOAT_MODES):
            known = ", ".join(("affine", *FLOAT_MODES))
            raise UserError(f"{self.where}: quantization mode {said!r} of {name} is not supported: {known}")
        if self.weights.info(f"{name}.scales").dtype != "U8":
            found = "affine"
        else:
            found = next((mode for mode, shape in FLOAT_MODES.items() if shape == (bits, group_size)), "unknown")
        if found == "unknown" or said not in (None, found):
            what = f"{bits} bits in groups of {group_size}" + (" with byte scales" if found != "affine" else "")
            named = f"is said to be {said}, but " if said is not None else ""
            raise UserError(f"{self.where}: {name} {named}has {what}, {found if named else 'which no mode has'}")
        return found
