"""`python -m mebp_mlx.export`: converts adapters to PEFT and llama.cpp formats, and PEFT adapters to this package's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..model.base import Model
from ..options import option, parse
from ..system.command import run_command
from ..system.terminal import say
from ..weights.hub import resolve_model
from .adapters import FLAG, load_adapters, read_about
from .folder import new_folder
from .gguf import write_gguf
from .peft import model_name, read_peft, write_ours, write_peft

PROG = "python -m mebp_mlx.export"
_GROUP, _KIND = "adapters", "output format (choose one)"
_TEXTS = (
    "Convert LoRA adapters for other programs, and PEFT adapters for this one.",
    "The values stay float32, and the adapted model computes the same results. llama.cpp loads the GGUF file with\n"
    "--lora, on a model converted by its own convert_hf_to_gguf.py. Only the headers of the model's weights are read.\n"
    "exit codes: 0 done, 2 wrong option or input, 130 interrupted",
)


@dataclass(frozen=True)
class Options:
    """The command's options."""

    # fmt: off
    adapter_path: str = option("adapters", _GROUP, "adapter folder from mebp_mlx, mlx-lm or PEFT", metavar="PATH")
    model: str | None = option(None, _GROUP, "base model: folder, hub id, or bundled", shown_default="as trained")
    save_path: str | None = option(None, _GROUP, "new folder for the result; with --gguf, a new file", metavar="PATH")

    peft: bool = option(False, _KIND, "write a folder that PEFT loads")
    gguf: bool = option(False, _KIND, "write a file that llama.cpp loads")
    from_peft: bool = option(False, _KIND, "convert a PEFT folder to one that this package and mlx-lm load")
    # fmt: on


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    interrupted = "interrupted; no partial output is left behind"
    return run_command(lambda _: _run(parse(Options, PROG, _TEXTS, argv)), interrupted)


def _run(options: Options) -> None:
    if (options.peft, options.gguf, options.from_peft).count(True) != 1:
        raise UserError("--peft, --gguf, --from-peft: exactly one of these is required")
    if options.save_path is None:
        raise UserError("--save-path: is required")
    folder = Path(options.adapter_path).expanduser()
    base = model_name(read_about(folder), options.model)
    model = Model(resolve_model(base))
    model.close()
    spec = model.spec
    if not options.from_peft and (lora := load_adapters(folder, spec)).fine_tune_type == "dora":
        raise UserError(
            f"{FLAG} {folder}: DoRA adapters cannot be exported; python -m mebp_mlx.fuse adds them to the weights"
        )
    if options.gguf:
        path = Path(options.save_path).expanduser()
        write_gguf(path, lora, spec, folder.resolve().name, "--save-path")
        say(f"{folder} -> {path}")
        return
    out = new_folder(options.save_path, "--save-path")
    if options.peft:
        write_peft(out, lora, spec, base)
    else:
        write_ours(out, read_peft(folder, spec, FLAG), base)
    say(f"{folder} -> {out.path}")


if __name__ == "__main__":
    sys.exit(main())
