"""`python -m mebp_mlx.doctor --kernels`: times attention with the kernels and with MLX, at the engine's shapes.

LEAST_KEYS in kernels/attention.py should be set from these figures: the row lengths from which the kernels' backward
is faster. The general check (checks.py) tests whether the kernels are correct.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from ..kernels import attention, selfcheck
from ..ops.attention import Attention, Heads
from ..ops.plan import Barrier, Plan
from ..planner.search import query_block
from ..system import device
from . import probes

# (heads, key heads, head dim): Qwen2.5-0.5B, two other ratios of heads, Qwen2.5-3B, Gemma-3-4B.
SHAPES = ((14, 2, 64), (32, 8, 80), (32, 32, 96), (16, 2, 128), (8, 4, 256))
LENGTHS = (1024, 4096, 16384)
DTYPES = (mx.bfloat16, mx.float16)
TILE = Plan().token_block
REPEATS = 3


def measure() -> Iterator[tuple[str, str, dict[str, float]]]:
    """(name, description, figures) per shape, dtype and length, for forward and backward of a row's last tile."""
    for H, K, head_dim in SHAPES:
        for dtype in DTYPES:
            if not all(selfcheck.uses_metal(name, dtype, head_dim) for name in attention.NAMES):
                continue  # the kernel's own check reports why
            for T in LENGTHS:
                figures = _times((H, K, head_dim), dtype, T)
                both = ", ".join(
                    f"{part} {figures[f'kernel_{part}_ms']:.2f} ms ({figures[f'kernel_{part}_tflops']:.2f} TFLOP/s), "
                    f"MLX {figures[f'mlx_{part}_ms']:.2f} ms"
                    for part in ("forward", "backward")
                )
                what = f"attention {device.dtype_name(dtype)} {H}/{K} x {head_dim}, {T:,} keys"
                serves = "used" if attention.is_served(dtype, head_dim, T) else "not used"
                yield what, f"{both}; kernels {serves} at this length", figures


def _times(shape: tuple[int, int, int], dtype: mx.Dtype, T: int) -> dict[str, float]:
    """Milliseconds of the last tile's forward and backward with kernels and MLX, and the kernels' TFLOP/s."""
    H, K, head_dim = shape
    n, keys = min(TILE, T), mx.random.split(mx.random.key(3), 4)
    shapes = ((1, H, n, head_dim), (1, K, T, head_dim), (1, K, T, head_dim), (1, n, H * head_dim))
    q, k, v, da = (mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True))
    mx.eval(q, k, v, da)
    heads, figures = Heads(head_dim, head_dim**-0.5, None, None, 0.0, {}), dict[str, float]()
    blocks = query_block(Plan().query_block, 4 * H * T)
    for way in ("kernel", "mlx"):

        def attend() -> Attention:
            made = Attention(heads, blocks, Barrier("block"))
            made.keys, made.values, made.is_fused = k, v, way == "kernel"  # noqa: B023
            return made

        forward = attend()
        saved = (forward(q, T - n), forward.fused.get(T - n))
        mx.eval(saved[0])
        runs: dict[str, Callable[[], list[mx.array]]] = {
            "forward": lambda: [attend()(q, T - n)],
            "backward": partial(_backward, attend, saved[1], (q, da), T - n),
        }
        for part, run in runs.items():
            seconds = probes.median_s(run, REPEATS)
            figures[f"{way}_{part}_ms"] = round(1e3 * seconds, 3)
            if way == "kernel":
                names = attention.NAMES[:1] if part == "forward" else attention.NAMES[1:]
                place = (T - n, 0, 0, T)
                operations = sum(attention.operations(m, (q.shape, k.shape), dtype.size, place) for m in names)
                figures[f"{way}_{part}_tflops"] = round(operations / seconds / 1e12, 3)
    return figures


def _backward(
    attend: Callable[[], Attention],
    saved: tuple[mx.array, mx.array] | None,
    given: tuple[mx.array, mx.array],
    position: int,
) -> list[mx.array]:
    made = attend()
    if saved is not None:
        made.fused[position] = saved
    return [made.backward(*given, position), *made.sums()]
