"""Zero-copy use of mapped pages, emulated on the CPU backend: MLX receives memory that is write-protected.

On Metal MLX could write a result into the file's pages unnoticed; in the emulation this ends the process. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path
from typing import Any

import mebp_mlx  # (the BLAS must be loaded before mlx.core)

import mlx.core as mx  # isort: skip
import numpy as np

from mebp_mlx.model.base import Model, Tensor
from mebp_mlx.ops.plan import Plan
from mebp_mlx.planner.search import choose
from mebp_mlx.planner.workload import Workload
from mebp_mlx.system import allocator
from mebp_mlx.system.machine import default_budget_bytes
from mebp_mlx.system.pages import PAGE_BYTES
from mebp_mlx.testing.tiny import random_batch, randomize_lora
from mebp_mlx.weights.safetensors import MappedWeights

_M_MMAP_THRESHOLD, _SETTLED_BYTES = -3, allocator._MMAP_BYTES
_IS_MMAPPED = 2  # in the word before a block of glibc's heap
_libc = ctypes.CDLL(None, use_errno=True)
_heap: list[mx.array] = []


def from_dlpack(pages: memoryview, *, copy: bool) -> mx.array:
    """Replaces mx.from_dlpack: whole read-only pages -> uint8, as documented for MLX on Metal.

    The array's memory is a write-protected copy of the pages. MLX sees a buffer of the pages' size; this size decides
    whether MLX may reuse it for a result.
    """
    source = np.frombuffer(pages, np.uint8)
    if copy is not False or not pages.readonly or not source.size or source.size % PAGE_BYTES:
        raise ValueError("cannot adopt")
    padded = _in_a_map_of_its_own(source.size + mmap.PAGESIZE)
    whole = np.frombuffer(memoryview(padded), np.uint8)
    address = whole.ctypes.data
    allocated = ctypes.c_size_t.from_address(address - 8)  # where MLX's CPU allocator stores the size
    assert allocated.value == whole.size
    allocated.value = source.size
    skip = -address % mmap.PAGESIZE
    whole[skip : skip + source.size] = source
    array = padded[skip : skip + source.size]
    mx.eval(array)
    if _libc.mprotect(ctypes.c_void_p(address + skip), ctypes.c_size_t(source.size), mmap.PROT_READ):
        raise OSError(ctypes.get_errno(), "mprotect")
    return array


def _in_a_map_of_its_own(n_bytes: int) -> mx.array:
    """uint8 [n_bytes] outside the heap, so that all of it is unmapped when freed, protected or not."""
    allocator.settle()
    _libc.mallopt(_M_MMAP_THRESHOLD, mmap.PAGESIZE)
    while True:
        array = mx.zeros(n_bytes, mx.uint8)
        mx.eval(array)
        block = np.frombuffer(memoryview(array), np.uint8).ctypes.data - 8  # MLX stores the size before its memory
        if ctypes.c_size_t.from_address(block - 8).value & _IS_MMAPPED:
            break
        _heap.append(array)  # another thread may free heap memory at any time, so memory from the heap stays allocated
    _libc.mallopt(_M_MMAP_THRESHOLD, _SETTLED_BYTES)
    return array


def place(file: Path, shift: int) -> None:
    """Rewrites a safetensors file: its data begins `shift` bytes after a page boundary, and its last page is filled."""
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, data = raw[8:end], raw[end:]
    header += b" " * ((shift - 8 - len(header)) % PAGE_BYTES)
    content = len(header).to_bytes(8, "little") + header + data
    file.write_bytes(content + bytes(-len(content) % PAGE_BYTES))


def read_and_step(folder: Path, seed: int, plans: dict[str, Plan]) -> dict[str, Any]:
    """Reads every tensor, computes with it, reads it again, then runs two steps; compares with copies, bit by bit.

    The plan is measured for the first checkpoint of a family, and reused from `plans` for its others. Returns
    {"adopted": names of adopted tensors, "copied": {name: reason}}.
    """
    model, plain = (mebp_mlx.open_model(folder, "bfloat16", "packed") for _ in range(2))
    weights = model.weights
    weights.adopt = True
    _compute_with_all(weights)
    tokens, targets = random_batch(seed, 2, 9, model.spec.V)
    family = model.spec.family
    if family not in plans:
        workload = Workload(model, mebp_mlx.init_lora(model, rank=2), *tokens.shape)
        plans[family] = choose(workload, default_budget_bytes()).plan
    expected = _step(plain, seed, tokens, targets, plans[family])
    for _ in range(2):
        actual = _step(model, seed, tokens, targets, plans[family])
        assert all(np.array_equal(actual[name], value) for name, value in expected.items()), folder
    for name in weights.names:
        assert mx.array_equal(Tensor(weights, name)[...], Tensor(plain.weights, name)[...]).item(), name
    adopted = [name for name in weights.names if weights.in_place(name) is not None]
    return {"adopted": adopted, "copied": {n: weights.info(n).not_adoptable for n in weights.names if n not in adopted}}


def _compute_with_all(weights: MappedWeights) -> None:
    for name in weights.names:
        expected = np.array(weights.view(name))
        ndim, floating = len(weights.info(name).shape), weights.info(name).dtype in ("F32", "F16", "BF16")
        for dtype in (mx.float32, mx.bfloat16, mx.float16) if floating else (mx.int32,):
            reads = [Tensor(weights, name)[...], Tensor(weights, name)[...][1:], Tensor(weights, name)[1:]]
            reads += [Tensor(weights, name)[:, 0:2]] if ndim == 2 else []
            mx.eval([read.astype(dtype) for read in reads])
            mx.eval([1 + read for read in [Tensor(weights, name)[...], Tensor(weights, name)[1:]]])
            mx.eval(mx.negative(Tensor(weights, name)[...]))
        again = Tensor(weights, name)[...]
        bits = again.view(mx.uint16) if again.dtype == mx.bfloat16 else again
        assert np.array_equal(np.asarray(bits), expected), name


def _step(model: Model, seed: int, tokens: np.ndarray, targets: np.ndarray, plan: Plan) -> dict[str, np.ndarray]:
    lora = mebp_mlx.init_lora(model, rank=2)
    randomize_lora(lora, seed)
    loss, grads = mebp_mlx.loss_and_grads(model, lora, tokens, targets, plan=plan)
    return {"loss": np.array(loss)} | {name: np.array(grad) for name, grad in grads.items()}


def main(how: str, seed: int, folders: list[str]) -> None:
    """Prints the result of `read_and_step` for each folder. how: "kept", or "dropped" to adopt again at every read."""
    mx.from_dlpack = from_dlpack
    if how == "dropped":
        keep = MappedWeights.in_place

        def in_place(weights: MappedWeights, name: str) -> mx.array | None:
            weights._adopted.clear()
            actual = keep(weights, name)
            weights._adopted.clear()
            return actual

        MappedWeights.in_place = in_place
    plans: dict[str, Plan] = {}
    print(json.dumps({folder: read_and_step(Path(folder), seed, plans) for folder in folders}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
