"""`python -m mebp_mlx.doctor --probe`: five measurements behind the choices for memory and dtypes on a Mac.

All run on every backend; rows of other backends end with "not on Metal". A mapped file that MLX cannot use in place is
read through its map.
"""

from __future__ import annotations

import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..engine.arena import choose_folder
from ..errors import UserError
from ..model.base import Tensor
from ..system import device
from ..system.files import reserve
from ..system.footprint import footprint_bytes
from ..system.pages import PAGE_BYTES
from ..weights.safetensors import MappedWeights
from ..weights.zero_copy import adopt

ADOPTED_BYTES, DIRTY_BYTES = 6104 * PAGE_BYTES, 3907 * PAGE_BYTES  # 100 and 64 MB
PRODUCT = (256, 896, 4864)  # of a 0.5B model's MLP: rows, inputs, outputs
CPU_ROWS = 4  # MLX's CPU backend takes a minute for 256
LOOKS, REPEATS = 200, 5


@dataclass(frozen=True)
class Measured:
    """One measurement. figures: by name; good: False if a required property does not hold."""

    what: str
    detail: str
    figures: dict[str, Any]
    good: bool = True


def measure() -> Iterator[Measured]:
    """Takes the five measurements in turn. Raises UserError if no folder on a disk has room for their files."""
    try:
        yield _adopted_footprint()
        yield _dirty_footprint()
        yield _look()
        yield _read_cast_read()
        yield _products()
    except OSError as error:
        raise UserError(f"--probe: {error.strerror or error}") from None


def median_s(compute: Callable[[], Any], repeats: int) -> float:
    """Median seconds to evaluate the result of `compute`, after one evaluation to warm up."""
    mx.eval(compute())
    times = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        mx.eval(compute())
        times.append(time.perf_counter() - began_s)
    return statistics.median(times)


def _adopted_footprint() -> Measured:
    """Footprint of mapped weights, shared and private. They are mapped shared: private pages may count once read."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryFile(dir=choose_folder(None)) as file:
        for _ in range(0, ADOPTED_BYTES, PAGE_BYTES):
            file.write(os.urandom(PAGE_BYTES))
        file.flush()
        for kind, access in (("shared", mmap.ACCESS_READ), ("private", mmap.ACCESS_COPY)):
            mapped = mmap.mmap(file.fileno(), 0, access=access)
            before_bytes = footprint_bytes()
            pages = adopt(mapped, 0, len(mapped))
            if pages is not None:
                mx.eval(pages.view(mx.uint32).max())
            else:
                np.frombuffer(mapped, np.uint32).max()
            figures |= {f"{kind}_bytes": footprint_bytes() - before_bytes, f"{kind}_adopted": pages is not None}
            del pages
    detail = ", ".join(f"{kind} {figures[f'{kind}_bytes'] / 1e6:.1f} MB" for kind in ("shared", "private"))
    how = "read in place" if figures["shared_adopted"] else "read through the map"
    what = f"{ADOPTED_BYTES / 1e6:.0f} MB of a mapped file"
    return Measured(what, f"footprint once {how}: {detail}", figures)


def _dirty_footprint() -> Measured:
    """Footprint of the arena's pages before the system has written them."""
    with tempfile.TemporaryFile(dir=choose_folder(None)) as file:
        reserve(file.fileno(), DIRTY_BYTES)
        with mmap.mmap(file.fileno(), DIRTY_BYTES) as mapped:
            before_bytes = footprint_bytes()
            for start in range(0, DIRTY_BYTES, PAGE_BYTES):
                mapped[start : start + PAGE_BYTES] = bytes(PAGE_BYTES)
            seen_bytes = footprint_bytes() - before_bytes
    detail = f"{DIRTY_BYTES / 1e6:.0f} MB written to a shared map: {seen_bytes / 1e6:.1f} MB of footprint"
    return Measured("dirty pages of a file", detail, {"seen_bytes": seen_bytes})


def _look() -> Measured:
    """Cost of a wait that computes nothing."""
    x = mx.zeros((LOOKS + 2, 8))
    mx.eval(x)
    starts = iter(range(LOOKS + 1))

    def view() -> mx.array:
        start = next(starts)
        return x[start : start + 1]

    look_us = 1e6 * median_s(view, LOOKS)
    return Measured("an evaluation of a view", f"{look_us:.1f} us (median of {LOOKS})", {"look_us": round(look_us, 2)})


def _read_cast_read() -> Measured:
    """Checks that MLX writes no result into mapped pages."""
    with _one_tensor() as (weights, expected):
        for _ in range(2):
            read = Tensor(weights, "w")[...]
            mx.eval(read.astype(mx.bfloat16))
            del read
            mx.eval(1 + Tensor(weights, "w")[...], -Tensor(weights, "w")[1:])
        same = np.array_equal(np.asarray(Tensor(weights, "w")[...]), expected)
        same = same and np.array_equal(weights.view("w"), expected)
        adopted = weights.in_place("w") is not None
    detail = ("the same numbers" if same else "DIFFERENT NUMBERS") + (", used in place" if adopted else ", copied")
    return Measured("a float16 tensor read, cast, read again", detail, {"same": same, "adopted": adopted}, same)


@contextmanager
def _one_tensor() -> Iterator[tuple[MappedWeights, np.ndarray]]:
    """A mapped file with one float16 tensor "w" at the start of a page, and its values."""
    from ..weights.writer import Entry, Shard

    value = mx.random.normal((4, 1 << 13)).astype(mx.float16)
    with tempfile.TemporaryDirectory(dir=choose_folder(None)) as folder:
        path = Path(folder) / "model.safetensors"
        with open(path, "xb") as file, Shard(file, [Entry.of("w", value)]) as shard:
            shard.append("w", value)
        weights = MappedWeights(path, adopt=True)
        try:
            yield weights, np.asarray(value)
        finally:
            weights.close()


def _products() -> Measured:
    """Times of products in float16 and bfloat16, which the GPUs of M1 and M2 emulate."""
    n, n_in, n_out = PRODUCT if device.on_gpu() else (CPU_ROWS, *PRODUCT[1:])
    figures = {}
    for dtype in (mx.bfloat16, mx.float16):
        name = device.dtype_name(dtype)
        x, w = mx.random.normal((n, n_in)).astype(dtype), mx.random.normal((n_out, n_in)).astype(dtype)
        packed = mx.quantize(w)  # 4 bits in groups of 64
        mx.eval(x, w, packed)
        figures[f"{name}_ms"] = 1e3 * median_s(partial(mx.matmul, x, w.T), REPEATS)
        product = partial(mx.quantized_matmul, x, *packed)
        figures[f"{name}_4bit_ms"] = 1e3 * median_s(product, REPEATS)
    detail = "; ".join(
        f"{what} bfloat16 {figures[f'bfloat16{kind}_ms']:.2f} ms, float16 {figures[f'float16{kind}_ms']:.2f} ms"
        for what, kind in (("plain", ""), ("4 bits", "_4bit"))
    )
    return Measured(f"[{n} x {n_in}] x [{n_in} x {n_out}]", detail, figures)
