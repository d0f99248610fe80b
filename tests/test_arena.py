"""The mapped activation file."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mebp_mlx.engine import arena as arena_module
from mebp_mlx.engine.arena import Arena, choose_folder, filesystem_of
from mebp_mlx.errors import UserError
from mebp_mlx.system.pages import PAGE_BYTES


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_stored_values_are_restored_bit_for_bit(tmp_path: Path, dtype: mx.Dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arena = Arena(40 * PAGE_BYTES, tmp_path)
    shapes = [(1, 1, 1), (3, 5, 7), (2, 33, 40), (1, 4096)]
    for _ in range(2):  # a cleared arena works like a new one
        arena.clear()
        arrays = [mx.array(rng.standard_normal(s), mx.float32).astype(dtype) for s in shapes]
        arrays.append(arrays[1].swapaxes(0, 2))  # not contiguous
        for i, array in enumerate(arrays):
            arena.put(i, "x", 3, array)
        for i, array in enumerate(arrays):
            back = arena.get(i, "x", 3)
            assert back.dtype == dtype and back.shape == array.shape and mx.array_equal(back, array).item(), seed
    arena.close()


def test_nothing_is_left_on_disk(tmp_path: Path) -> None:
    arena = Arena(PAGE_BYTES, tmp_path)
    assert os.listdir(tmp_path) == []
    arena.close()


def test_a_full_disk_is_reported_before_anything_runs(tmp_path: Path) -> None:
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(UserError, match=r"--arena-dir.*no room"):
        Arena(2 * free_bytes + (1 << 40), tmp_path)
    assert os.listdir(tmp_path) == []


def test_memory_file_systems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not a folder"):
        choose_folder(tmp_path / "nowhere")
    if os.path.isdir("/dev/shm") and filesystem_of(Path("/dev/shm")) == "tmpfs":
        with pytest.raises(UserError, match="tmpfs, which is memory"):
            choose_folder("/dev/shm")
    monkeypatch.setattr(arena_module, "filesystem_of", lambda path: "tmpfs")
    with pytest.raises(UserError, match="no folder on a disk"):
        choose_folder(None)
