"""The exceptions that the command line turns into exit codes."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

# Messages of MLX's allocators, of Metal's command buffers, and of the system if it cannot start a thread.
_NO_MEMORY = re.compile(
    r"\[(\w+::)?malloc|unable to allocate|bad_alloc|insufficient memory|can't start new thread"
    r"|resource temporarily unavailable",
    re.IGNORECASE,
)


class UserError(ValueError):
    """An error in the user's input (exit 2). The message is one line that names the flag, file and line."""


class BudgetError(UserError):
    """A memory budget that no plan can meet, or that was exceeded (exit 3). The message names a sufficient budget or
    the measured footprint.
    """


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite. Raised before that step changes any parameter."""


class PeerLost(RuntimeError):
    """The connection to another machine of the run broke (exit 1)."""


class PeerFailed(RuntimeError):
    """Another machine of the run told of an error, which it prints itself. exit_code: of that error."""

    def __init__(self, rank: int, exit_code: int, text: str) -> None:
        super().__init__(f"rank {rank}: {text}")
        self.exit_code = exit_code


@contextlib.contextmanager
def memory_errors_told() -> Iterator[None]:
    """Converts every error caused by a failed allocation to a BudgetError with one line.

    Python and numpy raise MemoryError, MLX RuntimeError, system calls OSError (ENOMEM).
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        no_memory = error.errno == errno.ENOMEM if isinstance(error, OSError) else _NO_MEMORY.search(str(error))
        if not (no_memory or isinstance(error, MemoryError)):
            raise
        text = " ".join(str(error).split())[:400] or type(error).__name__
        raise BudgetError(f"out of memory: {text}; earlier saves are intact") from None
