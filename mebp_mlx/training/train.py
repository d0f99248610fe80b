"""Trains a prepared run: its folder and log, the loop, and the final report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

from ..engine import Engine, make_engine
from ..errors import BudgetError
from ..planner.projection import host_rates, project
from ..system.device import dtype_name
from ..system.footprint import PeakMeter, footprint_bytes
from ..system.interrupt import Interrupt, Stopped
from ..system.last_line import LastLine
from ..system.units import megabytes
from ..system.version import __version__
from . import folder
from .best import FOLDER as BEST
from .callbacks import sender
from .log import RunLog
from .report import BudgetWatch, alignment_notices, notices, plan_record, show_sample, summarize
from .run import Run
from .saving import space_notice
from .services import Services
from .trainer import Trainer


def train_run(run: Run, interrupt: Interrupt, meter: PeakMeter) -> None:
    """Trains up to the last iteration and creates the run's folder.

    Raises Stopped after a signal and BudgetError if the measured footprint exceeds the budget (--over-budget stop),
    both with everything saved; NonFiniteLoss; UserError.
    """
    group, sizes = run.group, run.inputs.sizes(run.config, run.deal)
    with closing(_make_engine(run)) as engine:
        engine.reserve(sizes.batch_size, sizes.longest)
        _print_model(run)
        folder.make_folder(run.folder)
        with _open_log(run) as log:
            watch = BudgetWatch(run.planned, meter, log, stop=run.config.over_budget == "stop")
            trainer = Trainer(run, engine, log, watch, interrupt)
            interrupt.deferred = True
            group.gather(None)  # all machines are ready: from now on none waits for another's set-up
            group.timeout_s = run.config.peer_timeout
            step = trainer.train()
            if trainer.signal is not None:
                iteration = run.config.iteration(step)
                log.event("interrupted", iter=iteration, step=step)
                saved = f"interrupted: iteration {iteration} is saved in {run.folder}; --resume continues"
                raise Stopped(trainer.signal, saved)
            interrupt.deferred = False
            _check_budget(run, step, watch)
            if step < run.inputs.n_updates:
                log.notice(f"stopped early: {run.best}", iter=run.config.iteration(step))
            if run.config.tracks_best and run.best.iteration:
                log.say(f"best       iteration {run.best.iteration}, loss {run.best.loss:.3f}, in {run.folder / BEST}")
            peak_bytes = max(group.gather(meter.peak_bytes))
            summarize(run.folder, log, peak_bytes, trainer.seconds, run.config.iteration(step), run.planned)
            if run.config.phone is not None and run.planned is not None:
                plan, workload = run.planned.plan, run.planned.workload
                for text in project(run.config.phone, workload, plan, trainer.step_s, host_rates()):
                    log.say(text)
    if group.is_first:
        show_sample(run.config, run.inputs.model_path, run.folder)


def _make_engine(run: Run) -> Engine:
    return make_engine(
        run.config.engine,
        run.model,
        run.lora,
        plan=None if run.planned is None else run.planned.plan,
        seed=run.config.seed,
        estimator=run.estimator,
        arena_dir=run.config.arena_dir,
        total=run.group.total,
    )


def _print_model(run: Run) -> None:
    config, model = run.config, run.model
    print(
        f"model      {config.model}: {model.spec.family}, {model.spec.L} layers, width {model.spec.D}; "
        f"computed in {dtype_name(model.dtype)}, weights {'packed' if model.packed else 'decompressed'}\n"
        f"LoRA       {run.n_parameters:,} parameters, rank {config.rank}; {config.optimizer_name}, "
        f"engine {config.engine}; footprint {megabytes(footprint_bytes())}",
        flush=True,
    )


@contextmanager
def _open_log(run: Run) -> Iterator[RunLog]:
    """Writes run.json, opens the run's log and writes the first events."""
    config, first = run.config, run.config.iteration(run.inputs.first_step)
    project = config.project_name or run.folder.resolve().name
    services = Services(config.report_to or (), project, run.folder, config.to_dict(), print)
    last_line = LastLine(run.folder / folder.CHECKPOINT, run.model.weights.file_bytes)
    log = RunLog(run.folder, n_iters=run.n_iters, iteration=first, continues=config.resume)
    log.senders = [services.send, sender(run.callbacks)]
    services.say = log.notice
    with last_line, log, services:
        folder.remove_partial_files(run.folder)
        n_before = folder.recorded_machines(run.folder) if config.resume else run.group.size
        about = {"n_iters": run.n_iters, "n_lora_parameters": run.n_parameters, "data": run.inputs.data.counts}
        record = {
            "options": config.to_dict(),
            **about,
            "plan": None if run.planned is None else plan_record(run.planned),
            "origin": run.inputs.fingerprints,
            "version": __version__,
            "machine": run.machine,
            "n_machines": run.group.size,
        }
        folder.write_record(run.folder, record)
        measured = {"before_model_bytes": run.before_model_bytes, "blas": run.machine["blas"]}
        log.event("start", iter=first, n_updates=run.inputs.n_updates, **about, **measured)
        if first:
            log.say(f"resuming after iteration {first} of {run.n_iters}")
        for text in [*notices(config, run.inputs.data, run.optimizer, run.n_iters), *run.deal.notices(n_before)]:
            log.notice(text)
        for text in (*run.model.spec.remarks, *alignment_notices(run.model, config.model)):
            log.notice(text)
        iterations = range(first, run.n_iters)
        if space := space_notice(run.folder, config, run.lora, run.updater.state(), iterations):
            log.notice(space)
        yield log


def _check_budget(run: Run, step: int, watch: BudgetWatch) -> None:
    """Raises BudgetError if the run had to end because the footprint exceeded the budget."""
    iteration = run.config.iteration(step)
    if watch.look(iteration):
        how = "with a larger budget or --over-budget warn"
        rest = f"--resume {how} continues" if step < run.inputs.n_updates else f"a run {how} avoids this error"
        done = f"iteration {iteration} of {run.n_iters} is saved in {run.folder}"
        raise BudgetError(f"--memory-budget: {watch.passed}; {done}; {rest}")
    run.group.gather(None)  # where a machine whose budget was exceeded reports it
