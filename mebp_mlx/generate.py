"""What a model writes after a prompt, without and with adapters, through mlx-lm.

`python -m mebp_mlx.generate --model M --adapter-path A --prompt P` prints both texts; the trainer calls
`sample`, which runs this module in a process of its own: training imports neither mlx_lm nor transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mebp_mlx import __version__
from mebp_mlx.errors import UserError, memory_errors_told
from mebp_mlx.system.child import ChildFailure, answer, one_line, run_child
from mebp_mlx.weights.hub import resolve_model

PROG = "python -m mebp_mlx.generate"


def sample(
    model_path: str | Path,
    adapter_path: str | Path | None,
    prompt: str,
    max_tokens: int = 64,
    *,
    timeout_s: float = 600,
) -> dict[str, str | None]:
    """{"before": text without the adapters, "after": text with them, None without an adapter_path}, greedy.

    Runs in a child process that holds the whole model. Raises UserError if it fails or takes too long.
    """
    request = {
        "model": str(model_path),
        "adapter_path": None if adapter_path is None else str(adapter_path),
        "prompt": prompt,
        "max_tokens": max_tokens,
    }
    try:
        return run_child(["mebp_mlx.generate"], request, offline=True, timeout_s=timeout_s)
    except (ChildFailure, TimeoutError) as error:
        raise UserError(f"sampling from {model_path} failed: {one_line(error)}") from error


def generate(model_path: Path, adapter_path: Path | None, prompt: str, max_tokens: int) -> dict[str, str | None]:
    """Both texts, in this process: loads the model, continues the prompt, adds the adapters, continues again.

    A tokenizer with a chat template gets the prompt as a user's message, any other as plain text.
    """
    if not prompt:
        raise UserError("--prompt: must not be empty")
    if max_tokens < 1:
        raise UserError(f"--max-tokens: must be at least 1, got {max_tokens}")
    for name in ("adapter_config.json", "adapters.safetensors"):
        if adapter_path is not None and not (adapter_path / name).is_file():
            raise UserError(f"--adapter-path {adapter_path}: the folder holds no {name}")
    from mebp_mlx.system.machine import load_blas

    load_blas()  # before mlx_lm brings mlx.core
    try:
        import mlx_lm
        from mlx_lm.tuner.utils import load_adapters
    except ImportError as error:
        raise UserError(f"sampling needs mlx-lm: pip install mlx-lm ({one_line(error)})") from error
    try:
        model, tokenizer = mlx_lm.load(str(model_path))[:2]
        if tokenizer.has_chat_template:
            tokens = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        else:
            tokens = tokenizer.encode(prompt)
    except Exception as error:  # whatever a broken model, tokenizer or template makes its library raise
        raise UserError(f"--model {model_path}: {type(error).__name__}: {one_line(error)}") from error
    before = mlx_lm.generate(model, tokenizer, tokens, max_tokens=max_tokens)
    if adapter_path is None:
        return {"before": before, "after": None}
    try:
        model = load_adapters(model, str(adapter_path))
        model.eval()  # no dropout
        after = mlx_lm.generate(model, tokenizer, tokens, max_tokens=max_tokens)
    except Exception as error:  # older mlx-lm notices adapters of another shape only when it computes with them
        raise UserError(f"--adapter-path {adapter_path}: {type(error).__name__}: {one_line(error)}") from error
    return {"before": before, "after": after}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the texts, or one JSON object with --json; returns the exit code (2: stderr says why)."""
    parser = argparse.ArgumentParser(prog=PROG, description="Continue a prompt without and with adapters.")
    parser.add_argument("--version", action="version", version=f"mebp_mlx {__version__}", help="print the version")
    parser.add_argument("--model", required=True, help="folder, hub id, or `bundled`")
    parser.add_argument("--adapter-path", type=Path, help="folder with adapters.safetensors")
    parser.add_argument("--prompt", required=True, help="text to continue, or a chat model's question")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of the answer [64]")
    parser.add_argument("--json", action="store_true", help='print {"before": text, "after": text}')
    given = parser.parse_args(argv)
    try:
        with memory_errors_told():
            texts = generate(resolve_model(given.model), given.adapter_path, given.prompt, given.max_tokens)
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if given.json:
        print(json.dumps(texts))
    else:
        for name in ("before", "after"):
            if texts[name] is not None:
                print(f"--- {name}\n{texts[name]}")
    return 0


def _answer(request: dict[str, Any], _progress: Any) -> dict[str, Any]:
    adapter = request["adapter_path"]
    return dict(
        generate(
            Path(request["model"]),
            Path(adapter) if adapter else None,
            request["prompt"],
            request["max_tokens"],
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1 or sys.stdin.isatty():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        sys.exit(main(sys.argv[1:]))
    answer(_answer)
