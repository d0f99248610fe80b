"""Metal kernels for the final layer, each with a pure-MLX reference, and numpy loops for the CPU (cpu.py).

This folder is installed as `mebp_mlx.kernels`.

A wrapper's `impl` is "metal" (the kernel), "reference", or None: the kernel if Metal is available and the kernel has
passed its check (trust.py), otherwise the reference.
"""

from . import linear_cross_entropy as _linear_cross_entropy
from . import online_softmax as _online_softmax
from .linear_cross_entropy import linear_cross_entropy, linear_softmax
from .online_softmax import online_softmax
from .trust import KERNELS, uses_metal

sources = {module.SOURCE.name: module.SOURCE for module in (_online_softmax, _linear_cross_entropy)}

__all__ = ["KERNELS", "linear_cross_entropy", "linear_softmax", "online_softmax", "sources", "uses_metal"]
