"""Loads a fast BLAS for MLX, and describes the machine.

MLX's Linux wheel contains the reference BLAS (2-5 GFLOP/s in float32). A fast BLAS replaces it if its symbols are
global *before* `mlx.core` is imported. Therefore this module imports only the standard library.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

NO_BACKEND = """MLX has no backend here: pip install "mebp_mlx[cpu]", or "mebp_mlx[cuda]" for an NVIDIA GPU"""
REMEDY = 'pip install "mebp_mlx[cpu]" (x86-64) or apt install libopenblas0'
_OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas-pthread.so.0", "libopenblas.so")

_blas: Blas | None = None


@dataclass(frozen=True)
class Blas:
    """The BLAS that MLX's CPU backend uses: its name, its file, and a note for the user."""

    name: str  # "Accelerate", "MKL", "OpenBLAS", "custom", "preloaded" or "reference"
    path: str | None
    note: str

    def __str__(self) -> str:
        return self.name + (f" ({Path(self.path).name})" if self.path else "")


def load_blas() -> Blas:
    """Loads a fast BLAS once per process (Linux; a no-op on macOS) and returns the one that MLX will use.

    `MEBP_BLAS=off` keeps MLX's own; `MEBP_BLAS=/path/lib.so` loads that library (UserError if it cannot be loaded or
    has no `cblas_sgemm`). Otherwise PyPI's `mkl` is tried, then a system OpenBLAS; if neither is found, one warning
    names the remedy.
    """
    global _blas
    if _blas is None:
        _blas = Blas("Accelerate", None, "part of macOS") if sys.platform == "darwin" else _load()
    return _blas


def memory_bytes() -> int:
    """The machine's physical memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def default_budget_bytes() -> int:
    """The default memory budget: 1 GB or a quarter of the memory, whichever is less."""
    return min(1_000_000_000, memory_bytes() // 4)


def backend_missing() -> bool:
    """Whether MLX lacks a backend and cannot be imported: on Linux the `mlx` wheel itself has none."""
    if not sys.platform.startswith("linux") or _has_library():
        return False
    try:  # a custom build may be a single library
        import mlx.core  # noqa: F401
    except ImportError:
        return True
    return False


def machine() -> dict[str, Any]:
    """The machine's description for measurements: processor, cores, memory, system, versions, BLAS."""
    from importlib import metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    system = os.uname()
    return {
        "machine": system.machine,
        "chip": _chip(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "os": f"{system.sysname} {system.release}",
        "python": ".".join(map(str, sys.version_info[:3])),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "numpy": version("numpy"),
        "blas": str(load_blas()),
    }


def usable_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _chip() -> str | None:
    if sys.platform == "darwin":
        import subprocess

        try:
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
        except (OSError, subprocess.CalledProcessError):
            return None
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"^(?:model name|Model|Hardware|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None


def _load() -> Blas:
    wanted = os.environ.get("MEBP_BLAS", "")
    if wanted == "off":
        return Blas("reference", None, "MEBP_BLAS=off keeps the BLAS inside MLX's wheel: slow")
    problem = _open_global(wanted) if wanted else None
    if problem:
        raise UserError(f"MEBP_BLAS={wanted}: {problem}")
    if "mlx.core" in sys.modules:
        if _global_cblas():
            return Blas("preloaded", None, "a BLAS was loaded before mebp_mlx")
        note = "mlx.core was imported before mebp_mlx, so its slow built-in BLAS is used: import mebp_mlx first"
        warnings.warn(note, RuntimeWarning, stacklevel=2)
        return Blas("reference", None, note)
    if wanted:
        return Blas("custom", wanted, "named by MEBP_BLAS")
    if _global_cblas():
        return Blas("preloaded", None, "a BLAS was loaded before mebp_mlx")
    problems = []
    for name, find in (("MKL", _mkl_files), ("OpenBLAS", _openblas_files)):
        for path in find():  # OpenBLAS only if MKL is missing: the search starts a process
            if name == "MKL":
                _settle_mkl()
            problem = _open_global(path)
            if problem is None:
                return Blas(name, path, "loaded before MLX to replace its built-in BLAS")
            if os.path.isabs(path):  # it exists, so the reason is worth reporting
                problems.append(f"{path}: {problem}")
    if any(glob.glob(str(folder.parent / "mlx_cuda*")) for folder in _mlx_folders()):
        return Blas("reference", None, "not needed: MLX computes on the GPU")
    if not _has_library():
        return Blas("reference", None, NO_BACKEND)
    note = f"no fast BLAS found, matrix products will be 20-50 times slower; remedy: {REMEDY}"
    if problems:
        note += "; tried " + "; ".join(problems)
    warnings.warn(note, RuntimeWarning, stacklevel=2)
    return Blas("reference", None, note)


def _mlx_folders() -> list[Path]:
    mlx_spec = importlib.util.find_spec("mlx")  # imports nothing
    return [Path(folder) for folder in (mlx_spec and mlx_spec.submodule_search_locations) or ()]


def _has_library() -> bool:
    return any((folder / "lib" / "libmlx.so").exists() for folder in _mlx_folders())


def _settle_mkl() -> None:
    """Settings that MKL reads when it is loaded; the user's own values are kept.

    MKL_CBWR: without it results may depend on the alignment of the operands and on the number of threads (seen:
    [1, 896] x [896, 151] on 1 and 2 threads), so a recomputed or resumed step would not be bit-equal. AUTO,STRICT costs
    no measurable time.
    KMP_BLOCKTIME: by default a worker thread spins for 200 ms after each product, on a core that the rest of a step
    needs; with 1 ms the wall time is the same and the processor time a quarter lower (200 -> 150 ms a round).
    MKL_INTERFACE_LAYER: MLX passes 32-bit sizes.
    """
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    os.environ["MKL_INTERFACE_LAYER"] = "LP64"


def _open_global(path: str) -> str | None:
    """Loads a shared library into the global symbol scope; returns the reason for a failure, or None."""
    try:
        library = ctypes.CDLL(path)  # local first: a library without cblas must not leave symbols behind
        if not hasattr(library, "cblas_sgemm"):
            return "has no symbol cblas_sgemm"
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return " ".join(str(error).split())
    return None


def _global_cblas() -> bool:
    return hasattr(ctypes.CDLL(None), "cblas_sgemm")


def _mkl_files() -> list[str]:
    """All libmkl_rt files of PyPI's `mkl`, newest first."""
    paths = glob.glob(os.path.join(sys.prefix, "lib", "libmkl_rt.so*"))
    if not paths:  # a --user or --target install; last, because importlib.metadata is slow
        from importlib import metadata

        try:
            files = metadata.distribution("mkl").files or []
        except metadata.PackageNotFoundError:
            files = []
        paths = [str(Path(str(f.locate())).resolve()) for f in files if f.name.startswith("libmkl_rt.so")]
        paths = [path for path in paths if os.path.exists(path)]
    return sorted(paths, key=_version, reverse=True)


def _openblas_files() -> list[str]:
    local = glob.glob(os.path.join(sys.prefix, "lib", "libopenblas*.so*"))
    names = sorted(local, key=_version, reverse=True) + list(_OPENBLAS_NAMES)
    if sys.platform.startswith("linux") and not any(map(_loads, names)):
        from ctypes.util import find_library  # last, because it starts ldconfig or a compiler

        other = find_library("openblas")
        if other:
            names.append(other)
    return names


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _version(path: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", path.rpartition(".so")[2]))
