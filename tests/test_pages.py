"""msync through the C library; on macOS the arena calls it after every put."""

from __future__ import annotations

import mmap
import sys
import tempfile

import numpy as np
import pytest

from mebp_mlx.runtime.pages import write_back

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="msync is POSIX's")


def test_pages_reach_the_file() -> None:
    page = mmap.PAGESIZE
    with tempfile.TemporaryFile() as file:
        file.truncate(4 * page)
        mapped = mmap.mmap(file.fileno(), 4 * page)
        np.frombuffer(mapped, np.uint8)[page : page + 5] = 7
        write_back(mapped, page, 5, always=True)
        write_back(mapped, 0, 0, always=True)
        file.seek(page)
        assert file.read(5) == b"\x07" * 5


def test_an_error_of_the_system_is_raised() -> None:
    mapped = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    with pytest.raises(OSError, match="msync"):
        write_back(mapped, 1, 5, always=True)  # not a page's start
