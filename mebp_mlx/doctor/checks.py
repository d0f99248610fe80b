"""The checks; each yields findings: OK (works), NOTE (works, but could be better), FAIL, NOT_HERE (does not apply)."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..api import open_model
from ..engine.arena import choose_folder, filesystem_of
from ..errors import UserError
from ..kernels import KERNELS, attention, selfcheck
from ..system import device
from ..system.files import write_atomically
from ..system.footprint import PeakMeter, footprint_bytes
from ..system.limits import process_limit
from ..system.machine import load_blas, machine
from ..system.pages import PAGE_BYTES
from ..weights import zero_copy as adopt
from ..weights.hub import resolve_model
from . import kernels, probes

OK, NOTE, FAIL, NOT_HERE = "ok", "note", "FAIL", "-"
SPIKE_BYTES, SPIKE_S = 50_000_000, 0.02
SLOW_BLAS_GFLOPS = 20  # MLX's built-in reference BLAS reaches 5
KERNEL_SIZES = {"T": 256, "C": 8192, "V": 16384, "D": 1024}  # in timed calls
REPEATS = 5


@dataclass(frozen=True)
class Finding:
    """One row of the table. group: its heading; what: the thing checked; state: OK, NOTE, FAIL or NOT_HERE."""

    group: str
    what: str
    state: str
    detail: str
    figures: dict[str, Any]


def check_device() -> Iterator[Finding]:
    """The device that MLX uses, and the resulting defaults."""
    about, info = machine(), mx.device_info()
    name = f"{info.get('device_name')}, {info.get('architecture')}"
    yield Finding("device", "MLX", OK, f"{about['mlx']} on {mx.default_device().type.name}: {name}", dict(info))
    if not device.on_metal():
        yield Finding("device", "Metal", NOT_HERE, "not available on this machine: no kernels are used", {})
    dtype = "the checkpoint's own dtype" if device.on_gpu() else "float32"
    weights = "packed" if device.keeps_packed("auto") else "decompressed"
    yield Finding("device", "defaults", OK, f"computes in {dtype}, weights {weights}", {})


def check_memory() -> Iterator[Finding]:
    """The memory limits, and the footprint so far."""
    about, info = machine(), mx.device_info()
    limits = {"memory_bytes": about["memory_bytes"]}
    limits |= {key: info[key] for key in ("max_recommended_working_set_size", "max_buffer_length") if key in info}
    limits["footprint_bytes"] = footprint_bytes()
    detail = ", ".join(f"{key.removesuffix('_bytes').replace('_', ' ')} {n / 1e6:,.0f} MB" for key, n in limits.items())
    yield Finding("memory", "limits", OK, detail, limits)


def check_blas() -> Iterator[Finding]:
    """The BLAS library in use, and its speed on a product of a 0.5B model's MLP."""
    blas = load_blas()
    x, w = mx.random.normal((256, 896)), mx.random.normal((4864, 896))
    mx.eval(x, w)
    seconds = probes.median_s(lambda: x @ w.T, REPEATS)
    gflops = 2 * 256 * 896 * 4864 / seconds / 1e9
    slow = gflops < SLOW_BLAS_GFLOPS
    detail = f"{blas}: {gflops:,.0f} GFLOP/s in float32" + (f"; {blas.note}" if slow else "")
    figures = {"name": blas.name, "path": blas.path, "gflops": round(gflops, 1)}
    yield Finding("BLAS", "[256 x 896] x [896 x 4864]", NOTE if slow else OK, detail, figures)


def check_meter() -> Iterator[Finding]:
    """The footprint meter: it must see a deliberate spike, and must not count mapped pages of a file."""
    with PeakMeter() as meter:
        before_bytes = footprint_bytes()
        spike = mmap.mmap(-1, SPIKE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, SPIKE_BYTES, mmap.PAGESIZE):
            spike[page] = 1
        time.sleep(SPIKE_S)
        spike.close()
        time.sleep(SPIKE_S)
        seen_bytes = meter.peak_bytes - before_bytes
    right = 0.9 * SPIKE_BYTES <= seen_bytes <= 1.3 * SPIKE_BYTES
    detail = f"{SPIKE_BYTES / 1e6:.0f} MB for {1e3 * SPIKE_S:.0f} ms read as {seen_bytes / 1e6:.1f} MB"
    yield Finding("meter", "a deliberate spike", OK if right else FAIL, detail, {"seen_bytes": seen_bytes})
    with tempfile.TemporaryFile(dir=choose_folder(None)) as file:
        file.write(os.urandom(1 << 20) * 32)
        file.flush()
        before_bytes = footprint_bytes()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            sum(pages[:: mmap.PAGESIZE])
            seen_bytes = footprint_bytes() - before_bytes
    detail = f"32 MB of a file read through a map: {seen_bytes / 1e6:.1f} MB of footprint"
    yield Finding("meter", "clean mapped pages", OK if seen_bytes < 4e6 else FAIL, detail, {"seen_bytes": seen_bytes})


def check_files() -> Iterator[Finding]:
    """The arena's folder, and whether MLX uses mapped pages in place."""
    try:
        folder = choose_folder(None)
    except UserError as error:
        yield Finding("files", "arena", FAIL, str(error), {})
        return
    free_bytes, kind = shutil.disk_usage(folder).free, filesystem_of(folder)
    figures = {"folder": str(folder), "filesystem": kind, "free_bytes": free_bytes}
    state = OK if free_bytes > 2e9 else NOTE
    yield Finding("files", "arena", state, f"{folder} ({kind or 'disk'}), {free_bytes / 1e9:.1f} GB free", figures)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "pages"
        path.write_bytes(bytes(2 * PAGE_BYTES))
        with open(path, "rb") as file:
            taken = adopt.adopt(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 100, 1000) is not None
    if taken or not device.on_metal():
        detail = "used in place" if taken else "MLX copies them on this backend"
        yield Finding("files", "mapped weights", OK if taken else NOT_HERE, detail, {"adopted": taken})
    else:
        yield Finding("files", "mapped weights", NOTE, "MLX refuses them: they are copied", {"adopted": False})


def check_saves(folder: Path | None = None) -> Iterator[Finding]:
    """Tries a save and a lock in `folder` (default: the current folder, where runs create theirs); lists limits."""
    folder = folder or Path.cwd()
    kind, limit = filesystem_of(folder), resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    missing: list[str] = []
    free_bytes, seconds = 0, 0.0
    try:
        free_bytes = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            began_s = time.perf_counter()
            write_atomically(Path(scratch) / "save", lambda file: file.write(bytes(PAGE_BYTES)), "doctor")
            seconds = time.perf_counter() - began_s
            with open(Path(scratch) / "save") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except UserError as error:
        missing.append(str(error))
    except OSError as error:
        missing.append(f"locks: {error.strerror}" if seconds else f"not writable: {error.strerror}")
    detail = f"{folder} ({kind or 'disk'}), {free_bytes / 1e9:.1f} GB free: a save takes {seconds * 1e3:.1f} ms"
    if limit != resource.RLIM_INFINITY:
        detail += f", files of at most {limit / 1e6:,.0f} MB (ulimit -f)"
    if (memory := process_limit()) is not None:
        detail += f"; {memory}"
    figures = {"folder": str(folder), "filesystem": kind, "free_bytes": free_bytes, "save_s": seconds}
    yield Finding("files", "saves", NOTE if missing else OK, "; ".join([detail, *missing]), figures)


def check_model(name: str) -> Iterator[Finding]:
    """Which of a checkpoint's tensors MLX uses in place, which are copied in every pass, and why."""
    model = open_model(resolve_model(name))
    spec = model.spec
    about = f"{spec.family}, {spec.L} layers; computed in {device.dtype_name(model.dtype)}, "
    about += "weights packed" if model.packed else "weights decompressed"
    yield Finding("model", Path(name).name, OK, about, {"path": str(model.path)})
    if not device.on_metal():
        detail = "not available on this machine: everything is copied; the rows below apply to Metal"
        yield Finding("model", "Metal", NOT_HERE, detail, {})
    placed = model.weights.placement(spec.tensors)
    for why, infos in sorted(placed.items(), key=lambda item: item[0] or ""):
        n_bytes = sum(info.n_bytes for info in infos)
        detail = f"{len(infos):,} tensors, {n_bytes:,} bytes"
        if why and why.endswith("aligned"):
            detail += "; python -m mebp_mlx.convert --mode keep aligns them"
        state = NOT_HERE if not device.on_metal() else NOTE if why else OK
        figures = {"tensors": len(infos), "bytes": n_bytes, "why": why, "names": [info.name for info in infos]}
        yield Finding("model", f"copied in every pass: {why}" if why else "used in place", state, detail, figures)
    model.close()


def check_probes() -> Iterator[Finding]:
    """The measurements of probes.py, which have not been taken on a Mac yet."""
    for probe in probes.measure():
        here = device.on_metal()
        state = FAIL if not probe.good else OK if here else NOT_HERE
        detail = probe.detail + ("" if here else "; not on Metal")
        yield Finding("probe", probe.what, state, detail, probe.figures)


def check_kernels(every: bool = False) -> Iterator[Finding]:
    """Compiles each kernel for each dtype and group size, checks it against its reference and times both.

    every: check attention's kernels for every head dim, not only for the first one.
    """
    for kernel in KERNELS.values():
        if not selfcheck.backend.available():
            reason = "needs Metal; the reference is used (tests emulate the kernel)"
            yield Finding("kernels", kernel.name, NOT_HERE, reason, {})
            continue
        for dtype in selfcheck.DTYPES:
            for group_size in kernel.group_sizes[: None if every or kernel.name not in attention.NAMES else 1]:
                yield _kernel(kernel, dtype, group_size)


def check_attention() -> Iterator[Finding]:
    """Times attention with the kernels and with MLX."""
    if not selfcheck.backend.available():
        yield Finding("attention", "times", NOT_HERE, "needs Metal; python -m bench kernels counts operations", {})
        return
    for what, detail, figures in kernels.measure():
        yield Finding("attention", what, OK, detail, figures)


def _kernel(kernel: selfcheck.Kernel, dtype: mx.Dtype, group_size: int) -> Finding:
    what = f"{kernel.name} {device.dtype_name(dtype)}" + (f" /{group_size}" if group_size else "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row reports the problem
        problem = "" if selfcheck.passes(kernel.name, dtype, group_size) else kernel.problems[dtype, group_size]
    if problem:
        return Finding("kernels", what, FAIL, problem, {"problem": problem})
    arguments = kernel.sample(dtype, group_size, **KERNEL_SIZES)
    mx.eval([a for a in arguments if isinstance(a, mx.array)])
    metal_ms = 1e3 * probes.median_s(lambda: kernel.metal(*arguments), REPEATS)
    reference_ms = 1e3 * probes.median_s(lambda: kernel.reference(*arguments), REPEATS)
    figures = {"metal_ms": round(metal_ms, 3), "reference_ms": round(reference_ms, 3)}
    detail = f"agrees with its reference; {metal_ms:.2f} ms, reference {reference_ms:.2f} ms"
    return Finding("kernels", what, OK, detail, figures)
