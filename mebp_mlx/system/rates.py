"""`python -m mebp_mlx.system.rates`: measures this machine's rates of matrix products and memory; prints JSON.

It runs in its own process, so that its arrays do not count in a training run's footprint. It reports the best of
several repeats, because a roofline needs peak rates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from .child import answer
from .device import compute_dtype, dtype_name, on_gpu
from .machine import load_blas, machine

PRODUCT = (256, 2048, 8192)
COPY_BYTES = 256 << 20


def measure(repeats: int = 7) -> dict[str, Any]:
    """{"blas", "dtype", "flops", "memory_bytes"}: operations per second of [256 x 2,048] x [2,048 x 8,192], and bytes
    per second of a copy, counting reads and writes.
    """
    dtype = compute_dtype("auto", "")
    n, k, m = PRODUCT
    x, w = mx.random.normal((n, k)).astype(dtype), mx.random.normal((k, m)).astype(dtype)
    mx.eval(x, w)
    product_s = min(_seconds(lambda: mx.eval(x @ w)) for _ in range(repeats))
    copy_s = _gpu_copy_s(repeats) if on_gpu() else _cpu_copy_s(repeats)
    return {
        "blas": str(load_blas()),
        "dtype": dtype_name(dtype),
        "flops": 2 * n * k * m / product_s,
        "memory_bytes": 2 * COPY_BYTES / copy_s,
    }


def _gpu_copy_s(repeats: int) -> float:
    source = mx.zeros((COPY_BYTES // 4,), mx.float32)
    mx.eval(source)
    return min(_seconds(lambda: mx.eval(source + 1.0)) for _ in range(repeats))


def _cpu_copy_s(repeats: int) -> float:
    """The time of a copy on all cores; MLX's own element-wise operations use only one."""
    source, target = np.ones(COPY_BYTES // 4, np.float32), np.zeros(COPY_BYTES // 4, np.float32)
    n_threads = machine()["cores"]
    parts = [slice(*ends) for ends in pairwise(np.linspace(0, len(source), n_threads + 1, dtype=int).tolist())]
    with ThreadPoolExecutor(n_threads) as threads:
        copy = lambda part: np.copyto(target[part], source[part])  # noqa: E731  (releases the interpreter's lock)
        return min(_seconds(lambda: list(threads.map(copy, parts))) for _ in range(repeats))


def _seconds(run: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    run()
    return time.perf_counter() - began_s


if __name__ == "__main__":
    answer(lambda _request, _progress: measure())
