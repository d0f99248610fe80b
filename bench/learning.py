"""Learning curves of several methods on the same data: convergence and zo_variants (`python -m bench NAME`).

The learning rate of a method is the best of a small grid, by the loss on validation rows: every method gets the same
number of trials with the same number of forward passes. Curves use the test rows and other seeds; a seed sets LoRA's
initial values, the order of the data and the noise. A step of MeBP counts as two forward passes, because its backward
pass has as many products with the weights as a forward pass.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mebp_mlx
from bench import report
from bench.case import Stepper
from mebp_mlx.config import ZEROTH_ORDER, TrainConfig
from mebp_mlx.data.dataset import DataSets, TokenRows, batches, eval_batches, prepare
from mebp_mlx.data.rows import ALL, COMPLETION, RowOptions
from mebp_mlx.errors import NonFiniteLoss, UserError
from mebp_mlx.model.base import Model
from mebp_mlx.weights.hub import resolve_model

GRID_SEED = 1000  # the seed of the trials; no curve uses it


@dataclass(frozen=True)
class Method:
    """An engine with its optimizer, the learning rates to try, and the forward passes of one step."""

    label: str
    engine: str
    optimizer: str
    rates: tuple[float, ...]
    passes: int
    color: str


# Five rates per method, about a factor of 3 apart. eps is the trainer's default for all methods; the step sizes of Adam
# and FZOO do not depend on the size of the gradient.
METHODS = {
    "mebp": Method("MeBP (exact), Adam", "mebp", "adam", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), 2, "C1"),
    "mezo": Method("MeZO", "mezo", "sgd", (3e-6, 1e-5, 3e-5, 1e-4, 3e-4), 2, "C0"),
    "kzoo": Method("K-ZOO", "kzoo", "sgd", (3e-6, 1e-5, 3e-5, 1e-4, 3e-4), 2, "C2"),
    "hizoo": Method("HiZOO", "hizoo", "sgd", (3e-6, 1e-5, 3e-5, 1e-4, 3e-4), 3, "C3"),
    "fzoo": Method("FZOO", "fzoo", "sgd", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 9, "C4"),
}


def add_options(parser: argparse.ArgumentParser, grid_passes: int) -> None:
    """Adds the options of both benches."""
    defaults = TrainConfig()
    parser.add_argument("--model", default=defaults.model, help="folder, hub id, or `bundled`")
    parser.add_argument(
        "--data", default=defaults.data, help="folder, hub id (org/name or org/name:part), or `bundled`"
    )
    parser.add_argument("--mask-prompt", action="store_true", help="train only on the answers")
    parser.add_argument("--batch-size", type=report.positive, default=4)
    parser.add_argument("--max-seq-length", type=report.positive, default=256)
    parser.add_argument(
        "--eval-batches", type=int, default=15, help="number of batches of validation and test rows; -1: all"
    )
    parser.add_argument(
        "--rates", type=report.positive, default=5, help="number of learning rates to try, around the middle one"
    )
    parser.add_argument("--seeds", type=report.positive, default=3, help="runs per method")
    parser.add_argument(
        "--grid-passes", type=report.positive, default=grid_passes, help="forward passes per trial of a rate"
    )


class Task:
    """The model and the data, opened once."""

    def __init__(self, options: argparse.Namespace):
        path = resolve_model(options.model)
        self.batch_size = options.batch_size
        train_on = COMPLETION if options.mask_prompt else ALL
        self.data: DataSets = prepare(options.data, path, RowOptions(train_on, options.max_seq_length))
        if self.data.valid is None:
            raise UserError(f"--data {options.data}: has no valid.jsonl, which is needed to choose learning rates")
        self.valid: TokenRows = self.data.valid
        self.test: TokenRows = self.data.test or self.data.valid
        self.eval_batches, self.n_rates = options.eval_batches, options.rates
        self.model: Model = mebp_mlx.open_model(path)

    def run(
        self, method: Method, rate: float, seed: int, n_steps: int, rows: TokenRows, marks: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Trains, and yields loss and accuracy on `rows` after each number of steps in `marks` (0: before the first).

        seconds: training only. If a loss is not finite, the run ends with a loss of infinity.
        """
        longest, evaluated = (int(each.lengths.max()) - 1 for each in (self.data.train, rows))
        n_updates = max(1, n_steps)
        with contextlib.redirect_stdout(None):  # every run of a method prints the same plan
            sizes: dict[str, Any] = {"n_evaluated": evaluated, "n_updates": n_updates, "iters": n_updates}
            how: dict[str, Any] = {"engine": method.engine, "optimizer": method.optimizer, "learning_rate": rate}
            stepper = Stepper(self.model, longest, batch_size=self.batch_size, seed=seed, **sizes, **how)
        stream, seconds = batches(self.data.train, self.batch_size, seed), 0.0
        try:
            for step in range(n_steps + 1):
                if step in marks:
                    evaluations = [stepper.engine.evaluate(batch) for batch in self._eval(rows)]
                    n_labels = sum(each.n_labels for each in evaluations)
                    yield {
                        "step": step,
                        "passes": step * method.passes,
                        "seconds": round(seconds, 3),
                        "loss": round(sum(each.loss_sum for each in evaluations) / n_labels, 5),
                        "accuracy": round(sum(each.n_correct for each in evaluations) / n_labels, 5),
                    }
                if step < n_steps:
                    began_s, batch = time.perf_counter(), next(stream)
                    stepper.step(step, batch)
                    seconds += time.perf_counter() - began_s
        except NonFiniteLoss:
            yield {"step": step, "passes": step * method.passes, "seconds": seconds, "loss": math.inf, "accuracy": 0.0}
        finally:
            stepper.close()

    def choose_rate(self, name: str, n_passes: int) -> list[dict[str, Any]]:
        """One trial of about n_passes forward passes for each rate of a method's grid; `best` marks the chosen rate."""
        method = METHODS[name]
        n_steps = max(1, n_passes // method.passes)
        trials: list[dict[str, Any]] = []
        beside = max(0, (len(method.rates) - self.n_rates) // 2)
        rates = method.rates[beside : len(method.rates) - beside]
        for rate in rates:
            (end,) = self.run(method, rate, GRID_SEED, n_steps, self.valid, [n_steps])
            trials.append({"method": name, "rate": rate, "steps": n_steps, "valid_loss": end["loss"]})
            print(
                f"grid       {method.label:20} rate {rate:<8g} {n_steps} steps  valid loss {end['loss']:.4f}",
                flush=True,
            )
        best = min(trials, key=lambda trial: trial["valid_loss"])
        for trial in trials:
            trial["best"] = trial is best
        if best["rate"] in (rates[0], rates[-1]):
            print(f"grid       {method.label}: the best rate {best['rate']:g} is at the grid's edge", flush=True)
        return trials

    def curves(self, name: str, rate: float, n_steps: int, n_seeds: int) -> list[dict[str, Any]]:
        """Runs a method with `n_seeds` seeds; returns the points of its curves on the test rows."""
        method, rows = METHODS[name], []
        for seed in range(n_seeds):
            for point in self.run(method, rate, seed, n_steps, self.test, marks_up_to(n_steps)):
                rows.append({"method": name, "rate": rate, "seed": seed, **point})
            print(
                f"run        {method.label:20} seed {seed}  {point['step']} steps, {point['seconds']:.0f} s  "
                f"test loss {point['loss']:.4f}  accuracy {point['accuracy']:.1%}",
                flush=True,
            )
        return rows

    def _eval(self, rows: TokenRows) -> Iterator[Any]:
        return eval_batches(rows, self.batch_size, self.eval_batches)


def marks_up_to(n_steps: int) -> list[int]:
    """0, steps growing by a factor of 1.25 to 1.5, the last step, and 100, the step of the paper's finding."""
    marks, at = {0, n_steps, *([100] if n_steps >= 100 else [])}, 1.0
    while at < n_steps:
        marks.add(round(at))
        at *= 1.5 if at < 50 else 1.25
    return sorted(marks)


def convergence(argv: Sequence[str]) -> None:
    """The paper's Figure 1: exact gradients and MeZO on the same data, by steps, forward passes and seconds.

    Offline by default: the bundled model on the bundled text. With a network, on the paper's data:

        python -m bench convergence --model mlx-community/Qwen2.5-0.5B-4bit --data Salesforce/wikitext:wikitext-2-raw-v1

    (needs `datasets`). The paper's finding on WikiText-2: first order improves clearly within 100 steps; zeroth order
    hardly improves in 1,000 and is still behind after 100,000.
    """
    parser = report.parser("convergence", convergence.__doc__)
    add_options(parser, grid_passes=2000)
    parser.add_argument("--steps", type=report.positive, default=200, help="steps of exact gradients")
    parser.add_argument("--zo-steps", type=report.positive, default=1000, help="steps of MeZO")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.zo_steps, options.seeds, options.grid_passes, options.eval_batches = 25, 50, 2, 12, 4
        options.rates = 3
    _compare("convergence", options, {"mebp": options.steps, "mezo": options.zo_steps})


def zo_variants(argv: Sequence[str]) -> None:
    """The paper's Figure 3: MeZO, K-ZOO, HiZOO and FZOO with the same number of forward passes, and exact gradients.

    HiZOO's alpha is its authors' 1e-8, which makes it a slower MeZO; K-ZOO's pool has 4,096 seeds; FZOO uses 8
    directions per step.
    """
    parser = report.parser("zo_variants", zo_variants.__doc__)
    add_options(parser, grid_passes=720)
    parser.add_argument(
        "--passes", type=report.positive, default=720, help="forward passes per run of the zeroth-order methods"
    )
    parser.add_argument("--steps", type=report.positive, default=100, help="steps of exact gradients")
    options = parser.parse_args(argv)
    if options.quick:
        options.steps, options.passes, options.seeds, options.grid_passes, options.eval_batches = 25, 54, 2, 18, 4
        options.rates = 3
    n_steps = {"mebp": options.steps}
    n_steps |= {name: max(1, options.passes // METHODS[name].passes) for name in ZEROTH_ORDER}
    _compare("zo_variants", options, n_steps)


def _compare(name: str, options: argparse.Namespace, n_steps: dict[str, int]) -> None:
    """Chooses rates and measures curves of the methods in n_steps; prints the table and writes the files."""
    trials, rows = run_all(Task(options), n_steps, options)
    print(summary(rows, list(n_steps)))
    report.publish(name, options, rows, draw, grid=trials)


def best_rate(trials: Sequence[dict[str, Any]], name: str) -> float:
    """The chosen rate of a method."""
    return next(float(trial["rate"]) for trial in trials if trial["method"] == name and trial["best"])


def run_all(task: Task, n_steps: dict[str, int], options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Returns (trials of the learning rates, points of the curves) of every method in n_steps."""
    trials: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for name, steps in n_steps.items():
        trials += task.choose_rate(name, options.grid_passes)
        rows += task.curves(name, best_rate(trials, name), steps, options.seeds)
    return trials, rows


def summary(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """A row for each method: losses at the start, early and at the end; passes to the first method's early loss.

    Early: after 100 steps or, in shorter runs, after the first method's last step.
    """
    early = min(100, max(row["step"] for row in rows if row["method"] == names[0]))
    first = at_step(rows, names[0], early)
    heads = [
        "method",
        "rate",
        "start",
        f"{early} steps",
        "end",
        "steps",
        "passes",
        "s",
        "accuracy",
        f"passes to {first:.3f}",
    ]
    lines = []
    for name in names:
        own = [row for row in rows if row["method"] == name]
        last = max(row["step"] for row in own)
        end = [row for row in own if row["step"] == last]
        median = {key: report.spread([row[key] for row in end])["median"] for key in ("loss", "accuracy", "seconds")}
        reached = _passes_to(own, first)
        lines.append(
            [
                METHODS[name].label,
                f"{own[0]['rate']:g}",
                at_step(rows, name, 0),
                at_step(rows, name, early),
                median["loss"],
                last,
                end[0]["passes"],
                median["seconds"],
                f"{median['accuracy']:.1%}",
                f"{reached:,}" if reached is not None else "not reached",
            ]
        )
    return report.table(heads, lines)


def at_step(rows: Sequence[dict[str, Any]], name: str, step: int) -> float:
    """The median loss of a method at its last mark up to `step`."""
    own = [row for row in rows if row["method"] == name and row["step"] <= step]
    last = max(row["step"] for row in own)
    return report.spread([row["loss"] for row in own if row["step"] == last])["median"]


def _passes_to(own: Sequence[dict[str, Any]], loss: float) -> int | None:
    for step in sorted({row["step"] for row in own}):
        here = [row for row in own if row["step"] == step]
        if report.spread([row["loss"] for row in here])["median"] <= loss:
            return int(here[0]["passes"])
    return None


def draw(plt: Any, rows: report.Rows, options: Any) -> tuple[Any, str]:
    """Loss and accuracy against steps, forward passes and seconds: medians over the seeds, bands of 20 to 80 %."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(2, 3, figsize=(10, 5.6), sharey="row", sharex="col")
    columns = (("step", "steps"), ("passes", "forward passes (2 per step of MeBP)"), ("seconds", "seconds of training"))
    for across, (column, label) in enumerate(columns):
        for down, (value, what) in enumerate((("loss", "test loss"), ("accuracy", "next-token accuracy"))):
            axes = panels[down, across]
            for name in names:
                _draw_curve(axes, METHODS[name], [row for row in rows if row["method"] == name], column, value)
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=0)
            if down:
                axes.set_xlabel(label)
            if not across:
                axes.set_ylabel(what)
    losses = [row["loss"] for row in rows if math.isfinite(row["loss"])]
    start = max(row["loss"] for row in rows if row["step"] == 0)
    panels[0, 0].set_ylim(top=min(max(losses), 1.15 * start) + 0.1)  # a diverging run would flatten the other curves
    panels[1, 0].legend(fontsize=7, loc="upper left")
    title = f"{options.model} model, {options.data} data, {options.batch_size} rows per step, {options.seeds} seeds"
    figure.suptitle(title)
    return figure, ""


def _draw_curve(axes: Any, method: Method, rows: report.Rows, column: str, value: str) -> None:
    """Draws a method's line and band of `value` against `column`."""
    steps = sorted({row["step"] for row in rows})
    grouped = [[row for row in rows if row["step"] == step] for step in steps]
    x = [report.spread([row[column] for row in group])["median"] for group in grouped]
    spreads = [report.spread([row[value] for row in group]) for group in grouped]
    median, low, high = ([spread[end] for spread in spreads] for end in ("median", "p20", "p80"))
    axes.plot(x, median, color=method.color, label=method.label)
    axes.fill_between(x, low, high, color=method.color, alpha=0.25, linewidth=0)


PICTURES = {"convergence": draw, "zo_variants": draw}
BENCHES: dict[str, report.Bench] = {"convergence": convergence, "zo_variants": zo_variants}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv)


if __name__ == "__main__":
    report.run(main)
