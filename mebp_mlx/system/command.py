"""What all commands share: exit codes, and errors as one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import BudgetError, NonFiniteLoss, UserError, memory_errors_told
from .child import ChildFailure
from .interrupt import Interrupt, Stopped
from .terminal import forgiving_output

DONE, FAILED, WRONG_INPUT, NO_BUDGET = 0, 1, 2, 3


def run_command(work: Callable[[Interrupt], int | None], interrupted: str) -> int:
    """Runs a command's work and returns the exit code: the work's own (None: 0), or that of what ended it.

    interrupted: the line after a signal, unless Stopped brings its own.
    """
    with forgiving_output():
        try:
            with memory_errors_told(), Interrupt() as interrupt:
                return work(interrupt) or DONE
        except (UserError, NonFiniteLoss, ChildFailure) as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            return NO_BUDGET if isinstance(error, BudgetError) else WRONG_INPUT
        except KeyboardInterrupt as signal:
            stopped = signal if isinstance(signal, Stopped) else Stopped()
            print(stopped.message or interrupted, file=sys.stderr)
            return stopped.exit_code
