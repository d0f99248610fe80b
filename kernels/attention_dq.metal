// attention_dq: dL/dq of attention from its output and log-sum-exp, and delta, which attention_dkv reads.
//
//   p_j = exp(scale q . k_j - l)  for the keys that the query sees, else 0      delta = do . o  (= sum_j p_j do . v_j)
//   dq = scale sum_j p_j (do . v_j - delta) k_j
//
// Body of an mx.fast.metal_kernel with attention.metal as header: MLX writes the signature from the names used here.
//
// Inputs       q         [B, H, Tq, D]  scalar   scalar is float, half or bfloat
//              k, v      [B, K, Tk, D]  scalar   H is a multiple of K
//              o, d_o    [B, Tq, H, D]  scalar   the forward's output and its cotangent
//              lse       [B, H, Tq]     float    natural logarithm, of the forward
//              place     [2]            int      offset, window: as in attention_forward
//              scale                    float
// Outputs      dq        [B, H, Tq, D]  scalar
//              delta     [B, H, Tq]     float
// Template     scalar, D, ROWS, COLUMNS, SPLIT, HELD (q and d_o stay in registers): as in attention_forward
// Grid         (4 ROWS SPLIT, ceil(Tq / ROWS), B H) threads in threadgroups of (4 ROWS SPLIT, 1, 1); the rows that see
//              the most keys first
// Memory       as attention_forward; registers a thread: D / (4 SPLIT) for the sums, twice D / 8 (16 bits) or D / 4
//              (float) if HELD, COLUMNS / 2 for s and dp
// Numerics     products, sums and the exponential are float; dq is rounded once. A masked key's p is set to 0: no
//              infinity enters a sum, and tiles are 0 beyond Tk (0 times NaN would spread).

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
const size_t batch = head / n_heads, own_head = head % n_heads;
const size_t q_at = (size_t(head) * Tq + row) * D + c, o_at = ((batch * Tq + row) * n_heads + own_head) * D + c;
const size_t keys_at = size_t(key_head) * Tk * D;
threadgroup float* own_s = s_tile + (group * 8 + r) * S_STRIDE + c;

scalar held_q[HELD ? PARTS : 1][2], held_d_o[HELD ? PARTS : 1][2];
float own_delta = 0.0f;
UNROLL for (int d = 0; d < PARTS; d++) {
    UNROLL for (int e = 0; e < 2; e++) {
        const scalar from_q = is_row ? q[q_at + d * 8 + e] : scalar(0);
        const scalar from_d_o = is_row ? d_o[o_at + d * 8 + e] : scalar(0);
        own_delta += is_row ? float(from_d_o) * float(o[o_at + d * 8 + e]) : 0.0f;
        if (HELD) {
            held_q[HELD ? d : 0][e] = from_q;
            held_d_o[HELD ? d : 0][e] = from_d_o;
        }
    }
}
own_delta = attention::row_sum(own_delta);
const float lse2 = is_row ? attention::LOG2E * lse[size_t(head) * Tq + row] : 0.0f, scale2 = attention::LOG2E * scale;
simdgroup_float8x8 sums[OWN];
UNROLL for (int d = 0; d < OWN; d++) {
    sums[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

const int key_stop = metal::min(Tk, offset + metal::min(row_start + ROWS, Tq));
const int key_first = window > 0 ? metal::max(0, offset + row_start - window + 1) / COLUMNS * COLUMNS : 0;
for (int key_start = key_first; key_start < key_stop; key_start += COLUMNS) {
    const size_t from = keys_at + size_t(key_start) * D;
    attention::load_rows<scalar, COLUMNS, D, THREADS>(k_words, k + from, D, Tk - key_start, index);
    attention::load_rows<scalar, COLUMNS, D, THREADS>(v_words, v + from, D, Tk - key_start, index);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    simdgroup_float8x8 s[TILES], dp[TILES], left_q, left_d_o, right;
    UNROLL for (int j = 0; j < TILES; j++) {
        s[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        dp[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    UNROLL for (int d = 0; d < PARTS; d++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int at = d * 8 + e, held = HELD ? d : 0;
            left_q.thread_elements()[e] = HELD ? float(held_q[held][e]) : is_row ? float(q[q_at + at]) : 0.0f;
            left_d_o.thread_elements()[e] = HELD ? float(held_d_o[held][e]) : is_row ? float(d_o[o_at + at]) : 0.0f;
        }
        UNROLL for (int j = 0; j < TILES; j++) {
            if (j % SPLIT == part) {
                attention::load(right, k_tile + (j * 8 + c) * STRIDE + d * 8 + r, STRIDE);
                simdgroup_multiply_accumulate(s[j], left_q, right, s[j]);
                attention::load(right, v_tile + (j * 8 + c) * STRIDE + d * 8 + r, STRIDE);
                simdgroup_multiply_accumulate(dp[j], left_d_o, right, dp[j]);
            }
        }
    }
    UNROLL for (int j = 0; j < TILES; j++) {
        UNROLL for (int e = 0; e < 2; e++) {
            const int key = key_start + j * 8 + c + e;
            const bool seen = is_row && key < Tk && attention::sees(query, key, window);
            const float p = seen ? metal::precise::exp2(s[j].thread_elements()[e] * scale2 - lse2) : 0.0f;
            s[j].thread_elements()[e] = p * (dp[j].thread_elements()[e] - own_delta);
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
    UNROLL for (int j = 0; j < TILES; j++) {
        UNROLL for (int d = 0; d < OWN; d++) {
            attention::load(right, k_tile + (j * 8 + r) * STRIDE + (part * OWN + d) * 8 + c, 1);
            simdgroup_multiply_accumulate(sums[d], s[j], right, sums[d]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

if (is_row) {
    UNROLL for (int d = 0; d < OWN; d++) {
        UNROLL for (int e = 0; e < 2; e++) {
            dq[q_at + (part * OWN + d) * 8 + e] = scalar(scale * sums[d].thread_elements()[e]);
        }
    }
    if (c == 0 && part == 0) {
        delta[size_t(head) * Tq + row] = own_delta;
    }
}
