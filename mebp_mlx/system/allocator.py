"""Allocator settings that keep the process's footprint close to the memory that arrays use."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import numpy as np

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


@contextlib.contextmanager
def zeros_given_back(least_bytes: int = 16 << 20) -> Iterator[None]:
    """Large anonymous memory that is mapped within the context and holds only zeros leaves the footprint (Linux).

    Its pages read as zeros as before, and come back when they are written. MLX's ring clears 32 MB of buffers at its
    start, of which gradients of LoRA use a few.
    """
    before = set(_anonymous_maps())
    yield
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if before else None
    for start, stop in set(_anonymous_maps()) - before:
        first = start + mmap.PAGESIZE  # the heap's own header is before it
        if madvise is None or stop - start < least_bytes:
            continue
        pages = np.ctypeslib.as_array((ctypes.c_uint8 * (stop - first)).from_address(first))
        if not pages.any():
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)


def _anonymous_maps() -> Iterator[tuple[int, int]]:
    """Addresses [start, stop) of this process's writable memory without a file or a name; none but on Linux."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/self/maps").read_text().splitlines():
            place, mode, _, _, inode, *name = line.split()
            if mode == "rw-p" and inode == "0" and not name:
                start, stop = place.split("-")
                yield int(start, 16), int(stop, 16)
