"""A model as data: its matrices, its blocks, and the numbers in its equations.

reading.py builds it from config.json and checks the checkpoint against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .experts import Routing
from .families import CLASSIC
from .hybrid import DeltaHeads
from .rope import Rope

PROJECTIONS = {shorts[0]: key for key, shorts in CLASSIC.items()}  # most families' modules, by short name


FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode -> its only bits and group size


@dataclass(frozen=True)
class Quantization:
    """Layout of a packed weight, in mx.dequantize's terms."""

    bits: int
    group_size: int
    mode: str  # "affine", or one of FLOAT_MODES


@dataclass(frozen=True)
class Linear:
    """A frozen matrix in the checkpoint: [out_dims, in_dims], perhaps packed, perhaps with a bias.

    first_row: where its rows begin in a tensor that several matrices share. n_experts: size of a stack [n_experts,
    out_dims, in_dims]; 0 for a single matrix. apart: name of one expert's matrix, with {} for its number, if the
    checkpoint stores no stack.
    """

    name: str
    out_dims: int
    in_dims: int
    bias: bool = False
    quantization: Quantization | None = None
    first_row: int = 0
    n_experts: int = 0
    apart: str | None = None

    def expert(self, index: int) -> Linear:
        """One matrix of a stack. A stored stack is read as a matrix of all rows, expert by expert."""
        if self.apart is not None:
            return replace(self, name=self.apart.format(index), n_experts=0, apart=None)
        return replace(self, first_row=index * self.out_dims, n_experts=0)

    @property
    def without_bias(self) -> Linear:
        """The Linear of that expert alone."""
        return replace(self, bias=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out_dims, in_dims]; [n_experts, out_dims, in_dims] for a stack."""
        return (self.n_experts, self.out_dims, self.in_dims)[0 if self.n_experts else 1 :]

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a LoRA pair: a [in, r], b [r, out]; for a stack a [E, r, in], b [E, out, r], as in mlx-lm."""
        if self.n_experts:
            return (self.n_experts, rank, self.in_dims), (self.n_experts, self.out_dims, rank)
        return (self.in_dims, rank), (rank, self.out_dims)

    @cached_property
    def tensors(self) -> list[str]:
        """Names of the weight and of the tensors that dequantize it."""
        if self.apart is not None:
            return [name for index in range(self.n_experts) for name in self.expert(index).tensors]
        parts = ["weight"]
        if self.quantization is not None:
            parts += ["scales", "biases"] if self.quantization.mode == "affine" else ["scales"]
        return [f"{self.name}.{part}" for part in parts]


@dataclass(frozen=True)
class Layer:
    """One decoder block: its tensors and the settings of its attention."""

    index: int
    prefix: str
    block: str  # name of its equations (families/)
    rope: Rope | None  # None: no rotation of queries and keys
    window: int | None  # sliding window in tokens, None = all earlier tokens
    head_dim: int
    donor: int | None  # the layer whose keys and values it attends to; None: its own
    linears: dict[str, Linear]  # by name in the block: "q", "k", "v", "o", "gate", "up", "down"
    matrices: dict[str, Linear]  # by module ("self_attn.q_proj"); one may hold several projections
    norms: dict[str, str]  # norm weight tensors by the norm's name in the block ("input_layernorm")
    arrays: dict[str, str]  # other frozen tensors by their name in the block ("conv")
    experts: dict[str, Linear]  # a mixture's stacks "gate", "up" and "down", not among `linears`


@dataclass(frozen=True)
class LayerInputs:
    """A second embedding; every layer reads its own `width` columns (ops/layer_input.py)."""

    width: int  # P
    embedding: Linear  # [tokens, L * P]
    projection: Linear  # [L * P, D], of the first embedding's rows
    norm: str  # tensor of the norm's weight [P]


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
    embed_scale: float | None  # multiplies the embeddings
    residual_scale: float  # multiplies a branch's output
    head_divisor: float  # divides the head's input rows
    attention_cap: float | None  # scores and logits are cap * tanh(x / cap)
    logit_cap: float | None
    norm_after_rope: bool
    norm_offset: float  # added to every norm's weight
    delta: DeltaHeads | None  # for layers with a gated delta net
    routing: Routing | None  # for layers with a mixture of experts
    layer_inputs: LayerInputs | None
    layers: tuple[Layer, ...]
    embedding: Linear
    head: Linear
    final_norm: str
    tensors: tuple[str, ...] = ()  # every tensor that the model reads, and the spare head's
    spare_head: Linear | None = None  # stored although the embedding is tied: unused, but mlx-lm requires it
    remarks: tuple[str, ...] = ()  # differences from how mlx-lm reads the config, one per line

    @property
    def tied(self) -> bool:
        return self.head.name == self.embedding.name

    @property
    def lora_keys(self) -> tuple[str, ...]:
        """mlx-lm's default LoRA modules: every matrix of a block, by its name in the block."""
        return tuple(dict.fromkeys(key for layer in self.layers for key in layer.matrices))
