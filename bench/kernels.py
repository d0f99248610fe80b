"""The work of the Metal kernels, counted, not measured: kernels (attention), head_backward, head_forward."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mebp_mlx  # noqa: F401  isort: skip  (before mlx: it loads the BLAS)
import mlx.core as mx

from bench import report
from bench.dispatch.watch import VIEWS
from mebp_mlx.kernels import attention
from mebp_mlx.kernels.linear_cross_entropy import COLUMNS, ROWS
from mebp_mlx.ops.attention import Attention, Heads
from mebp_mlx.ops.plan import Barrier, Plan
from mebp_mlx.planner.search import query_block
from mebp_mlx.planner.work import Node, nodes_of
from mebp_mlx.testing.synth import SHAPES


@dataclass(frozen=True)
class Gpu:
    """Published peak rates, operations and bytes per second. share: of the peak, reached by MLX's 16-bit products."""

    name: str
    flops: float
    bandwidth: float
    share: float

    def bound_s(self, operations: float, n_bytes: float) -> float:
        """The least time in seconds, if computing and moving data overlap."""
        return max(operations / self.flops, n_bytes / self.bandwidth)


# Shares: published for float16 on M1 Max (M2: the same generation) and M3 Pro; the others are assumed to equal M3's.
GPUS = (
    Gpu("A17 Pro", 2.15e12, 51.2e9, 0.6),
    Gpu("M2 (10 cores)", 3.6e12, 100e9, 0.76),
    Gpu("M3 Max (40 cores)", 14.2e12, 400e9, 0.6),
    Gpu("M4 (10 cores)", 4.1e12, 120e9, 0.6),
)

# ----------------------------------------------------------------------------------------------- attention

# (heads, key heads, head dim, window) of a layer.
LAYERS = {
    "qwen2.5-0.5b": (14, 2, 64, None),
    "head dim 80": (32, 8, 80, None),
    "head dim 96": (32, 32, 96, None),
    "qwen2.5-3b": (16, 2, 128, None),
    "gemma3-4b, global": (8, 4, 256, None),
    "gemma3-4b, local": (8, 4, 256, 1024),
}
# Per core, found by others on M1: Apple publishes no figures, and M3 and later allocate registers dynamically.
CORE_THREADGROUP_BYTES, CORE_REGISTER_BYTES = 64 << 10, 208 << 10
OTHER_REGISTERS = 20  # addresses, the row's numbers, one fragment: an estimate


def registers(name: str, head_dim: int, item_bytes: int) -> int:
    """32-bit registers of a thread: sums, held rows, scores of a tile, and OTHER_REGISTERS."""
    tiles = attention.tiling(name, head_dim, item_bytes)
    sums = head_dim // 4 // tiles.split * (2 if name == "attention_dkv" else 1)
    n_held = 1 if name == "attention_forward" else 2
    held = n_held * head_dim // 4 * item_bytes // 4 if tiles.held else 0
    scores = tiles.columns // 4 * (1 if name == "attention_forward" else 2)
    return sums + held + scores + OTHER_REGISTERS


def occupancy(name: str, head_dim: int, item_bytes: int) -> dict[str, int]:
    """Threads and bytes of a threadgroup, registers of a thread, and threadgroups per core by either limit."""
    tiles = attention.tiling(name, head_dim, item_bytes)
    n_bytes, n_registers = tiles.threadgroup_bytes(name, head_dim, item_bytes), registers(name, head_dim, item_bytes)
    return {
        "threads": tiles.threads,
        "threadgroup_bytes": n_bytes,
        "registers": n_registers,
        "groups_by_memory": CORE_THREADGROUP_BYTES // n_bytes,
        "groups_by_registers": CORE_REGISTER_BYTES // (4 * n_registers * tiles.threads),
    }


def attention_nodes(shape: tuple[int, int, int, int | None], T: int, is_fused: bool) -> dict[str, list[Node]]:
    """Nodes of one layer's forward and backward, T tokens in 16 bits, in the plan's tiles and blocks."""
    H, K, D, window = shape
    heads = Heads(D, D**-0.5, window, None, 0.0, {})
    most = Plan().query_block
    plan = Plan(query_block=most if is_fused else query_block(most, 4 * H * T))

    def layer(names: Sequence[str]) -> Callable[..., list[mx.array]]:
        def run(q: mx.array, k: mx.array, v: mx.array, d_o: mx.array, lse: mx.array) -> list[mx.array]:
            made = Attention(heads, plan.query_block, Barrier(None))
            made.is_fused, made.keys, made.values = is_fused, k, v
            outputs: list[mx.array] = []
            for start, stop in reversed(plan.tiles(T)):
                rows = slice(start, stop)
                if "forward" in names:
                    outputs += [made(q[:, :, rows], start), *(made.fused[start] if is_fused else ())]
                else:
                    if is_fused:
                        made.fused[start] = (d_o[:, rows], lse[:, :, rows])  # its own output has this shape
                    outputs.append(made.backward(q[:, :, rows], d_o[:, rows], start))
            return [*outputs, *made.sums()]

        return run

    inputs = [mx.zeros(s, mx.bfloat16) for s in ((1, H, T, D), (1, K, T, D), (1, K, T, D), (1, T, H * D))]
    inputs.append(mx.zeros((1, H, T)))
    return {name: nodes_of(layer([name]), *inputs) for name in ("forward", "backward")}


def moved_bytes(nodes: list[Node]) -> float:
    """Bytes read and written by every node that is not a view; sums are written in place."""
    return sum(_node_bytes(node) for node in nodes)


def _node_bytes(node: Node) -> float:
    if node.name in VIEWS:
        return 0.0
    if node.name == "SliceUpdate":
        shape, item_bytes = node.inputs[1]
        return 2.0 * math.prod(shape) * item_bytes
    return node.n_bytes


def largest_bytes(nodes: list[Node]) -> int:
    """Bytes of the largest array that a node outputs."""
    return max(math.prod(shape) * item for node in nodes for shape, item in node.outputs)


def kernels(argv: Sequence[str]) -> None:
    """Attention's kernels and MLX's path in blocks: operations, bytes, bounds on four GPUs, and the kernels' occupancy.

    Operations are those of the products, in whole tiles; bytes are read and written by every node of the graphs that
    the engine builds, which are not evaluated. Rates are published peaks; a bound is the larger of operations / rate
    and bytes / bandwidth. "share": of the peak, which the kernels must reach to be as fast as MLX's path, whose
    products are assumed to reach 60 % of it, and its other operations 75 % of the bandwidth. Nothing is timed: on a
    Mac, `python -m mebp_mlx.doctor --kernels` does that.
    """
    parser = report.Parser("kernels", kernels.__doc__)
    parser.add_argument("--tokens", type=report.positive, default=4096, help="T (default: 4,096)")
    options = parser.parse_args(argv)
    rows, lines, used = [], [], []
    for layer, shape in LAYERS.items():
        row = attention_row(layer, shape, options.tokens)
        rows.append(row)
        for way in ("kernels", "blocks"):
            for part in ("forward", "backward"):
                found = row[way][part]
                sizes = [
                    found["operations"] / 1e9,
                    found["n_bytes"] / 1e6,
                    found["largest_bytes"] / 1e6,
                    found["nodes"],
                ]
                bounds = [1e3 * bound for bound in found["bound_s"].values()]
                share = f"{row['share'][GPUS[1].name]:.0%}" if (way, part) == ("kernels", "backward") else ""
                lines.append([layer, f"{way}, {part}", *sizes, *bounds, share])
    for D in attention.HEAD_DIMS:
        for name in attention.NAMES:
            used.append([D, name, *occupancy(name, D, 2).values()])
    print(f"one layer, T = {options.tokens:,}, 16 bits; bounds from published rates, nothing measured")
    gpus = [f"{gpu.name}, ms" for gpu in GPUS]
    heads = ["layer", "", "GFLOP", "MB moved", "largest array, MB", "launches", *gpus, f"share ({GPUS[1].name})"]
    print(report.table(heads, lines))
    heads = ["head dim", "kernel", "threads", "threadgroup bytes", "registers", "groups by memory", "by registers"]
    print(report.table(heads, used))
    print(json.dumps({"bench": "kernels", "tokens": options.tokens, "rows": rows}))


def attention_row(layer: str, shape: tuple[int, int, int, int | None], T: int) -> dict[str, Any]:
    """Counts of a layer both ways, and the share of a GPU's peak above which the kernels' backward is faster."""
    row: dict[str, Any] = {"layer": layer}
    with attention.assumed():
        for way, is_fused in (("kernels", True), ("blocks", False)):
            row[way] = {part: _counts(nodes) for part, nodes in attention_nodes(shape, T, is_fused).items()}
    ours, theirs = row["kernels"]["backward"], row["blocks"]["backward"]
    outside = theirs["n_bytes"] - theirs["product_bytes"]
    row["share"] = {
        gpu.name: ours["operations"]
        / gpu.flops
        / (theirs["operations"] / gpu.flops / 0.6 + outside / gpu.bandwidth / 0.75)
        for gpu in GPUS
    }
    return row


def _counts(nodes: list[Node]) -> dict[str, Any]:
    operations, n_bytes = sum(node.flops for node in nodes), moved_bytes(nodes)
    return {
        "operations": operations,
        "n_bytes": n_bytes,
        "product_bytes": sum(node.n_bytes for node in nodes if node.flops),
        "largest_bytes": largest_bytes(nodes),
        "nodes": sum(node.name not in VIEWS for node in nodes),
        "bound_s": {gpu.name: gpu.bound_s(operations, n_bytes) for gpu in GPUS},
    }


# ----------------------------------------------------------------------------------------------- the head

THREADS = 1024  # Metal's limit for a threadgroup
REGISTERS = 96  # 32-bit registers per thread of such a threadgroup, at most (an estimate)
KERNEL_SHARE = 0.45  # of the peak, linear_cross_entropy: an estimate (float tiles, no double buffering)
WAIT_S = 0.2e-3  # of a small blocking evaluation (published: 0.15 to 0.25 ms)


@dataclass(frozen=True)
class Way:
    """operations: multiplications and additions; n_bytes: device memory traffic; registers: one thread's part of a sum
    [32, D] in a threadgroup of 1,024 threads.
    """

    name: str
    operations: float
    n_bytes: float
    registers: float = 0

    def bound_s(self, gpu: Gpu) -> float:
        return gpu.bound_s(self.operations, self.n_bytes)


def ways(T: int, V: int, D: int, item_bytes: int = 2) -> list[Way]:
    """The three methods for T labelled rows, 4-bit weights in groups of 64, 16-bit activations."""
    weights = V * D * (4 / 8 + 2 * item_bytes / 64)
    rows, logits = T * D, T * V
    chunk = Plan(head_block_bytes=None).vocabulary_chunk(T, 0, item_bytes)
    n_chunks = math.ceil(V / chunk)
    two_products = 4.0 * T * V * D
    # z and p are written and read; the sum [T, D] is read and written for every chunk.
    a_bytes = 2 * weights + 4 * logits * item_bytes + 2 * n_chunks * rows * 4 + n_chunks * rows * item_bytes
    n_tiles = math.ceil(T / ROWS)
    splits = max(1, 40 // n_tiles)  # of the vocabulary, to occupy 40 cores; each has its own sum
    return [
        Way("A: two products and online_softmax", two_products, a_bytes),
        Way(
            "B: one kernel, dh in registers",
            two_products,
            weights + rows * item_bytes + 2 * splits * rows * 4,
            ROWS * D / THREADS,
        ),
        Way(
            "C: one kernel, dh in device memory",
            two_products,
            2 * weights + n_tiles * ROWS * D * 4 * 2 * math.ceil(V / COLUMNS),
        ),
    ]


def head_backward(argv: Sequence[str]) -> None:
    """Why the head's dh has no own kernel: bytes and operations of three methods, and bounds on four GPUs.

        A  z = h W^T by quantized_matmul, online_softmax, p W by quantized_matmul: logits pass through memory
        B  one kernel that sums 32 rows of dh in the registers of 1,024 threads, as flash attention does
        C  one kernel, dh in device memory, read and written once for every tile of 64 columns of logits

    Nothing is timed. Rates are published peaks; a bound is the larger of operations / rate and bytes / bandwidth. B
    saves the time of the additional bytes that A moves.
    """
    parser = report.Parser("head_backward", head_backward.__doc__)
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    options = parser.parse_args(argv)
    rows, lines = [], []
    for shape, V, D in _heads():
        first, *_ = found = ways(options.tokens, V, D)
        for way in found:
            bounds = {gpu.name: way.bound_s(gpu) for gpu in GPUS}
            saved = {gpu.name: (first.n_bytes - way.n_bytes) / gpu.bandwidth for gpu in GPUS}
            sizes = [way.operations / 1e9, way.n_bytes / 1e6, way.registers or None]
            lines.append([shape, way.name, *sizes, *(1e3 * bounds[g.name] for g in GPUS), 1e3 * saved["M2 (10 cores)"]])
            counts = {"operations": way.operations, "n_bytes": way.n_bytes, "registers": way.registers}
            rows.append({"shape": shape, "way": way.name[0], **counts, "bound_s": bounds, "saved_s": saved})
    print(f"T = {options.tokens}; bounds from published rates, nothing measured; about {REGISTERS} registers a thread")
    gpus = [f"{gpu.name}, ms" for gpu in GPUS]
    print(report.table(["shape", "way", "GFLOP", "MB", "registers", *gpus, "passes saved on M2, ms"], lines))
    print(json.dumps({"bench": "head_backward", "tokens": options.tokens, "rows": rows}))


def forward_s(gpu: Gpu, T: int, V: int, D: int, logits_block_bytes: int, waits: bool) -> tuple[float, float]:
    """Seconds of the loss alone by linear_cross_entropy, and by quantized_matmul and online_softmax.

    waits: whether to wait for each chunk's logits and state, as in the smallest plan.
    """
    operations = 2.0 * T * V * D
    n_chunks = math.ceil(
        V / Plan(head_block_bytes=None, logits_block_bytes=logits_block_bytes).vocabulary_chunk(T, 0, 2)
    )
    passes_s = 3 * 2 * T * V / (0.75 * gpu.bandwidth)  # z written and read, p written
    kernel_s = operations / (KERNEL_SHARE * gpu.flops)
    return kernel_s, operations / (gpu.share * gpu.flops) + passes_s + 2 * WAIT_S * n_chunks * waits


def head_forward(argv: Sequence[str]) -> None:
    """When linear_cross_entropy beats quantized_matmul and online_softmax for the loss alone: counted, not measured.

    The kernel's share of the peak is an estimate, MLX's are published. The smallest plan waits twice for every chunk of
    1 MiB of logits; in the others, the GPU already has the next chunk during a wait.
    """
    parser = report.Parser("head_forward", head_forward.__doc__)
    parser.add_argument("--tokens", type=report.positive, default=256, help="T (default: 256)")
    options = parser.parse_args(argv)
    rows, lines = [], []
    for shape, V, D in _heads():
        for gpu in GPUS:
            kernel_s, waiting_s = forward_s(gpu, options.tokens, V, D, 1 << 20, True)
            lazy_s = forward_s(gpu, options.tokens, V, D, 8 << 20, False)[1]
            used = "the smallest plan" if kernel_s < waiting_s else "no plan"
            used = "every plan" if kernel_s < lazy_s else used
            lines.append([shape, gpu.name, 1e3 * kernel_s, 1e3 * waiting_s, 1e3 * lazy_s, used])
            seconds = {"kernel_s": kernel_s, "waiting_s": waiting_s, "lazy_s": lazy_s}
            rows.append({"shape": shape, "gpu": gpu.name, **seconds})
    print(f"T = {options.tokens}; from published rates, nothing measured; the kernel at {KERNEL_SHARE:.0%} of the peak")
    heads = ["shape", "GPU", "kernel ms", "products ms, smallest plan", "other plans", "the kernel wins in"]
    print(report.table(heads, lines))
    print(json.dumps({"bench": "head_forward", "tokens": options.tokens, "rows": rows}))


def _heads() -> list[tuple[str, int, int]]:
    """(shape, V, D)."""
    configs = {shape: SHAPES[shape] for shape in ("qwen2.5-0.5b", "qwen2.5-3b", "gemma3-4b")}
    return [(shape, c["vocab_size"], c.get("text_config", c)["hidden_size"]) for shape, c in configs.items()]


BENCHES: dict[str, report.Bench] = {
    "kernels": kernels,
    "head_backward": head_backward,
    "head_forward": head_forward,
}


def main(argv: Sequence[str] | None = None) -> object:
    return report.pick(BENCHES, argv, default="kernels")


if __name__ == "__main__":
    report.run(main)
