"""Rewrites a checkpoint as the shards of a new one: plans the layout from the headers alone, then streams the rows.

This is the core of `mebp_mlx.convert`, without its options and folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..model.base import Model
from ..model.config import FLOAT_MODES, Linear, Quantization
from ..model.experts import ROUTER_PACKING
from ..model.lora import Adapter, Pair
from ..system.footprint import footprint_bytes
from ..system.units import megabytes
from ..weights.safetensors import TensorInfo
from ..weights.writer import DTYPES, NAMES, Entry, Shard
from .quantize import Packing, Recipe, pack, unpacked

_ROW_BLOCK_ITEMS = 1 << 20  # weights in memory at once
_FLOATS = ("F32", "F16", "BF16")
_OWN_DTYPE = (".A_log", ".expert_bias")  # tensors that keep theirs, as in mlx-lm
_KINDS = (*_FLOATS, "U32", "U8")  # packed weights, scales of FLOAT_MODES

Say = Callable[[str], None]


@dataclass
class Report:
    """The results of a conversion. Errors are relative: the RMS of the differences over the RMS of the weights."""

    bytes_before: int  # size of the tensors that the model uses
    bytes_after: int
    n_parameters: int
    packed: list[str]  # matrices
    copied: list[str]  # matrices copied byte for byte: all of them, or those already packed in this format
    unpacked: list[str]  # matrices whose row length is not a multiple of the group size
    left_out: list[str]  # tensors of the source that the model does not use
    errors: dict[str, float] = field(default_factory=dict)  # of each packed matrix
    others: dict[str, Quantization] = field(default_factory=dict)  # formats that differ from the main one
    error: float = 0.0  # of all packed matrices together, without the copied ones
    seconds: float = 0.0


@dataclass(frozen=True)
class _Matrix:
    """A matrix to be rewritten, or a stack. dtype: that of its scales and biases or, if it is not packed, of its
    weights. Experts that are stored separately become a stack.
    """

    linear: Linear
    dtype: mx.Dtype
    packing: Packing | None

    def entries(self) -> Iterator[Entry]:
        name, (*rows, n_in) = self.linear.name, self.linear.shape
        dtype, packing = NAMES[self.dtype], self.packing
        if packing is None:
            yield Entry(f"{name}.weight", dtype, self.linear.shape)
            return
        groups = (*rows, n_in // packing.group_size)
        yield Entry(f"{name}.weight", "U32", (*rows, n_in * packing.bits // 32))
        yield Entry(f"{name}.scales", "U8" if packing.mode in FLOAT_MODES else dtype, groups)
        if packing.mode not in FLOAT_MODES:
            yield Entry(f"{name}.biases", dtype, groups)


@dataclass(frozen=True)
class _Vector:
    """A norm or a bias, written in the new dtype."""

    entry: Entry

    def entries(self) -> Iterator[Entry]:
        yield self.entry


@dataclass(frozen=True)
class _Same:
    """A tensor that is copied byte for byte."""

    entry: Entry

    def entries(self) -> Iterator[Entry]:
        yield self.entry


@dataclass(frozen=True)
class _Stacked:
    """The biases of experts that are stored apart, as a stack."""

    linear: Linear
    dtype: mx.Dtype

    def entries(self) -> Iterator[Entry]:
        yield Entry(f"{self.linear.name}.bias", NAMES[self.dtype], self.linear.shape[:2])


class Repack:
    """The new files: one for the embeddings, one for each decoder block, one for the final norm (with the head).

    recipe: how matrices are packed; None copies every tensor's bytes. dtype: for everything that is not packed; None
    keeps each tensor's own. adapter: LoRA pairs to add to their matrices, which without a recipe are packed again in
    their old format. Raises UserError if a tensor is not of a float type, or the group size fits no matrix.
    """

    def __init__(
        self, model: Model, recipe: Recipe | None, dtype: mx.Dtype | None, adapter: Adapter | None = None
    ) -> None:
        self._model, self._recipe, self._dtype, self._adapter = model, recipe, dtype, adapter
        spec = model.spec
        inputs = spec.layer_inputs
        more: list[Linear | str] = [] if inputs is None else [inputs.embedding, inputs.projection, inputs.norm]
        blocks: list[list[Linear | str]] = [[spec.embedding, *more]]
        blocks += [[*layer.norms.values(), *layer.arrays.values(), *layer.matrices.values()] for layer in spec.layers]
        head = spec.spare_head if spec.tied else spec.head
        blocks += [[spec.final_norm] if head is None else [spec.final_norm, head]]
        self._blocks = [[new for item in block for new in self._new(item)] for block in blocks]
        linears = [item for block in blocks for item in block if isinstance(item, Linear)]
        matrices = [item for block in self._blocks for item in block if isinstance(item, _Matrix)]
        packed = [matrix.linear.name for matrix in matrices if matrix.packing]
        copied = [linear.name for linear in linears if self._stays(linear)]
        most = recipe.packing if recipe is not None else None
        if most is not None and not packed and not copied:
            widths = ", ".join(str(n) for n in sorted({linear.in_dims for linear in linears}))
            raise UserError(f"--group-size {most.group_size}: divides no matrix's row length ({widths})")
        stored = {linear.name: how.stored for linear in linears if (how := self._packing(linear)) is not None}
        entries = [entry for block in self._blocks for item in block for entry in item.entries()]
        parts = {name for linear in linears for name in linear.tensors}
        vectors = [model.weights.info(name) for name in spec.tensors if name not in parts]
        used = set(spec.tensors)
        self.report = Report(
            bytes_before=sum(model.weights.info(name).n_bytes for name in used),
            bytes_after=sum(entry.n_bytes for entry in entries),
            n_parameters=sum(math.prod(vector.shape) for vector in vectors)
            + sum(math.prod(linear.shape) for linear in linears),
            packed=packed + (copied if most is not None else []),
            copied=copied,
            others={name: how for name, how in stored.items() if most is not None and how != most.stored},
            unpacked=[matrix.linear.name for matrix in matrices if not matrix.packing],
            left_out=[name for name in model.weights.names if name not in used],
            errors=dict.fromkeys(copied, 0.0),
        )

    def write(self, folder: Path, say: Say) -> dict[str, str]:
        """Writes and flushes all files, fills in the report's errors, and returns {tensor: file}.

        Raises UserError if a value is not finite, in the source or in the new dtype.
        """
        sums, placed = np.zeros(2), {}
        for number, block in enumerate(self._blocks, 1):
            began_s = time.perf_counter()
            file = f"model-{number:05d}-of-{len(self._blocks):05d}.safetensors"
            entries = [entry for item in block for entry in item.entries()]
            placed.update({entry.name: file for entry in entries})
            with open(folder / file, "xb") as new, Shard(new, entries) as shard:
                for item in block:
                    if isinstance(item, _Vector):
                        name, dtype = item.entry.name, DTYPES[item.entry.dtype]
                        shard.append(name, self._cast(name, self._model.tensor(name)[...], dtype))
                    elif isinstance(item, _Same):
                        self._copy(shard, item.entry)
                    elif isinstance(item, _Stacked):
                        self._stack(shard, item)
                    else:
                        sums += self._write_matrix(shard, item)
            what = f"block {number - 1}/{self._model.spec.L}"
            what = {1: "embedding", len(self._blocks): "head"}.get(number, what)
            n_bytes, seconds = sum(entry.n_bytes for entry in entries), time.perf_counter() - began_s
            say(f"{what:<12} {n_bytes / 1e6:8.1f} MB  {seconds:6.2f} s  footprint {megabytes(footprint_bytes())}")
        self.report.error = _relative(sums)
        return placed

    def _new(self, item: Linear | str) -> Iterator[_Matrix | _Vector | _Same | _Stacked]:
        if isinstance(item, str):
            info = self._model.weights.info(item)
            dtype = self._dtype_of(item)
            yield _Same(_entry(info)) if self._recipe is None else _Vector(Entry(item, NAMES[dtype], info.shape))
            return
        if self._stays(item):
            yield from (_Same(_entry(self._model.weights.info(name))) for name in item.tensors)
        else:
            yield _Matrix(item, self._own(item), self._packing(item))
        if not item.bias:
            return
        if item.apart is None or self._stays(item):
            own = [item.expert(index) for index in range(item.n_experts)] if item.apart is not None else [item]
            yield from (new for linear in own for new in self._new(f"{linear.name}.bias"))
        else:
            yield _Stacked(item, self._dtype_of(f"{item.expert(0).name}.bias"))

    def _packing(self, linear: Linear) -> Packing | None:
        """The packing of a matrix that is rewritten; None if it is not packed, or the group size does not divide its
        row length.
        """
        if self._recipe is None:
            own = linear.quantization
            return None if own is None else Packing(own.bits, own.group_size, own.mode)
        packing = self._recipe.of(linear.name, self._model.spec.L)
        routing = self._model.spec.routing
        if packing is not None and routing is not None and routing.packs_router(linear.name):
            packing = Packing(*ROUTER_PACKING, "affine")  # as mlx-lm packs it, whatever the rest
        return packing if packing is not None and packing.fits(linear.in_dims) else None

    def _stays(self, linear: Linear) -> bool:
        """Whether a matrix is copied byte for byte: without a recipe, or if it already has the new format."""
        if self._adapter is not None and linear.name in self._adapter.pairs:
            return False
        if self._recipe is None:  # with adapters, experts become stacks: mlx-lm reads no layer of both kinds
            return linear.apart is None or self._adapter is None
        packing = self._packing(linear)
        if linear.apart is not None:
            return False
        if packing is None or packing.mode == "symmetric" or packing.stored != linear.quantization:
            return False
        scales = self._model.weights.info(linear.tensors[-1]).dtype
        return packing.mode in FLOAT_MODES or NAMES[self._own(linear)] == scales

    def _own(self, linear: Linear) -> mx.Dtype:
        """The dtype of a matrix's numbers; FLOAT_MODES store none, so the final norm's is used."""
        has_none = linear.quantization is not None and linear.quantization.mode in FLOAT_MODES
        return self._dtype_of(self._model.spec.final_norm if has_none else linear.tensors[-1])

    def _dtype_of(self, name: str) -> mx.Dtype:
        info = self._model.weights.info(name)
        if info.dtype not in _FLOATS:
            raise UserError(f"{info.file}: tensor {name} has dtype {info.dtype}, not one of {', '.join(_FLOATS)}")
        return DTYPES[info.dtype] if self._dtype is None or name.endswith(_OWN_DTYPE) else self._dtype

    def _copy(self, shard: Shard, entry: Entry) -> None:
        for start, stop in _row_blocks(entry.shape):
            shard.append(entry.name, self._model.tensor(entry.name)[start:stop])

    def _write_matrix(self, shard: Shard, matrix: _Matrix) -> np.ndarray:
        """Writes a matrix. Returns sums of squares, of the packing errors and of the source's weights; zeros if it is
        not packed.
        """
        linear, sums = matrix.linear, np.zeros(2)
        for exact in self._pieces(linear):
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

    def _stack(self, shard: Shard, stacked: _Stacked) -> None:
        """Writes the biases of experts that are stored separately."""
        linear = stacked.linear
        for index in range(linear.n_experts):
            name = f"{linear.expert(index).name}.bias"
            shard.append(f"{linear.name}.bias", self._cast(name, self._model.tensor(name)[...], stacked.dtype))

    def _pieces(self, linear: Linear) -> Iterator[mx.array]:
        """Rows of W + s (A B)^T in float32, in order, of one expert after another."""
        pair = None if self._adapter is None else self._adapter.pairs.get(linear.name)
        for index in range(max(1, linear.n_experts)):
            own, own_pair = linear, pair
            if linear.n_experts:
                own = linear.expert(index)
                own_pair = None if pair is None else pair.expert(index)
            for start, stop in _row_blocks((linear.out_dims, linear.in_dims)):
                yield self._rows(own, own_pair, start, stop)

    def _rows(self, linear: Linear, pair: Pair | None, start: int, stop: int) -> mx.array:
        """Rows of W + s (A B)^T in float32; with DoRA, scaled to the lengths m."""
        rows = self._model.rows(linear, start, stop)
        if self._adapter is None or pair is None:
            return rows
        rows = rows + self._adapter.scale * (pair.b[:, start:stop].T @ pair.a.T)
        if pair.m is None:
            return rows
        return rows * (pair.m[start:stop] / mx.linalg.norm(rows, axis=1))[:, None]

    def _cast(self, name: str, values: mx.array, dtype: mx.Dtype) -> mx.array:
        cast = values.astype(dtype)
        quick = _sum_of_squares(np.asarray(cast.astype(mx.float32)))  # several times as fast as checking each value
        if not math.isfinite(quick) and not mx.isfinite(cast).all().item():
            too_large = mx.isfinite(values).all().item()
            why = f"values that are too large for {NAMES[dtype]}" if too_large else "values that are not finite"
            raise UserError(f"{self._model.weights.info(name).file}: tensor {name} contains {why}")
        return cast


def _entry(info: TensorInfo) -> Entry:
    if info.dtype not in _KINDS:
        raise UserError(f"{info.file}: tensor {info.name} has dtype {info.dtype}, not one of {', '.join(_KINDS)}")
    return Entry(info.name, info.dtype, info.shape)


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, _ROW_BLOCK_ITEMS // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _sum_of_squares(values: np.ndarray) -> float:
    return float(np.vdot(values, values))


def _relative(sums: Sequence[float] | np.ndarray) -> float:
    return math.sqrt(sums[0] / sums[1]) if sums[1] else 0.0
