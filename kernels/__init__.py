"""Metal kernels of the final layer, each beside a pure-MLX reference. Ships as `mebp_mlx.kernels`.

A wrapper's `impl` is "metal" (the kernel), "reference", or None: the kernel where Metal is there and the kernel has
proved itself (trust.py), the reference elsewhere.
"""

from .linear_cross_entropy import linear_cross_entropy, linear_softmax
from .online_softmax import online_softmax
from .trust import KERNELS, uses_metal

__all__ = ["KERNELS", "linear_cross_entropy", "linear_softmax", "online_softmax", "uses_metal"]
