"""The memory that freed arrays leave behind after memory.settle()."""

from __future__ import annotations

import json
import subprocess
import sys

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
