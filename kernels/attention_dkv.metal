// attention_dkv: dL/dk and dL/dv of attention from its log-sum-exp and attention_dq's delta.
//
//   p_ij = exp(scale q_i . k_j - l_i)  where query i sees key j, else 0
//   dv_j = sum_i p_ij do_i      dk_j = scale sum_i p_ij (do_i . v_j - delta_i) q_i      over all heads of the key head
//
// Body of an mx.fast.metal_kernel with attention.metal as header: MLX writes the signature from the names used here.
//
// Inputs       q           [B, H, Tq, D]  scalar   scalar is float, half or bfloat
//              k, v        [B, K, Tk, D]  scalar   H is a multiple of K
//              d_o         [B, Tq, H, D]  scalar
//              lse, delta  [B, H, Tq]     float
//              place       [4]            int      offset, window: as in attention_forward; low, high: keys to write
//              scale                      float
// Outputs      dk, dv      [B, K, high - low, D]  float   these queries' part; every element is written
// Template     scalar, D, SPLIT: as in attention_forward, ROWS (own keys), COLUMNS (queries of a tile), HELD (k and v
//              stay in registers)
// Grid         (4 ROWS SPLIT, ceil((high - low) / ROWS), B K) threads in threadgroups of (4 ROWS SPLIT, 1, 1)
// Memory       a tile of q and one of d_o in threadgroup memory, 2 COLUMNS (D scalars + 16 bytes), 8 COLUMNS bytes of
//              lse and delta; with SPLIT > 1 also 8 ROWS (COLUMNS + 4) bytes. Registers a thread: twice D / (4 SPLIT)
//              for the sums, twice D / 8 (16 bits) or D / 4 (float) if HELD, COLUMNS / 2 for p and ds
// Numerics     products, sums and the exponential are float. One thread sums an element, heads and queries in order:
//              the same bits from run to run, no atomics. A masked pair's p is set to 0: no infinity enters a sum.

constexpr int STRIDE = D + 16 / sizeof(scalar), PARTS = D / 8, OWN = PARTS / SPLIT, TILES = COLUMNS / 8;
constexpr int THREADS = 4 * ROWS * SPLIT, WORDS = STRIDE * sizeof(scalar) / 16, S_STRIDE = COLUMNS + 4;
threadgroup uint4 q_words[COLUMNS * WORDS];
threadgroup uint4 d_words[COLUMNS * WORDS];
threadgroup float lse_tile[COLUMNS];
threadgroup float delta_tile[COLUMNS];
threadgroup float p_tile[SPLIT > 1 ? ROWS * S_STRIDE : 1];
threadgroup float ds_tile[SPLIT > 1 ? ROWS * S_STRIDE : 1];
threadgroup const scalar* q_tile = (threadgroup const scalar*)q_words;
threadgroup const scalar* d_tile = (threadgroup const scalar*)d_words;

const int Tq = q_shape[2], Tk = k_shape[2], n_heads = q_shape[1], per_key_head = n_heads / k_shape[1];
const int offset = place[0], window = place[1], low = place[2], high = place[3];
const int index = thread_position_in_threadgroup.x, lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup / SPLIT, part = simdgroup_index_in_threadgroup % SPLIT;
const int key_start = low + threadgroup_position_in_grid.y * ROWS, key_head = threadgroup_position_in_grid.z;
const int r = attention::lane_row(lane), c = attention::lane_column(lane);
const int key = key_start + group * 8 + r;
const bool is_key = key < high;
const size_t k_at = (size_t(key_head) * Tk + key) * D + c;
const int s_at = (group * 8 + r) * S_STRIDE + c;

scalar held_k[HELD ? PARTS : 1][2], held_v[HELD ? PARTS : 1][2];
UNROLL for (int d = 0; d < (HELD ? PARTS : 0); d++) {
    UNROLL for (int e = 0; e < 2; e++) {
        held_k[d][e] = is_key ? k[k_at + d * 8 + e] : scalar(0);
        held_v[d][e] = is_key ? v[k_at + d * 8 + e] : scalar(0);
    }
}
simdgroup_float8x8 d_keys[OWN], d_values[OWN];
UNROLL for (int d = 0; d < OWN; d++) {
    d_keys[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    d_values[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}
const float scale2 = attention::LOG2E * scale;

const int last_key = metal::min(high, key_start + ROWS) - 1;
const int row_stop = window > 0 ? metal::min(Tq, last_key + window - offset) : Tq;
const int row_first = metal::max(0, key_start - offset) / COLUMNS * COLUMNS;
for (int head = key_head * per_key_head; head < (key_head + 1) * per_key_head; head++) {
    const size_t rows_at = size_t(head) * Tq, batch = head / n_heads, own_head = head % n_heads;
    for (int row_start = row_first; row_start < row_stop; row_start += COLUMNS) {
        const device scalar* q_rows = q + (rows_at + row_start) * D;
        const device scalar* d_rows = d_o + ((batch * Tq + row_start) * n_heads + own_head) * D;
        attention::load_rows<scalar, COLUMNS, D, THREADS>(q_words, q_rows, D, Tq - row_start, index);
        attention::load_rows<scalar, COLUMNS, D, THREADS>(d_words, d_rows, n_heads * D, Tq - row_start, index);
        if (index < COLUMNS) {
            const bool is_row = row_start + index < Tq;
            lse_tile[index] = is_row ? attention::LOG2E * lse[rows_at + row_start + index] : 0.0f;
            delta_tile[index] = is_row ? delta[rows_at + row_start + index] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        // Transposed: own keys are the rows, the tile's queries the columns.
        simdgroup_float8x8 p[TILES], ds[TILES], left_k, left_v, right;
        UNROLL for (int j = 0; j < TILES; j++) {
            p[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            ds[j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        }
        UNROLL for (int d = 0; d < PARTS; d++) {
            UNROLL for (int e = 0; e < 2; e++) {
                const size_t at = k_at + d * 8 + e;
                left_k.thread_elements()[e] = HELD ? float(held_k[HELD ? d : 0][e]) : is_key ? float(k[at]) : 0.0f;
                left_v.thread_elements()[e] = HELD ? float(held_v[HELD ? d : 0][e]) : is_key ? float(v[at]) : 0.0f;
            }
            UNROLL for (int j = 0; j < TILES; j++) {
                if (j % SPLIT == part) {
                    attention::load(right, q_tile + (j * 8 + c) * STRIDE + d * 8 + r, STRIDE);
                    simdgroup_multiply_accumulate(p[j], left_k, right, p[j]);
                    attention::load(right, d_tile + (j * 8 + c) * STRIDE + d * 8 + r, STRIDE);
                    simdgroup_multiply_accumulate(ds[j], left_v, right, ds[j]);
                }
            }
        }
        UNROLL for (int j = 0; j < TILES; j++) {
            UNROLL for (int e = 0; e < 2; e++) {
                const int column = j * 8 + c + e, row = row_start + column;
                const bool seen = is_key && row < Tq && attention::sees(offset + row, key, window);
                const float weight = metal::precise::exp2(p[j].thread_elements()[e] * scale2 - lse_tile[column]);
                p[j].thread_elements()[e] = seen ? weight : 0.0f;
                ds[j].thread_elements()[e] = seen ? weight * (ds[j].thread_elements()[e] - delta_tile[column]) : 0.0f;
            }
        }
        if (SPLIT > 1) {
            UNROLL for (int j = 0; j < TILES; j++) {
                if (j % SPLIT == part) {
                    UNROLL for (int e = 0; e < 2; e++) {
                        p_tile[s_at + j * 8 + e] = p[j].thread_elements()[e];
                        ds_tile[s_at + j * 8 + e] = ds[j].thread_elements()[e];
                    }
                }
            }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            UNROLL for (int j = 0; j < TILES; j++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    p[j].thread_elements()[e] = p_tile[s_at + j * 8 + e];
                    ds[j].thread_elements()[e] = ds_tile[s_at + j * 8 + e];
                }
            }
        }
        UNROLL for (int j = 0; j < TILES; j++) {
            UNROLL for (int d = 0; d < OWN; d++) {
                const int at = (j * 8 + r) * STRIDE + (part * OWN + d) * 8 + c;
                attention::load(right, d_tile + at, 1);
                simdgroup_multiply_accumulate(d_values[d], p[j], right, d_values[d]);
                attention::load(right, q_tile + at, 1);
                simdgroup_multiply_accumulate(d_keys[d], ds[j], right, d_keys[d]);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

if (is_key) {
    const size_t at = (size_t(key_head) * (high - low) + key - low) * D + part * OWN * 8 + c;
    UNROLL for (int d = 0; d < OWN; d++) {
        UNROLL for (int e = 0; e < 2; e++) {
            dk[at + d * 8 + e] = scale * d_keys[d].thread_elements()[e];
            dv[at + d * 8 + e] = d_values[d].thread_elements()[e];
        }
    }
}
