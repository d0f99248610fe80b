"""The memory that freed arrays leave behind after memory.settle()."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest

from mebp_mlx.system.allocator import zeros_given_back
from mebp_mlx.system.footprint import footprint_bytes

ROUNDS = """
import json
import mebp_mlx
from mebp_mlx.system import allocator as memory
from mebp_mlx.system.footprint import footprint_bytes
import mlx.core as mx

memory.settle()
survivors = []
mx.eval(mx.ones(1))
before = footprint_bytes()

def work(rows):
    x = mx.ones((rows, 1024))
    survivors.append(mx.array([1.0, 2.0]) * rows)  # small blocks that stay, between large ones that go
    mx.eval(x, x * 2, survivors)

after_round = []
for _ in range(10):
    for rows in (100, 2000, 5000, 9000, 3000, 7000, 1000):
        work(rows)
    after_round.append(footprint_bytes() - before)
print(json.dumps([after_round, mx.get_cache_memory()]))
"""


def test_freed_memory_does_not_accumulate() -> None:
    """Ten rounds of seven sizes would add up to 2 GB; the heap may keep the size of the largest, and some gaps."""
    done = subprocess.run([sys.executable, "-c", ROUNDS], stdout=subprocess.PIPE, text=True, check=True)
    after_round, cache_bytes = json.loads(done.stdout)
    largest_bytes = 2 * 9000 * 1024 * 4
    assert cache_bytes == 0
    assert max(after_round) <= 1.5 * largest_bytes, after_round


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_zeros_leave_the_footprint_and_nothing_else_does() -> None:
    """A large mapping of zeros costs nothing afterwards; one with a single other byte stays as it is."""
    for byte in (0, 7):
        before = footprint_bytes()
        with zeros_given_back():
            own = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            content = np.frombuffer(own, np.uint8)
            content[:], content[-1] = 0, byte
        held = footprint_bytes() - before
        assert content[-1] == byte and not content[:-1].any()
        assert held <= 1 << 20 if byte == 0 else held >= 60 << 20
