"""Mapped weights: the written bytes are read, and nothing else; damaged files are refused by name."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.errors import UserError
from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.testing.tiny import packed_config, write_model
from mebp_mlx.weights.safetensors import MappedWeights
from tests.weight_files import DTYPES, random_tensor, random_tensors, raw_file, same, save_sharded

pytestmark = pytest.mark.quick


# Reading


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
        for start, stop in ((0, 4), (1, 3), (2, 2), (3, 4)):
            assert same(Tensor(weights, name)[:, start:stop], expected[:, start:stop]), (name, start, stop)


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
def test_indices_outside_a_matrix_are_an_error(tmp_path: Path, bits: int | None) -> None:
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


def test_mapped_bytes_are_not_footprint_and_rows_load_only_themselves(tmp_path: Path) -> None:
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


# Columns


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
