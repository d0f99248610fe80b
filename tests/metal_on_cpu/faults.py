"""Two correct kernels, and planted faults: the emulator must find each by the given means."""

from __future__ import annotations

from typing import NamedTuple

# Sums of rows, a complete kernel: the 4 simdgroups of a threadgroup reduce a row together.
ROW_SUMS = """
template <typename T> [[kernel]] void row_sums(
    const device T* in [[buffer(0)]], device float* out [[buffer(1)]], constant int& n [[buffer(2)]],
    uint row [[threadgroup_position_in_grid]], uint id [[thread_position_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint simdgroup [[simdgroup_index_in_threadgroup]],
    uint n_threads [[threads_per_threadgroup]]) {
  threadgroup float parts[4];
  float sum = 0;
  for (int i = id; i < n; i += n_threads) sum += float(in[row * n + i]);
  sum = simd_sum(sum);
  if (lane == 0) parts[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float total = 0;
  for (int i = 0; i < 4; i++) total += parts[i];
  if (id == 0) out[row] = total;
}
"""

# out [M, N] = x [M, K] w[N, K]^T, a body for metal_kernel: two simdgroups, each an 8 x 8 tile of the result.
MATMUL = """
    uint thread_id = thread_index_in_threadgroup;
    uint simdgroup = simdgroup_index_in_threadgroup;
    uint row = threadgroup_position_in_grid.y * 8, column = threadgroup_position_in_grid.x * 16;
    threadgroup T x_tile[8 * 8], w_tile[16 * 8];
    threadgroup float out_tile[2 * 64];
    simdgroup_matrix<T, 8, 8> a, b;
    simdgroup_float8x8 sums = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    for (int k = 0; k < K; k += 8) {
        for (uint i = thread_id; i < 192; i += 64) {
            bool is_x = i < 64;
            uint r = is_x ? row + i / 8 : column + (i - 64) / 8, c = k + i % 8;
            if (is_x) x_tile[i] = r < M && c < K ? x[r * K + c] : T(0);
            else w_tile[i - 64] = r < N && c < K ? w[r * K + c] : T(0);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_load(a, x_tile, 8);
        simdgroup_load(b, w_tile + simdgroup * 64, 8, ulong2(0, 0), true);
        simdgroup_multiply_accumulate(sums, a, b, sums);
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_store(sums, out_tile + simdgroup * 64, 8);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_id; i < 128; i += 64) {
        uint r = row + i % 64 / 8, c = column + i / 64 * 8 + i % 8;
        if (r < M && c < N) out[r * N + c] = out_tile[i];
    }
"""


class Fault(NamedTuple):
    """`old` in a correct kernel becomes `new`; the fault is found by `means` with `message` (a regex).

    Means: "values" (wrong against float64 in one of three thread orders), "orders" (values differ between orders),
    "run" (the emulator stops), "compile", "lint", or the name of a sanitizer.
    """

    name: str
    old: str
    new: str
    means: str
    message: str = ""

    def planted_in(self, kernel: str) -> str:
        assert self.old in kernel, self.old
        return kernel.replace(self.old, self.new)


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
START = "float total = 0;"

IN_ROW_SUMS = [
    Fault("barrier left out", BARRIER, "", "thread", "data race"),
    Fault("barrier left out, seen by NaN", BARRIER, "", "values"),
    Fault("barrier that orders no memory", "::mem_threadgroup", "::mem_none", "thread", "data race"),
    Fault("simdgroup_barrier for a threadgroup's", "threadgroup_barrier", "simdgroup_barrier", "thread", "data race"),
    Fault("barrier in a branch", BARRIER, "if (id < 64) " + BARRIER, "run", "barrier at line .* already returned"),
    Fault(
        "a barrier each in two branches",
        BARRIER,
        f"if (id < 64) {{\n {BARRIER} }} else {{\n {BARRIER} }}",
        "run",
        "barrier divergence: thread 63 waits at line 13, thread 64 at line 14",
    ),
    Fault("early return", "float sum = 0;", "if (id >= uint(n)) return;\n float sum = 0;", "run", "already returned"),
    Fault("read past a buffer's end", "i < n;", "i <= n;", "address", "heap-buffer-overflow"),
    Fault("read past a buffer's end, seen by NaN", "row * n + i", "row * n + i + 1", "values"),
    Fault("write past a buffer's end", "out[row] = total", "out[row + 1] = total", "run", "outside of buffer 1"),
    Fault("threadgroup array too small", "parts[4]", "parts[3]", "address", "heap-buffer-overflow"),
    Fault("threadgroup array too small, seen by its guard", "parts[4]", "parts[3]", "run", "outside of .* threadgroup"),
    Fault("threadgroup memory not initialised", "if (lane == 0)", "if (lane == 0 && simdgroup < 3)", "values"),
    Fault("variable not initialised", "float sum = 0;", "float sum;", "values"),
    Fault("half accumulator", "float sum = 0;", "half sum = 0;", "values"),
    Fault("threads of a group write the same element", "if (id == 0) out", "out", "thread", "data race"),
    Fault("threadgroups write the same element", "out[row] = total", "out[0] = total", "orders"),
    Fault("simd_sum in a branch", "sum = simd_sum", "if (lane < 16) sum = simd_sum", "values"),
    Fault("lane where the simdgroup is meant", "parts[simdgroup] =", "parts[lane] =", "values"),
    Fault("too much threadgroup memory", "parts[4]", "parts[8193]", "run", "32772 bytes .* limit is 32768"),
    Fault("threadgroup memory as device memory", START, START + " device float* p = parts;", "lint", "__local"),
    Fault("pointer without an address space", START, START + " float* p = &total;", "lint", "without an address space"),
    Fault(
        "threadgroup variable in a function",
        "template",
        "inline void f() { threadgroup float a[4]; }\ntemplate",
        "lint",
    ),
    Fault("write through constant", START, START + " n = 1;", "compile", "const|read-only"),
    Fault("write through constant, by lint", START, START + " n = 1;", "lint", "not assignable"),
    Fault("double", START, "double total = 0;", "compile", "no_double"),
    Fault("implicit float -> bfloat", START, START + " bfloat b = sum;", "compile", "bfloat"),
    Fault("max(float, int)", START, START + " sum = max(sum, 0);", "compile", "max"),
    Fault("unknown function", "simd_sum", "simd_summ", "compile", "simd_summ"),
]

SECOND_BARRIER = "b, sums);\n        " + BARRIER
IN_MATMUL = [
    Fault("first barrier left out", BARRIER + "\n        simdgroup_load(a", "simdgroup_load(a", "thread", "data race"),
    Fault("second barrier left out", SECOND_BARRIER, "b, sums);", "thread", "data race"),
    Fault("sums not initialised", " = make_filled_simdgroup_matrix<float, 8, 8>(0.0f)", "", "values"),
    Fault("transpose forgotten", "ulong2(0, 0), true", "ulong2(0, 0), false", "values"),
    Fault(
        "not all lanes multiply",
        "simdgroup_multiply_accumulate",
        "if (thread_id % 4) simdgroup_multiply_accumulate",
        "run",
        "not all 32 lanes",
    ),
    Fault("edge of w not checked", "r < N && c < K", "c < K", "address", "heap-buffer-overflow"),
    Fault("edge of the result not checked", "r < M && c < N", "c < N", "run", "outside of buffer 2"),
    Fault("store into a buffer of constants", "out_tile + simdgroup * 64, 8)", "x, 8)", "lint", "simdgroup_store"),
    Fault("load from a tile said to be in device", "threadgroup T x_tile", "device T x_tile", "lint"),
    Fault(
        "vector from an address that it cannot have",
        "out_tile[i];",
        "(*(device float4*)(x + 1)).x;",
        "address,undefined",
        "misaligned",
    ),
]
