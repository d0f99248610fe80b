"""The lines that a run prints before and after the training loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .. import bundled
from ..config import TrainConfig
from ..data.dataset import DataSets
from ..errors import UserError
from ..generation.sample import sample
from ..model.base import Model
from ..planner.search import Planned
from ..planner.sizes import expert_sizes
from ..system.footprint import PeakMeter
from ..system.units import megabytes
from .log import RunLog, events
from .optimizers import uses_learning_rate

WORTH_ALIGNING_BYTES = 16 << 20


def notices(config: TrainConfig, data: DataSets, optimizer: Any, n_iters: int) -> list[str]:
    """Remarks about this run that may surprise the user."""
    remarks = []
    if config.epochs is None and n_iters != config.iters:
        remarks.append(f"{n_iters} iterations, not {config.iters}: each update takes {config.grad_accumulation_steps}")
    if not uses_learning_rate(optimizer):
        remarks.append(
            "adafactor sets its own step sizes; optimizer_config: {adafactor: {relative_step: false}} "
            "makes it use --learning-rate"
        )
    if config.resume and config.lr_decay != "constant":
        remarks.append(f"--lr-decay {config.lr_decay} reaches its end at iteration {n_iters}")
    if data.valid is None and config.val_batches:
        remarks.append("no valid.jsonl: no validation is run")
    counts = data.counts["train"]
    n_unsure = counts.get("n_unsure", 0)
    if n_rows := counts.get("n_prompt_differs", 0) - n_unsure:
        remarks.append(
            f"{n_rows:,} training rows: the chat template rewrites the prompt before an answer; labels begin with the "
            "answer (mlx-lm's begin where the unchanged prompt would end)"
        )
    if n_unsure:
        remarks.append(f"{n_unsure:,} training rows: the chat template rewrites them; labels may begin early or late")
    return remarks


def alignment_notices(model: Model, model_name: str) -> list[str]:
    """The copies that a conversion would save, if MLX uses mapped pages in place but the checkpoint is not aligned."""
    if not model.weights.adopt:
        return []
    placed = model.weights.placement(model.spec.tensors)
    copied = [info for why, infos in placed.items() if why and why.endswith("aligned") for info in infos]
    n_bytes = sum(info.n_bytes for info in copied)
    if n_bytes < WORTH_ALIGNING_BYTES:
        return []
    return [
        f"{megabytes(n_bytes)} of weights are copied in every pass: {len(copied):,} tensors are not aligned; "
        f"python -m mebp_mlx.convert --mode keep --model {model_name} --out DIR avoids this and changes no bit"
    ]


def print_data(data: DataSets, config: TrainConfig) -> None:
    """Prints one line per split, and a histogram of the training rows' lengths."""
    treated = "dropped" if config.overlong == "drop" else "truncated"
    for split, counts in data.counts.items():
        line = f"{split:<11}{counts['rows']:,} rows, {counts['tokens']:,} tokens"
        if n_rows := counts.get("n_overlong"):
            line += f"; {n_rows:,} too long, {treated}"
        if n_rows := counts.get("n_masked_rows"):
            line += f"; {n_rows:,} skipped (no label)"
        print(line, flush=True)
    print(f"lengths    {length_histogram(data.train.lengths, config.batch_size)}", flush=True)


def length_histogram(lengths: np.ndarray, batch_size: int) -> str:
    """The lengths of rows as `9-16 ## 17-32 ########## 33-64 ###; median 25 tokens, longest 60; padding 4%`.

    padding: the share of padding in batches, which group rows of similar length.
    """
    exponents = np.ceil(np.log2(lengths)).astype(int)
    parts = []
    for exponent in range(int(exponents.min()), int(exponents.max()) + 1):
        share = float((exponents == exponent).mean())
        first, last = (1 << exponent >> 1) + 1, 1 << exponent
        parts.append(f"{first}-{last} {'#' * math.ceil(10 * share) or '.'}")
    ordered = np.sort(lengths)
    groups = np.split(ordered, range(batch_size, len(ordered), batch_size))
    n_positions = sum(len(group) * int(group[-1]) for group in groups)
    padding = 1 - int(ordered.sum()) / n_positions
    return f"{' '.join(parts)}; median {np.median(lengths):.0f} tokens, longest {ordered[-1]:,}; padding {padding:.0%}"


def print_plan(config: TrainConfig, planned: Planned, table: bool) -> None:
    """Prints the predicted footprint in one line, or as a table with everything the plan decides."""
    workload, plan, predicted = planned.workload, planned.plan, planned.predicted
    held_bytes = predicted.kept_bytes - predicted.written_bytes
    if not table:
        print(
            f"plan       predicted peak {megabytes(predicted.peak_bytes)} ({predicted.peak_phase}); kept "
            f"{megabytes(held_bytes)} in memory, {megabytes(predicted.arena_bytes)} on disk",
            flush=True,
        )
        return
    print(
        f"\nplan for {workload.B} x {workload.T:,} tokens, {config.optimizer_name}, engine {config.engine}; "
        "nothing is trained"
    )
    print(f"  {'phase':<10}{'predicted MB':>14}")
    for name, n_bytes in predicted.phases.items():
        mark = "  <- peak" if name == predicted.peak_phase else ""
        print(f"  {name:<10}{n_bytes / 1e6:>14,.1f}{mark}")
    state = f"optimizer state {workload.state_bytes / 1e6:.1f} MB" + (", on disk" if plan.offload_state else "")
    weights = "whole" if plan.weight_block_bytes is None else f"{plan.weight_block_bytes >> 10:,} KiB"
    rows = {
        "LoRA": f"{workload.lora_bytes // 4:,} parameters, {workload.lora_bytes / 1e6:.1f} MB; {state}",
        "kept": f"{held_bytes / 1e6:,.1f} MB in memory: {', '.join(sorted(plan.saved))}"
        if workload.is_exact
        else "nothing",
        "arena": f"{predicted.arena_bytes / 1e6:,.1f} MB on disk",
        "written": f"{predicted.written_bytes / 1e6:,.1f} MB per micro-batch, optimizer state "
        f"{workload.state_bytes * plan.offload_state / 1e6:,.1f} MB per update",
        "blocks": f"{plan.token_block} tokens, {plan.query_block} queries, weights {weights}, "
        f"logits {plan.logits_block_bytes >> 10:,} KiB; a graph is one {plan.grain}",
    }
    if (sizes := expert_sizes(workload.model, workload.B * workload.T)) is not None:
        rows["experts"] = (
            f"a pass reads at most {sizes.n_reached} per layer in {sizes.n_layers} layers, {sizes.reached / 1e6:,.1f} "
            f"of {sizes.stored / 1e6:,.1f} MB: those that tokens choose"
        )
    for name, text in rows.items():
        print(f"  {name:<10}{text}")


def plan_record(planned: Planned) -> dict[str, Any]:
    """The plan and its prediction for run.json."""
    predicted = planned.predicted
    return {
        **planned.plan.to_dict(),
        "predicted_bytes": predicted.phases,
        "predicted_peak_bytes": predicted.peak_bytes,
        "kept_in_memory_bytes": predicted.kept_bytes - predicted.written_bytes,
        "arena_bytes": predicted.arena_bytes,
        "written_bytes_per_micro_batch": predicted.written_bytes,
    }


class BudgetWatch:
    """Detects that the measured peak exceeds the budget; logs it once, and prints a note or ends the run.

    stop: whether the run then has to end (--over-budget stop). passed: a sentence about the excess; None before.
    """

    def __init__(self, planned: Planned | None, meter: PeakMeter, log: RunLog, stop: bool):
        self.planned, self.meter, self.log, self.stop = planned, meter, log, stop
        self.passed: str | None = None

    def look(self, iteration: int) -> bool:
        """Compares the process's peak so far with the budget, if any; returns True if the run has to end."""
        if self.passed is None and self.planned is not None and self.planned.budget_bytes is not None:
            budget, peak = self.planned.budget_bytes, self.meter.peak_bytes
            predicted = self.planned.predicted.peak_bytes
            if peak > budget:
                self.passed = (
                    f"the budget of {budget / 1e6:.1f} MB was exceeded: the footprint reached {peak / 1e6:.1f} MB, "
                    f"{predicted / 1e6:.1f} MB was predicted"
                )
                numbers = {"budget_bytes": budget, "peak_bytes": peak, "predicted_peak_bytes": predicted}
                self.log.event("notice", text=self.passed, iter=iteration, **numbers)
                if not self.stop:
                    self.log.say(f"note: {self.passed}")
        return self.stop and self.passed is not None


def summarize(
    folder: Path, log: RunLog, peak_bytes: int, seconds: float, n_iters: int, planned: Planned | None
) -> None:
    """Writes the last event and the last line: loss, time, peak footprint, and the adapters' folder."""
    losses = [event["loss"] for event in events(folder, "valid") if isinstance(event.get("loss"), float)]
    log.event("end", iter=n_iters, seconds=seconds, peak_bytes=peak_bytes)
    fall = f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}, " if losses else ""
    peak = megabytes(peak_bytes)
    if planned is not None:
        peak += f" ({megabytes(planned.predicted.peak_bytes)} predicted"
        peak += f", budget {megabytes(planned.budget_bytes)})" if planned.budget_bytes is not None else ")"
    log.say(f"done: {fall}{seconds:.1f} s, peak footprint {peak}, adapters in {folder}")


def show_sample(config: TrainConfig, model_path: Path, folder: Path) -> None:
    """Prints text generated by a child process without and with the adapters. A failure or an interrupt is reported,
    not raised: the run is complete.
    """
    prompt = config.sample_prompt
    if prompt is None and config.model == "bundled":
        prompt = bundled.SAMPLE_PROMPT
    if prompt is None:
        return
    budget_bytes = config.memory_budget if isinstance(config.memory_budget, int) else None
    shown: list[str] = []

    def show(kind: str, text: str) -> None:
        if kind == "note":
            print(f"sample     {text}", flush=True)
            return
        if not shown:
            print(f"--- prompt\n{prompt}")
        if kind not in shown:
            print(f"{chr(10) if shown else ''}--- {kind}")
            shown.append(kind)
        print(text, end="", flush=True)

    print(f"sample     another process loads {config.model}; interrupting it loses nothing, the run is complete",
          flush=True)  # fmt: skip
    try:
        sample(model_path, folder, prompt, budget_bytes=budget_bytes, show=show)
        print(flush=True)
    except UserError as error:
        print(f"{chr(10) if shown else ''}note: no sample: {error}", flush=True)
    except KeyboardInterrupt:
        print(f"{chr(10) if shown else ''}sample interrupted; the run itself is complete, adapters in {folder}",
              flush=True)  # fmt: skip
