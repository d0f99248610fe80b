// linear_cross_entropy: the head's loss from packed weights, without any logits in memory (forward only).
//
//   z_v = h . (scale q_v + bias),   and over this threadgroup's range of the vocabulary, online,
//   m = max_v z_v,   s = sum_v exp(z_v - m),   t = z_y if the target y is in the range, else 0
//
// The ranges ("splits") are combined afterwards: loss = M + log(sum_i s_i exp(m_i - M)) - sum_i t_i, M = max_i m_i.
//
// Body of an mx.fast.metal_kernel: MLX writes the signature from the names used here.
//
// Inputs       h         [T, D]          scalar   rows after the final norm; scalar is float, half or bfloat
//              packed    [V, D / 8]      uint32   eight 4-bit codes a word, the lowest bits first
//              scales    [V, D / GROUP]  scalar
//              biases    [V, D / GROUP]  scalar   not read if SYMMETRIC: there it is -8 scale
//              targets   [T]             int      y; negative: no label, t stays 0
// Outputs      maxima, sums, target_logits   [S, T] float, S splits
// Template     scalar, GROUP (32, 64 or 128 weights share a scale), SYMMETRIC
// Grid         (128, ceil(T / 32), S) threads in threadgroups of (128, 1, 1): 32 rows, and V / S of the vocabulary
//              rounded up to whole tiles of 64
// Numerics     codes become float, products and sums are float (simdgroup matrices), exp is the precise one.
//              Rows beyond T read as zero and are not written; columns beyond V are ignored. D is a multiple of GROUP.
// Memory       one 32 x 32 tile of h and one 64 x 32 tile of the weights in threadgroup memory (13.8 KB); the same
//              memory holds the finished 32 x 64 logits.

constexpr int ROWS = 32, COLUMNS = 64, DEPTH = 32;  // a tile of logits, and how much of D at a time
constexpr int STRIDE = DEPTH + 4, Z_STRIDE = COLUMNS + 4;  // padded: neighbouring rows use different banks
threadgroup float tile[(ROWS + COLUMNS) * STRIDE];
threadgroup float* h_tile = tile;
threadgroup float* w_tile = tile + ROWS * STRIDE;
threadgroup float* z_tile = tile;  // after the products

const int T = h_shape[0], D = h_shape[1], V = packed_shape[0];
const int words = D / 8, groups = D / GROUP;
const int index = thread_position_in_threadgroup.x;
const int group = simdgroup_index_in_threadgroup;
const int row_start = threadgroup_position_in_grid.y * ROWS;
const int split = threadgroup_position_in_grid.z, n_splits = threadgroups_per_grid.z;
const int tiles_per_split = ((V + COLUMNS - 1) / COLUMNS + n_splits - 1) / n_splits;
const int first = split * tiles_per_split * COLUMNS;
const int last = metal::min(V, first + tiles_per_split * COLUMNS);

// Four neighbouring threads process one row of logits, sixteen columns each.
const int own_row = index / 4, own_columns = (index % 4) * (COLUMNS / 4);
const int target = row_start + own_row < T ? targets[row_start + own_row] : -1;
float maximum = -INFINITY, sum = 0.0f, target_logit = 0.0f;

for (int column_start = first; column_start < last; column_start += COLUMNS) {
    // Each of the four simdgroups: 16 rows by 32 columns, in 2 x 4 matrices.
    simdgroup_float8x8 z[2][4];
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            z[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
    }
    for (int depth = 0; depth < D; depth += DEPTH) {
        for (int k = index; k < ROWS * DEPTH; k += 128) {
            int row = row_start + k / DEPTH;
            float value = 0.0f;
            if (row < T) {
                value = float(h[size_t(row) * D + depth + k % DEPTH]);
            }
            h_tile[(k / DEPTH) * STRIDE + k % DEPTH] = value;
        }
        for (int k = index; k < COLUMNS * (DEPTH / 8); k += 128) {
            int row = k / (DEPTH / 8), word = k % (DEPTH / 8);
            int v = column_start + row;
            uint codes = 0;
            float scale = 0.0f, bias = 0.0f;
            if (v < last) {
                size_t at = size_t(v) * groups + (depth + word * 8) / GROUP;
                codes = packed[size_t(v) * words + depth / 8 + word];
                scale = float(scales[at]);
                bias = SYMMETRIC ? -8.0f * scale : float(biases[at]);
            }
            for (int i = 0; i < 8; i++) {
                w_tile[row * STRIDE + word * 8 + i] = scale * float((codes >> (4 * i)) & 15) + bias;
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (int k = 0; k < DEPTH; k += 8) {
            simdgroup_float8x8 left[2], right[4];
            for (int i = 0; i < 2; i++) {
                simdgroup_load(left[i], h_tile + ((group / 2) * 16 + i * 8) * STRIDE + k, STRIDE);
            }
            for (int j = 0; j < 4; j++) {  // transposed: rows of the tile are columns of the product
                simdgroup_load(right[j], w_tile + ((group % 2) * 32 + j * 8) * STRIDE + k, STRIDE, ulong2(0, 0), true);
            }
            for (int i = 0; i < 2; i++) {
                for (int j = 0; j < 4; j++) {
                    simdgroup_multiply_accumulate(z[i][j], left[i], right[j], z[i][j]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            int row = (group / 2) * 16 + i * 8, column = (group % 2) * 32 + j * 8;
            simdgroup_store(z[i][j], z_tile + row * Z_STRIDE + column, Z_STRIDE);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    const int n = metal::clamp(last - column_start - own_columns, 0, COLUMNS / 4);
    threadgroup const float* own = z_tile + own_row * Z_STRIDE + own_columns;
    float highest = maximum;
    for (int c = 0; c < n; c++) {
        highest = metal::max(highest, own[c]);
    }
    highest = metal::max(highest, metal::simd_shuffle_xor(highest, 1));
    highest = metal::max(highest, metal::simd_shuffle_xor(highest, 2));
    sum *= metal::precise::exp(maximum - highest);  // 0 at the first tile: every thread's row has a column there
    maximum = highest;
    for (int c = 0; c < n; c++) {
        sum += metal::precise::exp(own[c] - highest);
        if (column_start + own_columns + c == target) {
            target_logit = own[c];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

sum += metal::simd_shuffle_xor(sum, 1);
sum += metal::simd_shuffle_xor(sum, 2);
target_logit += metal::simd_shuffle_xor(target_logit, 1);
target_logit += metal::simd_shuffle_xor(target_logit, 2);
if (index % 4 == 0 && row_start + own_row < T) {
    size_t at = size_t(split) * T + row_start + own_row;
    maxima[at] = maximum;
    sums[at] = sum;
    target_logits[at] = target_logit;
}
