"""`python -m mebp_mlx.train`: options, model, data, and the training loop.

Iterations are micro-batches, as in mlx-lm; an update is made of `grad_accumulation_steps` of them. All random keys
are functions of the seed and the number of updates done, so that number, the LoRA parameters and the optimizer's
state are all that an exact resume needs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mebp_mlx

from .config import TrainConfig
from .data.dataset import Batch, DataSets, TokenRows, batches, eval_batches, n_batches_per_epoch, prepare
from .data.preview import show_rows
from .engine import Engine, make_engine
from .engine.zeroth_order import Estimator
from .errors import BudgetError, NonFiniteLoss, UserError, memory_errors_told
from .model.base import Model
from .model.lora import Lora
from .planner.projection import host_rates, impose, project
from .system.device import dtype_name
from .system.footprint import PeakMeter, footprint_bytes
from .system.last_line import LastLine
from .system.machine import machine
from .system.phone import THROTTLED, thermal_state
from .system.units import megabytes
from .training import checkpoint
from .training.checkpoint import Checkpoint
from .training.interrupt import Interrupt
from .training.log import RunLog, reporter
from .training.optimizers import make_optimizer, uses_learning_rate
from .training.report import BudgetWatch, alignment_notices, notices, plan_record, print_data, show_sample, summarize
from .training.setup import Sizes, estimator_of, make_lora, make_plan, make_updater, plan_without_data, saved_plan
from .training.update import Updater
from .weights.hub import resolve_model

DONE, WRONG_INPUT, NO_BUDGET, INTERRUPTED = 0, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. What a user can get wrong is one line on stderr, no traceback."""
    try:
        config = TrainConfig.from_args(argv)
        if config.resume:
            config = TrainConfig.from_args(argv, saved=checkpoint.saved_options(Path(config.adapter_path)))
        with memory_errors_told(), Interrupt() as interrupt, PeakMeter() as meter:
            return run(config, interrupt, meter)
    except (UserError, NonFiniteLoss) as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return NO_BUDGET if isinstance(error, BudgetError) else WRONG_INPUT
    except KeyboardInterrupt:
        print("interrupted; the last save, if there was one, stays as it is", file=sys.stderr)
        return INTERRUPTED


def run(config: TrainConfig, interrupt: Interrupt, meter: PeakMeter) -> int:
    """Trains as `config` says and returns the exit code. Raises UserError, BudgetError, NonFiniteLoss.

    BudgetError also when the measured footprint passes the budget (--over-budget stop): all is saved then.
    """
    folder = Path(config.adapter_path)
    about = machine()
    print(f"backend    MLX {about['mlx']} on {mx.default_device().type.name}, BLAS {about['blas']}", flush=True)

    # Names and files, before anything large is opened.
    model_path = resolve_model(config.model)
    if config.dry_run and plan_without_data(config, model_path):
        return DONE
    saved = checkpoint.load_checkpoint(folder) if config.resume else None
    if saved is None and not (config.dry_run or config.preview):
        checkpoint.check_unused(folder)
    data = prepare(config.data_source, model_path, config.row_options)
    print_data(data, config)
    if config.preview:
        show_rows(data.train, model_path, config.preview)
        return DONE
    if config.test and data.test is None:
        raise UserError(f"--test: {config.data} has no test.jsonl")
    origin = {"model": checkpoint.model_fingerprint(model_path), "data": checkpoint.data_fingerprint(data.cache_dir)}
    if saved is not None:
        checkpoint.check_same_run(config, saved, origin)
    n_updates = count_updates(config, data.train)
    accumulate = config.grad_accumulation_steps
    n_iters = n_updates * accumulate
    step = 0 if saved is None else saved.step
    if saved is not None and step >= n_updates:
        print(
            f"nothing to do: the run in {folder} has done {step * accumulate} iterations of {n_iters}; "
            "a larger --iters continues it"
        )
        return DONE
    before_model_bytes = footprint_bytes()
    print(f"footprint  {megabytes(before_model_bytes)} before the model is opened")

    # Model, trainable parameters, optimizer, engine.
    model = mebp_mlx.open_model(model_path, config.dtype, config.weights)
    if config.phone is not None:
        print(impose(config.phone, config.budget_bytes))
    lora = make_lora(config, model)
    optimizer = make_optimizer(config, n_updates)
    estimator = estimator_of(config, lora)
    if saved is not None:
        restore(saved, lora, optimizer, estimator)
        saved = None  # its arrays belong to lora and optimizer now
    batch_size, longest = min(config.batch_size, len(data.train)), int(data.train.lengths.max()) - 1
    evaluated = [rows for rows in (data.valid, data.test if config.test else None) if rows is not None]
    longest_evaluated = max((int(rows.lengths.max()) - 1 for rows in evaluated), default=0)
    sizes = Sizes(batch_size, longest, longest_evaluated)
    known = saved_plan(folder) if config.resume else None
    planned = make_plan(config, model, lora, sizes, estimator, known)
    if config.dry_run:
        return DONE
    updater = make_updater(config, lora, None if planned is None else planned.plan, optimizer)
    engine = make_engine(
        config.engine,
        model,
        lora,
        plan=None if planned is None else planned.plan,
        seed=config.seed,
        estimator=estimator,
        arena_dir=config.arena_dir,
    )
    engine.reserve(batch_size, longest)
    n_parameters = sum(value.size for value in lora.parameters().values())
    print(
        f"model      {config.model}: {model.spec.family}, {model.spec.L} layers, width {model.spec.D}; "
        f"computed in {dtype_name(model.dtype)}, weights {'packed' if model.packed else 'decompressed'}\n"
        f"LoRA       {n_parameters:,} parameters, rank {config.rank}; {config.optimizer_name}, "
        f"engine {config.engine}; footprint {megabytes(footprint_bytes())}",
        flush=True,
    )

    # The folder belongs to this run from here on.
    checkpoint.make_folder(folder)
    send = reporter(config.report_to, config.project_name or folder.resolve().name, config.to_dict())
    last_line = LastLine(folder / checkpoint.CHECKPOINT, model.weights.file_bytes)
    with last_line, RunLog(folder, n_iters=n_iters, iteration=step * accumulate, send=send) as log:
        checkpoint.write_json(
            folder / checkpoint.RUN,
            {
                "options": config.to_dict(),
                "n_iters": n_iters,
                "n_lora_parameters": n_parameters,
                "plan": None if planned is None else plan_record(planned),
                "data": data.counts,
                "origin": origin,
                "version": mebp_mlx.__version__,
                "machine": about,
            },
        )
        log.event(
            "start",
            iter=step * accumulate,
            n_iters=n_iters,
            n_updates=n_updates,
            data=data.counts,
            n_lora_parameters=n_parameters,
            before_model_bytes=before_model_bytes,
            blas=about["blas"],
        )
        if step:
            log.say(f"resuming after iteration {step * accumulate} of {n_iters}")
        for text in [*notices(config, data, optimizer, n_iters), *alignment_notices(model, config.model)]:
            log.notice(text)

        watch = BudgetWatch(planned, meter, log, stop=config.over_budget == "stop")
        trainer = Trainer(
            config,
            folder,
            data,
            origin,
            model,
            lora,
            optimizer,
            updater,
            estimator,
            engine,
            log,
            meter,
            interrupt,
            watch,
        )
        interrupt.deferred = True
        try:
            step = trainer.train(step, n_updates)
        finally:
            engine.close()
        if interrupt.requested:
            log.event("interrupted", iter=step * accumulate, step=step)
            log.say(f"interrupted: iteration {step * accumulate} is saved in {folder}; --resume continues")
            return INTERRUPTED
        interrupt.deferred = False
        if watch.look(step * accumulate):
            how = "with a larger budget or --over-budget warn"
            rest = f"--resume {how} continues" if step < n_updates else f"a run {how} would not end so"
            done = f"iteration {step * accumulate} of {n_iters} is saved in {folder}"
            raise BudgetError(f"--memory-budget: {watch.passed}; {done}; {rest}")
        summarize(folder, log, meter.peak_bytes, trainer.seconds, n_iters, planned)
        if config.phone is not None and planned is not None:
            for text in project(config.phone, planned.workload, planned.plan, trainer.step_s, host_rates()):
                log.say(text)
    show_sample(config, model_path, folder)
    return DONE


@dataclass
class Trainer:
    """The loop, with everything it works on."""

    config: TrainConfig
    folder: Path
    data: DataSets
    origin: dict[str, str]
    model: Model
    lora: Lora
    optimizer: Any
    updater: Updater
    estimator: Estimator | None
    engine: Engine
    log: RunLog
    meter: PeakMeter
    interrupt: Interrupt
    watch: BudgetWatch
    seconds: float = 0.0
    step_s: float | None = None  # of the last report
    hot: bool = False  # a warm machine was reported

    def train(self, step: int, n_updates: int) -> int:
        """Updates number `step` (from 0) to `n_updates`, with reports, saves and validations; returns those done.

        Ends early, with everything saved, when an interrupt is requested or the budget is passed.
        """
        config, accumulate = self.config, self.config.grad_accumulation_steps
        began_s, window, stopped = time.perf_counter(), _Window(), self.interrupt
        stream = batches(self.data.train, config.batch_size, config.seed, start=step * accumulate)
        saved_step = -1
        if step == 0:
            self.validate(0)
        while step < n_updates and not stopped.requested and not self.watch.look(step * accumulate):
            started_s = time.perf_counter()
            micro_batches = [next(stream) for _ in range(accumulate)]
            loss = self.update(step, micro_batches)
            if loss is None:
                break
            window.add(loss, sum(batch.n_labels for batch in micro_batches), time.perf_counter() - started_s)
            before, step = step * accumulate, step + 1
            iteration, last = step * accumulate, step == n_updates
            self.log.advance(iteration)
            if last or _due(config.steps_per_report, before, iteration):
                self.report(iteration, window)
                window = _Window()
            if last or _due(config.steps_per_eval, before, iteration):
                self.validate(iteration)  # before the save: a state with a loss that is not finite is not kept
            if last or _due(config.save_every, before, iteration):
                self.save(step, numbered=_due(config.save_every, before, iteration))
                saved_step = step
            if last and config.test and self.data.test is not None:
                self.evaluate("test", iteration, self.data.test, config.test_batches)
        if window.n_updates:  # interrupted between two reports
            self.report(step * accumulate, window)
        if saved_step != step:
            self.save(step, numbered=False)
        self.seconds = time.perf_counter() - began_s
        return step

    def update(self, step: int, micro_batches: Sequence[Batch]) -> float | None:
        """One optimizer update; returns the mean loss over all labelled tokens of its micro-batches.

        An interrupt between two micro-batches gives up the update, of which nothing is applied yet: None.
        """
        n_labels = sum(batch.n_labels for batch in micro_batches)
        self.updater.begin_step()
        loss = 0.0
        for micro, batch in enumerate(micro_batches):
            if micro and self.interrupt.requested:
                return None
            self.check_files()
            try:
                loss += self.engine.step(batch, step=step, micro=micro, n_labels=n_labels, sink=self.updater.sink)
            except NonFiniteLoss as error:
                raise self.not_finite(str(error), step * len(micro_batches) + micro + 1, batch) from None
        self.updater.end_step()
        return loss

    def check_files(self) -> None:
        """Raises UserError when a weight file was cut short, before a pass reads beyond its end."""
        try:
            self.model.weights.check_sizes()
        except UserError as error:
            saved = (self.folder / checkpoint.CHECKPOINT).exists()
            last = f"what is saved in {self.folder} is the last good state" if saved else "nothing is saved yet"
            raise UserError(f"{error}; {last}") from None

    def not_finite(self, what: str, iteration: int, batch: Batch) -> NonFiniteLoss:
        """The error that ends the run, after an entry in the log."""
        self.log.event("notice", text=what, iter=iteration, rows=batch.rows)
        return NonFiniteLoss(
            f"{what} at iteration {iteration} (rows {', '.join(batch.rows)}); "
            f"what is saved in {self.folder} is the last good state"
        )

    def report(self, iteration: int, window: _Window) -> None:
        """What the updates since the last report came to."""
        rate = self.optimizer.learning_rate.item() if uses_learning_rate(self.optimizer) else None
        thermal = None if self.config.phone is None else thermal_state()
        if thermal in THROTTLED and not self.hot:
            self.hot = True
            self.log.notice(f"thermal state {thermal}: the system slows this machine down", iter=iteration)
        self.step_s = window.seconds / window.n_updates
        self.log.train(
            iteration,
            loss=window.loss_sum / window.n_labels,
            learning_rate=rate,
            n_tokens=window.n_labels,
            tokens_per_s=window.n_labels / window.seconds,
            step_s=self.step_s,
            footprint_bytes=footprint_bytes(),
            peak_bytes=self.meter.peak_bytes,
            thermal=thermal,
        )

    def save(self, step: int, numbered: bool) -> None:
        """Checkpoint and adapters; refuses a state that is not finite (NonFiniteLoss)."""
        self.check_files()  # or what a pass read as zeros would be kept
        iteration = step * self.config.grad_accumulation_steps
        started_s = time.perf_counter()
        checkpoint.save_checkpoint(
            self.folder,
            Checkpoint(
                self.lora.parameters(),
                self.updater.state(),
                step,
                self.config.to_dict(),
                self.origin,
                {} if self.estimator is None else self.estimator.state(),
            ),
        )
        checkpoint.save_adapters(self.folder, self.lora, self.config, iteration, numbered=numbered)
        self.log.event("save", iter=iteration, step=step, seconds=time.perf_counter() - started_s)

    def validate(self, iteration: int) -> None:
        """The loss on the first `val_batches` batches of the validation rows, if there are any."""
        if self.data.valid is not None and self.config.val_batches:
            self.evaluate("valid", iteration, self.data.valid, self.config.val_batches)

    def evaluate(self, kind: str, iteration: int, rows: TokenRows, limit: int) -> None:
        """Token-weighted means over the first `limit` batches; nothing is reported when it is interrupted.

        Raises NonFiniteLoss, too.
        """
        started_s, loss_sum, n_labels, n_correct = time.perf_counter(), 0.0, 0, 0
        for batch in eval_batches(rows, self.config.batch_size, limit):
            if self.interrupt.requested:
                return
            self.check_files()
            found = self.engine.evaluate(batch)
            if not math.isfinite(found.loss_sum):
                raise self.not_finite(f"{kind} loss is {found.loss_sum}", iteration, batch)
            loss_sum, n_labels = loss_sum + found.loss_sum, n_labels + found.n_labels
            n_correct += found.n_correct
        seconds, accuracy = time.perf_counter() - started_s, n_correct / n_labels
        self.log.evaluation(
            kind, iteration, loss=loss_sum / n_labels, accuracy=accuracy, n_tokens=n_labels, seconds=seconds
        )


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


def _due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def count_updates(config: TrainConfig, rows: TokenRows) -> int:
    """Optimizer updates of the run: whole ones only, so that --iters 10 with 4 micro-batches an update makes 2."""
    accumulate = config.grad_accumulation_steps
    if config.epochs is not None:
        return math.ceil(config.epochs * n_batches_per_epoch(rows, config.batch_size) / accumulate)
    if config.iters < accumulate:
        raise UserError(f"--iters: {config.iters} is less than one update of --grad-accumulation-steps {accumulate}")
    return config.iters // accumulate


def restore(saved: Checkpoint, lora: Lora, optimizer: Any, estimator: Estimator | None) -> None:
    """Puts a checkpoint's arrays into a fresh Lora, optimizer and estimator of the same options.

    One parameter is read at a time, and the optimizer's state not yet: all of it at once would be above the plan.
    """
    optimizer.init(lora.parameters())  # for names and shapes; nothing is computed
    state = {} if estimator is None else estimator.state()
    checkpoint.check_arrays(saved, Checkpoint(lora.parameters(), optimizer.state, 0, {}, {}, state))
    for name, value in saved.lora.items():
        mx.eval(value)
        lora.update({name: value})
    optimizer.state = saved.optimizer
    if estimator is not None:
        mx.eval(saved.engine)
        estimator.load(saved.engine)


if __name__ == "__main__":
    sys.exit(main())
