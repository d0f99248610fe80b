"""A model's kinds of layers, with and without attention, and the tensors of a layer of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from .config import Layer, Linear
from .experts import Mixture
from .families import Family
from .hybrid import Widths
from .rope import Rope
from .settings import Settings


class Reader(Protocol):
    """Receives requests for a model's tensors: a checkpoint (tensors.py), or a list to write (testing/synth.py)."""

    read: list[str]

    def has(self, name: str) -> bool: ...

    def linear(self, name: str, out_dims: int, in_dims: int, bias: bool = False) -> Linear: ...

    def experts(self, name: str, apart: str, shape: tuple[int, int, int], bias: bool = False) -> Linear: ...

    def vector(self, name: str, size: int) -> str: ...

    def taps(self, name: str, channels: int, n_taps: int) -> bool:
        """Requests a depthwise kernel; returns whether it has torch's layout [channels, 1, taps]."""


@dataclass(frozen=True)
class Kind:
    """matrices: short names of the projections that each holds; norms: module and size; biases: by the matrix's first
    short name; mixture: of experts, instead of an MLP.
    """

    block: str
    D: int
    head_dim: int
    matrices: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, tuple[str, int]]
    arrays: Mapping[str, str]
    widths: Widths
    biases: Mapping[str, bool]
    offset_in_torch_layout: float = 0.0
    donor: int | None = None
    mixture: Mixture | None = None

    def with_experts(self, mixture: Mixture, settings: Settings) -> Kind:
        """This kind with a mixture of experts instead of its MLP."""
        n_experts, F = settings.integer(mixture.n_experts), settings.integer(mixture.width)
        own = {key: shorts for key, shorts in self.matrices.items() if shorts[0] not in mixture.parts}
        arrays, shapes = dict(self.arrays), dict(self.widths.arrays)
        if mixture.selection_bias is not None and settings.flag(mixture.selection_bias[1]):
            arrays["selection_bias"], shapes["selection_bias"] = mixture.selection_bias[0], (n_experts,)
        rows = {**self.widths.rows, "gate": F, "up": F, "router": n_experts}
        widths = replace(self.widths, rows=rows, inputs={**self.widths.inputs, "down": F}, arrays=shapes)
        own[mixture.router] = ("router",)
        biases, block = {**self.biases, "router": mixture.router_bias}, f"{self.block}_moe"
        return replace(self, block=block, matrices=own, arrays=arrays, widths=widths, biases=biases, mixture=mixture)

    def layer(self, tensors: Reader, index: int, prefix: str, rope: Rope | None, window: int | None) -> Layer:
        """A layer of this kind; requests its tensors. Raises UserError."""
        rows, inputs = self.widths.rows, self.widths.inputs
        matrices = {
            key: tensors.linear(
                f"{prefix}.{key}",
                sum(rows[short] for short in shorts),
                inputs.get(shorts[0], self.D),
                bias=self.biases.get(shorts[0], False),
            )
            for key, shorts in self.matrices.items()
        }
        linears = {}
        for key, shorts in self.matrices.items():
            first = 0
            for short in shorts:
                linears[short] = replace(matrices[key], out_dims=rows[short], first_row=first)
                first += rows[short]
        experts = self._experts(tensors, prefix)
        matrices |= {f"{stack.name.removeprefix(f'{prefix}.')}": stack for stack in experts.values()}
        norms = {name: tensors.vector(f"{prefix}.{part}.weight", size) for name, (part, size) in self.norms.items()}
        arrays = {name: f"{prefix}.{module}" for name, module in self.arrays.items()}
        for name, shape in self.widths.arrays.items():
            if len(shape) == 1:
                tensors.vector(arrays[name], *shape)
        own = (window, self.head_dim, self.donor)
        return Layer(index, prefix, self.block, rope, *own, linears, matrices, norms, arrays, experts)

    def _experts(self, tensors: Reader, prefix: str) -> dict[str, Linear]:
        if (mixture := self.mixture) is None:
            return {}
        rows, inputs = self.widths.rows, self.widths.inputs
        return {
            short: tensors.experts(
                f"{prefix}.{mixture.experts}.{part}",
                f"{prefix}.{mixture.apart}.{part}",
                (rows["router"], rows[short], inputs.get(short, self.D)),
                self.biases.get(short, False),
            )
            for short, part in mixture.parts.items()
        }

    def is_in_torch_layout(self, tensors: Reader, prefix: str) -> bool:
        """Requests the layer's depthwise kernel, if it has one; returns whether it has torch's layout."""
        kernels = [(self.arrays[name], shape) for name, shape in self.widths.arrays.items() if len(shape) == 2]
        return any([tensors.taps(f"{prefix}.{module}", *shape) for module, shape in kernels])


def kinds_of(
    family: Family, settings: Settings, D: int, F: int, heads: tuple[int, int, int]
) -> tuple[Kind, Kind | None]:
    """The kinds of layers with and without attention. heads: of queries, of keys and values, and their width."""
    H, K, head_dim = heads
    mlp, mlp_inputs = {"gate": F, "up": F, "down": D}, {"down": F}
    flags = dict.fromkeys("qkv", family.qkv_bias) | {"o": family.o_bias}
    flags |= dict.fromkeys(("gate", "up", "down"), family.mlp_bias)
    biases = {short: settings.flag(flag) for short, flag in flags.items()}
    norms = {name: (module, D) for name, module in family.norms.items()}
    qk_norms = {}
    if settings.flag(family.qk_norm):
        for name, module, n_heads in zip(("q_norm", "k_norm"), family.qk_norms, (H, K), strict=True):
            qk_norms[name] = (f"self_attn.{module}", head_dim * n_heads if family.qk_norm_of_rows else head_dim)
    rows = {"q": H * head_dim * (2 if family.gated_query else 1), "k": K * head_dim, "v": K * head_dim, "o": D}
    inputs = {"o": H * head_dim} | mlp_inputs
    if family.layer_inputs:
        P = settings.integer("hidden_size_per_layer_input")
        rows |= {"per_layer_input_gate": P, "per_layer_projection": D}
        inputs["per_layer_projection"] = P
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(family.arrays, (1,))
    arrays = dict(family.arrays)
    if family.sinks:
        arrays["sinks"], shapes["sinks"] = "self_attn.sinks", (H,)
    widths = Widths(rows | mlp, inputs, shapes)
    attention = Kind(family.block, D, head_dim, family.matrices, norms | qk_norms, arrays, widths, biases)
    if (hybrid := family.hybrid) is None:
        return attention, None
    own = hybrid.widths(settings, D)
    widths = replace(own, rows={**own.rows, **mlp}, inputs={**own.inputs, **mlp_inputs})
    other_norms = {name: (module, D) for name, module in hybrid.norms.items()}
    offset = hybrid.offset_in_torch_layout
    return attention, Kind(hybrid.block, D, head_dim, hybrid.matrices, other_norms, hybrid.arrays, widths, {}, offset)


def without_keys(kind: Kind, donor: int) -> Kind:
    """This layer with another layer's keys and values."""
    matrices = {name: shorts for name, shorts in kind.matrices.items() if shorts not in (("k",), ("v",))}
    norms = {name: norm for name, norm in kind.norms.items() if name != "k_norm"}
    return replace(kind, block=f"{kind.block}_shared", matrices=matrices, norms=norms, donor=donor)
