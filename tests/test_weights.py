"""Mapped weights: the bytes that a writer wrote, nothing else read, and every damaged file refused by name."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.testing.tiny import packed_config, write_model
from mebp_mlx.weights.safetensors import INDEX_NAME, MappedWeights

pytestmark = pytest.mark.quick

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
    """Odd sizes, so that most tensors begin where their type would not be aligned."""
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


# What was written is read


@pytest.mark.parametrize("layout", ["file", "folder", "sharded", "sharded without index"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_dtype_and_layout_reads_as_mlx_reads_it(tmp_path: Path, layout: str, seed: int) -> None:
    tensors = random_tensors(seed)
    if layout.startswith("sharded"):
        save_sharded(tmp_path, tensors, 3, with_index=layout == "sharded")
    else:
        mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    weights = MappedWeights(tmp_path / "model.safetensors" if layout == "file" else tmp_path)
    assert sorted(weights.names) == sorted(tensors)
    assert len(weights) == len(tensors)
    rng = np.random.default_rng(seed)
    for name, expected in tensors.items():
        info = weights.info(name)
        assert (info.name, info.dtype, info.shape) == (name, name.partition(".")[0], tuple(expected.shape))
        assert info.n_bytes == expected.nbytes
        assert name in weights
        assert same(Tensor(weights, name)[...], expected), name
        if not expected.ndim:
            continue
        n_rows = expected.shape[0]
        start, stop = sorted(rng.integers(0, n_rows + 1, 2).tolist())
        assert same(Tensor(weights, name)[start:stop], expected[start:stop]), (name, start, stop)
        ids = rng.integers(0, max(n_rows, 1), (2, 3) if n_rows else (0, 2))
        assert same(Tensor(weights, name)[ids], mx.take(expected, mx.array(ids.astype(np.int32)), axis=0)), (name, ids)
    weights.close()


@pytest.mark.parametrize("shift", range(8))
def test_tensors_may_begin_anywhere(tmp_path: Path, shift: int) -> None:
    tensors = {name: random_tensor(np.random.default_rng(3), dtype, (6, 4)) for name, dtype in DTYPES.items()}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    raw = (tmp_path / "a.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "b.safetensors").write_bytes(raw_file(raw[8 : 8 + n] + b" " * shift, raw[8 + n :]))
    weights = MappedWeights(tmp_path / "b.safetensors")
    for name, expected in tensors.items():
        assert same(Tensor(weights, name)[1:5], expected[1:5]), name
        assert same(Tensor(weights, name)[np.array([5, 0, 5])], expected[mx.array([5, 0, 5])]), name


def test_a_view_copies_nothing_and_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    values = mx.array(np.arange(12, dtype=np.float32).reshape(3, 4))
    mx.save_safetensors(str(path), {"x": values, "half": values.astype(mx.bfloat16)})
    weights = MappedWeights(path)
    view = weights.view("x")
    assert not view.flags.owndata and not view.flags.writeable
    assert view.tolist() == values.tolist()
    half = weights.view("half")
    assert half.dtype == np.uint16
    assert (half.astype(np.uint32) << 16).view(np.float32).tolist() == values.tolist()
    info, raw = weights.info("x"), path.read_bytes()
    assert info.file == path
    assert raw[info.offset : info.offset + info.n_bytes] == np.array(values).tobytes()


def test_names_are_in_file_order(tmp_path: Path) -> None:
    header = {name: {"dtype": "U8", "shape": [4], "data_offsets": [at, at + 4]} for name, at in (("b", 4), ("a", 0))}
    (tmp_path / "model.safetensors").write_bytes(raw_file(header, bytes(8)))
    assert MappedWeights(tmp_path).names == ("a", "b")


@pytest.mark.parametrize("bits", [4, None])
def test_what_lies_outside_a_matrix_is_an_error(tmp_path: Path, bits: int | None) -> None:
    packing = None if bits is None else {"group_size": 32, "bits": bits}
    model = Model(write_model(tmp_path / "model", packed_config("qwen2"), quantization=packing))
    linear = model.spec.layers[0].linears["down"]
    reads = ((model.row_block, linear.out_dims), (model.rows, linear.out_dims), (model.column_block, linear.in_dims))
    for read, n in reads:
        for start, stop in ((-1, 32), (0, n + 1), (64, 32)):
            with pytest.raises(IndexError, match=linear.name):
                read(linear, start, stop)
    for ids in ([-1], [0, model.spec.V], [2**40]):
        with pytest.raises(IndexError, match=str(ids[-1])):
            model.gather(model.spec.embedding, np.array(ids))


def test_an_unknown_name_is_refused_by_name(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(2)})
    weights = MappedWeights(tmp_path)
    assert "y" not in weights
    for read in (weights.info, weights.view, weights.in_place, weights.advise):
        with pytest.raises(UserError, match="y"):
            read("y")


def test_advice_is_harmless_for_any_range_in_any_thread_and_after_close(tmp_path: Path) -> None:
    expected = mx.array(np.random.default_rng(0).integers(0, 9, (999, 37)).astype(np.uint8))
    tensors = {"x": expected, "s": mx.array(2.0), "empty": mx.zeros((0, 3))}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    weights = MappedWeights(tmp_path)
    problems: list[BaseException] = []

    def advise() -> None:
        try:
            for start, stop in ((0, None), (5, 6), (0, 0), (998, 5000), (-4, 2), (7, 3), (400, 700)):
                for name in weights.names:
                    weights.advise(name, start, stop)
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=advise)
    thread.start()
    thread.join()
    assert same(Tensor(weights, "x")[...], expected)
    weights.close()
    advise()
    assert not problems


def test_a_view_outlives_close(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.arange(5)})
    weights = MappedWeights(tmp_path)
    view = weights.view("x")
    weights.close()
    weights.close()
    assert view.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="closed"):
        Tensor(weights, "x")[...]


def test_mapped_bytes_are_not_footprint_and_rows_bring_only_themselves(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(raw_file({"x": {"dtype": "BF16", "shape": [20_000, 2000], "data_offsets": [0, 80_000_000]}}))
        file.write(bytes(80_000_000))
    code = """
import sys, mebp_mlx, mlx.core as mx
from mebp_mlx.system.footprint import footprint_bytes
from mebp_mlx.model.base import Tensor
from mebp_mlx.weights.safetensors import MappedWeights
mx.eval(mx.zeros(3) + 1)
start = footprint_bytes()
weights = MappedWeights(sys.argv[1])
opened = footprint_bytes() - start
weights.view("x").max()
touched = footprint_bytes() - start
rows = Tensor(weights, "x")[5000:10_000]
mx.eval(rows)
print(opened, touched, footprint_bytes() - start)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    opened, touched, copied = map(int, done.stdout.split())
    assert opened <= 1_000_000 and touched <= 2_000_000
    assert 19_000_000 <= copied <= 23_000_000


# What is damaged is refused


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


def test_a_stale_index_beside_complete_weights_does_not_matter(tmp_path: Path) -> None:
    """Conversions keep the index of what they converted: other shards, tensors that are gone, or moved."""
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


def test_an_index_decides_which_of_the_files_count(tmp_path: Path) -> None:
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
def test_a_mutated_file_is_refused_or_read_as_the_format_says(tmp_path: Path, seed: int) -> None:
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
        return  # the reference reader also refuses holes and bytes after the last tensor
    assert {name: (weights.info(name).dtype, list(weights.info(name).shape)) for name in weights.names} == {
        name: (tensor["dtype"], list(tensor["shape"])) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert weights.view(name).tobytes() == bytes(tensor["data"])


def test_columns_copy_only_themselves(tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(raw_file({"x": {"dtype": "U32", "shape": [4000, 5000], "data_offsets": [0, 80_000_000]}}))
        file.write(bytes(80_000_000))
    code = """
import sys, mebp_mlx, mlx.core as mx
from mebp_mlx.system.footprint import PeakMeter, footprint_bytes
from mebp_mlx.model.base import Tensor
from mebp_mlx.weights.safetensors import MappedWeights
weights = MappedWeights(sys.argv[1])
mx.eval(mx.zeros(3) + 1)
start = footprint_bytes()
with PeakMeter() as meter:
    columns = Tensor(weights, "x")[:, 100:200]
    mx.eval(columns)
print(meter.peak_bytes - start)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert 1_600_000 <= int(done.stdout) <= 6_000_000


@pytest.mark.parametrize("shift", range(4))
def test_columns_are_the_files_and_stay_inside_it(tmp_path: Path, shift: int) -> None:
    tensors = {name: random_tensor(np.random.default_rng(3), dtype, (6, 5)) for name, dtype in DTYPES.items()}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), tensors)
    raw = (tmp_path / "a.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    (tmp_path / "b.safetensors").write_bytes(raw_file(raw[8 : 8 + n] + b" " * shift, raw[8 + n :]))
    weights = MappedWeights(tmp_path / "b.safetensors")
    for name, expected in tensors.items():
        for start, stop in ((0, 5), (1, 4), (2, 2), (4, 5)):
            assert same(Tensor(weights, name)[:, start:stop], expected[:, start:stop]), (name, start, stop)
