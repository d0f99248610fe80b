"""What freed arrays leave behind after memory.settle()."""

from __future__ import annotations

import json
import subprocess
import sys

ROUNDS = """
import json
import mebp_mlx
from mebp_mlx.runtime import memory
from mebp_mlx.runtime.footprint import footprint_bytes
import mlx.core as mx

memory.settle()
survivors = []

def work(rows):
    x = mx.ones((rows, 1024))
    survivors.append(mx.array([1.0, 2.0]) * rows)  # small blocks that stay, between large ones that go
    mx.eval(x, x * 2, survivors)

after_round = []
for _ in range(10):
    for rows in (100, 2000, 5000, 9000, 3000, 7000, 1000):
        work(rows)
    after_round.append(footprint_bytes())
print(json.dumps([after_round, mx.get_cache_memory()]))
"""


def test_rounds_of_the_same_sizes_do_not_add_up() -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], stdout=subprocess.PIPE, text=True, check=True)
    after_round, cache_bytes = json.loads(done.stdout)
    assert cache_bytes == 0
    assert max(after_round[5:]) - after_round[4] <= 2_000_000, after_round  # the first rounds find their places
