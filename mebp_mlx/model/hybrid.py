"""Layers without attention, named in the rows of families.py: widths of their matrices, and their other tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..errors import UserError
from .settings import Settings


@dataclass(frozen=True)
class DeltaHeads:
    """Heads of a gated delta net: numbers of keys (and queries) and values, and their widths."""

    n_keys: int
    n_values: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class Widths:
    """rows, inputs: matrix sizes by short name (a missing input is hidden_size); arrays: shapes by name, a
    depthwise kernel's as [channels, taps].
    """

    rows: Mapping[str, int]
    inputs: Mapping[str, int]
    arrays: Mapping[str, tuple[int, ...]]
    delta: DeltaHeads | None = None


@dataclass(frozen=True)
class Hybrid:
    """block: name of its equations; matrices, norms: as in Family; arrays: modules of other tensors, by name.

    has_attention(settings, layer): whether a layer has attention instead; offset_in_torch_layout: if the depthwise
    kernel is stored in torch's layout, norms are stored as weight - 1.
    """

    block: str
    matrices: Mapping[str, tuple[str, ...]]
    norms: Mapping[str, str]
    arrays: Mapping[str, str]
    widths: Callable[[Settings, int], Widths]
    has_attention: Callable[[Settings, int], bool]
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    offset_in_torch_layout: float = 0.0


def conv_widths(settings: Settings, D: int) -> Widths:
    """LFM2's short convolution: [b | c | z] of width D each, a kernel over D channels."""
    if settings.get("conv_bias", False):
        raise UserError(f"{settings.where}: conv_bias is not supported")
    return Widths({"in": 3 * D, "out": D}, {"out": D}, {"conv": (D, settings.integer("conv_L_cache"))})


def has_listed_attention(settings: Settings, index: int) -> bool:
    """LFM2's: full_attn_idxs, else layer_types."""
    listed = settings.get("full_attn_idxs")
    if isinstance(listed, list):
        return index in listed
    types = settings.get("layer_types")
    if not isinstance(types, list) or index >= len(types):
        raise UserError(f"{settings.where}: neither full_attn_idxs nor layer_types gives the kind of layer {index}")
    return bool(types[index] == "full_attention")


def lfm2_width(settings: Settings) -> int:
    """The MLP's inner width F."""
    F = settings.integer("block_ff_dim", settings.get("intermediate_size"))
    if settings.get("block_auto_adjust_ff_dim", False):
        F = int(settings.number("block_ffn_dim_multiplier", 1.0) * int(2 * F / 3))
        F = -(-F // (multiple := settings.integer("block_multiple_of"))) * multiple
    return F


def delta_widths(settings: Settings, D: int) -> Widths:
    """Qwen 3.5's gated delta net: queries, keys and values from one matrix, an output gate, and two gates per head."""
    keys = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    heads = DeltaHeads(*(settings.integer(f"linear_{key}") for key in keys))
    if heads.n_values % heads.n_keys:
        raise UserError(
            f"{settings.where}: linear_num_value_heads={heads.n_values} is not a multiple of "
            f"linear_num_key_heads={heads.n_keys}"
        )
    values = heads.n_values * heads.value_dim
    channels = 2 * heads.n_keys * heads.key_dim + values
    rows = {"qkv": channels, "z": values, "b": heads.n_values, "a": heads.n_values, "out": D}
    taps = settings.integer("linear_conv_kernel_dim", 4)
    arrays = {"conv": (channels, taps), "A_log": (heads.n_values,), "dt_bias": (heads.n_values,)}
    return Widths(rows, {"out": values}, arrays | {"norm": (heads.value_dim,)}, heads)


def has_every_nth(settings: Settings, index: int) -> bool:
    """Qwen 3.5's: the last of every full_attention_interval layers."""
    return (index + 1) % settings.integer("full_attention_interval", 4) == 0
