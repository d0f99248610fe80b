"""Formats sizes as text."""

from __future__ import annotations


def megabytes(n_bytes: float) -> str:
    """`123 MB`; 1 MB = 10^6 bytes."""
    return f"{n_bytes / 1e6:,.0f} MB"
