"""Run Metal kernels on a Linux CPU, for tests on machines without Metal.

`metal_kernel` has the signature of `mx.fast.metal_kernel`; `Kernel` runs a `[[kernel]]` of any Metal source. The source is
compiled as C++ against `shim.h`; every GPU thread is a fiber that switches at barriers and simd operations. Three thread
orders (`seed`), address and thread sanitizers (`sanitize`) and clang's address-space rules (`lint`) find what a run on a
real GPU might hide. What it cannot show: speed, occupancy, real scheduling, the last bits of fast math, and whatever
else Metal's own compiler refuses. Results from here are to be called *emulated*.
"""

from tests.metal_on_cpu.fast import generated_by_mlx, metal_kernel, mlx_include, signature
from tests.metal_on_cpu.lint import lint, why_no_lint
from tests.metal_on_cpu.run import Kernel, build_all, why_not
from tests.metal_on_cpu.translate import MSLError

__all__ = [
    "Kernel",
    "MSLError",
    "build_all",
    "generated_by_mlx",
    "lint",
    "metal_kernel",
    "mlx_include",
    "signature",
    "why_no_lint",
    "why_not",
]
