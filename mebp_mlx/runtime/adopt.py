"""Mapped file pages as MLX arrays, nothing copied: Metal takes host memory that begins and ends on a page.

Written from MLX's interface, `mx.from_dlpack(x, copy=False)`: it adopts a buffer on Metal and raises ValueError
elsewhere, on the CPU backend always. Whoever asks here copies then.
"""

from __future__ import annotations

import mmap

import mlx.core as mx
import numpy as np

PAGE_BYTES = 16 << 10  # Apple silicon's page


def open_map(fileno: int, adopt: bool) -> mmap.mmap:
    """A file, mapped to be read. To be adopted it is mapped copy-on-write: numpy exports only writable memory to MLX,
    and pages that nobody writes to stay clean file pages all the same.
    """
    return mmap.mmap(fileno, 0, access=mmap.ACCESS_COPY if adopt else mmap.ACCESS_READ)


def adopt(mapped: mmap.mmap, offset: int, n_bytes: int) -> mx.array | None:
    """Bytes [offset, offset + n_bytes) of a map as uint8 [n_bytes] in place, or None where MLX cannot.

    The whole pages around them are adopted; a range that ends in a file's last, incomplete page cannot be.
    """
    start = offset // PAGE_BYTES * PAGE_BYTES
    stop = -(-(offset + n_bytes) // PAGE_BYTES) * PAGE_BYTES
    if stop > len(mapped):
        return None
    pages = np.frombuffer(mapped, np.uint8, stop - start, start)
    try:
        adopted: mx.array = mx.from_dlpack(pages, copy=False)
    except (ValueError, TypeError, RuntimeError, BufferError):
        return None
    return adopted[offset - start : offset - start + n_bytes]
