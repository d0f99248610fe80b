// Shared by the three attention kernels, as the `header` of their mx.fast.metal_kernel: tiles, fragments, and the mask.
//
// A simdgroup's 8 x 8 matrix: lane l holds two neighbouring elements of a row. MLX's own attention kernels assume the
// same layout. Metal's specification does not guarantee it; the first-use check would detect a different one.

#ifndef UNROLL  // arrays of matrices stay in registers only where loops over them are unrolled
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

namespace attention {

constexpr constant float LOG2E = 1.4426950408889634f;
constexpr constant float LN2 = 0.6931471805599453f;

inline int lane_row(int lane) {
    return (lane / 4 & 4) + lane / 2 % 4;
}

inline int lane_column(int lane) {
    return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

// Over the four lanes that hold a row.
inline float row_sum(float x) {
    x += metal::simd_shuffle_xor(x, 1);
    return x + metal::simd_shuffle_xor(x, 8);
}

inline float row_max(float x) {
    x = metal::max(x, metal::simd_shuffle_xor(x, 1));
    return metal::max(x, metal::simd_shuffle_xor(x, 8));
}

// Positions count from key 0. A query sees the keys up to its own, `window` of them (0: all).
inline bool sees(int query, int key, int window) {
    return key <= query && (window <= 0 || key > query - window);
}

// Loads ROWS rows of D elements into threadgroup memory, 16 bytes at a time, with 16 bytes of padding per row (so that
// neighbouring rows use different banks); rows from n_rows on become 0. Rows start at multiples of 16 bytes: D is a
// multiple of 8.
template <typename scalar, int ROWS, int D, int THREADS>
inline void load_rows(threadgroup uint4* tile, const device scalar* rows, size_t stride, int n_rows, int index) {
    constexpr int WORDS = D * sizeof(scalar) / 16;
    for (int n = index; n < ROWS * WORDS; n += THREADS) {
        const int row = n / WORDS, word = n % WORDS;
        uint4 value = uint4(0);
        if (row < n_rows) {
            value = ((const device uint4*)(rows + row * stride))[word];
        }
        tile[row * (WORDS + 1) + word] = value;
    }
}

// This lane's two elements: of a row, or of a column of the tile, which transposes the matrix.
template <typename scalar>
inline void load(thread simdgroup_float8x8& matrix, threadgroup const scalar* at, int step) {
    matrix.thread_elements()[0] = float(at[0]);
    matrix.thread_elements()[1] = float(at[step]);
}

}  // namespace attention
