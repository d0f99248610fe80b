"""Runs Metal kernels on a Linux CPU, for tests on machines without Metal.

`metal_kernel` has the signature of `mx.fast.metal_kernel`; `Kernel` runs a `[[kernel]]` of any Metal source. The source
is compiled as C++ against cpp/shim.h; every GPU thread is a fiber that switches at barriers and simd operations. Thread
orders (`seed`), address and thread sanitizers (`sanitize`) and clang's address spaces (`lint`) find faults that a run
on a real GPU might hide; faults.py lists the tested ones. The emulator cannot show speed, occupancy, real scheduling,
the last bits of fast math, and other errors of Metal's compiler. Its results must be called *emulated*.

Tests skip with `why_not()` (no compiler or no sanitizer runtime) and `why_no_lint()` as reasons. MEBP_CXX names a
compiler, MEBP_KERNEL_CACHE the folder of compiled kernels.
"""

from tests.metal_on_cpu.fast import generated_by_mlx, metal_kernel, mlx_include, signature
from tests.metal_on_cpu.lint import lint, why_no_lint
from tests.metal_on_cpu.run import Kernel, why_not
from tests.metal_on_cpu.translate import MSLError

__all__ = [
    "Kernel",
    "MSLError",
    "generated_by_mlx",
    "lint",
    "metal_kernel",
    "mlx_include",
    "signature",
    "why_no_lint",
    "why_not",
]
