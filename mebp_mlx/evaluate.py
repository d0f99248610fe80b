"""`python -m mebp_mlx.evaluate`: measures loss, perplexity and accuracy, with and without adapters, within a budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data.rows import ALL, COMPLETION
from .export.adapters import adapters_of, trained_with
from .options import option, parse, size_option
from .system.command import run_command
from .system.footprint import PeakMeter
from .system.limits import SMALLEST, UNLIMITED, check_peak, named_budget
from .system.terminal import say
from .system.units import megabytes
from .training.evaluate import Evaluator, rows_as_trained, table
from .weights.hub import SPLITS, resolve_model

PROG = "python -m mebp_mlx.evaluate"
_GROUP = "evaluation"
_TEXTS = (
    "Measure loss, perplexity and accuracy of a model, with and without adapters.",
    "Nothing is trained or written. Rows are read and labelled as in training.\n"
    "exit codes: 0 done, 2 wrong option or input, 3 memory budget cannot be met or was exceeded, 130 interrupted",
)


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _GROUP, "folder, hub id, or bundled", shown_default="as trained")
    adapter_path: str | None = option(None, _GROUP, "adapters to measure in addition to the base model",
                                      metavar="PATH", shown_default="none")
    data: str | None = option(None, _GROUP, "folder, hub id, bundled, or any JSONL file",
                              shown_default="as trained")
    split: str = option("test", _GROUP, "split of the data: test, valid, train", choices=SPLITS)
    mask_prompt: bool | None = option(None, _GROUP, "label only the answer; default: as in training")
    max_seq_length: int | None = option(None, _GROUP, "maximum row length in tokens", at_least=2,
                                        shown_default="as trained, else 2048")
    overlong: str = option("truncate", _GROUP, "for a longer row: truncate, drop or error",
                           choices=("truncate", "drop", "error"))
    batch_size: int = option(4, _GROUP, "rows per batch; more rows need more memory", at_least=1)
    test_batches: int = option(500, _GROUP, "number of batches; -1: all", at_least=1, or_minus_one=True)
    memory_budget: int | str | None = size_option(
        _GROUP, "footprint limit, such as 500MB; min: the smallest; none", words=(SMALLEST, UNLIMITED),
        shown_default="1GB, at most 1/4 of memory")
    dtype: str = option("auto", _GROUP,
                        "dtype of the computation; auto: the checkpoint's on a GPU, float32 on the CPU",
                        choices=("auto", "float32", "bfloat16", "float16"))
    json: bool = option(False, _GROUP, "print one JSON object instead of the table")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return run_command(lambda _: _run(parse(Options, PROG, _TEXTS, argv)), "interrupted; nothing was written")


def _run(options: Options) -> None:
    folder = Path(options.adapter_path).expanduser() if options.adapter_path is not None else None
    known: dict[str, Any] = {} if folder is None else trained_with(folder)
    with PeakMeter() as meter:
        model_path = resolve_model(options.model or known.get("model") or "bundled")
        labels = None if options.mask_prompt is None else COMPLETION if options.mask_prompt else ALL
        changes = {"train_on": labels, "max_seq_length": options.max_seq_length, "overlong": options.overlong}
        rows = rows_as_trained(known, model_path, options.split, options.data, changes)
        budget_bytes, smallest = named_budget(options.memory_budget)
        quality = Evaluator(rows, options.batch_size, options.test_batches, budget_bytes, smallest, options.dtype)
        qualities = {"model": quality(model_path, None)}
        if folder is not None:
            qualities["adapters"] = quality(model_path, adapters_of(folder, model_path))
    if options.json:
        say(json.dumps({name: {**asdict(q), "perplexity": q.perplexity} for name, q in qualities.items()}))
    else:
        for line in (*table(rows, qualities), f"peak footprint {megabytes(meter.peak_bytes)}"):
            say(line)
    check_peak(budget_bytes, meter.peak_bytes)


if __name__ == "__main__":
    sys.exit(main())
