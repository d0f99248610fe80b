"""Mapped file pages as MLX arrays, nothing copied: Metal takes host memory that begins and ends on a page.

Written from MLX's interface, `mx.from_dlpack(x, copy=False)`: it adopts a buffer on Metal and raises ValueError
elsewhere, on the CPU backend always. The caller then copies.
"""

from __future__ import annotations

import mmap
from typing import Any

import mlx.core as mx
import numpy as np

from ..system.pages import PAGE_BYTES


def adopt(mapped: mmap.mmap, offset: int, n_bytes: int) -> mx.array | None:
    """Bytes [offset, offset + n_bytes) of a read-only map as uint8 [n_bytes] in place, or None where MLX cannot.

    The whole pages around them are adopted. They must not be written: MLX gives an array's memory to a result once
    nothing else refers to it, so whoever adopts keeps the array for as long as anything is read from it.
    """
    start = offset // PAGE_BYTES * PAGE_BYTES
    stop = _whole(offset + n_bytes, PAGE_BYTES)
    if stop > _whole(
        len(mapped), mmap.PAGESIZE
    ):  # the system maps the whole last page of a file, and nothing beyond it
        return None
    inside = np.frombuffer(mapped, np.uint8)[start:]
    pages: Any = np.lib.stride_tricks.as_strided(inside, (stop - start,))  # Python's map ends with the file
    try:
        view: Any = memoryview(pages)  # numpy's own export of read-only arrays differs by version
        adopted: mx.array = mx.from_dlpack(view, copy=False)
    except (ValueError, TypeError, RuntimeError, BufferError):
        return None
    return adopted[offset - start : offset - start + n_bytes]


def _whole(n_bytes: int, page_bytes: int) -> int:
    return -(-n_bytes // page_bytes) * page_bytes
