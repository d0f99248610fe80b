"""A checkpoint as the shards of a new, packed one: what goes where from the headers alone, then row by row.

The work of `mebp_mlx.convert`, without its options and folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from .errors import UserError
from .model.frozen import Model
from .model.pack import Packing, pack, unpacked
from .model.spec import Layer, Linear, ModelSpec
from .runtime.footprint import footprint_bytes
from .runtime.log import megabytes
from .shards import DTYPES, NAMES, Entry, Shard

_ROW_BLOCK_ITEMS = 1 << 20  # weights in memory at once
_FLOATS = ("F32", "F16", "BF16")

Say = Callable[[str], None]


@dataclass
class Report:
    """What a conversion does. Errors are relative: the RMS of the differences over the RMS of the weights."""

    bytes_before: int  # of the tensors that the model uses
    bytes_after: int
    n_parameters: int
    packed: list[str]  # matrices
    copied: list[str]  # those of them that were packed in this way before
    unpacked: list[str]  # matrices whose rows the group size does not divide
    left_out: list[str]  # tensors of the source that the model does not use
    errors: dict[str, float] = field(default_factory=dict)  # of each packed matrix
    error: float = 0.0  # of all of them together, the copied ones apart
    seconds: float = 0.0


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the model, and what becomes of it. dtype: of its scales and biases or, unpacked, its own."""

    linear: Linear
    dtype: mx.Dtype
    packing: Packing | None
    copied: bool  # its packed parts are used as they are

    def entries(self) -> Iterator[Entry]:
        name, n_rows, n_in = self.linear.name, self.linear.out_dims, self.linear.in_dims
        dtype, packing = NAMES[self.dtype], self.packing
        if packing is None:
            yield Entry(f"{name}.weight", dtype, (n_rows, n_in))
            return
        groups = (n_rows, n_in // packing.group_size)
        yield Entry(f"{name}.weight", "U32", (n_rows, n_in * packing.bits // 32))
        yield Entry(f"{name}.scales", "U8" if packing.mode == "mxfp4" else dtype, groups)
        if packing.mode != "mxfp4":
            yield Entry(f"{name}.biases", dtype, groups)


@dataclass(frozen=True)
class _Vector:
    """A norm or a bias, copied."""

    entry: Entry

    def entries(self) -> Iterator[Entry]:
        yield self.entry


class Repack:
    """The new files: the embedding's, one for each decoder block, and the final norm's (with the head).

    packing: of the matrices; dtype: of all that is not packed, None: each tensor's own. Raises UserError for a
    tensor of another kind than floats, and when the group size fits no matrix.
    """

    def __init__(self, model: Model, packing: Packing, dtype: mx.Dtype | None) -> None:
        self._model, self._packing, self._dtype = model, packing, dtype
        self._used: dict[str, int] = {}  # bytes, by name in the source
        spec = model.spec
        blocks: list[list[Linear | str]] = [[spec.embedding]]
        blocks += [_in_order_of_use(spec, layer) for layer in spec.layers]
        blocks += [[spec.final_norm] if spec.tied else [spec.final_norm, spec.head]]
        self._blocks = [[new for item in block for new in self._new(item)] for block in blocks]
        matrices = [item for block in self._blocks for item in block if isinstance(item, _Matrix)]
        if not any(matrix.packing for matrix in matrices):
            widths = ", ".join(str(n) for n in sorted({matrix.linear.in_dims for matrix in matrices}))
            raise UserError(f"--group-size {packing.group_size}: divides no matrix's rows, which are {widths} long")
        entries = [entry for block in self._blocks for item in block for entry in item.entries()]
        vectors = [item.entry for block in self._blocks for item in block if isinstance(item, _Vector)]
        self.report = Report(
            bytes_before=sum(self._used.values()),
            bytes_after=sum(entry.n_bytes for entry in entries),
            n_parameters=sum(math.prod(entry.shape) for entry in vectors)
            + sum(matrix.linear.out_dims * matrix.linear.in_dims for matrix in matrices),
            packed=[matrix.linear.name for matrix in matrices if matrix.packing],
            copied=[matrix.linear.name for matrix in matrices if matrix.copied],
            unpacked=[matrix.linear.name for matrix in matrices if not matrix.packing],
            left_out=[name for name in model.weights.names if name not in self._used],
        )

    def write(self, folder: Path, say: Say) -> dict[str, str]:
        """Writes all files, each flushed; fills the report's errors; returns {tensor: file}.

        Raises UserError for values that are not finite, in the source or in the new dtype.
        """
        sums, placed = np.zeros(2), {}
        for number, block in enumerate(self._blocks, 1):
            began_s = time.perf_counter()
            file = f"model-{number:05d}-of-{len(self._blocks):05d}.safetensors"
            entries = [entry for item in block for entry in item.entries()]
            placed.update({entry.name: file for entry in entries})
            with Shard(folder / file, entries) as shard:
                for item in block:
                    if isinstance(item, _Vector):
                        name, dtype = item.entry.name, DTYPES[item.entry.dtype]
                        shard.append(name, self._cast(name, self._model.weights.rows(name), dtype))
                    elif item.copied:
                        self._copy(shard, item)
                    else:
                        sums += self._write_matrix(shard, item)
            what = f"block {number - 1}/{self._model.spec.L}"
            what = {1: "embedding", len(self._blocks): "head"}.get(number, what)
            n_bytes, seconds = sum(entry.n_bytes for entry in entries), time.perf_counter() - began_s
            say(f"{what:<12} {n_bytes / 1e6:8.1f} MB  {seconds:6.2f} s  footprint {megabytes(footprint_bytes())}")
        self.report.error = _relative(sums)
        return placed

    def _new(self, item: Linear | str) -> Iterator[_Matrix | _Vector]:
        if isinstance(item, str):
            yield _Vector(Entry(item, NAMES[self._dtype_of(item)], self._use(item)))
            return
        was, packing = item.quantization, self._packing if self._packing.fits(item.in_dims) else None
        parts = [f"{item.name}.{part}" for part in _parts(item)]
        for part in parts:
            self._use(part)
        if was is not None and was.mode == "mxfp4":  # has no dtype of its own
            own = self._dtype_of(self._model.spec.final_norm)
        else:
            own = self._dtype_of(parts[-1])
        same = packing is not None and packing.mode != "symmetric" and packing.stored == was
        if same and packing is not None and packing.mode == "affine":
            same = NAMES[own] == self._model.weights.info(parts[-1]).dtype
        yield _Matrix(item, own, packing, same)
        if item.bias:
            yield from self._new(f"{item.name}.bias")

    def _use(self, name: str) -> tuple[int, ...]:
        info = self._model.weights.info(name)
        self._used[name] = info.n_bytes
        return info.shape

    def _dtype_of(self, name: str) -> mx.Dtype:
        info = self._model.weights.info(name)
        if info.dtype not in _FLOATS:
            raise UserError(f"{info.file}: tensor {name} has dtype {info.dtype}, not one of {', '.join(_FLOATS)}")
        return self._dtype or DTYPES[info.dtype]

    def _copy(self, shard: Shard, matrix: _Matrix) -> None:
        for start, stop in _row_blocks(matrix.linear):
            for part in _parts(matrix.linear):
                name = f"{matrix.linear.name}.{part}"
                shard.append(name, self._model.weights.rows(name, start, stop))
        self.report.errors[matrix.linear.name] = 0.0

    def _write_matrix(self, shard: Shard, matrix: _Matrix) -> np.ndarray:
        """Sums of squares: of the differences to the source's weights, and of these; zeros if it stays unpacked."""
        linear, sums = matrix.linear, np.zeros(2)
        for start, stop in _row_blocks(linear):
            exact = self._model.rows(linear, start, stop)
            rows = self._cast(f"{linear.name}.weight", exact, matrix.dtype)
            if matrix.packing is None:
                shard.append(f"{linear.name}.weight", rows)
                continue
            parts = pack(rows, matrix.packing)
            for part, values in parts.items():
                shard.append(f"{linear.name}.{part}", values)
            truth = np.asarray(exact)
            sums += (_sum_of_squares(truth - unpacked(parts, matrix.packing)), _sum_of_squares(truth))
        if matrix.packing is not None:
            self.report.errors[linear.name] = _relative(sums)
        return sums

    def _cast(self, name: str, values: mx.array, dtype: mx.Dtype) -> mx.array:
        cast = values.astype(dtype)
        quick = _sum_of_squares(np.asarray(cast.astype(mx.float32)))  # several times as fast as to look at each value
        if not math.isfinite(quick) and not mx.isfinite(cast).all().item():
            too_large = mx.isfinite(values).all().item()
            why = f"values that are too large for {NAMES[dtype]}" if too_large else "values that are not finite"
            raise UserError(f"{self._model.weights.info(name).file}: tensor {name} holds {why}")
        return cast


def _parts(linear: Linear) -> tuple[str, ...]:
    if linear.quantization is None:
        return ("weight",)
    return ("weight", "scales") if linear.quantization.mode == "mxfp4" else ("weight", "scales", "biases")


def _in_order_of_use(spec: ModelSpec, layer: Layer) -> list[Linear | str]:
    linears = layer.linears

    def norms(*names: str) -> list[str]:
        return [f"{layer.prefix}.{name}.weight" for name in names]

    return [
        *norms("input_layernorm"),
        *(linears[short] for short in "qkv"),
        *(norms("self_attn.q_norm", "self_attn.k_norm") if spec.qk_norm else ()),
        linears["o"],
        *norms("post_attention_layernorm"),
        *(norms("pre_feedforward_layernorm") if spec.gemma else ()),
        *(linears[short] for short in ("gate", "up", "down")),
        *(norms("post_feedforward_layernorm") if spec.gemma else ()),
    ]


def _row_blocks(linear: Linear) -> Iterator[tuple[int, int]]:
    step = max(1, _ROW_BLOCK_ITEMS // linear.in_dims)
    for start in range(0, linear.out_dims, step):
        yield start, min(start + step, linear.out_dims)


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.vdot(values, values))


def _relative(sums: Sequence[float] | np.ndarray) -> float:
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
