"""`python -m mebp_mlx.convert`: converts a checkpoint to 2 to 8 bits, 16 or 32 bits, or an aligned copy; streamed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError
from .export.convert import convert, summary
from .export.quantize import MIXED, MODES, Recipe, checked_packing
from .options import build_parser, given_options, option
from .system.command import run_command
from .system.device import DTYPES
from .system.footprint import PeakMeter
from .system.terminal import say
from .system.units import megabytes

PROG = "python -m mebp_mlx.convert"
_GROUP = "conversion"
KEEP = "keep"
_REFUSED = {
    "--upload-repo": "not available: use `hf upload NAME DIR`",
    "--trust-remote-code": "not available: no code from a model's folder is ever run",
}
_TEXTS = (
    "Convert a checkpoint to 2 to 8 bits, to 16 or 32 bits, or to an aligned copy, a few rows at a time, writing one\n"
    "page-aligned file per decoder block.",
    "affine: mlx-lm's quantization, bit for bit. symmetric: no offset (INT4), stored so that every reader of affine\n"
    "weights loads it. mxfp4, mxfp8, nvfp4: small floats with a one-byte scale per group. A packed source is first\n"
    "unpacked. keep: copies every bit and aligns every tensor, so that Metal can use the mapped file in place.\n"
    "mlx_lm.convert's flags are accepted: with --hf-path or --mlx-path and no packing option, the mode is keep.\n"
    "DIR appears only when it is complete. exit codes: 0 done, 2 wrong option or input, 130 interrupted",
)


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _GROUP, "source: a folder, a hub id, or bundled", metavar="SRC",
                               flags=("--hf-path",))
    out: str = option("mlx_model", _GROUP, "new or empty folder for the result", metavar="DIR", path=True,
                      flags=("--mlx-path",))
    quantize: bool = option(False, _GROUP, "pack (the default)", flags=("-q",))
    dequantize: bool = option(False, _GROUP, "pack nothing: store matrices in 16 or 32 bits", flags=("-d",))
    bits: int | None = option(None, _GROUP, "bits per packed weight: 2, 3, 4, 5, 6 or 8", metavar="N",
                              flags=("--q-bits",), shown_default="4, mxfp8: 8")
    group_size: int | None = option(None, _GROUP, "weights per scale: 32, 64 or 128", metavar="N",
                                    flags=("--q-group-size",), shown_default="64, mx: 32, nv: 16")
    mode: str | None = option(None, _GROUP, "affine, symmetric, mxfp4, mxfp8, nvfp4; keep: aligned copy",
                              choices=(*MODES, KEEP), flags=("--q-mode",), shown_default="affine")
    quant_predicate: str | None = option(None, _GROUP, f"more bits for sensitive matrices: {', '.join(MIXED)}",
                                         choices=tuple(MIXED), shown_default="the same for all")
    dtype: str | None = option(None, _GROUP, f"dtype of unpacked tensors: {', '.join(DTYPES)}", choices=tuple(DTYPES),
                               shown_default="the source's")
    # fmt: on

    def recipe(self) -> Recipe | None:
        """How matrices are packed; None copies every bit. Raises UserError for an invalid combination."""
        how = {"--bits": self.bits, "--group-size": self.group_size, "--quant-predicate": self.quant_predicate}
        given = {flag: value for flag, value in how.items() if value is not None}
        if self.dequantize:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--mode": self.mode} if self.mode is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": cannot be combined with --dequantize")
            return Recipe(None)
        if self.mode == KEEP:
            given |= {"--quantize": ""} if self.quantize else {}
            given |= {"--dtype": self.dtype} if self.dtype is not None else {}
            for flag, value in given.items():
                raise UserError(f"{flag} {value}".strip() + ": cannot be combined with --mode keep")
            return None
        return self._packed(self.mode or "affine")

    def _packed(self, mode: str) -> Recipe:
        if self.quant_predicate is None:
            return Recipe(checked_packing(self.bits, self.group_size, mode))
        if mode != "affine":
            raise UserError(f"--quant-predicate {self.quant_predicate}: requires --mode affine, not {mode}")
        if self.bits is not None:
            raise UserError(f"--bits {self.bits}: --quant-predicate {self.quant_predicate} sets the bits")
        low, high = MIXED[self.quant_predicate]
        return Recipe(checked_packing(low, self.group_size, mode), high)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda _: _run(_from_flags(argv)), "interrupted; no partial output is left behind")


def _run(options: Options) -> None:
    recipe = options.recipe()
    if not options.model:
        raise UserError("--model: is required")
    with PeakMeter() as meter:
        report = convert(options.model, options.out, recipe, options.dtype, say)
        say(f"{options.model} -> {options.out}")
        for line in summary(report, recipe, options.dtype):
            say(line)
        say(f"  took      {report.seconds:.1f} s, peak footprint {megabytes(meter.peak_bytes)}")


def _from_flags(argv: Sequence[str] | None) -> Options:
    parser = build_parser(Options, PROG, *_TEXTS)
    values = given_options(Options, parser, argv, _REFUSED)
    words = sys.argv[1:] if argv is None else argv
    is_mlx_lms = any(word.partition("=")[0] in ("--hf-path", "--mlx-path") for word in words)
    if is_mlx_lms and not values.keys() & {"quantize", "dequantize", "bits", "group_size", "mode", "quant_predicate"}:
        values["mode"] = KEEP
    return Options(**values)


if __name__ == "__main__":
    sys.exit(main())
