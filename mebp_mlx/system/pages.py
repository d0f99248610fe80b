"""The size of a memory page."""

from __future__ import annotations

PAGE_BYTES = 16 << 10  # Apple silicon's; a multiple of Linux's


def page_ceil(n_bytes: int) -> int:
    """n_bytes rounded up to whole pages."""
    return -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
