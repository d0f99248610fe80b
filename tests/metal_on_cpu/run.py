"""Compiles a translated kernel and runs it, in this process or as a program under a sanitizer."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from tests.metal_on_cpu.translate import MSLError, Parameter, translate

CPP = Path(__file__).parent / "cpp"
COMPILERS = ("clang++-19", "clang++-16", "clang++-15", "clang++", "g++")
SECONDS_TO_RUN = 120  # a sanitized program that takes longer is treated as hanging

FLAGS = [
    *(
        "-std=c++17",
        "-O1",
        "-g1",
        "-w",
        "-Wno-reserved-user-defined-literal",
        "-fno-exceptions",
        "-fno-strict-aliasing",
        "-faligned-new",
    ),
    "-ffp-contract=off",  # a * b + c rounds twice on every CPU
    "-fexcess-precision=16",  # half rounds after every operation
    "-ftrivial-auto-var-init=pattern",  # a variable that is read before it is written has a wrong value
]
GUARD_BYTES = 4096  # guard of NaN bytes around each buffer, which no kernel may touch

# Requirements for a compiler: it supports half, and has the sanitizer's runtime.
PROBE = "int main(int n, char**) { _Float16 h = n; return __builtin_bit_cast(unsigned short, h) == 0; }"


def compiler() -> str | None:
    """The first available C++ compiler: MEBP_CXX, or one of COMPILERS."""
    return next((name for name in (os.environ.get("MEBP_CXX"), *COMPILERS) if name and shutil.which(name)), None)


def why_not(sanitize: str = "") -> str | None:
    """The reason why kernels cannot run on this machine (with the sanitizer), for pytest.skip; None if they can."""
    if platform.system() != "Linux":
        return "kernels run on the CPU under Linux only"
    name = compiler()
    return "no C++ compiler" if name is None else _why_not(name, sanitize)


@lru_cache
def _why_not(name: str, sanitize: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/probe"
        made = subprocess.run(
            [name, *FLAGS, *_sanitizer_flags(sanitize), "-x", "c++", "-", "-o", program, "-lstdc++"],
            input=PROBE,
            text=True,
            capture_output=True,
        )
        ran = made.returncode or subprocess.run([program], capture_output=True).returncode
    what = f" with -fsanitize={sanitize}" if sanitize else " for half (clang >= 15 or g++ >= 12)"
    return f"{name} cannot build a program{what}" if ran else None


def _sanitizer_flags(sanitize: str) -> list[str]:
    return [f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []


def cache_folder() -> Path:
    """The folder of compiled kernels: MEBP_KERNEL_CACHE, or this user's folder in the temporary folder."""
    given = os.environ.get("MEBP_KERNEL_CACHE")
    return Path(given) if given else Path(tempfile.gettempdir()) / f"mebp-metal-on-cpu-{os.getuid()}"


class Kernel:
    """A kernel of a Metal source, compiled when it first runs.

    `function` may carry template arguments ("f<float, 4>"); `folders` are searched for quoted includes; `constants` are
    function constants by id; `sanitize` is "", "address", "thread" or "address,undefined". Raises MSLError if it is not
    supported, does not compile, or a fault is detected. The thread sanitizer distinguishes about 8,000 threads and
    remembers about 200 at a time, so use small grids.
    """

    def __init__(
        self,
        source: str,
        function: str,
        folders: Sequence[Path] = (),
        constants: Mapping[int | str, object] | None = None,
        sanitize: str = "",
        fast_math: bool = False,
        name: str = "kernel",
    ) -> None:
        plain_name = re.match(r"[\w:]+", function)
        if plain_name is None:
            raise MSLError(f"not the name of a kernel: {function}")
        self.sanitize = sanitize
        self._fast_math = fast_math
        text, parameters = translate(source, plain_name[0], folders, constants, name)
        self.n_buffers = max((int(p.argument or 0) + 1 for p in parameters if p.attribute == "buffer"), default=0)
        self.cpp = "\n".join(
            [
                '#include "shim.h"',
                text,
                '#line 1 "entry"',
                f"static void msl_entry(void** B) {{ {function}({', '.join(map(_argument, parameters))}); }}",
                'extern "C" int msl_run(void** b, const uint* g, const uint* t, const size_t* a, int s, char* e,',
                "size_t n) { return msl::dispatch(msl_entry, b, g, t, a, s, e, n); }",
                '#include "program.h"' if sanitize else "",
            ]
        )

    def build(self) -> Path:
        """The compiled file, from the cache if possible."""
        name = compiler()
        if name is None:
            raise MSLError("no C++ compiler")
        flags = [*FLAGS, f"-I{CPP}", *_sanitizer_flags(self.sanitize)]
        flags += ["-ffast-math"] if self._fast_math else []
        flags += [] if self.sanitize else ["-shared", "-fPIC"]
        headers = [path.read_text() for path in sorted(CPP.glob("*.h"))]
        key = hashlib.sha256("\0".join([name, *flags, *headers, self.cpp]).encode()).hexdigest()[:24]
        folder = cache_folder()
        path = folder / (f"{key}.program" if self.sanitize else f"{key}.so")
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(dir=folder)
        os.close(descriptor)
        try:
            made = subprocess.run(
                [name, *flags, "-x", "c++", "-", "-o", unfinished, "-lstdc++", "-lm"],
                input=self.cpp,
                text=True,
                capture_output=True,
            )
            if made.returncode:
                raise MSLError(made.stderr)
            os.replace(unfinished, path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
        return path

    def __call__(
        self,
        buffers: Sequence[np.ndarray | None],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        argument_bytes: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Runs it on arrays by buffer index (None: not bound), which are written in place unless read-only.

        `grid` counts threads, as MLX does; `argument_bytes` are the lengths of threadgroup arguments; `seed` chooses
        the order of threads: 0 in order, 1 reversed, others shuffled.
        """
        if not self.n_buffers <= len(buffers) <= 64:
            raise MSLError(f"{len(buffers)} buffers given, the kernel has {self.n_buffers}")
        if any(b is not None and not b.flags.c_contiguous for b in buffers):
            raise MSLError("buffers must be contiguous")
        lengths = [*argument_bytes, *[0] * (32 - len(argument_bytes))]
        run = self._run_program if self.sanitize else self._run_here
        run(buffers, grid, threadgroup, lengths, seed)

    def _run_here(
        self,
        buffers: Sequence[np.ndarray | None],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        argument_bytes: Sequence[int],
        seed: int,
    ) -> None:
        guarded = [None if b is None else _Guarded(b) for b in buffers]
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*[None if g is None else g.address for g in guarded])
        error = ctypes.create_string_buffer(600)
        failed = ctypes.CDLL(str(self.build())).msl_run(
            pointers,
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*threadgroup),
            (ctypes.c_size_t * 32)(*argument_bytes),
            seed,
            error,
            len(error),
        )
        if failed:
            raise MSLError(error.value.decode())
        for index, (array, copy) in enumerate(zip(buffers, guarded, strict=True)):
            if array is not None and copy is not None:
                copy.back_to(array, index)

    def _run_program(
        self,
        buffers: Sequence[np.ndarray | None],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        argument_bytes: Sequence[int],
        seed: int,
    ) -> None:
        job = struct.pack("40Q", len(buffers), *grid, *threadgroup, seed, *argument_bytes)
        for array in buffers:
            raw = b"" if array is None else array.tobytes()
            job += struct.pack("Q", len(raw)) + raw
        with tempfile.NamedTemporaryFile(suffix=".job") as file:
            file.write(job)
            file.flush()
            ran = subprocess.run(
                [str(self.build()), file.name],
                capture_output=True,
                text=True,
                timeout=SECONDS_TO_RUN,
                env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"},
            )
            if ran.returncode:
                raise MSLError(ran.stderr[:4000] or f"the kernel's program ended with {ran.returncode}")
            results = Path(file.name).read_bytes()
        position = 0
        for array in buffers:
            if array is None:
                continue
            if array.flags.writeable:
                array[...] = np.frombuffer(results, array.dtype, array.size, position).reshape(array.shape)
            position += array.nbytes


class _Guarded:
    """A copy of an array between two guards of 0xff: reading past an end gives NaN, writing past it is detected."""

    def __init__(self, array: np.ndarray) -> None:
        self._whole = np.full(array.nbytes + 2 * GUARD_BYTES + 64, 0xFF, np.uint8)
        self._start = GUARD_BYTES + -(self._whole.ctypes.data + GUARD_BYTES) % 64  # aligned like Metal's buffers
        self._stop = self._start + array.nbytes
        self._whole[self._start : self._stop] = np.frombuffer(array.tobytes(), np.uint8)
        self.address = self._whole.ctypes.data + self._start

    def back_to(self, array: np.ndarray, index: int) -> None:
        if not (self._whole[: self._start] == 0xFF).all() or not (self._whole[self._stop :] == 0xFF).all():
            raise MSLError(f"the kernel wrote outside of buffer {index}")
        if array.flags.writeable:
            inside = self._whole[self._start : self._stop].tobytes()
            array[...] = np.frombuffer(inside, array.dtype).reshape(array.shape)


def _argument(parameter: Parameter) -> str:
    """The argument that the entry passes for one parameter of the kernel."""
    if parameter.attribute == "buffer":
        is_reference = re.search(r"&\s*\w*\s*(\[\[|$)", parameter.declaration)
        return f"msl::{'Reference' if is_reference else 'Pointer'}{{B[{parameter.argument}]}}"
    if parameter.attribute == "threadgroup":
        number = int(parameter.argument or 0)
        return f"msl::Pointer{{msl::threadgroup_memory({-1 - number}, msl::G.argument_bytes[{number}])}}"
    return f"msl::{parameter.attribute}()"
