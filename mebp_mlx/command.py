"""What the commands share: from flags to checked options, from exceptions to exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import BudgetError, UserError
from .options import Spec, build_parser, convert, describe, suggest
from .system.command import DONE, run_command
from .system.machine import default_budget_bytes

Options = TypeVar("Options")


def parse(
    cls: type[Options],
    prog: str,
    texts: tuple[str, str],
    argv: Sequence[str] | None,
    not_here: Mapping[str, str] | None = None,
) -> Options:
    """The options of a command line. texts: of --help, before the options and after them; not_here: flags of
    mlx-lm's command of that name and why there are none here. Raises UserError naming the flag; --help exits.
    """
    parser = build_parser(cls, prog, *texts)
    found, unknown = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    specs = describe(cls)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if why := (not_here or {}).get(flag):
            raise UserError(f"{flag}: not available: {why}")
        raise UserError(f"{flag}: no such option{suggest(flag, [spec.flag for spec in specs.values()])}")
    return cls(**{name: _checked(specs[name], raw) for name, raw in vars(found).items()})


def exit_code(work: Callable[[], None], interrupted: str) -> int:
    """Does the work; what a user can get wrong is one line on stderr, no traceback.

    interrupted: what Ctrl-C leaves behind, in words.
    """

    def run(_: object) -> int:
        work()
        return DONE

    return run_command(run, f"interrupted; {interrupted}")


def say(text: str) -> None:
    """A line of progress. A closed pipe stops nothing."""
    print(text, flush=True)


def limits(budget: int | str | None) -> tuple[int | None, bool]:
    """--memory-budget as (bytes or None for no limit, whether the smallest footprint is asked for)."""
    if isinstance(budget, int):
        return budget, False
    return (default_budget_bytes() if budget is None else None), budget == "min"


def over_budget(budget_bytes: int | None, peak_bytes: int) -> None:
    """Raises BudgetError when the measured peak has passed the budget."""
    if budget_bytes is not None and not peak_bytes <= budget_bytes:
        raise BudgetError(
            f"--memory-budget: the budget of {budget_bytes / 1e6:.1f} MB is exceeded: the footprint reached "
            f"{peak_bytes / 1e6:.1f} MB"
        )


def _checked(spec: Spec, raw: Any) -> Any:
    try:
        return convert(spec, raw)
    except ValueError as error:
        raise UserError(f"{spec.flag}: {error}") from None
