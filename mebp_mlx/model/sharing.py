"""Layers with different widths and shared keys and values, named in the rows of families.py: Gemma 4's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .settings import Settings


@dataclass(frozen=True)
class Variant:
    """A layer's own settings. F: width of its MLP; donor: the layer whose keys and values it attends to."""

    head_dim: int
    F: int
    donor: int | None = None


def gemma4_layers(settings: Settings, L: int, windows: list[int | None], head_dim: int, F: int) -> list[Variant]:
    """A Variant for each of L layers, from their sliding windows (None: full attention). Raises UserError.

    The last num_kv_shared_layers take keys and values from the last layer below them of their own kind.
    """
    _refuse_what_is_not_there(settings)
    where, n_shared = settings.where, settings.get("num_kv_shared_layers")
    if not isinstance(n_shared, int) or isinstance(n_shared, bool) or not 0 <= n_shared < L:
        raise UserError(f"{where}: num_kv_shared_layers must be 0 to {L - 1}, found {str(n_shared)[:100]!r}")
    M = L - n_shared
    full = settings.get("global_head_dim") and settings.integer("global_head_dim")
    wide = 2 if settings.get("use_double_wide_mlp") else 1
    donors = {window: index for index, window in enumerate(windows[:M])}
    variants = []
    for index, window in enumerate(windows):
        if window not in donors:
            raise UserError(f"{where}: layer {index} shares keys and values, but no layer below {M} is of its kind")
        own = head_dim if window is not None else full or head_dim
        shares = index >= M
        variants.append(Variant(own, F * wide if shares else F, donors[window] if shares else None))
    return variants


# mlx-lm's and transformers' defaults for missing keys; the tensors do not settle them clearly.
_READ_DIFFERENTLY = {
    "num_kv_shared_layers": ("20", "0"),
    "use_double_wide_mlp": ("true", "false"),
    "final_logit_softcapping": ("30", "null"),
}


def _refuse_what_is_not_there(settings: Settings) -> None:
    for key, (mlx_lm, transformers) in _READ_DIFFERENTLY.items():
        if key not in settings.config:
            raise UserError(f"{settings.where}: {key} is missing; mlx-lm assumes {mlx_lm}, transformers {transformers}")
    allowed: dict[str, tuple[Any, ...]] = {
        "enable_moe_block": (False,),
        "attention_k_eq_v": (False,),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, "vision"),
        "hidden_activation": ("gelu_pytorch_tanh",),
    }
    for key, values in allowed.items():
        value = settings.get(key)
        if value is not None and value not in values:
            raise UserError(f"{settings.where}: {key} {value!r} is not supported")
