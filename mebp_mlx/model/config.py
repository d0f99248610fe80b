"""What a model is, as data: its matrices, its blocks, and the numbers that its equations need.

reading.py makes it of a config.json and checks the checkpoint against it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from .experts import Routing
from .families import CLASSIC
from .hybrid import DeltaHeads
from .rope import Rope

PROJECTIONS = {shorts[0]: key for key, shorts in CLASSIC.items()}  # of most families, by the names that blocks use


FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode -> bits, group size: it has no others


@dataclass(frozen=True)
class Quantization:
    """How a packed weight is laid out: mx.dequantize's own terms."""

    bits: int
    group_size: int
    mode: str  # "affine", or one of FLOAT_MODES


@dataclass(frozen=True)
class Linear:
    """A frozen matrix in the checkpoint: [out_dims, in_dims], perhaps packed, perhaps with a bias.

    first_row: where its rows begin in a tensor that several matrices share. n_experts: of a stack of that many such
    matrices [n_experts, out_dims, in_dims], 0: it is one; apart: how a checkpoint calls each of them, with {} for its
    number, where it stores no stack.
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
        """One matrix of a stack. A stored stack is read as a matrix of all rows, one expert's after another's."""
        if self.apart is not None:
            return replace(self, name=self.apart.format(index), n_experts=0, apart=None)
        return replace(self, first_row=index * self.out_dims, n_experts=0)

    @property
    def without_bias(self) -> Linear:
        """The same matrix alone."""
        return replace(self, bias=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """[out_dims, in_dims], of a stack with n_experts in front."""
        return (self.n_experts, self.out_dims, self.in_dims)[0 if self.n_experts else 1 :]

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a LoRA pair: a [in, r], b [r, out]; of a stack a [E, r, in], b [E, out, r], as in mlx-lm."""
        if self.n_experts:
            return (self.n_experts, rank, self.in_dims), (self.n_experts, self.out_dims, rank)
        return (self.in_dims, rank), (rank, self.out_dims)

    @cached_property
    def tensors(self) -> list[str]:
        """The names of the weight and of what it is dequantized with."""
        if self.apart is not None:
            return [name for index in range(self.n_experts) for name in self.expert(index).tensors]
        parts = ["weight"]
        if self.quantization is not None:
            parts += ["scales", "biases"] if self.quantization.mode == "affine" else ["scales"]
        return [f"{self.name}.{part}" for part in parts]


@dataclass(frozen=True)
class Layer:
    """One decoder block: where its tensors are and what its attention may see."""

    index: int
    prefix: str
    block: str  # whose equations these are (families/)
    rope: Rope | None  # None: queries and keys are not rotated
    window: int | None  # sliding window in tokens, None = all earlier tokens
    head_dim: int
    donor: int | None  # the layer whose keys and values its queries meet; None: its own
    linears: dict[str, Linear]  # as the block names them: "q", "k", "v", "o", "gate", "up", "down"
    matrices: dict[str, Linear]  # as they are stored and adapted ("self_attn.q_proj"); one may hold several projections
    norms: dict[str, str]  # tensors of norms' weights by the norm's name in the block ("input_layernorm")
    arrays: dict[str, str]  # other tensors by their name in the block, which stay as they are ("conv")
    experts: dict[str, Linear]  # stacks of a mixture's "gate", "up" and "down", which are no `linears`; or none


@dataclass(frozen=True)
class LayerInputs:
    """A second embedding, of which every layer reads its own `width` columns (ops/layer_input.py)."""

    width: int  # P
    embedding: Linear  # [tokens, L * P]
    projection: Linear  # [L * P, D], of the first embedding's rows
    norm: str  # tensor of its weight [P]


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
    residual_scale: float  # multiplies what a branch adds to the stream
    head_divisor: float  # divides the rows that the head gets
    attention_cap: float | None  # scores and logits are cap * tanh(x / cap)
    logit_cap: float | None
    norm_after_rope: bool
    norm_offset: float  # is added to every norm's weight
    delta: DeltaHeads | None  # of layers with a gated delta net
    routing: Routing | None  # of layers with a mixture of experts
    layer_inputs: LayerInputs | None
    layers: tuple[Layer, ...]
    embedding: Linear
    head: Linear
    final_norm: str
    tensors: tuple[str, ...] = ()  # every one that the model reads, and the spare head's
    spare_head: Linear | None = None  # stored beside a tied embedding: read by nobody, but mlx-lm misses it
    remarks: tuple[str, ...] = ()  # where mlx-lm reads the config otherwise, a line each

    @property
    def tied(self) -> bool:
        return self.head.name == self.embedding.name

    @property
    def lora_keys(self) -> tuple[str, ...]:
        """Where mlx-lm puts LoRA by default: every matrix of a block, by its name inside it."""
        return tuple(dict.fromkeys(key for layer in self.layers for key in layer.matrices))
