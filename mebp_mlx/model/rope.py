"""Rotary position embedding: which frequencies a config asks for; ops/attention.py rotates.

The frequency formulas are those of the models' published configs ("llama3", "yarn",
"linear" rope scaling); float32 throughout, so that they equal mlx-lm's to the bit.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeGuard

import mlx.core as mx

from ..errors import UserError

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """How one layer rotates its queries and keys.

    dims: rotated dimensions of a head; base: rotary base; scale: position scale (linear scaling has 1/factor); freqs:
    wavelength divisors [dims/2] that stand in base's place, or None; magnitude: a factor on the rotated vector.
    """

    dims: int
    base: float
    traditional: bool = False
    scale: float = 1.0
    freqs: mx.array | None = field(default=None, compare=False)
    magnitude: float = 1.0


def is_positive(value: Any) -> TypeGuard[float]:
    """Whether it is a positive number that a float holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def make_rope(dims: int, base: float, scaling: dict | None, *, traditional: bool = False, where: str) -> Rope:
    """The Rope that config.json's rope_scaling (or None) asks for. UserError for a kind that is not supported."""
    kind = (scaling or {}).get("type") or (scaling or {}).get("rope_type") or "default"
    if kind not in SUPPORTED_ROPE:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE)}")
    if kind == "default" or scaling is None:
        return Rope(dims, base, traditional)
    factor = scaling.get("factor")
    if not is_positive(factor):
        raise UserError(f"{where}: rope scaling {kind!r} needs a positive 'factor', found {str(factor)[:100]}")
    if kind == "linear":
        return Rope(dims, base, traditional, scale=1 / factor)
    settings = {k: v for k, v in scaling.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    try:
        freqs, magnitude = _frequencies(kind, dims, base, tuple(sorted(settings.items())))
        usable = bool((mx.isfinite(freqs) & (freqs > 0)).all()) and math.isfinite(magnitude)
    except (ArithmeticError, ValueError, RuntimeError):  # RuntimeError: numbers that MLX cannot hold
        usable = False
    if not usable:
        raise UserError(f"{where}: rope scaling {kind!r} has numbers that give no frequencies")
    return Rope(dims, base, traditional, freqs=freqs, magnitude=magnitude)


@cache  # one entry per distinct rope of a model (one or two); a few hundred bytes each
def _frequencies(kind: str, dims: int, base: float, settings: tuple[tuple[str, float], ...]) -> tuple[mx.array, float]:
    freqs, magnitude = (_llama3 if kind == "llama3" else _yarn)(dims, base, dict(settings))
    mx.eval(freqs)
    return freqs, magnitude


def _llama3(dims: int, base: float, s: dict) -> tuple[mx.array, float]:
    low, high = s.get("low_freq_factor", 1.0), s.get("high_freq_factor", 4.0)
    context = s.get("original_max_position_embeddings", 8192)
    freqs = base ** (mx.arange(0, dims, 2) / dims)
    wavelengths = 2 * mx.pi * freqs
    slowed = mx.where(wavelengths > context / low, freqs * s["factor"], freqs)
    smooth = (context / wavelengths - low) / (high - low)
    between = (wavelengths > context / high) & (wavelengths < context / low)
    return mx.where(between, slowed / ((1 - smooth) / s["factor"] + smooth), slowed), 1.0


def _yarn(dims: int, base: float, s: dict) -> tuple[mx.array, float]:
    context = s.get("original_max_position_embeddings", 4096)

    def dimension(n_rotations: float) -> float:
        return dims * math.log(context / (n_rotations * 2 * math.pi)) / (2 * math.log(base))

    def magnitude(m: float) -> float:
        return 1.0 if s["factor"] <= 1 else 0.1 * m * math.log(s["factor"]) + 1.0

    low = max(math.floor(dimension(s.get("beta_fast", 32))), 0)
    high: float = min(math.ceil(dimension(s.get("beta_slow", 1))), dims - 1)
    if low == high:
        high += 0.001
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low), 0, 1)
    keep = 1.0 - ramp
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    slow = s["factor"] * plain
    freqs = (slow * plain) / (slow * keep + plain * (1 - keep))
    return freqs, magnitude(s.get("mscale", 1)) / magnitude(s.get("mscale_all_dim", 0))
