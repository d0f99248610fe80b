"""Damaged weight files are refused with the name of the file and the tensor."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Tensor
from mebp_mlx.weights.safetensors import INDEX_NAME, MappedWeights
from tests.weight_files import DTYPES, random_tensor, raw_file, refusal, same, save_sharded

pytestmark = pytest.mark.quick


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes


DAMAGED: dict[str, tuple[Any, str]] = {
    "unknown dtype": ({"x": entry(dtype="F7")}, "x.*F7"),
    "dtype is no text": ({"x": entry(dtype=["F32"])}, "x.*dtype"),
    "dtype missing": ({"x": {"shape": [1], "data_offsets": [0, 4]}}, "x.*dtype"),
    "negative size": ({"x": entry(shape=[-2, -3])}, "x.*shape"),
    "fractional size": ({"x": entry(shape=[2.0, 3])}, "x.*shape"),
    "boolean size": ({"x": entry(shape=[True, 6])}, "x.*shape"),
    "shape is no list": ({"x": entry(shape=6)}, "x.*shape"),
    "huge size": ({"x": entry(shape=[2**31, 0], data_offsets=[0, 0])}, "x.*shape"),
    "huge product": ({"x": entry(shape=[2**30, 2**30, 2**30, 0], data_offsets=[0, 0])}, "x.*shape"),
    "many axes": ({"x": entry(shape=[1] * 70, data_offsets=[0, 4])}, "x.*shape"),
    "shape too small for its bytes": ({"x": entry(shape=[2, 2])}, "x.*16 bytes.*24"),
    "dtype too small for its bytes": ({"x": entry(dtype="F16")}, "x.*12 bytes.*24"),
    "offsets reversed": ({"x": entry(data_offsets=[24, 0])}, "x.*data_offsets"),
    "offsets negative": ({"x": entry(data_offsets=[-24, 0])}, "x.*data_offsets"),
    "three offsets": ({"x": entry(data_offsets=[0, 24, 48])}, "x.*data_offsets"),
    "offsets missing": ({"x": {"dtype": "F32", "shape": [2, 3]}}, "x.*data_offsets"),
    "beyond the file": ({"x": entry(data_offsets=[16, 40])}, "x.*truncated"),
    "far beyond the file": ({"x": entry(data_offsets=[2**62, 2**62 + 24])}, "x.*truncated"),
    "overlap": ({"x": entry(), "y": {"dtype": "U8", "shape": [3], "data_offsets": [23, 26]}}, "x and y overlap"),
    "same bytes": ({"x": entry(), "y": entry()}, "overlap"),
    "entry is no object": ({"x": [1, 2]}, "x.*object"),
    "header is no object": ([1, 2], "object"),
    "no JSON": (b"{'x': 1}", "JSON"),
    "empty header": (b"", "JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', "JSON"),
    "deep": (b"[" * 100_000, "JSON"),
    "name twice": (b'{"x":{},"y":{},"x":{}}', "x.*twice"),
    "newline in a name": ({"x\ny": entry(dtype="?")}, "x y"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_header_is_refused_naming_file_and_tensor(tmp_path: Path, case: str) -> None:
    header, pattern = DAMAGED[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(raw_file(header, bytes(30)))
    message = refusal(path)
    assert str(path) in message and re.search(pattern, message)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**8 + 1, 31])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(28))
    assert "weights.safetensors" in refusal(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    mx.save_safetensors(str(path), {"a": mx.arange(5), "b": mx.arange(7).astype(mx.uint8)})
    raw = path.read_bytes()
    for n_bytes in range(len(raw)):
        path.write_bytes(raw[:n_bytes])
        assert str(path) in refusal(path), n_bytes


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
    + [json.dumps({"weight_map": {"a": file}}) for file in ("", "../m.safetensors", "/m.safetensors", "a\0b", "..")],
    ids=range(13),
)
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    mx.save_safetensors(str(tmp_path / "m.safetensors"), {"a": mx.zeros(2)})
    (tmp_path / INDEX_NAME).write_text(text)
    assert INDEX_NAME in refusal(tmp_path)


def test_an_index_with_a_missing_shard_is_refused(tmp_path: Path) -> None:
    tensors = {name: mx.zeros((2, 2)) for name in "abcd"}
    save_sharded(tmp_path, tensors, 2, with_index=True)
    index = tmp_path / INDEX_NAME
    good = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": good | {"e": "model-00003-of-00002.safetensors"}}))
    assert "model-00003-of-00002.safetensors" in refusal(tmp_path)
    index.write_text(json.dumps({"weight_map": good}))
    file = sorted(set(good.values()))[1]
    (tmp_path / file).unlink()
    assert file in refusal(tmp_path)


def test_a_stale_index_next_to_complete_weights_is_harmless(tmp_path: Path) -> None:
    """Conversions keep the source's index, whose shards and tensors may be missing or moved."""
    tensors = {name: mx.full((2, 2), ord(name)) for name in "abcd"}
    save_sharded(tmp_path, tensors, 2, with_index=True)
    index = tmp_path / INDEX_NAME
    good = json.loads(index.read_text())["weight_map"]
    stale = [
        {name: f"model-0000{number}-of-00005.safetensors" for number, name in enumerate("abcde", 1)},
        good | {"lm_head.weight": good["a"]},
        good | {"a": good["b"]},
        {"a": good["a"], "z": good["b"]},
    ]
    for weight_map in stale:
        index.write_text(json.dumps({"weight_map": weight_map}))
        weights = MappedWeights(tmp_path)
        assert set(weights.names) == set(tensors)
        assert all(same(Tensor(weights, name)[...], value) for name, value in tensors.items())


def test_an_index_decides_which_files_are_read(tmp_path: Path) -> None:
    save_sharded(tmp_path, {name: mx.zeros((2, 2)) for name in "abcd"}, 2, with_index=True)
    mx.save_safetensors(str(tmp_path / "model-stray.safetensors"), {"a": mx.ones((2, 2)), "e": mx.ones(3)})
    weights = MappedWeights(tmp_path)
    assert set(weights.names) == set("abcd") and not Tensor(weights, "a")[...].any().item()


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model-1.safetensors"), {"a": mx.zeros(2), "b": mx.zeros(2)})
    mx.save_safetensors(str(tmp_path / "model-2.safetensors"), {"b": mx.zeros(2)})
    message = refusal(tmp_path)
    assert "tensor b" in message and "model-1" in message and "model-2" in message


def test_missing_files_are_refused(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    assert "model.safetensors" in refusal(tmp_path)


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """The file with one or a few changes in its header's values, its header's text, its length or its end."""
    n = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + n]), raw[8 + n :]
    header.pop("__metadata__", None)
    for _ in range(chance.randint(1, 3)):
        kind = chance.choice(["offset", "shape", "dtype", "swap", "bytes", "length", "cut", "grow"])
        name = chance.choice(sorted(header))
        tensor = header[name]
        if kind == "offset":
            tensor["data_offsets"][chance.randint(0, 1)] += chance.choice([-8, -4, -1, 1, 2, 8, 10**6, 2**63])
        elif kind == "shape":
            tensor["shape"] = [chance.choice([0, 1, 2, 3, 5, 2**31, -1]) for _ in range(chance.randint(0, 4))]
        elif kind == "dtype":
            tensor["dtype"] = chance.choice([*DTYPES, "F64", "F8_E4M3", "", None])
        elif kind == "swap":
            other = header[chance.choice(sorted(header))]
            tensor["data_offsets"], other["data_offsets"] = other["data_offsets"], tensor["data_offsets"]
        elif kind == "cut":
            data = data[: chance.randint(0, len(data))]
        elif kind == "grow":
            data += bytes(chance.randint(1, 9))
        else:
            broken = bytearray(raw_file(header, data))
            where = chance.randrange(8) if kind == "length" else chance.randrange(len(broken))
            broken[where] = chance.randrange(256)
            return bytes(broken)
    return raw_file(header, data)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_mutated_file_is_refused_or_read_as_its_format_specifies(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = tmp_path / "weights.safetensors"
    rng = np.random.default_rng(seed)
    mx.save_safetensors(
        str(path),
        {
            f"{name}.{i}": random_tensor(rng, DTYPES[name], tuple(rng.integers(0, 4, rng.integers(0, 4)).tolist()))
            for i, name in enumerate(chance.sample(sorted(DTYPES), 4))
        },
    )
    broken = mutated(path.read_bytes(), chance)
    path.write_bytes(broken)
    try:
        weights = MappedWeights(path)
    except UserError as error:
        assert str(path) in str(error)
        return
    taken: list[tuple[int, int]] = []
    for name in weights.names:
        info = weights.info(name)
        assert weights.view(name).tobytes() == broken[info.offset : info.offset + info.n_bytes]
        array = Tensor(weights, name)[...]
        mx.eval(array)
        assert (tuple(array.shape), array.nbytes) == (info.shape, info.n_bytes)
        if info.n_bytes:
            taken.append((info.offset, info.offset + info.n_bytes))
    taken.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken))
    try:
        expected = dict(safetensors.deserialize(broken))
    except safetensors.SafetensorError:
        return  # the reference reader also refuses gaps, and bytes after the last tensor
    assert {name: (weights.info(name).dtype, list(weights.info(name).shape)) for name in weights.names} == {
        name: (tensor["dtype"], list(tensor["shape"])) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert weights.view(name).tobytes() == bytes(tensor["data"])
