"""The model card of a fused model: its base model and adapters, their training, and the measured losses."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system.units import megabytes
from .adapters import RUN
from .fuse import Format, Kept

_LOG = "log.jsonl"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Card:
    """The sources of a fused model. name: its folder's name; base: the base model as the user named it; adapters:
    their folder; options: the options they were trained with (trained_with).
    """

    name: str
    base: str
    adapters: Path
    options: dict[str, Any]


def model_card(about: Card, how: Format, kept: Kept | None, rows: str) -> str:
    """README.md of a fused model. kept: the losses measured on `rows`, or None if nothing was measured."""
    name, base = about.name, about.base
    head = ["library_name: mlx", "pipeline_tag: text-generation", "tags:", "- mlx", "- lora"]
    if _HUB_ID.fullmatch(base) and not Path(base).exists():
        head.append(f"base_model: {json.dumps(base)}")
    facts = [("base model", base), ("stored in", str(how)), *_training(about.adapters, about.options)]
    if kept is not None:
        facts.append((f"loss on {rows}", f"{kept.base:.4f} base, {kept.adapters:.4f} with adapters, {kept.fused:.4f} "
                      f"fused: {kept.share:.1%} of the gain kept"))  # fmt: skip
    lines = ["---", *head, "---", "", f"# {name}", "", f"{base} with LoRA adapters fused into its weights.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts), ""]
    lines += ["```python", "from mlx_lm import generate, load", "", f"model, tokenizer = load({json.dumps(name)})",
              'print(generate(model, tokenizer, "hello"))', "```", ""]  # fmt: skip
    return "\n".join(lines)


def _training(adapters: Path, options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The known facts of the training run: mlx-lm saves its options; this package also saves a log and the machine."""
    for key, name in (("data", "trained on"), ("iters", "iterations"), ("batch_size", "batch size"),
                      ("learning_rate", "learning rate"), ("seed", "seed")):  # fmt: skip
        if options.get(key) is not None:
            yield name, str(options[key])
    if isinstance(lora := options.get("lora_parameters"), dict):
        n_layers = options.get("num_layers")
        where = "all layers" if n_layers == -1 else f"the last {n_layers} layers"
        yield "LoRA", f"rank {lora.get('rank')}, scale {lora.get('scale')}, on {where}"
    events = _events(adapters / _LOG)
    reports = [event for event in events if event.get("event") == "train"]
    if tokens := sum(event.get("n_tokens") or 0 for event in reports):
        yield "labelled tokens trained on", f"{tokens:,}"
    losses = [event["loss"] for event in events if event.get("event") == "valid" and event.get("loss") is not None]
    if losses:
        yield "validation loss in training", f"{losses[0]:.4f} -> {losses[-1]:.4f}"
    if peak := max((event.get("peak_bytes") or 0 for event in reports), default=0):
        yield "peak footprint of training", megabytes(peak)
    try:
        about = json.loads((adapters / RUN).read_text(encoding="utf-8"))["machine"]
        yield "trained on machine", f"{about['chip']}, {about['cores']} cores, {about['os']}, MLX {about['mlx']}"
    except (OSError, ValueError, KeyError, TypeError):
        return


def _events(log: Path) -> list[dict[str, Any]]:
    try:
        events = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return [event for event in events if isinstance(event, dict)]
