"""`python -m mebp_mlx.fuse`: adds adapters to their model's weights, streamed, unless too much of the gain is lost."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .export.adapters import adapters_of, trained_with
from .export.card import Card, model_card
from .export.folder import check_outside, new_folder
from .export.fuse import Kept, Measure, format_of, fuse
from .export.quantize import MODES
from .export.upload import check_repo, upload
from .options import option, parse, size_option
from .system.command import run_command
from .system.device import DTYPES
from .system.footprint import PeakMeter
from .system.limits import SMALLEST, UNLIMITED, check_peak, named_budget
from .system.terminal import say
from .system.units import megabytes
from .training.evaluate import Evaluator, rows_as_trained
from .weights.hub import SPLITS, resolve_model

PROG = "python -m mebp_mlx.fuse"
_MODEL, _STORED, _MEASURED = "model and adapters", "storage format", "measurement"
_GGUF = "not available: python -m mebp_mlx.export --gguf writes the adapters for llama.cpp"
_CODE = "not available: no code from a model's folder is ever run"
_REFUSED = {"--export-gguf": _GGUF, "--gguf-path": _GGUF, "--trust-remote-code": _CODE}
_TEXTS = (
    "Add adapters to the weights of their model, a few rows at a time, and measure how much of the gain is kept.",
    "The loss is measured without adapters, with them, and fused; a model that loses more than --tolerance of the\n"
    "gain is not written. 4 bits often lose a short run's gain; --dequantize keeps it. PATH appears when complete.\n"
    "exit codes: 0 done, 2 wrong option or input, or too much lost, 3 memory budget cannot be met or was exceeded,\n"
    "130 interrupted",
)


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _MODEL, "folder, hub id, or bundled", shown_default="as trained")
    adapter_path: str = option("adapters", _MODEL, "adapter folder from mebp_mlx or mlx-lm", metavar="PATH")
    save_path: str = option("fused_model", _MODEL, "new or empty folder for the fused model", metavar="PATH")
    upload_repo: str | None = option(None, _MODEL, "upload the folder to this repository on the hub", metavar="REPO",
                                     shown_default="no upload")

    dequantize: bool = option(False, _STORED, "do not pack; default: store each matrix as in the model")
    bits: int | None = option(None, _STORED, "pack all matrices in 2, 3, 4, 5, 6 or 8 bits",
                              shown_default="as in the model")
    group_size: int | None = option(None, _STORED, "weights per scale: 32, 64 or 128",
                                    shown_default="64, mx: 32, nv: 16")
    mode: str | None = option(None, _STORED, "pack in this mode: affine, symmetric, mxfp4, mxfp8, nvfp4", choices=MODES,
                              shown_default="affine")
    dtype: str | None = option(None, _STORED, f"dtype of unpacked tensors: {', '.join(DTYPES)}",
                               choices=tuple(DTYPES), shown_default="as in the model")

    tolerance: float | str = option(0.1, _MEASURED, "share of the gain that may be lost; none: no measurement",
                                    words=("none",), at_least=0, metavar="X")
    data: str | None = option(None, _MEASURED, "folder, hub id, bundled, or any JSONL file", shown_default="as trained")
    split: str = option("valid", _MEASURED, "split of the data: valid, test, train", choices=SPLITS)
    batch_size: int = option(4, _MEASURED, "rows per batch", at_least=1)
    val_batches: int = option(25, _MEASURED, "number of batches; -1: all", at_least=1, or_minus_one=True)
    memory_budget: int | str | None = size_option(
        _MEASURED, "footprint limit, such as 500MB; min: the smallest; none", words=(SMALLEST, UNLIMITED),
        shown_default="1GB, at most 1/4 of memory")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    interrupted = "interrupted; no partial output is left behind"
    return run_command(lambda _: _run(parse(Options, PROG, _TEXTS, argv, _REFUSED)), interrupted)


def _run(options: Options) -> None:
    how = format_of(options.bits, options.group_size, options.mode, options.dtype, options.dequantize)
    folder = Path(options.adapter_path).expanduser()
    if options.upload_repo is not None:
        check_repo(options.upload_repo)
    out = new_folder(options.save_path, "--save-path")
    known = trained_with(folder)
    base = options.model or known.get("model") or "bundled"
    source = resolve_model(base)
    check_outside(out, source)
    budget_bytes, smallest = named_budget(options.memory_budget)
    measure = None
    with PeakMeter() as meter:
        lora = adapters_of(folder, source)
        if options.tolerance != "none":
            rows = rows_as_trained(known, source, options.split, options.data)
            quality = Evaluator(rows, options.batch_size, options.val_batches, budget_bytes, smallest)
            measure = Measure(lambda path, pairs: quality(path, pairs).loss, rows.name, float(options.tolerance))

        def card(kept: Kept | None) -> str:
            rows = "" if measure is None else measure.rows
            return model_card(Card(out.path.name, base, folder, known), how, kept, rows)

        report, kept = fuse(source, lora, out, how, measure, card, say)
    say(f"{base} + {folder} -> {out.path}")
    say(f"  stored    in {how}; {report.bytes_before:,} -> {report.bytes_after:,} bytes")
    say(f"  measured  {'nothing' if measure is None else f'{measure.rows}: {kept}'}")
    say(f"  took      peak footprint {megabytes(meter.peak_bytes)}")
    check_peak(budget_bytes, meter.peak_bytes)
    if options.upload_repo is not None:
        say(f"  uploaded  {upload(out.path, options.upload_repo)}")


if __name__ == "__main__":
    sys.exit(main())
