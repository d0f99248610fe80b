"""Loss, perplexity and accuracy of a model on rows, with and without adapters, from forward passes only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data.dataset import TokenRows, eval_batches, prepare_rows
from ..data.rows import ALL, COMPLETION, RowOptions
from ..engine.base import Pass
from ..errors import NonFiniteLoss
from ..export.adapters import ADAPTER_CONFIG, adapters_of
from ..model.base import Model
from ..model.lora import Adapter, Lora
from ..model.opening import open_model
from ..ops.plan import Plan
from ..planner.search import choose
from ..planner.workload import Workload
from ..system.group import Group
from .distributed import Deal

NO_LORA = Lora({}, rank=1, scale=1.0, dropout=0.0, keys=(), num_layers=0)


@dataclass(frozen=True)
class Quality:
    """loss: mean over labelled tokens, in nats; accuracy: share of them to which the model gives the highest score."""

    loss: float
    accuracy: float
    n_labels: int
    n_rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite if that overflows a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Model, adapter: Adapter, rows: TokenRows, plan: Plan, deal: Deal, batch_size: int, n_batches: int = -1
) -> Quality:
    """The quality on the first `n_batches` batches of the rows (-1: all). Raises NonFiniteLoss, which names the rows,
    and UserError if a weight file was truncated.
    """
    work = Pass(model, plan, adapter)
    loss_sum, n_labels, n_correct, n_rows = 0.0, 0, 0, 0
    for batch in eval_batches(rows, batch_size, n_batches):
        model.weights.check_sizes()
        part = deal.part(batch)
        result = work.loss(part)
        if not math.isfinite(result.loss_sum):
            raise NonFiniteLoss(f"the loss is not finite (rows {', '.join(part.rows)})")
        loss_sum += result.loss_sum
        n_labels += result.n_labels
        n_correct += result.n_correct
        n_rows += len(batch.rows)
    loss_sum, n_labels, n_correct = (
        sum(values) for values in zip(*deal.group.gather((loss_sum, n_labels, n_correct)), strict=True)
    )
    return Quality(loss_sum / n_labels, n_correct / n_labels, n_labels, n_rows)


def rows_as_trained(
    known: Mapping[str, Any],
    model_path: Path,
    split: str,
    data: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> TokenRows:
    """The rows of a split, or of the file `data`, read as in the run whose options are `known`.

    changes: fields of RowOptions; those that are not None override `known`. Rows that are too long are truncated unless
    `changes` sets `overlong`. Raises UserError.
    """
    given = {name: value for name, value in (changes or {}).items() if value is not None}
    trained = {"train_on": COMPLETION if known.get("mask_prompt") else ALL, **known, "overlong": "truncate"}
    names = [field.name for field in fields(RowOptions)]
    options = {name: value for name in names if (value := {**trained, **given}.get(name)) is not None}
    return prepare_rows(data or known.get("data") or "bundled", split, model_path, RowOptions(**options))


class Evaluator:
    """Evaluates models on the same rows, within a budget.

    n_batches: number of batches, -1 for all; budget_bytes: limit of the footprint, None for no limit; smallest: use the
    plan with the smallest footprint; dtype: as in open_model; group: the machines that share the work.
    """

    def __init__(
        self,
        rows: TokenRows,
        batch_size: int,
        n_batches: int = -1,
        budget_bytes: int | None = None,
        smallest: bool = False,
        dtype: str = "auto",
        group: Group | None = None,
    ):
        self.deal = Deal(group or Group(), batch_size)
        self.rows, self.batch_size, self.n_batches, self.dtype = rows, batch_size, n_batches, dtype
        self.budget_bytes, self.smallest = budget_bytes, smallest

    def __call__(self, path: Path, lora: Lora | None) -> Quality:
        """The quality of the model in a folder, with or without LoRA pairs. Raises UserError, NonFiniteLoss, and
        BudgetError, which names the smallest workable budget, if no plan fits.
        """
        model = open_model(path, self.dtype)
        try:
            return evaluate(
                model, lora or NO_LORA, self.rows, self._plan(model, lora), self.deal, self.batch_size, self.n_batches
            )
        finally:
            model.close()

    def _plan(self, model: Model, lora: Lora | None) -> Plan:
        longest = int(self.rows.lengths.max()) - 1
        workload = Workload(
            model, lora or NO_LORA, min(self.deal.most_rows, len(self.rows)), longest, forward_only=True
        )
        return choose(workload, self.budget_bytes, smallest=self.smallest).plan


def is_test_alone(config: TrainConfig) -> bool:
    """Whether the options request only --test: --iters 0, or a data folder without training rows."""
    if not config.test or config.dry_run or config.preview:
        return False
    if not config.iters and config.epochs is None:
        return True
    folder = Path(config.data).expanduser()
    is_given = config.hf_dataset is None and config.data != "bundled" and (folder / "test.jsonl").is_file()
    return is_given and not (folder / "train.jsonl").exists()


def evaluate_alone(
    config: TrainConfig, model_path: Path, group: Group | None = None
) -> tuple[TokenRows, dict[str, Quality]]:
    """`--test` without training: the test rows, and the model's quality on them, also with the adapters in
    --adapter-path if it contains any. Raises UserError, BudgetError, NonFiniteLoss.
    """
    rows = prepare_rows(config.data_source, "test", model_path, config.row_options)
    budget_bytes, smallest = config.budget_bytes, config.smallest
    quality = Evaluator(rows, config.batch_size, config.test_batches, budget_bytes, smallest, config.dtype, group)
    qualities = {"model": quality(model_path, None)}
    folder = Path(config.adapter_path).expanduser()
    if (folder / ADAPTER_CONFIG).is_file():
        qualities["adapters"] = quality(model_path, adapters_of(folder, model_path))
    return rows, qualities


def table(rows: TokenRows, qualities: Mapping[str, Quality]) -> list[str]:
    """The results as lines of text."""
    first = next(iter(qualities.values()))
    lines = [f"{rows.name}: {first.n_rows:,} rows, {first.n_labels:,} labelled tokens"]
    lines += [f"{'':<10}{'loss':>10}{'perplexity':>14}{'accuracy':>10}"]
    return lines + [f"{n:<10}{q.loss:>10.4f}{q.perplexity:>14,.2f}{q.accuracy:>10.1%}" for n, q in qualities.items()]
