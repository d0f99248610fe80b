"""Exact LoRA fine-tuning of language models inside a phone app's memory.

    model = mebp_mlx.open_model(path)
    lora = mebp_mlx.init_lora(model, rank=8)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets)

    folder = mebp_mlx.train(mebp_mlx.TrainConfig(model="bundled", iters=20))

Importing the package loads a fast BLAS on Linux, which must happen before
`mlx.core` is imported; everything else is loaded on first use.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

from .errors import BudgetError, NonFiniteLoss, UserError
from .system.machine import NO_BACKEND, backend_missing, load_blas
from .system.version import __version__ as __version__

if TYPE_CHECKING:
    from .api import Plan, TrainConfig, init_lora, load_adapters, loss, loss_and_grads, open_model, save_adapters

# A wrong $MEBP_BLAS is reported by the commands, which load the BLAS again and can print one line.
with contextlib.suppress(UserError):
    load_blas()
# python -m mebp_mlx.train, or a console script: nothing that goes wrong from here on is a traceback.
_is_command = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]).startswith(("mebp_mlx.", "mebp-mlx"))
if _is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until system/interrupt.py takes over
if backend_missing():
    if _is_command:
        print(f"error: {NO_BACKEND}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(NO_BACKEND)

__all__ = [
    "BudgetError",
    "NonFiniteLoss",
    "Plan",
    "TrainConfig",
    "UserError",
    "init_lora",
    "load_adapters",
    "loss",
    "loss_and_grads",
    "open_model",
    "save_adapters",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":  # the command's module, which can be called (train.py)
        return importlib.import_module(".train", __name__)
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The interface, without the modules that it is made of."""
    return sorted(__all__)
