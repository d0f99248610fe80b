"""Reads safetensors as named views over memory-mapped files.

Opening reads only the headers. Bytes enter anonymous memory only when MLX copies from a view (model/base.py: Tensor);
the mapped pages stay clean file pages, which the system can drop at any time. Maps are shared and read-only: macOS
would count the pages of private, writable maps as the process's own memory once they are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from ..errors import UserError
from .zero_copy import adopt

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# safetensors name -> (numpy type of a view, MLX type). numpy has no bfloat16, so its bits are viewed as uint16.
# The 16- and 64-bit integers and BOOL occur only in unused buffers of some checkpoints.
DTYPES: dict[str, tuple[Any, mx.Dtype]] = {
    "F32": (np.dtype("<f4"), mx.float32),
    "F16": (np.dtype("<f2"), mx.float16),
    "BF16": (np.dtype("<u2"), mx.bfloat16),
    "U32": (np.dtype("<u4"), mx.uint32),
    "U8": (np.dtype("u1"), mx.uint8),
    "I8": (np.dtype("i1"), mx.int8),
    "I32": (np.dtype("<i4"), mx.int32),
    "U16": (np.dtype("<u2"), mx.uint16),
    "I16": (np.dtype("<i2"), mx.int16),
    "U64": (np.dtype("<u8"), mx.uint64),
    "I64": (np.dtype("<i8"), mx.int64),
    "BOOL": (np.dtype("u1"), mx.bool_),
}


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: `offset` counts bytes from the start of `file`."""

    name: str
    dtype: str  # a safetensors name: "F32", "F16", "BF16", "U32", "U8", "I8", "I32" ...
    shape: tuple[int, ...]
    n_bytes: int
    file: Path
    offset: int

    @property
    def mlx_dtype(self) -> mx.Dtype:
        """The dtype of an MLX array with this tensor's values."""
        return DTYPES[self.dtype][1]

    @property
    def not_adoptable(self) -> str | None:
        """The reason why MLX cannot adopt the mapped bytes (on Metal); None if it can."""
        item_bytes = self.mlx_dtype.size
        if not self.n_bytes:
            return "empty"
        if self.offset % item_bytes:  # kernels require items aligned to their size
            return f"not {item_bytes}-byte aligned"
        return None


class MappedWeights:
    """The tensors of a `.safetensors` file, or of a folder with `model*.safetensors` (single or sharded).

    `names` is in file order: shard by shard, by offset. The constructor checks all headers and raises UserError naming
    the file (and the tensor), so that no later read can be out of range. adopt: whether in_place() lets MLX adopt the
    mapped pages where possible (weights/zero_copy.py).
    """

    names: tuple[str, ...]

    def __init__(self, path: str | Path, *, adopt: bool = False) -> None:
        path = Path(path)
        self.adopt = adopt
        files = _shards(path)
        self._infos: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._adopted: dict[str, mx.array | None] = {}
        try:
            for file in files:
                self._maps[file], infos = _open_shard(file)
                for info in infos:
                    if info.name in self._infos:
                        other = self._infos[info.name].file.name
                        raise UserError(f"{file}: tensor {_one_line(info.name)} is already in {other}")
                    self._infos[info.name] = info
        except BaseException:
            self.close()
            raise
        self.names = tuple(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __len__(self) -> int:
        return len(self._infos)

    def rename(self, prefixes: Mapping[str, str]) -> None:
        """Renames tensors: in names that begin with a key of `prefixes`, the key is replaced by its value."""
        for old, new in prefixes.items():
            for name in [name for name in self._infos if name.startswith(old)]:
                renamed = new + name.removeprefix(old)
                if renamed not in self._infos:
                    self._infos[renamed] = dataclasses.replace(self._infos.pop(name), name=renamed)
        self.names = tuple(self._infos)

    def rename_parts(self, parts: Mapping[str, str]) -> None:
        """Renames tensors: a part between dots that is a key becomes the key's value."""
        if not parts:
            return
        for name in list(self._infos):
            renamed = ".".join(parts.get(part, part) for part in name.split("."))
            if renamed not in self._infos:
                self._infos[renamed] = dataclasses.replace(self._infos.pop(name), name=renamed)
        self.names = tuple(self._infos)

    def info(self, name: str) -> TensorInfo:
        """The dtype, shape and location of a tensor. Raises UserError if there is no tensor of that name."""
        try:
            return self._infos[name]
        except KeyError:
            where = ", ".join(str(file) for file in self._maps)
            raise UserError(f"{where}: no tensor named {_one_line(name)}") from None

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only array over the map, without a copy; bfloat16 appears as uint16.

        A tensor that is not aligned to its item size gives a view of unaligned data.
        """
        info = self.info(name)
        dtype = DTYPES[info.dtype][0]
        if info.n_bytes == 0:
            return np.zeros(info.shape, dtype)
        # frombuffer, unlike the ndarray constructor, keeps the map open for as long as the view lives
        count = info.n_bytes // dtype.itemsize
        return np.frombuffer(self._map(info), dtype, count, info.offset).reshape(info.shape)

    def _map(self, info: TensorInfo) -> mmap.mmap:
        if not self._maps:
            raise ValueError("these weights are closed")
        return self._maps[info.file]

    def in_place(self, name: str) -> mx.array | None:
        """The whole tensor over its mapped pages, without a copy; None if it must be copied.

        Adopted at the first call and kept until `close`. MLX reuses an array's memory for a result (astype, 1 + w) if
        nothing else refers to it; the reference kept here prevents that, also for a slice.
        """
        info = self.info(name)
        if not self.adopt or info.not_adoptable:
            return None
        if name not in self._adopted:
            array = adopt(self._map(info), info.offset, info.n_bytes)
            self._adopted[name] = None if array is None else array.view(info.mlx_dtype).reshape(info.shape)
        return self._adopted[name]

    def placement(self, names: Iterable[str]) -> dict[str | None, list[TensorInfo]]:
        """These tensors grouped by the reason for copying them; None: adopted, or adoptable on a Metal GPU."""
        tensors: dict[str | None, list[TensorInfo]] = {}
        for name in names:
            info = self.info(name)
            why = info.not_adoptable
            if self.adopt and why is None and self.in_place(name) is None:
                why = "refused by MLX"
            tensors.setdefault(why, []).append(info)
        return tensors

    def advise(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Asks the kernel to read these rows soon (madvise WILLNEED). Does not use MLX, so it is safe in any thread."""
        info = self.info(name)
        if not info.n_bytes or not self._maps or not hasattr(mmap, "MADV_WILLNEED"):
            return
        first, n_bytes = info.offset, info.n_bytes
        if info.shape:
            n_rows = info.shape[0]
            row_bytes = info.n_bytes // n_rows
            start = min(max(start, 0), n_rows)
            stop = n_rows if stop is None else min(max(stop, start), n_rows)
            first, n_bytes = info.offset + start * row_bytes, (stop - start) * row_bytes
        page_start = first - first % mmap.PAGESIZE  # madvise requires a page boundary
        if n_bytes:
            # only advice: a map that was closed meanwhile, or a file system without support, is not an error
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._maps[info.file].madvise(mmap.MADV_WILLNEED, page_start, first + n_bytes - page_start)

    @property
    def file_bytes(self) -> dict[Path, int]:
        """The size of each mapped file at the time it was opened."""
        return {file: len(mapped) for file, mapped in self._maps.items()}

    def check_sizes(self) -> None:
        """Raises UserError if a file has shrunk: reads beyond its last page raise SIGBUS, reads within give zeros."""
        for file, mapped in self._maps.items():
            if (n_bytes := mapped.size()) < len(mapped):
                raise UserError(f"{file}: was {len(mapped)} bytes, is {n_bytes} bytes: cut short while it was in use")

    def close(self) -> None:
        """Releases the maps. Views and adopted arrays that are still referenced keep their own map alive.

        After that nothing protects such an adopted array from being overwritten, so drop these arrays first.
        """
        self._adopted.clear()
        maps, self._maps = self._maps, {}
        for mapped in maps.values():
            with contextlib.suppress(BufferError):  # a view is alive and will release the map
                mapped.close()


def _shards(path: Path) -> list[Path]:
    """The files to open, in order: those that the index names or, if none of these exists, all others.

    Some conversions keep the index of their source, which names none of the files that exist. The index's list of
    tensors is not used: the files' own headers list them all.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    index, files = path / INDEX_NAME, sorted(path.glob("model*.safetensors"))
    if index.is_file():
        named = [path / file for file in sorted(set(_read_index(index).values()))]
        missing = [file for file in named if not file.is_file()]
        if not missing:
            return named
        if len(missing) < len(named) or not files:
            raise UserError(f"{index}: lists {missing[0].name}, which is missing")
    if not files:
        raise UserError(f"{path}: no model*.safetensors in this folder")
    return files


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{index}: not a safetensors index ({_one_line(error)})") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: weight_map is not an object with entries")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file not in ("", ".", "..") and file == os.path.basename(file)
        if not plain or "\0" in file or len(file.encode(errors="surrogatepass")) > 255:
            raise UserError(f"{index}: the file of tensor {_one_line(name)} is not a plain file name")
    return weight_map


def _open_shard(file: Path) -> tuple[mmap.mmap, list[TensorInfo]]:
    """Maps one file and checks its whole header."""
    if file.exists() and not file.is_file():  # opening a pipe would block forever
        raise UserError(f"{file}: is not a file")
    try:
        with open(file, "rb") as handle:
            file_bytes = os.fstat(handle.fileno()).st_size
            if file_bytes < 8:
                raise UserError(f"{file}: {file_bytes} bytes are too few for a safetensors file")
            header_bytes = int.from_bytes(handle.read(8), "little")
            if header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                claim = f"its header claims {header_bytes} bytes in a file of {file_bytes}"
                raise UserError(f"{file}: {claim}: truncated or not safetensors")
            header = handle.read(header_bytes)
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({_one_line(error)})") from None
    try:
        return mapped, _parse_header(file, header, 8 + header_bytes, file_bytes)
    except BaseException:
        mapped.close()
        raise


def _parse_header(file: Path, header: bytes, data_start: int, file_bytes: int) -> list[TensorInfo]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its header is not valid JSON ({_one_line(error)})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: its header is not a JSON object")
    entries.pop("__metadata__", None)
    infos = [_tensor_info(file, name, entry, data_start, file_bytes) for name, entry in entries.items()]
    infos.sort(key=lambda info: (info.offset, info.n_bytes))
    end, before = data_start, None
    for info in infos:
        if info.offset < end and info.n_bytes:
            raise UserError(f"{file}: tensors {_one_line(before)} and {_one_line(info.name)} overlap")
        if info.n_bytes:
            end, before = info.offset + info.n_bytes, info.name
    return infos


def _tensor_info(file: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> TensorInfo:
    def fail(reason: str) -> UserError:
        return UserError(f"{file}: tensor {_one_line(name)}: {reason}")

    if not isinstance(entry, dict):
        raise fail("its entry is not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise fail(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape, 2**31) or len(shape) > 32 or prod(max(n, 1) for n in shape) >= 2**48:
        raise fail("its shape is not a list of sizes that MLX can hold")
    if not _naturals(offsets, 2**63) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise fail("its data_offsets are not a valid range")
    n_bytes = prod(shape) * DTYPES[dtype][0].itemsize
    if offsets[1] - offsets[0] != n_bytes:
        raise fail(f"{dtype} {shape} takes {n_bytes} bytes, but its data_offsets span {offsets[1] - offsets[0]}")
    if data_start + offsets[1] > file_bytes:
        raise fail(f"ends {data_start + offsets[1] - file_bytes} bytes beyond the end of the file: truncated?")
    return TensorInfo(name, dtype, tuple(shape), n_bytes, file, data_start + offsets[0])


def _naturals(values: Any, limit: int) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < limit for v in values)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {max(keys, key=keys.count)} occurs twice")
    return entries


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:200]
