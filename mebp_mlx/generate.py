"""`python -m mebp_mlx.generate`: streams a model's continuation of a prompt, with or without adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .export.adapters import trained_with
from .generation.text import Prompt, Writer
from .options import option, parse, size_option
from .system.command import run_command
from .system.footprint import PeakMeter
from .system.limits import UNLIMITED, check_peak
from .system.units import megabytes
from .weights.hub import resolve_model

PROG = "python -m mebp_mlx.generate"
_GROUP, _TEXT = "model", "text"
_TEXTS = (
    "Continue a prompt, token by token.",
    "The text goes to stdout, everything else to stderr. The whole model is in memory; on the CPU it is converted to\n"
    "float32 as far as --memory-budget allows, because packed weights are slow there.\n"
    "exit codes: 0 done, 2 wrong option or input, 3 memory budget cannot be met or was exceeded, 130 interrupted",
)
_REFUSED = {"--trust-remote-code": "not available: no code from a model's folder is ever run"}


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    model: str | None = option(None, _GROUP, "folder, hub id, or bundled", shown_default="as trained")
    adapter_path: str | None = option(None, _GROUP, "adapter folder from mebp_mlx or mlx-lm", metavar="PATH",
                                      shown_default="none")
    memory_budget: int | str | None = size_option(_GROUP, "footprint limit, such as 500MB", words=(UNLIMITED,),
                                                  shown_default="none")

    prompt: str | None = option(None, _TEXT, "text, or a chat model's message; - reads stdin", metavar="TEXT",
                                flags=("-p",))
    system_prompt: str | None = option(None, _TEXT, "a chat model's instructions", metavar="TEXT", shown_default="none")
    ignore_chat_template: bool = option(False, _TEXT, "send the prompt as plain text")
    max_tokens: int = option(100, _TEXT, "maximum length of the text", at_least=1, flags=("-m",))
    temp: float = option(0.0, _TEXT, "temperature; 0: always the likeliest token", at_least=0)
    top_p: float = option(1.0, _TEXT, "sample from the likeliest tokens with this total probability", above=0)
    seed: int | None = option(None, _TEXT, "seed for sampling", at_least=0, below=2**63, shown_default="random")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    interrupted = "interrupted; the text is incomplete"
    return run_command(lambda _: _run(parse(Options, PROG, _TEXTS, argv, _REFUSED)), interrupted)


def _run(options: Options) -> None:
    text = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not text:
        raise UserError(f"--prompt: {'is required' if text is None else 'must not be empty'}")
    folder = None if options.adapter_path is None else Path(options.adapter_path).expanduser()
    known = {} if folder is None else trained_with(folder)
    model_path = resolve_model(options.model or known.get("model") or "bundled")
    budget_bytes = options.memory_budget if isinstance(options.memory_budget, int) else None
    prompt = Prompt(text, options.max_tokens, options.system_prompt, options.ignore_chat_template, options.temp,
                    options.top_p, options.seed)  # fmt: skip
    with PeakMeter() as meter:
        for piece in Writer(model_path, folder, budget_bytes, _note).stream(prompt):
            print(piece, end="", flush=True)
        print(flush=True)
    _note(f"peak footprint {megabytes(meter.peak_bytes)}")
    check_peak(budget_bytes, meter.peak_bytes)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
