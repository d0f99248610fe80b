"""Shared fixtures."""

from __future__ import annotations

import os
import secrets

import pytest

import mebp_mlx  # noqa: F401  (the BLAS must be loaded before mlx.core)


@pytest.fixture
def seed() -> int:
    """A fresh seed for random inputs; failures print it, and MEBP_TEST_SEED repeats it."""
    value = int(os.environ.get("MEBP_TEST_SEED") or secrets.randbelow(2**31))
    print(f"MEBP_TEST_SEED={value}")  # shown with a failure
    return value
