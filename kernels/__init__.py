"""Metal kernels for the final layer and attention, each with a pure-MLX reference; numpy loops for the CPU (cpu.py).

This folder is installed as `mebp_mlx.kernels`.

A wrapper's `impl` is "metal" (the kernel), "reference", or None: the kernel if Metal is available and the kernel has
passed its check (selfcheck.py), otherwise the reference.
"""

from . import attention
from . import linear_cross_entropy as _linear_cross_entropy
from . import online_softmax as _online_softmax
from .linear_cross_entropy import linear_cross_entropy, linear_softmax
from .online_softmax import online_softmax
from .selfcheck import KERNELS, uses_metal

_SOURCES = (_online_softmax.SOURCE, _linear_cross_entropy.SOURCE, attention.FORWARD, attention.DQ, attention.DKV)
sources = {source.name: source for source in _SOURCES}

__all__ = ["KERNELS", "attention", "linear_cross_entropy", "linear_softmax", "online_softmax", "sources", "uses_metal"]
