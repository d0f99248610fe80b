"""MLX arrays over mapped file pages, without a copy: Metal accepts host memory that begins and ends on a page boundary.

`mx.from_dlpack(x, copy=False)` adopts such a buffer on Metal. On other backends (always on the CPU) it raises
ValueError, and the caller copies.
"""

from __future__ import annotations

import mmap
from typing import Any

import mlx.core as mx
import numpy as np

from ..system.pages import PAGE_BYTES


def adopt(mapped: mmap.mmap, offset: int, n_bytes: int) -> mx.array | None:
    """Bytes [offset, offset + n_bytes) of a read-only map as a uint8 array [n_bytes] in place; None if MLX cannot adopt
    them.

    The whole pages around them are adopted. They must not be written to: MLX reuses an array's memory for a result once
    nothing else refers to it, so the caller must keep the array for as long as anything is read from it.
    """
    start = offset // PAGE_BYTES * PAGE_BYTES
    stop = _whole(offset + n_bytes, PAGE_BYTES)
    if stop > _whole(len(mapped), mmap.PAGESIZE):  # the system maps a file's whole last page, and nothing beyond it
        return None
    inside = np.frombuffer(mapped, np.uint8)[start:]
    pages: Any = np.lib.stride_tricks.as_strided(inside, (stop - start,))  # Python's view of the map ends with the file
    try:
        view: Any = memoryview(pages)  # numpy's own export of read-only arrays differs by version
        adopted: mx.array = mx.from_dlpack(view, copy=False)
    except (ValueError, TypeError, RuntimeError, BufferError):
        return None
    return adopted[offset - start : offset - start + n_bytes]


def _whole(n_bytes: int, page_bytes: int) -> int:
    return -(-n_bytes // page_bytes) * page_bytes
