// attention_forward: attention's output and each row's log-sum-exp; no scores in memory.
//
//   s_j = scale q . k_j  for the keys that the query sees      l = log sum_j exp(s_j)      o = sum_j exp(s_j - l) v_j
// online over tiles of keys: m' = max(m, max s);  o' = o e^(m-m') + sum e^(s-m') v;  likewise the sum of e^(s-m').
//
// Body of an mx.fast.metal_kernel with attention.metal as header: MLX writes the signature from the names used here.
//
// Inputs       q         [B, H, Tq, D]  scalar   scalar is float, half or bfloat
//              k, v      [B, K, Tk, D]  scalar   H is a multiple of K: H / K heads share a key head
//              place     [2]            int      offset: the key at query 0's own position; window: keys seen, 0: all
//              scale                    float
// Outputs      o         [B, Tq, H, D]  scalar   0 where a query sees nothing
//              lse       [B, H, Tq]     float    natural logarithm; -inf where a query sees nothing
// Template     scalar, D (a multiple of 8 SPLIT), ROWS (own queries, 8 a simdgroup), COLUMNS (keys of a tile), SPLIT
//              (simdgroups that share eight queries: each computes its part of a tile's scores, exchanges it in
//              threadgroup memory, and each sums its part of D), HELD (queries stay in registers)
// Grid         (4 ROWS SPLIT, ceil(Tq / ROWS), B H) threads in threadgroups of (4 ROWS SPLIT, 1, 1); the rows that see
//              the most keys first
// Memory       a tile of keys and one of values in threadgroup memory, 2 COLUMNS (D scalars + 16 bytes); with SPLIT > 1
//              also 4 ROWS (COLUMNS + 4) bytes. Registers a thread: D / (4 SPLIT) for the sums, D / 8 (16 bits) or
//              D / 4 (float) if HELD, COLUMNS / 4 for the scores.
// Numerics     products, sums and the softmax are float, exponents of two are precise; o is rounded once. A masked
//              key's score is -inf and its weight 0; a maximum of -inf is replaced by 0.

constexpr int STRIDE = D + 16 / sizeof(scalar), PARTS = D / 8, OWN = PARTS / SPLIT, TILES = COLUMNS / 8;
constexpr int THREADS = 4 * ROWS * SPLIT, WORDS = STRIDE * sizeof(scalar) / 16, S_STRIDE = COLUMNS + 4;
threadgroup uint4 k_words[COLUMNS * WORDS];
threadgroup uint4 v_words[COLUMNS * WORDS];
threadgroup float s_tile[SPLIT > 1 ? ROWS * S_STRIDE : 1];
threadgroup const scalar* k_tile = (threadgroup const scalar*)k_words;
threadgroup const scalar* v_tile = (threadgroup const scalar*)v_words;

const int Tq = q_shape[2], Tk = k_shape[2], n_heads = q_shape[1], n_key_heads = k_shape[1];
const int offset = place[0], window = place[1];
const int index = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup / SPLIT, part = simdgroup_index_in_threadgroup % SPLIT;
const int row_start = (threadgroups_per_grid.y - 1 - threadgroup_position_in_grid.y) * ROWS;
const int head = threadgroup_position_in_grid.z;
const int key_head = head / n_heads * n_key_heads + head % n_heads / (n_heads / n_key_heads);
const int r = attention::lane_row(lane), c = attention::lane_column(lane);
const int row = row_start + group * 8 + r, query = offset + row;
const bool is_row = row < Tq;
const size_t q_at = (size_t(head) * Tq + row) * D + c, keys_at = size_t(key_head) * Tk * D;
threadgroup float* own_s = s_tile + (group * 8 + r) * S_STRIDE + c;

scalar held[HELD ? PARTS : 1][2];
UNROLL for (int d = 0; d < (HELD ? PARTS : 0); d++) {
    held[d][0] = is_row ? q[q_at + d * 8] : scalar(0);
    held[d][1] = is_row ? q[q_at + d * 8 + 1] : scalar(0);
}
simdgroup_float8x8 sums[OWN];
UNROLL for (int d = 0; d < OWN; d++) {
    sums[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
float top = -INFINITY, total = 0.0f;  // of this row; `total` is this lane's part
const float scale2 = attention::LOG2E * scale;

const int key_stop = metal::min(Tk, offset + metal::min(row_start + ROWS, Tq));
const int key_first = window > 0 ? metal::max(0, offset + row_start - window + 1) / COLUMNS * COLUMNS : 0;
for (int key_start = key_first; key_start < key_stop; key_start += COLUMNS) {
    const size_t from = keys_at + size_t(key_start) * D;
    attention::load_rows<scalar, COLUMNS, D, THREADS>(k_words, k + from, D, Tk - key_start, index);
    attention::load_rows<scalar, COLUMNS, D, THREADS>(v_words, v + from, D, Tk - key_start, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_float8x8 s[TILES], left, right;
    UNROLL for (int j = 0; j < TILES; j++) {
        s[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    UNROLL for (int d = 0; d < PARTS; d++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const size_t at = q_at + d * 8 + e;
            left.thread_elements()[e] = HELD ? float(held[HELD ? d : 0][e]) : is_row ? float(q[at]) : 0.0f;
        }
        UNROLL for (int j = 0; j < TILES; j++) {
            if (j % SPLIT == part) {
                attention::load(right, k_tile + (j * 8 + c) * STRIDE + d * 8 + r, STRIDE);
                simdgroup_multiply_accumulate(s[j], left, right, s[j]);
            }
        }
    }
    UNROLL for (int j = 0; j < TILES; j++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int key = key_start + j * 8 + c + e;
            const bool seen = is_row && key < Tk && attention::sees(query, key, window);
            s[j].thread_elements()[e] = seen ? s[j].thread_elements()[e] * scale2 : -INFINITY;
        }
    }
    if (SPLIT > 1) {
        UNROLL for (int j = 0; j < TILES; j++) {
            if (j % SPLIT == part) {
                own_s[j * 8] = s[j].thread_elements()[0];
                own_s[j * 8 + 1] = s[j].thread_elements()[1];
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        UNROLL for (int j = 0; j < TILES; j++) {
            s[j].thread_elements()[0] = own_s[j * 8];
            s[j].thread_elements()[1] = own_s[j * 8 + 1];
        }
    }

    float highest = top;
    UNROLL for (int j = 0; j < TILES; j++) {
        highest = metal::max(highest, metal::max(s[j].thread_elements()[0], s[j].thread_elements()[1]));
    }
    highest = attention::row_max(highest);
    const float base = highest == -INFINITY ? 0.0f : highest, shrink = metal::precise::exp2(top - base);
    top = highest;
    total *= shrink;
    UNROLL for (int d = 0; d < OWN; d++) {
        sums[d].thread_elements()[0] *= shrink;
        sums[d].thread_elements()[1] *= shrink;
    }
    UNROLL for (int j = 0; j < TILES; j++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const float p = metal::precise::exp2(s[j].thread_elements()[e] - base);
            s[j].thread_elements()[e] = p;
            total += p;
        }
        UNROLL for (int d = 0; d < OWN; d++) {
            attention::load(right, v_tile + (j * 8 + r) * STRIDE + (part * OWN + d) * 8 + c, 1);
            simdgroup_multiply_accumulate(sums[d], s[j], right, sums[d]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

total = attention::row_sum(total);
if (is_row) {
    const size_t batch = head / n_heads, own_head = head % n_heads;
    const size_t o_at = ((batch * Tq + row) * n_heads + own_head) * D + part * OWN * 8 + c;
    const float factor = total > 0.0f ? 1.0f / total : 0.0f;
    UNROLL for (int d = 0; d < OWN; d++) {
        o[o_at + d * 8] = scalar(sums[d].thread_elements()[0] * factor);
        o[o_at + d * 8 + 1] = scalar(sums[d].thread_elements()[1] * factor);
    }
    if (c == 0 && part == 0) {
        const float found = (top + metal::precise::log2(total)) * attention::LN2;
        lse[size_t(head) * Tq + row] = total > 0.0f ? found : -INFINITY;
    }
}
