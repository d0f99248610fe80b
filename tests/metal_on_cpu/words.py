"""Kernels with the Metal vocabulary of this project: the emulator runs them, and the lint finds nothing."""

# Log of a sum of exponentials, one simdgroup per row: a body and functions for metal_kernel.
HEADER = """
constexpr constant int WIDTH = 32;
template <typename T> inline float at(const device T* row, int i, int n) {
    return i < n ? float(row[i]) : -INFINITY;
}
inline void add(thread float& top, thread float& sum, float z) {
    float higher = max(top, z);
    sum = sum * metal::fast::exp(top - higher) + metal::fast::exp(z - higher);
    top = higher;
}
"""
LOG_SUM_EXP = """
    uint lane = thread_index_in_simdgroup;
    int row = thread_position_in_grid.y;
    float top = -3.0e38, sum = 0.0, tops[2] = {0, 0};
    for (int i = lane; i < n; i += WIDTH) add(top, sum, at(x + row * n, i, n));
    for (ushort step = 16; step > 0; step /= 2) {
        float other_top = simd_shuffle_xor(top, step), other_sum = simd_shuffle_xor(sum, step);
        float higher = metal::max(top, other_top);
        sum = sum * metal::precise::exp(top - higher) + other_sum * metal::precise::exp(other_top - higher);
        top = higher;
    }
    tops[is_wide ? 1 : 0] = simd_max(top);
    if (lane == WIDTH - 1) out[row] = T(metal::precise::log(sum) + tops[is_wide]);
"""

# Everything else, without a purpose: it must only compile and be free of lint.
WORDS_HEADER = """
constant constexpr float LOG2E = 1.44f;
constexpr constant float TABLE[4] = {0.0f, 1.0f, 2.0f, 3.0f};
struct Pair { float top; float sum; };
template <typename T, int N> struct Tile {
    T values[N];
    T total() const thread { T t = T(0); for (int i = 0; i < N; i++) t += values[i]; return t; }
};
template <typename T> METAL_FUNC float4 load4(const device T* p) { return float4(p[0], p[1], p[2], p[3]); }
template <typename T, typename U> inline void copy_in(threadgroup T* to, const device U* from, uint n, uint id) {
    for (uint i = id; i < n; i += 32) to[i] = T(from[i]);
}
inline Pair join(Pair a, Pair b) {
    Pair c;
    c.top = max(a.top, b.top);
    c.sum = a.sum * exp(a.top - c.top) + b.sum * exp(b.top - c.top);
    return c;
}
inline uint pick(uint word, int i) { return (word >> (4 * i)) & 15u; }
"""
WORDS = """
    float a = exp(x[0]), b = log(a) + fabs(a) + sqrt(a) + rsqrt(a) + metal::precise::sqrt(a);
    float c = clamp(a, 0.0f, 1.0f), d = select(a, b, a > b), q = fma(a, b, c);
    float many = tanh(a) + pow(a, 2.0f) + floor(a) + round(a) + exp2(a) * M_LOG2E_F + fast::log(a);
    int e = abs(-3), f = metal::min(1, 2), at_most = max(1u, 2u), ones = popcount(3u);
    bool special = isnan(a) || isinf(b);
    uint bits = as_type<uint>(a), low = pick(bits, 1);
    float again = as_type<float>(bits);
    uint64_t big = uint64_t(1) << 40;
    int64_t negative = -1;
    uchar small = uchar(7);

    float4 v = float4(1, 2, 3, 4);
    half4 v_half = half4(v);
    float4 v_back = float4(v_half) * 2.0f + v;
    ushort2 pair = ushort2(1, 2);
    char4 chars = char4(1, 2, 3, 4);
    uint3 position = thread_position_in_grid;
    float z = v.x + v[2] + v_back.w + dot(v, load4(x)) + float(chars.x + small);
    const device half4* wide = (const device half4*)(y);
    const device half4* wide_too = reinterpret_cast<const device half4*>(y);
    v += float4(wide[0]) + float4(*wide_too);
    half h = half(a);
    bfloat16_t narrow = bfloat16_t(a);
    bfloat twice = narrow + narrow;
    float from_narrow = float(narrow) * 2;

    const device T* input = x + 4;
    device float* result = out;
    threadgroup T tile[64], second_tile[8 * 8];
    threadgroup T* tile_end = tile + 64;
    threadgroup float4 vectors[2];
    thread float* pointer = &a;
    thread float& reference = b;
    reference += *pointer;
    copy_in(tile, input, 60, position.x);
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    simdgroup_barrier(mem_flags::mem_threadgroup);

    float all = simd_sum(a) + simd_max(b) + simd_min(c) + simd_shuffle(a, 3) + simd_shuffle_down(a, 1);
    all += simd_shuffle_up(a, 1) + simd_broadcast(a, 0) + simd_shuffle_xor(a, ushort(1)) + simd_broadcast_first(b);
    bool some = simd_any(a > 0) && simd_all(b > 0);
    simdgroup_float8x8 sums[2], zero = simdgroup_float8x8(0);
    for (int k = 0; k < 2; k++) sums[k] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    simdgroup_half8x8 left, right;
    simdgroup_load(left, tile, 8);
    simdgroup_load(right, y, 8, 0, true);
    simdgroup_multiply_accumulate(sums[0], left, right, sums[0]);
    simdgroup_matrix<float, 8, 8> product(0.0f);
    simdgroup_multiply(product, left, right);
    sums[1].thread_elements()[0] *= 2.0f;
    simdgroup_store(sums[1], result, 8);
    sums[1] = zero;

    Pair joined = join({1.0f, 2.0f}, {3.0f, 4.0f});
    Tile<float, 4> numbers = {{1, 2, 3, 4}};
    constexpr int QUARTER = K / 4;
    float registers[QUARTER + 1] = {0};
    for (int k = 0; k < QUARTER; ++k) registers[k] = INFINITY;
    size_t at = size_t((K + 3) / 4) * 8;
    if (is_wide) { result[0] = 1; } else { result[1] = a * b; }
    if (a == -INFINITY) return;
    result[at % 4] = z + numbers.total() + joined.sum + TABLE[1] + LOG2E + many + float(negative) + float(big);
"""
