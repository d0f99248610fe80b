"""The exceptions that the command line turns into exit codes."""

from __future__ import annotations


class UserError(ValueError):
    """What a user can get wrong (exit 2). The message is one line that names the flag, file and line."""


class BudgetError(UserError):
    """A memory budget that no plan can meet, or that was passed (exit 3). The message names one that would do, or
    what was measured.
    """


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; raised before any parameter of that step is touched."""
