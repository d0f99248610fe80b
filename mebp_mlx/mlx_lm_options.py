"""Options of mlx_lm.lora that this trainer lacks: accepted if they would change nothing, else refused with a reason.

Former names are included, because YAML files outlive flags.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mebp_mlx.errors import UserError


@dataclass(frozen=True)
class Foreign:
    """One such option. why: its replacement, or the reason why there is none; asks_for_nothing: whether a value can be
    accepted without effect; is_told: whether acceptance is reported; has_value: whether its flag takes a value.
    """

    why: str
    asks_for_nothing: Callable[[Any], bool] = lambda value: not value
    is_told: bool = True
    has_value: bool = False


def _always(value: Any) -> bool:
    return True


FULL = (
    "full is not available: gradients and optimizer state of every weight are many times a phone's memory, and "
    "weights are mapped read-only; lora with a larger rank and all keys comes closest"
)
FOREIGN = {
    "train": Foreign("must be true: this command only trains", lambda value: value is True, is_told=False),
    "grad_checkpoint": Foreign("--memory-budget decides what is kept and what is recomputed", _always),
    "clear_cache_threshold": Foreign("the cache of buffers does not grow", _always, has_value=True),
    "trust_remote_code": Foreign(
        "no code from a model's folder is ever run, and no supported family needs any; leave it out"
    ),
    "use_dora": Foreign("use fine_tune_type: dora instead"),
    "wandb": Foreign("use report_to: wandb, and project_name for its project", has_value=True),
    "lora_layers": Foreign("renamed: use num_layers instead", has_value=True),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds their flags, which --help does not show. Values of given flags appear under the options' names."""
    group = parser.add_argument_group()
    for name, foreign in FOREIGN.items():
        how: dict[str, Any] = {"metavar": "VALUE"} if foreign.has_value else {"action": "store_true"}
        group.add_argument(flag(name), dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **how)


def flag(name: str) -> str:
    """`grad_checkpoint` -> `--grad-checkpoint`."""
    return "--" + name.replace("_", "-")


def is_taken(name: str, value: Any, where: str) -> bool:
    """Whether an accepted option has to be reported. Raises UserError for a value that cannot be ignored.

    value: from a flag or a YAML file, None if absent; where: the start of an error message.
    """
    foreign = FOREIGN[name]
    if value is None:
        return False
    if foreign.asks_for_nothing(value):
        return foreign.is_told
    raise UserError(f"{where}: {foreign.why}")


def notice(names: list[str]) -> str:
    """One line about the options that were accepted without effect."""
    reasons = [f"{name} ({FOREIGN[name].why})" if name in FOREIGN else f"{name} (null)" for name in names]
    return f"note: accepted, but without effect: {', '.join(reasons)}"
