"""Loss, perplexity and accuracy of a model on rows, with and without adapters, by forward passes that keep nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.dataset import TokenRows, eval_batches
from ..engine.base import Pass
from ..errors import NonFiniteLoss
from ..model.base import Model
from ..model.lora import Adapter, Lora
from ..ops.plan import Plan
from ..planner.search import Planned, choose
from ..planner.workload import Workload

NO_ADAPTER = Adapter({}, 1.0, 0.0)


@dataclass(frozen=True)
class Quality:
    """loss: the mean over labelled tokens, in nats; accuracy: the share of them that are the likeliest token."""

    loss: float
    accuracy: float
    n_labels: int
    n_rows: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that passes what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    model: Model, adapter: Adapter, rows: TokenRows, plan: Plan, batch_size: int, n_batches: int = -1
) -> Quality:
    """The quality on the first `n_batches` batches of some rows, -1: all. Raises NonFiniteLoss naming rows, and
    UserError when a weight file was cut short.
    """
    work = Pass(model, plan, adapter)
    loss_sum, n_labels, n_correct, n_rows = 0.0, 0, 0, 0
    for batch in eval_batches(rows, batch_size, n_batches):
        model.weights.check_sizes()
        found = work.loss(batch)
        if not math.isfinite(found.loss_sum):
            raise NonFiniteLoss(f"the loss is not finite (rows {', '.join(batch.rows)})")
        loss_sum += found.loss_sum
        n_labels += found.n_labels
        n_correct += found.n_correct
        n_rows += len(batch.rows)
    return Quality(loss_sum / n_labels, n_correct / n_labels, n_labels, n_rows)


def plan_evaluation(
    model: Model, lora: Lora | None, rows: TokenRows, batch_size: int, budget_bytes: int | None, smallest: bool
) -> Planned:
    """The fastest plan of forward passes within a budget (None: no limit); smallest: the one with the least footprint.

    lora: None for the model alone. Raises BudgetError, naming the smallest workable budget, when none fits.
    """
    lora = lora or Lora({}, rank=1, scale=1.0, dropout=0.0, keys=(), num_layers=0)
    longest = int(rows.lengths.max()) - 1
    workload = Workload(model, lora, min(batch_size, len(rows)), longest, forward_only=True)
    return choose(workload, budget_bytes, smallest=smallest)
