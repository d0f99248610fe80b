"""What a run tells a person before the loop and after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import bundled
from .config import TrainConfig
from .data import DataSets
from .errors import UserError
from .optimizers import uses_learning_rate
from .runtime.log import RunLog, first_event, megabytes
from .sample import sample


def notices(config: TrainConfig, data: DataSets, optimizer: Any, n_iters: int) -> list[str]:
    """What a person may not expect of this run."""
    found = []
    if config.epochs is None and n_iters != config.iters:
        found.append(f"{n_iters} iterations, not {config.iters}: an update takes {config.grad_accumulation_steps}")
    if not uses_learning_rate(optimizer):
        found.append(
            "adafactor sets its own step sizes; optimizer_config: {adafactor: {relative_step: false}} "
            "makes it use --learning-rate"
        )
    if config.resume and config.lr_decay != "constant":
        found.append(f"--lr-decay {config.lr_decay} reaches its end at iteration {n_iters}")
    if data.valid is None and config.val_batches:
        found.append("no valid.jsonl: there are no validations")
    if n_rows := data.counts["train"].get("n_prompt_differs"):
        found.append(
            f"{n_rows:,} training rows: the chat template rewrites the prompt, their labels may begin early or late"
        )
    return found


def print_data(data: DataSets, overlong: str) -> None:
    """One line for each split."""
    treated = "dropped" if overlong == "drop" else "truncated"
    for split, counts in data.counts.items():
        line = f"{split:<11}{counts['rows']:,} rows, {counts['tokens']:,} tokens"
        if n_rows := counts.get("n_overlong"):
            line += f"; {n_rows:,} too long, {treated}"
        if n_rows := counts.get("n_masked_rows"):
            line += f"; {n_rows:,} skipped, without a label"
        print(line, flush=True)


def summarize(folder: Path, log: RunLog, peak_bytes: int, seconds: float, n_iters: int) -> None:
    """The last event and the last line: what came out, what it took, where it is."""
    first, last = first_event(folder, "valid"), first_event(folder, "valid", latest=True)
    log.event("end", iter=n_iters, seconds=seconds, peak_bytes=peak_bytes)
    fall = f"validation loss {first['loss']:.3f} -> {last['loss']:.3f}, " if first and last else ""
    log.say(f"done: {fall}{seconds:.1f} s, peak footprint {megabytes(peak_bytes)}, adapters in {folder}")


def show_sample(config: TrainConfig, model_path: Path, folder: Path) -> None:
    """Text before and after, from a child process; a failure is told, not raised."""
    prompt = config.sample_prompt
    if prompt is None and config.model == "bundled":
        prompt = bundled.SAMPLE_PROMPT
    if prompt is None:
        return
    try:
        texts = sample(model_path, folder, prompt)
    except UserError as error:
        print(f"note: {error}")
        return
    print(f"--- prompt\n{prompt}\n--- before\n{texts['before']}\n--- after\n{texts['after']}", flush=True)
