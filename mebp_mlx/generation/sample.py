"""Samples a prompt without and with adapters in a child process: training imports neither mlx_lm nor transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mebp_mlx.errors import UserError
from mebp_mlx.system.child import ChildFailure, answer, one_line, run_child

Show = Callable[[str, str], None]


def sample(
    model_path: str | Path,
    adapter_path: str | Path,
    prompt: str,
    max_tokens: int = 64,
    *,
    budget_bytes: int | None = None,
    show: Show = lambda kind, text: None,
    timeout_s: float = 600,
) -> dict[str, str]:
    """{"before": text without the adapters, "after": text with them}, always choosing the likeliest token.

    budget_bytes: for the child, which holds the whole model; show: called with ("before" or "after", the next piece of
    text) during generation, and with ("note", a line). Raises UserError if the child fails or takes too long.
    """
    request = {
        "model": str(model_path),
        "adapter_path": str(adapter_path),
        "prompt": prompt,
        "max_tokens": max_tokens,
        "budget_bytes": budget_bytes,
    }
    command = ["mebp_mlx.generation.sample"]
    try:
        return run_child(command, request, offline=True, on_progress=lambda piece: show(*piece), timeout_s=timeout_s)
    except (ChildFailure, TimeoutError) as error:
        raise UserError(f"sampling from {model_path} failed: {one_line(error)}") from error


def _sample(request: dict[str, Any], progress: Callable[[Any], None]) -> dict[str, Any]:
    from mebp_mlx.generation.text import Prompt, Writer

    folder = Path(request["adapter_path"])
    prompt = Prompt(request["prompt"], request["max_tokens"])
    writer = Writer(Path(request["model"]), None, request["budget_bytes"], lambda line: progress(["note", line]))
    texts = {"before": "", "after": ""}
    for name in texts:
        if name == "after":
            writer.add_adapters(folder)
        for piece in writer.stream(prompt):
            progress([name, piece])
            texts[name] += piece
    return texts


if __name__ == "__main__":
    answer(_sample)
