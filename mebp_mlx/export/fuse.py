"""Adds adapters to a model's weights, W + s (A B)^T, a few rows at a time, and measures how much of the gain is kept.

Rounding to 16 bits loses almost nothing of the gain. Rounding to 4 bits can lose most of a short run's gain, because
its change to a weight is smaller than the distance between two 4-bit values. So the loss is measured for the base
model, the base model with adapters, and the fused model.
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

    recipe: how matrices are packed; None stores each matrix as in the source. dtype: a key of DTYPES for tensors that
    are not packed; None keeps the source's dtype.
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
    """The format that --bits, --group-size, --mode, --dtype and --dequantize describe. Raises UserError if options
    conflict.
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
    """Losses on the same rows: of the base model, the base model with adapters, and the fused model."""

    base: float
    adapters: float
    fused: float

    @property
    def share(self) -> float:
        """The share of the gain, base - adapters, that the fused model keeps."""
        return (self.base - self.fused) / (self.base - self.adapters)

    def __str__(self) -> str:
        return (
            f"loss {self.base:.4f} without adapters, {self.adapters:.4f} with them, {self.fused:.4f} fused: "
            f"{self.share:.1%} of the gain is kept"
        )


@dataclass(frozen=True)
class Measure:
    """How the gain is measured. loss: a function of a model's folder and a Lora (or None) that returns the loss on a
    fixed set of rows; rows: the name of their file; tolerance: the share of the gain that may be lost.
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
    """Writes the fused model to a new folder; returns a report and, if measured, the losses.

    measure: None skips the measurement; card: returns the text of README.md; say: called with a line for each file.
    Raises UserError, also if more of the gain is lost than the tolerance allows; the folder then does not exist.
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
            f"--adapter-path: no gain on {rows}: loss {losses.base:.4f} without adapters, {losses.adapters:.4f} with "
            "them, so the share that a fused model keeps is undefined; --data chooses other rows, --tolerance none "
            "skips this check"
        )
    return losses


def _tolerated(kept: Kept, tolerance: float, how: Format) -> Kept:
    if not 1 - kept.share <= tolerance:
        remedy = "a higher --tolerance accepts this" if how.is_dense else "--dequantize keeps more"
        raise UserError(f"--tolerance {tolerance:g}: in {how}, {kept}; {remedy}; nothing was written")
    return kept
