"""Shared by all commands: exit codes, and errors as one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import BudgetError, NonFiniteLoss, PeerFailed, PeerLost, UserError, memory_errors_told
from .child import ChildFailure, one_line
from .files import DISK_FULL
from .interrupt import Interrupt, Stopped
from .terminal import forgiving_output

DONE, FAILED, WRONG_INPUT, NO_BUDGET = 0, 1, 2, 3


def run_command(work: Callable[[Interrupt], int | None], interrupted: str) -> int:
    """Runs a command and returns its exit code: the result of `work` (None: 0), or the code of the error or signal.

    interrupted: the line to print after a signal, unless Stopped has its own message.
    """
    with forgiving_output():
        try:
            with memory_errors_told(), Interrupt() as interrupt:
                return work(interrupt) or DONE
        except (UserError, NonFiniteLoss, ChildFailure) as error:
            print("error:", one_line(error, 2000), file=sys.stderr)
            return NO_BUDGET if isinstance(error, BudgetError) else WRONG_INPUT
        except PeerLost as error:
            print("error:", one_line(error), file=sys.stderr)
            return FAILED
        except PeerFailed as error:
            return error.exit_code
        except OSError as error:
            if error.filename is None and error.errno not in DISK_FULL:
                raise  # not an error that a user can act on
            where = "" if error.filename is None else f"{error.filename}: "
            print("error:", one_line(f"{where}{error.strerror}; earlier saves are intact"), file=sys.stderr)
            return WRONG_INPUT
        except KeyboardInterrupt as signal:
            stopped = signal if isinstance(signal, Stopped) else Stopped()
            if message := interrupted if stopped.message is None else stopped.message:
                print(message, file=sys.stderr)
            return stopped.exit_code
