"""Why the head's dh has no kernel of its own: bytes and operations of three ways, counted, and bounds on two GPUs.

    A  z = h W^T by quantized_matmul, online_softmax, p W by quantized_matmul: logits pass through memory
    B  one kernel, its sum of 32 rows of dh in threadgroup memory: as many columns of dh as fit at a time, and all
       logits made again for each such slice
    C  one kernel, dh in device memory, read and written once for every tile of 64 columns of logits

Nothing is timed. Rates are published ones, and a bound is the larger of operations / rate and bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass

from mebp_mlx.kernels.linear_cross_entropy import COLUMNS, ROWS
from mebp_mlx.ops.plan import Plan
from mebp_mlx.testing.synth import SHAPES

THREADGROUP_BYTES = 32 << 10  # Metal's limit for a threadgroup
TILES_BYTES = (ROWS + COLUMNS) * (32 + 4) * 4  # of linear_cross_entropy.metal: h, weights and then logits


@dataclass(frozen=True)
class Gpu:
    """Published peak rates: float32 operations and bytes a second."""

    name: str
    flops: float
    bandwidth: float


GPUS = (Gpu("A17 Pro", 2.15e12, 51.2e9), Gpu("M2 (10 cores)", 3.6e12, 100e9))


@dataclass(frozen=True)
class Way:
    """operations: multiplications and additions; n_bytes: through device memory; threadgroup_bytes: a threadgroup's."""

    name: str
    operations: float
    n_bytes: float
    threadgroup_bytes: int

    def bound_s(self, gpu: Gpu) -> float:
        return max(self.operations / gpu.flops, self.n_bytes / gpu.bandwidth)

    @property
    def groups_per_core(self) -> int:
        """Threadgroups that share 32 KB; one fits at least."""
        return max(1, THREADGROUP_BYTES // self.threadgroup_bytes)


def ways(T: int, V: int, D: int, item_bytes: int = 2) -> list[Way]:
    """The three ways for T labelled rows, 4-bit weights in groups of 64, 16-bit activations."""
    weights = V * D * (4 / 8 + 2 * item_bytes / 64)
    rows, logits = T * D, T * V
    chunk = Plan(head_block_bytes=None).vocabulary_chunk(T, 0, item_bytes)
    n_chunks = math.ceil(V / chunk)
    two_products = 4.0 * T * V * D
    # z written and read, p written and read; the sum of [T, D] read and written for every chunk.
    a_bytes = 2 * weights + 4 * logits * item_bytes + 2 * n_chunks * rows * 4 + n_chunks * rows * item_bytes
    columns = (THREADGROUP_BYTES - TILES_BYTES) // (4 * ROWS) // 8 * 8
    slices = math.ceil(D / columns)
    n_tiles = math.ceil(T / ROWS)
    return [
        Way("A: two products and online_softmax", two_products, a_bytes, 32 * 4),
        Way(
            f"B: one kernel, dh in {slices} slices of {columns}",
            2.0 * T * V * D * (slices + 1),
            weights * (slices + 1) + rows * item_bytes + rows * 4,
            TILES_BYTES + columns * ROWS * 4,
        ),
        Way(
            "C: one kernel, dh in device memory",
            two_products,
            2 * weights + n_tiles * ROWS * D * 4 * 2 * math.ceil(V / COLUMNS),
            TILES_BYTES,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.head_backward", description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    rows = []
    print(f"T = {options.tokens}; bounds from published rates, nothing measured")
    print(f"{'shape':<14}{'way':<44}{'GFLOP':>8}{'MB':>9}{'KB/group':>10}", *(f"{gpu.name:>16}" for gpu in GPUS))
    for shape in ("qwen2.5-0.5b", "qwen2.5-3b", "gemma3-4b"):
        config = SHAPES[shape]
        D = config.get("text_config", config)["hidden_size"]
        for way in ways(options.tokens, config["vocab_size"], D):
            bounds = {gpu.name: way.bound_s(gpu) for gpu in GPUS}
            print(
                f"{shape:<14}{way.name:<44}{way.operations / 1e9:>8,.0f}{way.n_bytes / 1e6:>9,.0f}"
                f"{way.threadgroup_bytes / 1024:>10.1f}",
                *(f"{1e3 * bound:>13,.0f} ms" for bound in bounds.values()),
            )
            rows.append(
                {
                    "shape": shape,
                    "way": way.name[0],
                    "operations": way.operations,
                    "n_bytes": way.n_bytes,
                    "threadgroup_bytes": way.threadgroup_bytes,
                    "groups_per_core": way.groups_per_core,
                    "bound_s": bounds,
                }
            )
    print(json.dumps({"bench": "head_backward", "tokens": options.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
