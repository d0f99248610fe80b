"""Models of real shapes with random weights, in the layout that mlx-lm writes and loads.

A run's memory, time and file sizes depend only on shapes, so tests and benchmarks need no download. Files are streamed:
first the header, then each tensor in chunks, so memory does not grow with the model.
"""

from __future__ import annotations

import copy
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import UserError
from ..model.config import Linear, ModelSpec
from ..model.families import FAMILIES
from ..model.reading import describe
from ..system.files import NewFolder
from .shapes import SHAPES

SHARD_BYTES = 1_000_000_000
_PIECE_BYTES = 16 << 20
_WEIGHT_STD = 0.02
_BITS = (2, 3, 4, 5, 6, 8, 16)
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U32": 4}


@dataclass(frozen=True)
class Layer:
    """A parameter before packing. kind: "matrix" [out, in] or a stack of them, "norm", "bias" or "other"."""

    name: str
    shape: tuple[int, ...]
    kind: str


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors file. Its values are random words if dtype is U32, else centre + std * noise.

    The noise is normal, or uniform in [-1, 1] for scales and biases of quantized weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    centre: float = 0.0
    std: float = 0.0
    uniform: bool = False

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def model_config(shape: str | dict[str, Any], layers: int | None = None) -> dict[str, Any]:
    """The config.json of a named shape, or a copy of a given one, cut to `layers` blocks. UserError if unknown."""
    if isinstance(shape, str) and shape not in SHAPES:
        raise UserError(f"SHAPE {shape} is not one of {', '.join(SHAPES)}")
    config = copy.deepcopy(SHAPES[shape] if isinstance(shape, str) else shape)
    if config.get("model_type") not in FAMILIES:
        raise UserError(f"model_type {config.get('model_type')} is not one of {', '.join(FAMILIES)}")
    if layers is not None:
        if layers < 1:
            raise UserError(f"--layers {layers}: at least 1")
        text = config.get("text_config", config)
        text["num_hidden_layers"] = layers
        if text.get("layer_types"):
            text["layer_types"] = text["layer_types"][:layers]
    return config


class _Listing:
    """Records the parameters that a config requires, in place of a checkpoint (model/reading.py: Reader)."""

    def __init__(self, config: dict[str, Any]):
        text = config.get("text_config", config)
        self.is_tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", True))
        self.read: list[str] = []
        self.layers: list[Layer] = []

    def has(self, name: str) -> bool:
        return not self.is_tied

    def linear(self, name: str, out_dims: int, in_dims: int, bias: bool = False) -> Linear:
        self.layers.append(Layer(name, (out_dims, in_dims), "matrix"))
        if bias:
            self.layers.append(Layer(name, (out_dims,), "bias"))
        return Linear(name, out_dims, in_dims, bias)

    def experts(self, name: str, apart: str, shape: tuple[int, int, int], bias: bool = False) -> Linear:
        self.layers.append(Layer(name, shape, "matrix"))
        if bias:
            self.layers.append(Layer(name, shape[:2], "bias"))
        return Linear(name, *shape[1:], bias, n_experts=shape[0])

    def taps(self, name: str, channels: int, n_taps: int) -> bool:
        self.layers.append(Layer(name, (channels, n_taps, 1), "other"))
        return False

    def vector(self, name: str, size: int) -> str:
        self.layers.append(Layer(name, (size,), "norm" if name.endswith(".weight") else "other"))
        return name


def layers_of(config: dict[str, Any]) -> list[Layer]:
    """Every parameter of the model that a config.json describes, in order of use, under mlx-lm's names."""
    return _described(config)[0]


def _described(config: dict[str, Any]) -> tuple[list[Layer], ModelSpec]:
    listing = _Listing(config)
    spec = describe(config, listing)
    return sorted(listing.layers, key=lambda layer: layer.name == spec.head.name != spec.embedding.name), spec


def _tensors(config: dict[str, Any], bits: int, group_size: int, dtype: str) -> Iterator[Tensor]:
    layers, spec = _described(config)
    for layer in layers:
        if layer.kind == "norm":
            yield Tensor(layer.name, dtype, layer.shape, 1.0 - spec.norm_offset, 0.05)
        elif layer.kind == "other":
            yield Tensor(layer.name, dtype, layer.shape, 0.0, 0.5)
        elif layer.kind == "bias":
            yield Tensor(f"{layer.name}.bias", dtype, layer.shape, 0.0, _WEIGHT_STD)
        elif bits == 16 or layer.shape[-1] % group_size:  # mlx-lm does not quantize such rows either
            yield Tensor(f"{layer.name}.weight", dtype, layer.shape, 0.0, _WEIGHT_STD)
        else:
            *rows, n_in = layer.shape
            groups = (*rows, n_in // group_size)
            scale = _WEIGHT_STD * math.sqrt(12 / (4**bits - 1))  # levels 0 .. 2^bits - 1, equally likely
            centre = -(2**bits - 1) / 2 * scale
            yield Tensor(f"{layer.name}.weight", "U32", (*rows, n_in * bits // 32))
            yield Tensor(f"{layer.name}.scales", dtype, groups, scale, 0.1 * scale, uniform=True)
            yield Tensor(f"{layer.name}.biases", dtype, groups, centre, 0.1 * scale, uniform=True)


def write_model(
    shape: str | dict[str, Any],
    folder: str | Path,
    *,
    bits: int = 4,
    group_size: int = 64,
    dtype: str = "bfloat16",
    seed: int = 0,
    sparse: bool = False,
) -> Path:
    """Writes config.json and model*.safetensors to `folder` and returns it; takes about 100 MB of memory at any size.

    shape: a name in SHAPES, or a config.json as a dict. bits: 2 to 8 for affine quantization, 16 for none. dtype: of
    scales, norms and everything else that is not quantized. sparse: write headers and holes only; all weights are zero.
    The folder appears only when it is complete. Raises UserError if it exists and is not empty, if it cannot be
    written, if the disk is too full, and for an unknown shape, bits, group size or dtype.
    """
    config = model_config(shape)
    _check_format(bits, group_size, dtype)
    if bits < 16:
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
        config["quantization_config"] = dict(config["quantization"])
    config.get("text_config", config)["torch_dtype"] = dtype
    shards = _shards(list(_tensors(config, bits, group_size, DTYPES[dtype])))

    new = NewFolder(folder, "DIR")
    new.check()
    try:
        new.remove_leftovers()
        if not sparse:
            new.check_space(sum(tensor.n_bytes for shard in shards for tensor in shard))
        with new:
            _write_shards(new.partial, shards, None if sparse else seed)
            text = json.dumps(config, indent=4) + "\n"
            (new.partial / "config.json").write_text(text, encoding="utf-8")
            new.publish()
    except OSError as error:
        raise UserError(f"DIR {folder}: {error.strerror or error}") from None
    return Path(folder)


def _check_format(bits: int, group_size: int, dtype: str) -> None:
    if bits not in _BITS:
        raise UserError(f"--bits {bits} is not one of {', '.join(map(str, _BITS))}")
    if group_size not in (32, 64, 128):
        raise UserError(f"--group-size {group_size} is not one of 32, 64, 128")
    if dtype not in DTYPES or (bits == 16 and dtype == "float32"):
        raise UserError(f"--dtype {dtype} is not one of {', '.join(list(DTYPES)[: 2 if bits == 16 else 3])}")


def _shards(tensors: list[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    n_bytes = 0
    for tensor in tensors:
        if shards[-1] and n_bytes + tensor.n_bytes > SHARD_BYTES:
            shards.append([])
            n_bytes = 0
        shards[-1].append(tensor)
        n_bytes += tensor.n_bytes
    return shards


def _write_shards(folder: Path, shards: list[list[Tensor]], seed: int | None) -> None:
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / name, "wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                weight_map[tensor.name] = name
                if seed is not None:
                    _write_values(file, tensor, seed)
            if seed is None:
                file.truncate(file.tell() + sum(tensor.n_bytes for tensor in shard))
    total_bytes = sum(tensor.n_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def _header(shard: list[Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for tensor in shard:
        offsets = [offset, offset + tensor.n_bytes]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_values(file: BinaryIO, tensor: Tensor, seed: int) -> None:
    """Writes a tensor's values, which depend only on seed and name, not on the other tensors or the shards."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    left = math.prod(tensor.shape)
    while left:
        n = min(left, _PIECE_BYTES // 4)
        left -= n
        if tensor.dtype == "U32":
            file.write(rng.bytes(4 * n))
            continue
        noise = rng.random(n, np.float32) * 2 - 1 if tensor.uniform else rng.standard_normal(n, np.float32)
        noise *= np.float32(tensor.std)
        noise += np.float32(tensor.centre)
        file.write(_encoded(noise, tensor.dtype).data)


def _encoded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32, rounded
        return ((values.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)).astype(np.uint16)
    return values.astype(np.float16) if dtype == "F16" else values
