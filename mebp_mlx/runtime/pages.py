"""Dirty pages of a mapped file: told to the system early on macOS, where they might count as the process's."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

import numpy as np

_MS_ASYNC = 1  # the same in macOS's and Linux's sys/mman.h


def write_back(mapped: mmap.mmap, offset: int, n_bytes: int, always: bool = False) -> None:
    """Asks for [offset, offset + n_bytes) to be written, without waiting (msync, MS_ASYNC); offset is a page's start.

    Linux writes by itself and never counts pages of a file as anonymous, so there it does nothing unless `always`.
    """
    if n_bytes and (always or sys.platform == "darwin"):
        start = np.frombuffer(mapped, np.uint8, n_bytes, offset).ctypes.data
        if _msync()(ctypes.c_void_p(start), ctypes.c_size_t(n_bytes), _MS_ASYNC):
            error = ctypes.get_errno()
            raise OSError(error, "msync failed")


@lru_cache(maxsize=1)
def _msync() -> Any:
    return ctypes.CDLL(None, use_errno=True).msync
