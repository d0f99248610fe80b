"""Options of mlx_lm.lora that are no options here: what asks for nothing is taken, the rest refused with a reason.

Older names count too: YAML files live longer than flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mebp_mlx.errors import UserError


@dataclass(frozen=True)
class Foreign:
    """One of them. why: what takes its place, or why there is nothing; asks_for_nothing: whether a value may stand
    there; is_told: whether that is worth a notice; has_value: whether its flag takes one.
    """

    why: str
    asks_for_nothing: Callable[[Any], bool] = lambda value: not value
    is_told: bool = True
    has_value: bool = False


def _always(value: Any) -> bool:
    return True


FULL = (
    "full is not available: gradients and optimizer state of every weight are many times a phone's memory, and "
    "weights are mapped read-only; lora with a larger rank and all keys comes nearest"
)
FOREIGN = {
    "train": Foreign("must be true, this command trains", lambda value: value is True, is_told=False),
    "grad_checkpoint": Foreign("what is kept or recomputed follows from --memory-budget", _always),
    "clear_cache_threshold": Foreign("no cache of buffers grows here", _always, has_value=True),
    "trust_remote_code": Foreign("no code of a model's folder is ever run, and no family here needs any; leave it out"),
    "use_dora": Foreign("its name is fine_tune_type: dora now"),
    "wandb": Foreign("use report_to: wandb, and project_name for its project", has_value=True),
    "lora_layers": Foreign("its name is num_layers now", has_value=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Their flags, which --help does not show; their values come out under their names, if they were given."""
    group = parser.add_argument_group()
    for name, foreign in FOREIGN.items():
        how: dict[str, Any] = {"metavar": "VALUE"} if foreign.has_value else {"action": "store_true"}
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)


def flag(name: str) -> str:
    """`grad_checkpoint` -> `--grad-checkpoint`."""
    return "--" + name.replace("_", "-")


def is_taken(name: str, value: Any, where: str) -> bool:
    """Whether an option that is taken without effect is worth a notice. UserError for a value that asks for more.

    value: what a flag or a YAML file gives, None: absent; where: what an error begins with.
    """
    foreign = FOREIGN[name]
    if value is None:
        return False
    if foreign.asks_for_nothing(value):
        return foreign.is_told
    raise UserError(f"{where}: {foreign.why}")


def notice(names: list[str]) -> str:
    """One line about those that were taken."""
    reasons = [f"{name} ({FOREIGN[name].why})" if name in FOREIGN else f"{name} (null)" for name in names]
    return f"note: taken, and without effect here: {', '.join(reasons)}"
