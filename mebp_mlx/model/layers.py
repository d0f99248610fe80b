"""The settings that differ between a model's layers: window and rope."""

from __future__ import annotations

from ..errors import UserError
from .families import Family
from .rope import Rope, make_rope
from .settings import Settings

_KINDS = {"full_attention", "sliding_attention"}


class LayerRules:
    """A family's rules for layers, applied to a config."""

    def __init__(self, settings: Settings, family: Family, L: int):
        self.settings, self.family, self.L, self.where = settings, family, L, settings.where
        self.pattern = settings.get("sliding_window_pattern") if family.window_pattern else None

    def _rotated(self) -> float:
        """The fraction of a head that is rotated."""
        nested = self.settings.get("rope_parameters")
        part = nested.get("partial_rotary_factor") if isinstance(nested, dict) else None
        return float(self.settings.number("partial_rotary_factor", 1.0)) if part is None else float(part)

    def window(self, index: int) -> int | None:
        """A layer's sliding window in tokens: from layer_types if the family reads it, otherwise from its pattern."""
        types = self.settings.get("layer_types") if self.family.layer_types else None
        if types is not None:
            if index >= len(types):
                raise UserError(f"{self.where}: layer_types lists {len(types)} layers, fewer than num_hidden_layers")
            slides = types[index] == "sliding_attention"
        elif isinstance(self.pattern, str) and self.pattern:
            slides = self.pattern[index % len(self.pattern)] == "L"
        else:
            slides = bool(self.pattern) and (index + 1) % self.settings.integer("sliding_window_pattern") != 0
        return self.settings.integer("sliding_window") if slides else None

    def rope(self, index: int, window: int | None, head_dim: int) -> Rope | None:
        """A layer's rope, from top-level keys or from rope_parameters, which may hold one set per layer type.

        A config may have both if they agree (mlx-lm reads only the top-level keys). None: nothing is rotated.
        """
        if self._skips(index, window):
            return None
        family, get = self.family, self.settings.get
        dims = int(head_dim * self._rotated()) if family.partial_rope else head_dim
        local = family.window_rope_is_plain and window is not None
        nested, is_by_type = self._rope_parameters("full_attention" if window is None else "sliding_attention")
        key = family.window_theta if local else "rope_theta"
        old = None if local else get("rope_scaling")
        given = (self.settings.config.get(key), nested.get("rope_theta"))
        bases = [float(self.settings.positive(key, value)) for value in given if value is not None]
        base = bases[0] if bases else float(self.settings.number(key))
        if old is not None and not isinstance(old, dict):
            raise UserError(f"{self.where}: rope_scaling must be an object, found {str(old)[:100]!r}")
        new = nested if not local or is_by_type or family.window_theta != "rope_theta" else None
        ropes = [self._made(dims, base, scaling) for scaling in (old, new) if scaling]
        differ = any(rope != ropes[0] or rope.freqs is not ropes[0].freqs for rope in ropes)  # built once per setting
        if len(set(bases)) > 1 or differ:
            what = key if len(set(bases)) > 1 else "rope_scaling"
            raise UserError(f"{self.where}: {what} and rope_parameters contradict each other; remove one of them")
        return ropes[0] if ropes else self._made(dims, base, None)

    def _made(self, dims: int, base: float, scaling: dict | None) -> Rope:
        keys = ("max_position_embeddings", "original_max_position_embeddings")
        lengths = {key: value for key in keys if (value := self.settings.get(key)) is not None}
        traditional = bool(self.settings.get("rope_traditional", self.family.traditional))
        return make_rope(dims, base, scaling, traditional=traditional, where=self.where, lengths=lengths)

    def _skips(self, index: int, window: int | None) -> bool:
        if self.family.rope_in_windows_only:
            return bool(self.pattern) and window is None
        if not self.family.rope_skips_layers:
            return False
        listed = self.settings.get("no_rope_layers")
        if listed is None:
            return (index + 1) % self.settings.integer("no_rope_layer_interval") == 0
        if not isinstance(listed, list) or len(listed) != self.L:
            raise UserError(f"{self.where}: no_rope_layers must list {self.L} layers, found {listed!r}")
        return not listed[index]

    def _rope_parameters(self, layer_type: str) -> tuple[dict, bool]:
        """The rope_parameters of a layer type ({} if the config has none), and whether there is one set per type."""
        nested = self.settings.get("rope_parameters") or {}
        is_by_type = isinstance(nested, dict) and bool(nested.keys() & _KINDS)
        if is_by_type:
            nested = nested.get(layer_type) or {}
        if not isinstance(nested, dict):
            raise UserError(f"{self.where}: rope_parameters must hold objects, found {nested!r}")
        return nested, is_by_type
