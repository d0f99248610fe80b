"""`python -m mebp_mlx`, and the console script `mebp-mlx`: lists the commands or runs one."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from . import __version__

# Name of a module or folder with `main(argv) -> exit code`: what it does. pyproject.toml defines the console scripts.
COMMANDS = {
    "train": "fine-tune a language model with exact LoRA gradients",
    "evaluate": "measure loss, perplexity and accuracy on any rows, with and without adapters",
    "generate": "continue a prompt, with or without adapters",
    "fuse": "add adapters to the weights, and measure how much of the gain is kept",
    "export": "convert adapters to PEFT and llama.cpp, or from PEFT",
    "convert": "quantize a checkpoint, or align it for Metal",
    "doctor": "check this machine: device, memory meter, BLAS, kernels",
}


def usage() -> str:
    """The list of commands, as --help prints it."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    head = ["usage: mebp-mlx COMMAND [options]", "", "commands (each also as mebp_mlx.COMMAND):"]
    tail = ["", "mebp-mlx COMMAND --help lists its options; mebp-mlx --version prints the version"]
    return "\n".join([*head, *lines, *tail])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command in the first argument with the remaining ones; returns its exit code (2: no such command)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"mebp_mlx {__version__}")
        return 0
    if name not in COMMANDS:
        print(f"error: {name}: no such command; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"mebp_mlx.{name}")
    if hasattr(module, "__path__"):  # a folder
        module = importlib.import_module(f"mebp_mlx.{name}.__main__")
    return module.main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
