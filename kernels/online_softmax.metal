// online_softmax: adds one chunk of logits to a running softmax, between the head's two products.
//
//   m' = max(m, max_c z_c)        shrink = exp(m - m')
//   p_c = exp(z_c - m')           s' = s * shrink + sum_c p_c
//   t' = z_y if the target y is a column of this chunk, else t
//
// Body of an mx.fast.metal_kernel: MLX writes the signature from the names used here.
//
// Inputs       z              [T, C] scalar   logits; scalar is float, half or bfloat
//              maximum        [T]    float    m, -inf before the first chunk
//              total          [T]    float    s
//              target_logit   [T]    float    t
//              targets        [T]    int      y in the vocabulary; negative: no label, t stays
//              first          []     int      vocabulary index of the chunk's column 0
// Outputs      p              [T, C] scalar   input of the second product
//              new_maximum, new_total, new_target_logit, shrink   [T] float
// Template     scalar, THREADS (threads of a threadgroup, a multiple of 32 up to 1,024)
// Grid         (THREADS, T, 1) threads in threadgroups of (THREADS, 1, 1): one threadgroup a row
// Numerics     maximum, exp and sums in float whatever `scalar` is; p is rounded once, s' is not made of rounded p.
//              A row is read twice, and written once: 16 KB of bfloat at C = 8,192, which stays in the GPU's cache.

threadgroup float partial[32];

const uint row = threadgroup_position_in_grid.y;
const uint index = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint group = simdgroup_index_in_threadgroup;
const uint n_groups = THREADS / 32;
const int C = z_shape[1];
const size_t start = size_t(row) * size_t(C);

float highest = maximum[row];
for (int c = index; c < C; c += THREADS) {
    highest = metal::max(highest, float(z[start + c]));
}
highest = metal::simd_max(highest);
if (lane == 0) {
    partial[group] = highest;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
highest = metal::simd_max(lane < n_groups ? partial[lane] : -INFINITY);
threadgroup_barrier(mem_flags::mem_threadgroup);  // partial is used again

float sum = 0.0f;
for (int c = index; c < C; c += THREADS) {
    float weight = metal::precise::exp(float(z[start + c]) - highest);
    p[start + c] = scalar(weight);
    sum += weight;
}
sum = metal::simd_sum(sum);
if (lane == 0) {
    partial[group] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
sum = metal::simd_sum(lane < n_groups ? partial[lane] : 0.0f);

if (index == 0) {
    float factor = metal::precise::exp(maximum[row] - highest);
    int column = targets[row] - first;
    bool here = targets[row] >= 0 && column >= 0 && column < C;
    shrink[row] = factor;
    new_maximum[row] = highest;
    new_total[row] = total[row] * factor + sum;
    new_target_logit[row] = here ? float(z[start + (here ? column : 0)]) : target_logit[row];
}
