"""`python -m mebp_mlx.convert`: any supported checkpoint -> 2 to 8 bits, 16, or as it is but aligned; streamed.

Only a few rows of one matrix are in memory at any time. One file holds one decoder block, page-aligned.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import UserError
from .export.folder import check_outside, new_config, new_folder, write_folder
from .export.quantize import MIXED, MODES, Recipe, checked_packing
from .export.requantize import Repack, Report, Say
from .model.base import Model
from .model.reading import read_config
from .options import build_parser, given_options, option
from .system.allocator import settle
from .system.command import run_command
from .system.device import DTYPES
from .system.footprint import PeakMeter
from .system.terminal import say
from .system.units import megabytes
from .weights.hub import resolve_model

PROG = "python -m mebp_mlx.convert"
_GROUP = "conversion"
KEEP = "keep"
_REFUSED = {
    "--upload-repo": "not available: `hf upload NAME DIR` does it",
    "--trust-remote-code": "no code of a model's folder is ever run; leave it out",
}


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _GROUP, "source: a folder, a hub id, or bundled", metavar="SRC",
                               flags=("--hf-path",))
    out: str = option("mlx_model", _GROUP, "new or empty folder for the result", metavar="DIR", path=True,
                      flags=("--mlx-path",))
    quantize: bool = option(False, _GROUP, "pack, as is done without it", flags=("-q",))
    dequantize: bool = option(False, _GROUP, "pack nothing: matrices in 16 or 32 bits", flags=("-d",))
    bits: int | None = option(None, _GROUP, "of a packed weight: 2, 3, 4, 5, 6 or 8", metavar="N",
                              flags=("--q-bits",), shown_default="4, mxfp8: 8")
    group_size: int | None = option(None, _GROUP, "weights that share a scale: 32, 64 or 128", metavar="N",
                                    flags=("--q-group-size",), shown_default="64, mx: 32, nv: 16")
    mode: str | None = option(None, _GROUP, "affine, symmetric, mxfp4, mxfp8, nvfp4; keep: the same bits, aligned",
                              choices=(*MODES, KEEP), flags=("--q-mode",), shown_default="affine")
    quant_predicate: str | None = option(None, _GROUP, f"more bits where they matter: {', '.join(MIXED)}",
                                         choices=tuple(MIXED), shown_default="the same for all")
    dtype: str | None = option(None, _GROUP, f"of what is not packed: {', '.join(DTYPES)}", choices=tuple(DTYPES),
                               shown_default="as it is")
    # fmt: on

    @property
    def keeps(self) -> bool:
        """Whether every bit stays as it is."""
        return self.mode == KEEP

    def recipe(self) -> Recipe | None:
        """How matrices are to be packed, None to keep every bit. UserError for what does not exist."""
        how = {"--bits": self.bits, "--group-size": self.group_size, "--quant-predicate": self.quant_predicate}
        given = {flag: value for flag, value in how.items() if value is not None}
        if self.dequantize:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--mode": self.mode} if self.mode is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": --dequantize packs nothing")
            return Recipe(None)
        if self.keeps:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--dtype": self.dtype} if self.dtype is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": --mode keep changes no bit")
            return None
        return self._packed(self.mode or "affine")

    def _packed(self, mode: str) -> Recipe:
        if self.quant_predicate is None:
            return Recipe(checked_packing(self.bits, self.group_size, mode))
        if mode != "affine":
            raise UserError(f"--quant-predicate {self.quant_predicate}: has affine bits, not {mode}")
        if self.bits is not None:
            raise UserError(f"--bits {self.bits}: --quant-predicate {self.quant_predicate} chooses them")
        low, high = MIXED[self.quant_predicate]
        return Recipe(checked_packing(low, self.group_size, mode), high)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What a user can get wrong is one line on stderr, no traceback."""

    return run_command(lambda _: _run(_from_flags(argv)), "interrupted; nothing unfinished is left behind")


def _run(options: Options) -> None:
    with PeakMeter() as meter:
        report = convert(options, say)
        for line in _summary(options, report, meter.peak_bytes):
            say(line)


def convert(options: Options, on_line: Say = lambda text: None) -> Report:
    """Converts `options.model` into the new folder `options.out`.

    on_line: called with a line for each decoder block. Raises UserError, before anything is written for all that can be
    known then; whatever is raised, the folder appears whole or not at all.
    """
    began_s = time.perf_counter()
    recipe = options.recipe()
    if not options.model:
        raise UserError("--model: is required")
    out = new_folder(options.out, "--out")
    source = resolve_model(options.model)
    check_outside(out, source)
    settle()
    model = Model(source)
    try:
        repack = Repack(model, recipe, DTYPES[options.dtype] if options.dtype else None)
        config = new_config(read_config(source), recipe, repack.report.others, options.dtype)
        write_folder(out, source, repack, config, on_line)
    finally:
        model.weights.close()
    repack.report.seconds = time.perf_counter() - began_s
    return repack.report


# Command line


def _from_flags(argv: Sequence[str] | None) -> Options:
    parser = build_parser(
        Options,
        PROG,
        "Convert a checkpoint to 2 to 8 bits, to 16, or keep its bits, a few rows at a time, into one page-aligned\n"
        "file per decoder block.",
        "affine is mlx-lm's own quantization, bit by bit; symmetric has no offset (INT4) and is stored so that any\n"
        "reader of affine weights loads it; mxfp4, mxfp8 and nvfp4 have floats with a byte for a scale. A packed\n"
        "source is decompressed on the way. keep changes no bit, and places tensors where Metal can use the mapped\n"
        "file itself. mlx_lm.convert's names mean the same: after --hf-path or --mlx-path with nothing said of\n"
        "packing, keep is meant. DIR appears when it is complete. exit codes: 0 done, 2 wrong option or input,\n"
        "130 interrupted",
    )
    values = given_options(Options, parser, argv, _REFUSED)
    words = sys.argv[1:] if argv is None else argv
    is_mlx_lms = any(word.partition("=")[0] in ("--hf-path", "--mlx-path") for word in words)
    if is_mlx_lms and not values.keys() & {"quantize", "dequantize", "bits", "group_size", "mode", "quant_predicate"}:
        values["mode"] = KEEP
    return Options(**values)


def _summary(options: Options, report: Report, peak_bytes: int) -> Iterator[str]:
    recipe, rest = options.recipe(), options.dtype or "the source's dtype"
    bits = 8 * report.bytes_after / report.n_parameters
    yield f"{options.model} -> {options.out}"
    packing = None if recipe is None else recipe.packing
    if recipe is None:
        yield "  format    as it was, every tensor aligned"
    elif packing is None:
        yield f"  format    nothing packed; all in {rest}"
    else:
        each = f"{packing.bits} bits" if recipe.high_bits is None else f"{packing.bits} and {recipe.high_bits} bits"
        yield f"  format    {packing.mode}, {each} in groups of {packing.group_size}; all else in {rest}"
        yield f"  packed    {len(report.packed):,} matrices"
        if report.copied:
            yield f"  copied    {_some(report.copied)}: already packed in this way"
        if report.unpacked:
            yield f"  unpacked  {_some(report.unpacked)}: rows that groups of {packing.group_size} do not divide"
    if report.left_out:
        yield f"  left out  {_some(report.left_out)}: the model does not use it"
    yield f"  bytes     {report.bytes_before:,} -> {report.bytes_after:,}, {bits:.2f} bits a parameter"
    if packing is not None:
        worst = max(report.errors, key=report.errors.__getitem__)
        yield f"  error     {report.error:.2%} of the weights' RMS; largest {report.errors[worst]:.2%}, {worst}"
    yield f"  took      {report.seconds:.1f} s, peak footprint {megabytes(peak_bytes)}"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,}, such as {names[0]}"


if __name__ == "__main__":
    sys.exit(main())
