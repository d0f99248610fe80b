"""Rotary position embedding: the frequencies that a config specifies; ops/attention.py rotates.

The frequency formulas are those of the models' published configs ("llama3", "yarn", "longrope", "dynamic", "linear"
and "proportional" rope scaling); float32 throughout, so that they equal mlx-lm's to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import mlx.core as mx

from ..errors import UserError
from .settings import is_positive

SUPPORTED_ROPE = ("default", "linear", "llama3", "yarn", "longrope", "dynamic", "proportional")


@dataclass(frozen=True)
class Rope:
    """One layer's rotation of queries and keys.

    dims: rotated dimensions of a head (its first ones); base: rotary base; scale: position scale (linear scaling has
    1/factor); freqs: wavelength divisors [dims/2] that replace base, or None; magnitude: multiplies the rotated
    dimensions; limit: number of positions beyond which frequencies would depend on the row's length, or None; growth:
    (beta, context), queries are multiplied by 1 + beta ln(1 + floor(position / context)), or None.
    """

    dims: int
    base: float
    traditional: bool = False
    scale: float = 1.0
    freqs: mx.array | None = field(default=None, compare=False)
    magnitude: float = 1.0
    limit: int | None = None
    growth: tuple[float, float] | None = None


def make_rope(
    dims: int,
    base: float,
    scaling: dict | None,
    *,
    traditional: bool = False,
    where: str,
    lengths: Mapping[str, float] | None = None,
) -> Rope:
    """The Rope specified by config.json's rope_scaling (or None). Raises UserError for an unsupported kind.

    lengths: (original_)max_position_embeddings of the config, for the kinds that need them.
    """
    scaling = scaling or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)  # mrope equals plain rope if all positions are text
    if kind not in SUPPORTED_ROPE:
        raise UserError(f"{where}: rope scaling {kind!r} is not supported; supported: {', '.join(SUPPORTED_ROPE)}")
    settings = _settings(kind, scaling, dict(lengths or {}), dims, where)
    try:
        rope = _made(kind, Rope(dims, base, traditional, growth=_growth(scaling)), settings)
        usable = math.isfinite(rope.magnitude) and (rope.freqs is None or _are_positive(rope.freqs, kind))
    except (ArithmeticError, ValueError, TypeError, RuntimeError):  # RuntimeError: numbers that MLX cannot hold
        usable = False
    if not usable:
        raise UserError(f"{where}: rope scaling {kind!r} has numbers that give no frequencies")
    return rope


def _are_positive(freqs: mx.array, kind: str) -> bool:
    finite = freqs[:1] if kind == "proportional" else freqs  # dimensions that do not rotate have infinite wavelengths
    return bool(mx.isfinite(finite).all() & (freqs > 0).all())


def _made(kind: str, plain: Rope, settings: dict[str, Any]) -> Rope:
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, scale=1 / settings["factor"])
    if kind == "dynamic" and "alpha" not in settings:
        return replace(plain, limit=int(settings["max_position_embeddings"]))
    freqs, magnitude = _frequencies(kind, plain.dims, plain.base, tuple(sorted(settings.items())))
    return replace(plain, freqs=freqs, magnitude=magnitude)


def _settings(kind: str, scaling: dict, lengths: dict, dims: int, where: str) -> dict[str, Any]:
    """The checked parameters of a scaling kind: from rope_scaling and from the config."""
    if kind not in ("default", "longrope", "proportional") and "alpha" not in scaling:
        factor = scaling.get("factor")
        if not is_positive(factor):
            raise UserError(f"{where}: rope scaling {kind!r} needs a positive 'factor', found {str(factor)[:100]}")
    numbers: dict[str, Any] = {
        k: v for k, v in scaling.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    if kind == "longrope":
        long = scaling.get("long_factor")
        if not isinstance(long, list) or len(long) != dims // 2:
            raise UserError(f"{where}: rope scaling 'longrope' needs a list of {dims // 2} numbers 'long_factor'")
        numbers["long_factor"] = tuple(long)
    if kind in ("longrope", "dynamic"):
        numbers = _LENGTHS | lengths | numbers
    return numbers


_LENGTHS = {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}  # as in mlx-lm's phi3


def _growth(scaling: dict) -> tuple[float, float] | None:
    """Llama 4's and Ministral 3's growth of queries, if rope_parameters has it."""
    beta, context = scaling.get("llama_4_scaling_beta"), scaling.get("original_max_position_embeddings")
    return None if not beta or not context else (float(beta), float(context))


@cache  # one entry per distinct rope of a model (one or two); a few hundred bytes each
def _frequencies(kind: str, dims: int, base: float, settings: tuple[tuple[str, Any], ...]) -> tuple[mx.array, float]:
    makers = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "dynamic": _alpha, "proportional": _proportional}
    make = makers[kind]
    freqs, magnitude = make(dims, base, dict(settings))
    mx.eval(freqs)
    return freqs, magnitude


def _longrope(dims: int, base: float, s: dict) -> tuple[mx.array, float]:
    """long_factor for rows of any length, as in mlx-lm."""
    plain = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    context = s["original_max_position_embeddings"]
    factor = s["max_position_embeddings"] / context
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(context))
    return mx.array(s["long_factor"], mx.float32) * plain, magnitude


def _proportional(dims: int, base: float, s: dict) -> tuple[mx.array, float]:
    """Gemma 4's: only the first pairs rotate, at the frequencies that they have in a full rotation."""
    n_turned = int(dims * s.get("partial_rotary_factor", 1.0))
    turned = s.get("factor", 1.0) * base ** (mx.arange(0, n_turned, 2, dtype=mx.float32) / dims)
    return mx.concatenate([turned, mx.full(((dims - n_turned) // 2,), mx.inf)]), 1.0


def _alpha(dims: int, base: float, s: dict) -> tuple[mx.array, float]:
    """Hunyuan's: a larger base, for rows of any length."""
    base = base * s["alpha"] ** (dims / (dims - 2))
    return base ** (mx.arange(0, dims, 2) / dims), 1.0


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
