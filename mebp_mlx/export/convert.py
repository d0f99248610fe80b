"""Converts a checkpoint to another format, streamed, and summarizes the conversion."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ..model.base import Model
from ..model.reading import read_config
from ..system.allocator import settle
from ..system.device import DTYPES
from ..weights.hub import resolve_model
from .folder import check_outside, new_config, new_folder, write_folder
from .quantize import Recipe
from .requantize import Repack, Report, Say


def convert(model: str, out: str, recipe: Recipe | None, dtype: str | None, on_line: Say = lambda text: None) -> Report:
    """Converts a model (a folder, a hub id, or bundled) into the new folder `out`.

    recipe: how matrices are packed; None copies every tensor's bytes. dtype: a key of DTYPES for tensors that are not
    packed; None keeps the source's dtype. on_line: called with a line for each decoder block. Raises UserError, before
    anything is written where possible; after an error the folder does not exist.
    """
    began_s = time.perf_counter()
    new = new_folder(out, "--out")
    source = resolve_model(model)
    check_outside(new, source)
    settle()
    opened = Model(source)
    try:
        repack = Repack(opened, recipe, DTYPES[dtype] if dtype else None)
        config = new_config(read_config(source), recipe, repack.report.others, dtype)
        write_folder(new, source, repack, config, on_line)
    finally:
        opened.close()
    repack.report.seconds = time.perf_counter() - began_s
    return repack.report


def summary(report: Report, recipe: Recipe | None, dtype: str | None) -> Iterator[str]:
    """Yields lines that describe a finished conversion. Arguments as in `convert`."""
    rest = dtype or "the source's dtype"
    packing = None if recipe is None else recipe.packing
    if recipe is None:
        yield "  format    unchanged, every tensor aligned"
    elif packing is None:
        yield f"  format    nothing packed; all in {rest}"
    else:
        each = f"{packing.bits} bits" if recipe.high_bits is None else f"{packing.bits} and {recipe.high_bits} bits"
        yield f"  format    {packing.mode}, {each} in groups of {packing.group_size}; everything else in {rest}"
        yield f"  packed    {len(report.packed):,} matrices"
        if report.copied:
            yield f"  copied    {_some(report.copied)}: already packed in this format"
        if report.unpacked:
            yield f"  unpacked  {_some(report.unpacked)}: groups of {packing.group_size} do not divide the row length"
    if report.left_out:
        yield f"  left out  {_some(report.left_out)}: the model does not use it"
    bits = 8 * report.bytes_after / report.n_parameters
    yield f"  bytes     {report.bytes_before:,} -> {report.bytes_after:,}, {bits:.2f} bits per parameter"
    if packing is not None:
        worst = max(report.errors, key=report.errors.__getitem__)
        yield f"  error     {report.error:.2%} of the weights' RMS; largest {report.errors[worst]:.2%}, {worst}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,}, such as {names[0]}"
