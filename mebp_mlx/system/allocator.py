"""Allocator settings that keep the process's footprint close to the memory that arrays use."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

import mlx.core as mx

from .device import on_gpu

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_TRIM_BYTES, _MMAP_BYTES = 64 << 20, 32 << 20
# On a GPU a new buffer costs a system call, and no C heap recycles it, so the cache has room for one block's values.
# The wired limit is not changed. (Not measured on a Mac.)
_GPU_CACHE_BYTES = 32 << 20


@lru_cache(maxsize=1)
def settle() -> None:
    """Once per process: MLX caches no freed buffers (a few on a GPU), and the C heap (glibc) recycles them.

    A step allocates the same sizes again and again, so the heap does not grow, and its pages are not mapped again;
    MLX's own cache would hold 32 MB more. Measured on the Qwen2.5-0.5B shape, T = 256, SGD, 2 cores, per step
    (bench/LOG.md has more):

        MLX cache    M_MMAP_THRESHOLD, M_TRIM_THRESHOLD    peak MB    system CPU s    page faults
        32 MiB       glibc's own                             156          1.4            500,000
        0            glibc's own                             111          1.4            600,000
        0            256 KiB, own                             97          5.8          3,000,000
        0            32 MiB, 64 MiB                          110          0.4                  9
    """
    mx.set_cache_limit(_GPU_CACHE_BYTES if on_gpu() else 0)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
