"""The training loop: updates, reports, validations and saves.

Iterations are micro-batches, as in mlx-lm; an update consists of `grad_accumulation_steps` of them. All random keys
are functions of the seed and the number of updates done, so an exact resume needs only that number, the LoRA
parameters and the optimizer's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.dataset import Batch, TokenRows, batches, eval_batches
from ..engine import Engine
from ..errors import NonFiniteLoss, UserError
from ..system.footprint import footprint_bytes
from ..system.interrupt import Interrupt
from ..system.phone import THROTTLED, thermal_state
from .distributed import check_same_parameters
from .folder import CHECKPOINT
from .log import RunLog, TrainReport, last_event
from .optimizers import uses_learning_rate
from .report import BudgetWatch
from .run import Run
from .saving import Saver, is_due


class Trainer:
    """The loop over a prepared run. seconds: duration of the whole loop; step_s: seconds per step in the last report;
    signal: the number of the signal that ends the run, whichever machine received it.
    """

    def __init__(self, run: Run, engine: Engine, log: RunLog, watch: BudgetWatch, interrupt: Interrupt) -> None:
        self.run, self.engine, self.log, self.watch, self.interrupt = run, engine, log, watch, interrupt
        self.config, self.data = run.config, run.inputs.data
        self.saver = Saver(run.folder, run.config, run.inputs.fingerprints, run.lora, run.best)
        self.group, self.deal = run.group, run.deal
        self.signal: int | None = None
        self.seconds = 0.0
        self.step_s: float | None = None
        self._throttling_reported = False

    def train(self) -> int:
        """Runs the remaining updates, with reports, saves and validations; returns the total number of updates done.

        Ends early, with everything saved, if an interrupt is requested or the budget is exceeded.
        """
        n_updates, began_s, window = self.run.inputs.n_updates, time.perf_counter(), _Window()
        step = saved_step = self.run.inputs.first_step
        stream = batches(self.data.train, self.config.batch_size, self.config.seed, start=self.config.iteration(step))
        if step == 0:
            saved_step = -1
            self.validate(0)
        else:
            if self.group.is_first:
                self.saver.complete(step, self.log)
            if self._validation_was_cut_off(step) and self.validate(self.config.iteration(step)):
                self.save(step)
        while step < n_updates and not self._has_to_end(step):
            started_s = time.perf_counter()
            micro_batches = [next(stream) for _ in range(self.config.grad_accumulation_steps)]
            loss = self.update(step, micro_batches)
            if loss is None:
                break
            window.add(loss, sum(batch.n_labels for batch in micro_batches), time.perf_counter() - started_s)
            before, iteration = self.config.iteration(step), self.config.iteration(step + 1)
            step += 1
            last = step == n_updates
            is_best = False
            self.log.advance(iteration)
            if last or is_due(self.config.steps_per_report, before, iteration):
                self.report(iteration, window)
                window = _Window()
            if last or is_due(self.config.steps_per_eval, before, iteration):
                is_best = self.validate(iteration)  # before the save, so that no state with a non-finite loss is saved
            if last or is_best or is_due(self.config.save_every, before, iteration):
                self.save(step)
                saved_step = step
        if window.n_updates:  # interrupted between two reports
            self.report(self.config.iteration(step), window)
        if saved_step != step:
            self.save(step)
        if step == n_updates or self.stopped_early:
            self.test(self.config.iteration(step))
        self._agree_on_end()
        self.seconds = time.perf_counter() - began_s
        return step

    @property
    def stopped_early(self) -> bool:
        """Whether --patience ends the run."""
        return self.run.best.is_exhausted and self.signal is None

    def _validation_was_cut_off(self, step: int) -> bool:
        """Whether the resumed run was interrupted during a validation that best/ depends on."""
        before, iteration = self.config.iteration(step - 1), self.config.iteration(step)
        done = self._last_iteration("valid") or 0
        is_wanted = self.config.tracks_best and is_due(self.config.steps_per_eval, before, iteration)
        return is_wanted and done < iteration

    def _has_to_end(self, step: int) -> bool:
        if self.run.best.is_exhausted:
            return True
        return self._agree_on_end(self.watch.look(self.config.iteration(step)))

    def _agree_on_end(self, has_passed: bool = False) -> bool:
        """Whether a signal or an exceeded budget ends the run on any machine. All machines call this together; none
        acts on its own knowledge alone.
        """
        signals, passed = zip(*self.group.gather((self.interrupt.requested, has_passed)), strict=True)
        if self.signal is None:
            self.signal = max((number for number in signals if number is not None), default=None)
        return self.signal is not None or any(passed)

    def _last_iteration(self, event: str) -> int | None:
        """The iteration of the latest event of that kind in the log; None if there is none."""
        value: int | None = self.group.first((last_event(self.run.folder, event) or {}).get("iter"))
        return value

    def update(self, step: int, micro_batches: Sequence[Batch]) -> float | None:
        """Makes one optimizer update; returns the mean loss over all labelled tokens of its micro-batches.

        Returns None if an interrupt between two micro-batches cancels the update before anything is applied. With
        several machines the run ends after the step instead.
        """
        began_s, waited_s, n_positions = time.perf_counter(), self.group.waited_s, 0
        n_labels = sum(batch.n_labels for batch in micro_batches)
        updater = self.run.updater
        updater.begin_step(len(micro_batches))
        loss, failure = 0.0, None
        for micro, batch in enumerate(micro_batches):
            if micro and self.group.is_alone and self.interrupt.requested is not None:
                return None
            self.check_files()
            part = self.deal.part(batch)
            n_positions += part.tokens.size
            about: dict[str, Any] = {"step": step, "micro": micro, "n_labels": n_labels, "sink": updater.sink}
            try:
                loss += self.engine.step(part, **about)
            except NonFiniteLoss as error:
                failure = self.not_finite(str(error), step * len(micro_batches) + micro + 1, part)
                if self.group.is_alone:
                    raise failure from None
                self.engine.step(batch.part(0, 0), **about)  # the other ranks wait for this rank's sums
        updater.end_step()
        if failure is not None:
            raise failure
        seconds = time.perf_counter() - began_s - (self.group.waited_s - waited_s)
        told = self.group.gather((loss, n_positions, seconds))
        losses, positions, all_seconds = zip(*told, strict=True)
        self.deal.learn(positions, all_seconds)
        return math.fsum(losses)

    def check_files(self) -> None:
        """Raises UserError if a weight file was truncated, before a pass reads beyond its end."""
        try:
            self.run.model.weights.check_sizes()
        except UserError as error:
            raise UserError(f"{error}; {self._last_save()}") from None

    def _last_save(self) -> str:
        folder = self.run.folder
        if (folder / CHECKPOINT).exists():
            return f"the last good state is saved in {folder}"
        return "nothing is saved yet"

    def not_finite(self, what: str, iteration: int, batch: Batch) -> NonFiniteLoss:
        """Logs a loss that is not finite and returns the error that ends the run."""
        self.log.event("notice", text=what, iter=iteration, rows=batch.rows)
        return NonFiniteLoss(f"{what} at iteration {iteration} (rows {', '.join(batch.rows)}); {self._last_save()}")

    def report(self, iteration: int, window: _Window) -> None:
        """Reports the updates since the last report."""
        optimizer = self.run.optimizer
        rate = optimizer.learning_rate.item() if uses_learning_rate(optimizer) else None
        thermal = None if self.config.phone is None else thermal_state()
        if thermal in THROTTLED and not self._throttling_reported:
            self._throttling_reported = True
            self.log.notice(f"thermal state {thermal}: the system is throttling this machine", iter=iteration)
        self.step_s = window.seconds / window.n_updates
        footprints, peaks = zip(*self.group.gather((footprint_bytes(), self.watch.meter.peak_bytes)), strict=True)
        self.log.train(
            iteration,
            TrainReport(
                loss=window.loss_sum / window.n_labels,
                learning_rate=rate,
                n_tokens=window.n_labels,
                tokens_per_s=window.n_labels / window.seconds,
                step_s=self.step_s,
                footprint_bytes=max(footprints),
                peak_bytes=max(peaks),
                peak_bytes_by_rank=None if self.group.is_alone else peaks,
                thermal=thermal,
                loss_at=None if self.run.estimator is None else self.run.estimator.loss_at,
            ),
        )

    def save(self, step: int) -> None:
        """Saves checkpoint and adapters. Raises NonFiniteLoss if a value is not finite."""
        self.check_files()  # a truncated file may have been read as zeros
        check_same_parameters(self.group, self.run.lora)
        if self.group.is_first:
            self.saver.save(step, self.run.updater, self.run.estimator, self.log)

    def validate(self, iteration: int) -> bool:
        """Evaluates the first `val_batches` batches of the validation rows, if there are any; returns whether the
        adapters are to be saved as the best.
        """
        if self.data.valid is None or not self.config.val_batches:
            return False
        loss = self.evaluate("valid", iteration, self.data.valid, self.config.val_batches)
        return loss is not None and self.run.best.observe(loss, iteration) and self.config.tracks_best and iteration > 0

    def test(self, iteration: int) -> None:
        """Evaluates the test rows after the last iteration (--test), unless the log already has the result."""
        if self.config.test and self.data.test is not None and self._last_iteration("test") != iteration:
            self.evaluate("test", iteration, self.data.test, self.config.test_batches)

    def evaluate(self, kind: str, iteration: int, rows: TokenRows, limit: int) -> float | None:
        """Reports token-weighted means over the first `limit` batches; returns the loss. If interrupted, it reports
        nothing and returns None.

        Raises NonFiniteLoss.
        """
        started_s, loss_sum, n_labels, n_correct, is_cut = time.perf_counter(), 0.0, 0, 0, False
        for batch in eval_batches(rows, self.config.batch_size, limit):
            if is_cut := self.interrupt.requested is not None:
                break
            self.check_files()
            part = self.deal.part(batch)
            evaluation = self.engine.evaluate(part)
            if not math.isfinite(evaluation.loss_sum):
                raise self.not_finite(f"{kind} loss is {evaluation.loss_sum}", iteration, part)
            loss_sum, n_labels = loss_sum + evaluation.loss_sum, n_labels + evaluation.n_labels
            n_correct += evaluation.n_correct
        told = self.group.gather((loss_sum, n_labels, n_correct, is_cut))
        loss_sum, n_labels, n_correct, n_cut = (sum(values) for values in zip(*told, strict=True))
        if n_cut:
            return None
        seconds, accuracy = time.perf_counter() - started_s, n_correct / n_labels
        self.log.evaluation(
            kind, iteration, loss=loss_sum / n_labels, accuracy=accuracy, n_tokens=n_labels, seconds=seconds
        )
        return loss_sum / n_labels


@dataclass
class _Window:
    """Sums since the last report."""

    loss_sum: float = 0.0
    n_labels: int = 0
    n_updates: int = 0
    seconds: float = 0.0

    def add(self, loss: float, n_labels: int, seconds: float) -> None:
        self.loss_sum += loss * n_labels
        self.n_labels += n_labels
        self.n_updates += 1
        self.seconds += seconds
