"""Adopted pages are never written, although MLX reuses an input's memory if nothing else refers to it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.model.base import Tensor
from mebp_mlx.testing.tiny import packed_config, write_model
from mebp_mlx.weights import zero_copy as adopt
from mebp_mlx.weights.safetensors import MappedWeights
from tests import adoption
from tests.runs import child

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulation knows glibc and MLX's CPU wheel")
FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "gemma3", "gemma4", "qwen3_moe")
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
SHIFTS = (0, 2, 1)  # bytes after a page boundary: all tensors aligned; only 16-bit ones; none


def _write(folder: Path, family: str, dtype: str, shift: int, seed: int) -> Path:
    write_model(
        folder, packed_config(family), seed=seed, quantization={"group_size": 32, "bits": 4}, dtype=DTYPES[dtype]
    )
    adoption.place(folder / "model.safetensors", shift)
    return folder


def _run(how: str, seed: int, *folders: Path) -> tuple[int, str, str]:
    process = child("-m", "tests.adoption", how, str(seed), *map(str, folders))
    said, problems = process.communicate(timeout=300)
    return process.returncode, said, problems


@linux
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_casts_and_steps_write_into_no_adopted_page(tmp_path: Path, family: str, seed: int) -> None:
    cases = {(dtype, shift): tmp_path / f"{dtype}-{shift}" for dtype in DTYPES for shift in SHIFTS}
    folders = [_write(folder, family, *case, seed) for case, folder in cases.items()]
    code, said, problems = _run("kept", seed, *folders)
    assert code == 0, f"seed {seed}: {problems}"
    actual = json.loads(said)
    for (dtype, shift), folder in cases.items():
        weights, result = MappedWeights(folder), actual[str(folder)]
        item_bytes = {"U32": 4, "F32": 4, "F16": 2, "BF16": 2}
        infos = [weights.info(name) for name in weights.names]
        aligned = [info.name for info in infos if info.offset % item_bytes[info.dtype] == 0]
        assert result["adopted"] == aligned, (dtype, shift)
        if family != "gemma4":  # whose numbers [1] of 16 bits move what follows them
            assert len(aligned) == len(weights) if shift == 0 else len(aligned) < len(weights)
        assert set(result["copied"].values()) <= {"not 4-byte aligned", "not 2-byte aligned"}


@linux
@pytest.mark.parametrize("family, dtype", [("qwen2", "float16"), ("gemma3_text", "bfloat16")])
def test_the_emulation_catches_a_write(tmp_path: Path, family: str, dtype: str, seed: int) -> None:
    """Without the reference that is kept, the same reads write a result into the pages, and the process dies."""
    folder = _write(tmp_path / "model", family, dtype, 0, seed)
    code, said, _ = _run("dropped", seed, folder)
    assert code == -signal.SIGSEGV and not said


@linux
def test_a_tensor_is_adopted_once_and_its_pages_go_with_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tensors = {
        "a": mx.array(rng.standard_normal((300, 70)), mx.float32),
        "b": mx.array(rng.standard_normal((41, 1000)), mx.float32).astype(mx.bfloat16),
        "c": mx.array(rng.integers(0, 2**32, (97, 33), dtype=np.uint32)),
        "d": mx.array(rng.integers(0, 255, (3,), dtype=np.uint8)),
        "e": mx.array(2.5, mx.float32),
        "f": mx.zeros((0, 4)),
    }
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), tensors)
    adoption.place(path, 0)
    calls: list[int] = []

    def from_dlpack(pages: memoryview, *, copy: bool) -> mx.array:
        calls.append(np.frombuffer(pages, np.uint8).ctypes.data)
        return adoption.from_dlpack(pages, copy=copy)

    monkeypatch.setattr(mx, "from_dlpack", from_dlpack)
    adopted, copied = MappedWeights(path, adopt=True), MappedWeights(path)
    for _ in range(2):
        for name, value in tensors.items():
            ranges: list[Any] = [...]
            if value.ndim:
                n = value.shape[0]
                ranges += [slice(0, n), slice(min(1, n), n), slice(n // 2, min(n // 2 + 1, n)), slice(n, n)]
            for given in ranges:
                actual, expected = (Tensor(weights, name)[given] for weights in (adopted, copied))
                assert actual.dtype == expected.dtype and actual.shape == expected.shape, (name, given)
                assert mx.array_equal(actual, expected).item(), (name, given, seed)
                actual += 1  # changes nothing for the next read
                mx.eval(actual)
            if value.ndim == 2:
                columns = [Tensor(weights, name)[:, 1 : value.shape[1] - 1] for weights in (adopted, copied)]
                assert mx.array_equal(*columns).item() and columns[0].shape == columns[1].shape, name
    n_adoptable = sum(adopted.info(name).not_adoptable is None for name in tensors)
    assert len(calls) == n_adoptable >= 3
    assert all((address - min(calls)) % adopt.PAGE_BYTES == 0 for address in calls)
    del actual
    adopted.close()
    assert not adopted._adopted
    with pytest.raises(ValueError, match="closed"):
        Tensor(adopted, "a")[...]


@linux
def test_the_last_page_of_a_file_is_adopted_where_the_system_maps_it_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Always on Apple silicon with its 16 KiB pages; on 4 KiB pages only if just the last 4 KiB are missing."""
    monkeypatch.setattr(mx, "from_dlpack", adoption.from_dlpack)
    path = tmp_path / "model.safetensors"
    value = mx.arange(2 * adopt.PAGE_BYTES, dtype=mx.uint32).astype(mx.uint8)
    mx.save_safetensors(str(path), {"x": value})
    adoption.place(path, 0)
    whole = path.read_bytes()
    for missing, taken in ((1, True), (4000, True), (5000, False)):
        n_items = value.size - missing
        header = json.dumps({"x": {"dtype": "U8", "shape": [n_items], "data_offsets": [0, n_items]}}).encode()
        header += b" " * (adopt.PAGE_BYTES - 8 - len(header))
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[-value.size : -missing])
        weights = MappedWeights(path, adopt=True)
        assert (weights.in_place("x") is not None) == taken, missing
        assert mx.array_equal(Tensor(weights, "x")[...], value[:n_items]).item(), missing


def test_without_metal_rows_are_copied(tmp_path: Path, seed: int) -> None:
    """MLX's CPU backend refuses to adopt; only the memory use changes."""
    path = tmp_path / "model.safetensors"
    value = mx.array(np.random.default_rng(seed).standard_normal((500, 100)), mx.float32)
    mx.save_safetensors(str(path), {"w": value})
    weights = MappedWeights(path, adopt=True)
    assert mx.metal.is_available() or weights.in_place("w") is None
    assert mx.array_equal(Tensor(weights, "w")[10:400], value[10:400]).item()
    assert mx.array_equal(Tensor(weights, "w")[:, 10:40], value[:, 10:40]).item()
