"""Weight files for tests: random, sharded, raw bytes, and the check that they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.errors import UserError
from mebp_mlx.weights.safetensors import INDEX_NAME, MappedWeights

DTYPES = {
    "F32": mx.float32,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "I8": mx.int8,
    "I32": mx.int32,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U64": mx.uint64,
    "I64": mx.int64,
    "BOOL": mx.bool_,
}


def random_tensor(rng: np.random.Generator, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    if dtype in (mx.float32, mx.float16, mx.bfloat16):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)
    return mx.array(rng.integers(0, 2 if dtype == mx.bool_ else 100, shape).astype(np.int64)).astype(dtype)


def random_tensors(seed: int) -> dict[str, mx.array]:
    """Tensors of odd sizes, so that most are not aligned for their type."""
    rng = np.random.default_rng(seed)
    shapes: list[tuple[int, ...]] = [(7, 5), (3,), (2, 3, 5), (), (0, 4), (4, 0), (1,), (11, 1)]
    return {
        f"{name}.{i}": random_tensor(rng, dtype, shape)
        for name, dtype in DTYPES.items()
        for i, shape in enumerate(rng.permutation(np.array(shapes, dtype=object)))
    }


def save_sharded(folder: Path, tensors: dict[str, mx.array], n_shards: int, with_index: bool) -> None:
    names = list(tensors)
    weight_map = {}
    for shard in range(n_shards):
        file = f"model-{shard + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::n_shards]}
        mx.save_safetensors(str(folder / file), part)
        weight_map.update(dict.fromkeys(part, file))
    if with_index:
        (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def same(actual: mx.array, expected: mx.array) -> bool:
    return actual.dtype == expected.dtype and bool(mx.array_equal(actual, expected))  # shapes included


def raw_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        MappedWeights(path)
    message = str(caught.value)
    assert "\n" not in message
    return message
