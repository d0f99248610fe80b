"""`python -m mebp_mlx.train`, and `mebp_mlx.train(config)` from Python: fine-tunes a model.

The command and the function share a name, so this module is callable: `mebp_mlx.train(config, callbacks)` is
`mebp_mlx.train.train(config, callbacks)`, whichever was imported first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .config import TrainConfig
from .system.command import run_command
from .system.footprint import PeakMeter
from .system.group import Group
from .system.interrupt import Interrupt
from .system.limits import check_peak
from .system.terminal import say
from .system.units import megabytes
from .training.callbacks import Callback
from .training.checkpoint import saved_options
from .training.distributed import joined, own_config
from .training.evaluate import evaluate_alone, is_test_alone, table
from .training.run import prepare_run
from .training.train import train_run
from .weights.hub import resolve_model


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Errors of the user are one line on stderr, without a traceback."""
    interrupted = "interrupted; the last save, if there was one, is intact"

    def work(interrupt: Interrupt) -> None:
        with joined() as group:
            run(config_of(argv, group), interrupt, group)

    return run_command(work, interrupted)


def config_of(argv: Sequence[str] | None, group: Group | None = None) -> TrainConfig:
    """The command line's options, merged over those of the resumed run, which the first rank of a group reads."""
    config, group = TrainConfig.from_args(argv), group or Group()
    if config.resume:
        config = TrainConfig.from_args(argv, saved=_saved_by_first(config, group))
    return config


def _saved_by_first(config: TrainConfig, group: Group) -> dict[str, Any]:
    saved: dict[str, Any] = group.first(saved_options(Path(config.adapter_path)) if group.is_first else None)
    return saved


def train(config: TrainConfig | None = None, callbacks: Sequence[Callback] = ()) -> Path:
    """Trains with the options in `config` (None: the bundled model on the bundled text); prints as the command does.

    With config.resume, options that have their default values are taken from the resumed run. callbacks: objects with
    mlx-lm's on_train_loss_report(info), on_val_loss_report(info) or both. Returns the folder of the adapters. Raises
    UserError, BudgetError (a UserError) and NonFiniteLoss; KeyboardInterrupt after an interrupt, with everything saved.
    """
    config = TrainConfig() if config is None else config
    with Interrupt() as interrupt, joined() as group:
        if config.resume:
            config = TrainConfig.over(config.changed(), _saved_by_first(config, group))
        run(config, interrupt, group, callbacks)
    return Path(config.adapter_path)


def run(config: TrainConfig, interrupt: Interrupt, group: Group, callbacks: Sequence[Callback] = ()) -> None:
    """Trains, or only tests. Raises UserError, BudgetError, NonFiniteLoss, Stopped, PeerLost, PeerFailed."""
    is_test = is_test_alone(config)
    config = own_config(config, group)
    with PeakMeter() as meter:
        if is_test:
            for line in table(*evaluate_alone(config, resolve_model(config.model), group)):
                say(line)
            say(f"peak footprint {megabytes(meter.peak_bytes)}")
            check_peak(config.budget_bytes, meter.peak_bytes)
            return
        prepared = prepare_run(config, group)
        if prepared is not None:
            prepared.callbacks = callbacks if group.is_first else ()
            train_run(prepared, interrupt, meter)


class _Command(ModuleType):
    """Makes this module callable."""

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Command

if __name__ == "__main__":
    sys.exit(main())
