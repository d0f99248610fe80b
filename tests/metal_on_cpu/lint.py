"""Checks a kernel's address spaces with clang's C++ for OpenCL, which has MSL's spaces (device is __global, ...)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from functools import lru_cache

from tests.metal_on_cpu.run import COMPILERS, CPP
from tests.metal_on_cpu.translate import INSTANTIATION, strip_comments

OLDEST_CLANG = 15
KERNEL_TEMPLATE = re.compile(r"template\s*<([^>]*)>\s*(?:inline\s+)?(?=kernel\b)")
VECTOR_LITERAL = re.compile(r"\b((?:float|half|bfloat|u?int|u?short|u?char|u?long)[234])\(")

# MSL requires an address space on every pointer and reference; OpenCL treats `float* p` as a generic pointer.
SCALARS = (
    r"(?:float|half|bfloat|bfloat16_t|float16_t|bool|u?int(?:(?:8|16|32|64)_t)?|u?short|u?char|u?long|size_t)[234]?"
)
POINTER = r"(?P<before>[\w\s]*?)\b(?P<type>SCALARS)\s*(?:const\s*)?[*&]\s*\w+\s*(?=[,)=;\[])"
SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\b")


@lru_cache
def _clang() -> str | None:
    for name in (os.environ.get("MEBP_CXX"), *COMPILERS):
        if name and "clang" in name and shutil.which(name):
            version = subprocess.run([name, "-dumpversion"], capture_output=True, text=True).stdout
            if version.split(".")[0].isdigit() and int(version.split(".")[0]) >= OLDEST_CLANG:
                return name
    return None


def why_no_lint() -> str | None:
    """The reason why `lint` cannot run on this machine, for pytest.skip; None if it can."""
    return None if _clang() else f"no clang >= {OLDEST_CLANG}, which checks address spaces"


def lint(source: str, template: Mapping[str, object] | None = None) -> list[str]:
    """One line for each error of a kernel; an empty list if there is none.

    It finds mixed address spaces, writes to constant memory, threadgroup variables outside of kernels, and pointers
    without a space. A template is checked for the given values ("float", 8, True; default: float and 8). bfloat is
    treated as float, because the run checks types. Includes are ignored, so a kernel must be self-contained.
    """
    name = _clang()
    if name is None:
        raise RuntimeError(why_no_lint())
    text = INSTANTIATION.sub("", strip_comments(source))
    errors = _pointers_without_space(text)
    text = re.sub(r"\[\[\s*kernel\b[^\]]*\]\]", "kernel", text)
    text = re.sub(r"#include\s*[<\"][^>\"]*[>\"]|\[\[(?:[^\]]|\](?!\]))*\]\]", "", text)
    text = KERNEL_TEMPLATE.sub(lambda actual: _fixed_parameters(actual[1], template or {}), text)
    text = VECTOR_LITERAL.sub(r"make_\1(", text)  # OpenCL has no float4(x)
    checked = subprocess.run(
        [name, "-x", "clcpp", "-cl-std=clc++2021", "-target", "spir64", "-fsyntax-only", "-w", f"-I{CPP}", "-"],
        input=f'#include "lint.h"\n#line 1 "kernel"\n{text}',
        capture_output=True,
        text=True,
    )
    return errors + [line for line in checked.stderr.splitlines() if "error:" in line]


def _fixed_parameters(parameters: str, values: Mapping[str, object]) -> str:
    """OpenCL has no kernel templates: `typename T, int N` -> a typedef and a constant."""
    lines = []
    for parameter in parameters.split(","):
        kind, name = parameter.split("=")[0].split()
        if kind in ("typename", "class"):
            lines.append(f"typedef {values.get(name, 'float')} {name};")
        else:
            lines.append(f"constexpr constant {kind} {name} = {str(values.get(name, 8)).lower()};")
    return " ".join(lines)


def _pointers_without_space(text: str) -> list[str]:
    types = "|".join([SCALARS, *re.findall(r"\b(?:typename|class)\s+(\w+)", text)])
    errors = []
    for actual in re.finditer(POINTER.replace("SCALARS", types), text):
        if not SPACE.search(actual["before"]):
            line = text.count("\n", 0, actual.start("type")) + 1
            errors.append(f"kernel:{line}: error: pointer or reference without an address space: {actual[0].strip()}")
    return errors
