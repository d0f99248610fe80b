"""A model with its adapters added to its weights, W + s (A B)^T, a few rows at a time; and what that keeps.

Rounding to 16 bits loses next to nothing of what was learned; rounding to 4 bits can lose most of a short run, whose
change of a weight is smaller than the distance of two 4-bit values. So it is measured: the loss of the base model, of
the base model with adapters, and of the fused one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..model.base import Model
from ..model.lora import Lora
from ..model.reading import read_config
from ..system.device import DTYPES
from ..system.files import NewFolder
from .folder import new_config, write_folder, write_text
from .quantize import Recipe, checked_packing
from .requantize import Repack, Report, Say


@dataclass(frozen=True)
class Format:
    """How the fused model is stored.

    recipe: of all matrices, None: each matrix as in the source; dtype: a key of DTYPES, of what is not packed, None:
    the source's.
    """

    recipe: Recipe | None
    dtype: str | None = None

    def __str__(self) -> str:
        if self.recipe is None:
            return "the source's format"
        if (packing := self.recipe.packing) is None:
            return self.dtype or "the source's dtype, dequantized"
        return f"{packing.bits} bits ({packing.mode}, groups of {packing.group_size})"

    @property
    def is_dense(self) -> bool:
        """Whether no matrix is packed."""
        return self.recipe is not None and self.recipe.packing is None


def format_of(bits: int | None, group_size: int | None, mode: str | None, dtype: str | None, dense: bool) -> Format:
    """The format that --bits, --group-size, --mode, --dtype and --dequantize describe. Raises UserError for options
    that exclude each other.
    """
    packs = [flag for flag, value in (("--bits", bits), ("--group-size", group_size), ("--mode", mode)) if value]
    if packs and dense:
        raise UserError(f"{packs[0]}: cannot be combined with --dequantize")
    if packs:
        return Format(Recipe(checked_packing(bits, group_size, mode or "affine")), dtype)
    if dtype and not dense:
        raise UserError(f"--dtype {dtype}: needs --dequantize or --bits")
    return Format(Recipe(None) if dense else None, dtype)


@dataclass(frozen=True)
class Kept:
    """Losses on the same rows: of the base model, with adapters, and fused."""

    base: float
    adapters: float
    fused: float

    @property
    def share(self) -> float:
        """What is kept of the gain, base - adapters."""
        return (self.base - self.fused) / (self.base - self.adapters)

    def __str__(self) -> str:
        return (
            f"loss {self.base:.4f} without adapters, {self.adapters:.4f} with them, {self.fused:.4f} fused: "
            f"{self.share:.1%} of what was learned is kept"
        )


@dataclass(frozen=True)
class Measure:
    """How a gain is measured. loss: of a model's folder, with pairs or without, on always the same rows; rows: their
    file's name; tolerance: the share of the gain that may be lost.
    """

    loss: Callable[[Path, Lora | None], float]
    rows: str
    tolerance: float


def fuse(
    source: Path,
    lora: Lora,
    out: NewFolder,
    how: Format,
    measure: Measure | None,
    card: Callable[[Kept | None], str],
    say: Say,
) -> tuple[Report, Kept | None]:
    """Writes the fused model into a new folder; returns what was written and what it keeps.

    measure: None measures nothing; card: the text of its README.md; say: called with a line for each file. Raises
    UserError, also where more of the gain is lost than the tolerance allows; there is no folder then.
    """
    before: Kept | None = None
    if measure is not None:
        losses = measure.loss(source, None), measure.loss(source, lora)
        before = _gained(Kept(*losses, fused=math.nan), measure.rows)
    kept: list[Kept] = []

    def check(folder: Path) -> None:
        if measure is not None and before is not None:
            kept.append(_tolerated(replace(before, fused=measure.loss(folder, None)), measure.tolerance, how))
        write_text(folder / "README.md", card(kept[0] if kept else None))

    model = Model(source)
    try:
        repack = Repack(model, how.recipe, DTYPES[how.dtype] if how.dtype else None, lora)
        config = new_config(read_config(source), how.recipe, repack.report.others, how.dtype)
        write_folder(out, source, repack, config, say, check)
    finally:
        model.close()
    return repack.report, kept[0] if kept else None


def _gained(losses: Kept, rows: str) -> Kept:
    if not losses.adapters < losses.base:
        raise UserError(
            f"--adapter-path: no gain on {rows}: loss {losses.base:.4f} without, {losses.adapters:.4f} with adapters, "
            "so what a fused model keeps cannot be measured; --data names other rows, --tolerance none skips this"
        )
    return losses


def _tolerated(kept: Kept, tolerance: float, how: Format) -> Kept:
    if not 1 - kept.share <= tolerance:
        remedy = "a higher --tolerance takes it" if how.is_dense else "--dequantize keeps more"
        raise UserError(f"--tolerance {tolerance:g}: in {how}, {kept}; {remedy}; nothing is written")
    return kept
