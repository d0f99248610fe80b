"""A checkpoint in a new packing and layout: one file a block, a few rows of one matrix in memory at a time."""

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


@dataclass
class Report:
    """What a conversion did. Errors are relative: the RMS of the difference over the RMS of the weights."""

    bytes_before: int  # of the tensors that the model uses
    bytes_after: int
    n_parameters: int
    n_packed: int
    unpacked: list[str]  # matrices whose rows the group size does not divide
    left_out: list[str]  # tensors of the source that the model does not use
    errors: dict[str, float] = field(default_factory=dict)  # of each packed matrix
    error: float = 0.0  # of all of them together
    seconds: float = 0.0


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the model, the dtype of its scales or of itself, and whether it will be packed."""

    linear: Linear
    dtype: mx.Dtype
    packing: Packing | None

    def entries(self) -> list[Entry]:
        name, n_rows, n_in = self.linear.name, self.linear.out_dims, self.linear.in_dims
        dtype, packing = NAMES[self.dtype], self.packing
        if packing is None:
            return [Entry(f"{name}.weight", dtype, (n_rows, n_in))]
        groups = (n_rows, n_in // packing.group_size)
        entries = [Entry(f"{name}.weight", "U32", (n_rows, n_in * packing.bits // 32))]
        if packing.mode == "mxfp4":
            return [*entries, Entry(f"{name}.scales", "U8", groups)]
        return [*entries, Entry(f"{name}.scales", dtype, groups), Entry(f"{name}.biases", dtype, groups)]


class Repack:
    """The new files, tensor by tensor, from the headers alone; `write` fills them."""

    def __init__(self, model: Model, packing: Packing, dtype: mx.Dtype | None) -> None:
        self.model, self.packing, self.dtype = model, packing, dtype
        self._used: dict[str, int] = {}
        spec = model.spec
        blocks: list[list[Linear | str]] = [[spec.embedding]]
        blocks += [_in_order_of_use(spec, layer) for layer in spec.layers]
        blocks += [[spec.final_norm] if spec.tied else [spec.final_norm, spec.head]]
        self.blocks: list[list[_Matrix | Entry]] = [
            [new for item in block for new in self._new(item)] for block in blocks
        ]
        items = [item for block in self.blocks for item in block]
        matrices = [item for item in items if isinstance(item, _Matrix)]
        packed = [matrix for matrix in matrices if matrix.packing]
        if not packed:
            widths = ", ".join(str(n) for n in sorted({matrix.linear.in_dims for matrix in matrices}))
            raise UserError(
                f"--group-size {packing.group_size}: divides no row of this model's matrices ({widths} long)"
            )
        self.report = Report(
            bytes_before=sum(self._used.values()),
            bytes_after=sum(entry.n_bytes for block in self.blocks for entry in _entries(block)),
            n_parameters=sum(
                i.linear.out_dims * i.linear.in_dims if isinstance(i, _Matrix) else math.prod(i.shape) for i in items
            ),
            n_packed=len(packed),
            unpacked=[matrix.linear.name for matrix in matrices if not matrix.packing],
            left_out=[name for name in model.weights.names if name not in self._used],
        )
        self.weight_map: dict[str, str] = {}

    def _new(self, item: Linear | str) -> Iterator[_Matrix | Entry]:
        if isinstance(item, str):
            yield Entry(item, NAMES[self._dtype_of(item)], self.model.weights.info(item).shape)
            return
        parts: tuple[str, ...] = ("weight",) if item.quantization is None else ("weight", "scales", "biases")
        if item.quantization is not None and item.quantization.mode != "affine":
            parts = ("weight", "scales")
            own = self.dtype or self._dtype_of(self.model.spec.final_norm)  # mxfp4 has none
        else:
            own = self._dtype_of(f"{item.name}.{parts[-1]}")
        for part in parts:
            self._used[f"{item.name}.{part}"] = self.model.weights.info(f"{item.name}.{part}").n_bytes
        yield _Matrix(item, own, self.packing if self.packing.fits(item.in_dims) else None)
        if item.bias:
            yield from self._new(f"{item.name}.bias")

    def _dtype_of(self, name: str) -> mx.Dtype:
        info = self.model.weights.info(name)
        if info.dtype not in _FLOATS:
            raise UserError(f"{info.file}: tensor {name} has dtype {info.dtype}, not one of {', '.join(_FLOATS)}")
        self._used[name] = info.n_bytes
        return self.dtype or DTYPES[info.dtype]

    def write(self, folder: Path, say: Callable[[str], None]) -> None:
        """Writes all shards, each flushed, and fills the report's errors."""
        total = np.zeros(2)
        for number, block in enumerate(self.blocks, 1):
            began_s = time.perf_counter()
            file = f"model-{number:05d}-of-{len(self.blocks):05d}.safetensors"
            entries = list(_entries(block))
            self.weight_map.update(dict.fromkeys((entry.name for entry in entries), file))
            shard = Shard(folder / file, entries)
            try:
                for item in block:
                    if isinstance(item, _Matrix):
                        total += self._write_matrix(shard, item)
                    else:
                        shard.append(item.name, self._finite(item.name, self.model.weights.rows(item.name), item.dtype))
                shard.close()
            finally:
                shard.abandon()
            what = "embedding" if number == 1 else f"block {number - 1}/{self.model.spec.L}"
            n_bytes, seconds = sum(entry.n_bytes for entry in entries), time.perf_counter() - began_s
            what = "head" if number == len(self.blocks) else what
            say(f"{what:<12} {megabytes(n_bytes):>9}  {seconds:6.2f} s  footprint {megabytes(footprint_bytes())}")
        self.report.error = _relative(total)

    def _write_matrix(self, shard: Shard, matrix: _Matrix) -> np.ndarray:
        """Sums of squares: of the difference to the source's weights, and of these; zeros for what is not packed."""
        linear, sums = matrix.linear, np.zeros(2)
        step = max(1, _ROW_BLOCK_ITEMS // linear.in_dims)
        for start in range(0, linear.out_dims, step):
            exact = self.model.rows(linear, start, min(start + step, linear.out_dims))
            rows = self._finite(f"{linear.name}.weight", exact, NAMES[matrix.dtype])
            if matrix.packing is None:
                shard.append(f"{linear.name}.weight", rows)
                continue
            parts = pack(rows, matrix.packing)
            for part, values in parts.items():
                shard.append(f"{linear.name}.{part}", values)
            truth = np.asarray(exact)
            difference = truth - unpacked(parts, matrix.packing)
            sums += [np.square(values).sum(dtype=np.float64) for values in (difference, truth)]
        if matrix.packing is not None:
            self.report.errors[linear.name] = _relative(sums)
        return sums

    def _finite(self, name: str, values: mx.array, dtype: str) -> mx.array:
        """The values in their new dtype. UserError if one of them is not finite there."""
        cast = values.astype(DTYPES[dtype])
        if not mx.isfinite(cast).all().item():
            why = "holds values that are not finite"
            if mx.isfinite(values).all().item():
                why = f"holds values that are too large for {dtype}"
            raise UserError(f"{self.model.weights.info(name).file}: tensor {name} {why}")
        return cast


def _in_order_of_use(spec: ModelSpec, layer: Layer) -> list[Linear | str]:
    linears = layer.linears

    def norms(*names: str) -> list[Linear | str]:
        return [f"{layer.prefix}.{name}.weight" for name in names]

    items = [*norms("input_layernorm"), linears["q"], linears["k"], linears["v"]]
    items += norms("self_attn.q_norm", "self_attn.k_norm") if spec.qk_norm else []
    items += [linears["o"], *norms("post_attention_layernorm")]
    items += norms("pre_feedforward_layernorm") if spec.gemma else []
    items += [linears["gate"], linears["up"], linears["down"]]
    return items + (norms("post_feedforward_layernorm") if spec.gemma else [])


def _entries(block: Sequence[_Matrix | Entry]) -> Iterator[Entry]:
    for item in block:
        yield from item.entries() if isinstance(item, _Matrix) else (item,)


def _relative(sums: np.ndarray) -> float:
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
