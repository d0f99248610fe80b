"""`python -m mebp_mlx.convert`: a checkpoint of any supported kind -> 4 or 8 bits, or as it is but aligned; streamed.

Only a few rows of one matrix are in memory at any time. One file holds one decoder block, page-aligned.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .export.folder import check_outside, new_config, new_folder, write_folder
from .export.quantize import MODES, Packing, checked_packing
from .export.requantize import Repack, Report, Say
from .model.base import Model
from .model.config import read_config
from .options import Spec, build_parser, describe, option, suggest
from .options import convert as checked_value
from .system.allocator import settle
from .system.command import DONE, run_command
from .system.device import DTYPES
from .system.footprint import PeakMeter
from .system.units import megabytes
from .weights.hub import resolve_model

PROG = "python -m mebp_mlx.convert"
_GROUP = "conversion"
KEEP = "keep"


@dataclass(frozen=True)
class Options:
    """The command's options."""

    model: str | None = option(None, _GROUP, "source: a folder, a hub id, or bundled", metavar="SRC")
    out: str | None = option(None, _GROUP, "new or empty folder for the result", metavar="DIR")
    bits: int | None = option(None, _GROUP, "bits of a packed weight: 4 or 8", metavar="N", shown_default="4")
    group_size: int | None = option(
        None, _GROUP, "weights that share a scale: 32, 64 or 128", metavar="N", shown_default="64, mxfp4: 32"
    )
    mode: str = option(
        "affine", _GROUP, "affine, symmetric, mxfp4, or keep: the same bits, aligned", choices=(*MODES, KEEP)
    )
    dtype: str | None = option(
        None, _GROUP, f"of what is not packed: {', '.join(DTYPES)}", choices=tuple(DTYPES), shown_default="as it is"
    )

    def packing(self) -> Packing | None:
        """The format to convert to, None to keep every bit. UserError for one that does not exist."""
        if self.mode == KEEP:
            for flag, value in (("--bits", self.bits), ("--group-size", self.group_size), ("--dtype", self.dtype)):
                if value is not None:
                    raise UserError(f"{flag} {value}: --mode keep changes no bit")
            return None
        return checked_packing(self.bits, self.group_size, self.mode)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What a user can get wrong is one line on stderr, no traceback."""

    def work(_: object) -> int:
        options = _from_flags(argv)
        with PeakMeter() as meter:
            report = convert(options, say=_say)
            for line in _summary(options, report, meter.peak_bytes):
                _say(line)
        return DONE

    return run_command(work, "interrupted; nothing unfinished is left behind")


def convert(options: Options, say: Say = lambda text: None) -> Report:
    """Converts `options.model` into the new folder `options.out`.

    say: called with a line for each decoder block. Raises UserError, before anything is written for all that can be
    known then; whatever is raised, the folder appears whole or not at all.
    """
    began_s = time.perf_counter()
    packing = options.packing()
    if not options.model or not options.out:
        raise UserError(f"{'--out' if options.model else '--model'}: is required")
    out = new_folder(options.out, "--out")
    source = resolve_model(options.model)
    check_outside(out, source)
    settle()
    model = Model(source)
    try:
        repack = Repack(model, packing, DTYPES[options.dtype] if options.dtype else None)
        config = new_config(read_config(source), packing, options.dtype)
        write_folder(out, source, repack, config, say)
    finally:
        model.weights.close()
    repack.report.seconds = time.perf_counter() - began_s
    return repack.report


# Command line


def _from_flags(argv: Sequence[str] | None) -> Options:
    parser = build_parser(
        Options,
        PROG,
        "Convert a checkpoint to 4 or 8 bits, or keep its bits, a few rows at a time, into one page-aligned file per\n"
        "decoder block.",
        "affine is mlx-lm's own quantization, bit by bit; symmetric has no offset (INT4) and is stored so that any\n"
        "reader of affine weights loads it; mxfp4 has 4-bit floats in groups of 32. A packed source is decompressed\n"
        "on the way. keep changes no bit, and places tensors where Metal can use the mapped file itself. DIR appears\n"
        "when it is complete. exit codes: 0 done, 2 wrong option or input, 130 interrupted",
    )
    found, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    specs = describe(Options)
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise UserError(f"{flag}: no such option{suggest(flag, [spec.flag for spec in specs.values()])}")
    return Options(**{name: _checked(specs[name], raw) for name, raw in vars(found).items()})


def _checked(spec: Spec, raw: Any) -> Any:
    try:
        return checked_value(spec, raw)
    except ValueError as error:
        raise UserError(f"{spec.flag}: {error}") from None


def _say(text: str) -> None:
    print(text, flush=True)


def _summary(options: Options, report: Report, peak_bytes: int) -> Iterator[str]:
    packing, rest = options.packing(), options.dtype or "the source's dtype"
    bits = 8 * report.bytes_after / report.n_parameters
    yield f"{options.model} -> {options.out}"
    if packing is None:
        yield "  format    as it was, every tensor aligned"
    else:
        yield f"  format    {packing.mode}, {packing.bits} bits in groups of {packing.group_size}; all else in {rest}"
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
