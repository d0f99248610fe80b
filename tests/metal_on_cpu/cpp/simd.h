// Barriers, simd operations, simdgroup matrices and atomics.
#pragma once
#include "functions.h"
#include "threads.h"

namespace msl {
template <class T> struct Lanes { // what every lane of this simdgroup brought, and which lanes took part
  uint32_t mask;
  uint lane, simdgroup;
  bool active(uint l) const { return l < WIDTH && (mask >> l & 1); }
  MSL_NOSAN T operator[](uint l) const { // an inactive lane is undefined on a GPU: NaN bytes here
    T value;
    if (active(l)) copy_bytes(&value, G.brought[simdgroup][l], sizeof(T));
    else fill_bytes(&value, char(0xff), sizeof(T));
    return value;
  }
};
template <class T> MSL_NOSAN inline Lanes<T> exchange(const T& x, const char* op, uint line) {
  static_assert(sizeof(T) <= SLOT, "simd operand too large");
  T copy = x;
  block(SIMD, op, line, &copy, sizeof(T));
  return {G.current->mask, G.current->lane, G.current->simdgroup};
}
} // namespace msl

namespace metal {
#define MSL_LINE uint line = __builtin_LINE()
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

// A barrier with mem_none synchronises threads but orders no memory, which the thread sanitizer then reports.
#ifdef MSL_TSAN
#define MSL_ORDER(object, wait) \
  if (int(flags)) __tsan_release(object); \
  wait; \
  if (int(flags)) __tsan_acquire(object);
#else
#define MSL_ORDER(object, wait) (void)flags, (void)(object), wait;
#endif
MSL_NOSAN inline void threadgroup_barrier(mem_flags flags, MSL_LINE) {
  char* object = msl::G.sync + 32;
  MSL_ORDER(object, msl::block(msl::BARRIER, "threadgroup_barrier", line))
}
MSL_NOSAN inline void simdgroup_barrier(mem_flags flags, MSL_LINE) {
  char *object = msl::G.sync + msl::G.current->simdgroup, nothing = 0;
  MSL_ORDER(object, msl::block(msl::SIMD, "simdgroup_barrier", line, &nothing, 1))
}

#define MSL_REDUCTION(name, expression)                                                              \
  template <class T> inline T name(T x, MSL_LINE) {                                                  \
    auto lanes = msl::exchange(x, #name, line);                                                      \
    T a = x;                                                                                         \
    bool first = true;                                                                               \
    for (uint l = 0; l < msl::WIDTH; l++) {                                                          \
      if (!lanes.active(l)) continue;                                                                \
      T b = lanes[l];                                                                                \
      a = first ? b : static_cast<T>(expression);                                                    \
      first = false;                                                                                 \
    }                                                                                                \
    return a;                                                                                        \
  }
MSL_REDUCTION(simd_sum, a + b)
MSL_REDUCTION(simd_product, a * b)
MSL_REDUCTION(simd_max, max(a, b))
MSL_REDUCTION(simd_min, min(a, b))
MSL_REDUCTION(simd_any, a || b)
MSL_REDUCTION(simd_all, a && b)
#define MSL_SHUFFLE(name, from)                                                                      \
  template <class T> inline T name(T x, ushort n, MSL_LINE) {                                        \
    auto lanes = msl::exchange(x, #name, line);                                                      \
    (void)x;                                                                                         \
    return from;                                                                                     \
  }
MSL_SHUFFLE(simd_broadcast, lanes[n])
MSL_SHUFFLE(simd_shuffle, lanes[n])
MSL_SHUFFLE(simd_shuffle_xor, lanes[lanes.lane ^ n])
MSL_SHUFFLE(simd_shuffle_down, lanes.lane + n < msl::WIDTH ? lanes[lanes.lane + n] : x)
MSL_SHUFFLE(simd_shuffle_up, lanes.lane >= n ? lanes[lanes.lane - n] : x)
// The lanes that a plain shuffle leaves as they were are filled from the other end of `fill`.
template <class T> inline T simd_shuffle_and_fill_up(T x, T fill, ushort n, MSL_LINE) {
  auto fills = msl::exchange(fill, "simd_shuffle_and_fill_up", line);
  T filled = fills[(fills.lane + msl::WIDTH - n) % msl::WIDTH], shifted = simd_shuffle_up(x, n, line);
  return fills.lane >= n ? shifted : filled;
}
template <class T> inline T simd_shuffle_and_fill_down(T x, T fill, ushort n, MSL_LINE) {
  auto fills = msl::exchange(fill, "simd_shuffle_and_fill_down", line);
  T filled = fills[(fills.lane + n) % msl::WIDTH], shifted = simd_shuffle_down(x, n, line);
  return fills.lane + n < msl::WIDTH ? shifted : filled;
}
#define MSL_PREFIX_SUM(name, inclusive)                                                              \
  template <class T> inline T name(T x, MSL_LINE) {                                                  \
    auto lanes = msl::exchange(x, #name, line);                                                      \
    T sum = T(0);                                                                                    \
    for (uint l = 0; l < lanes.lane + inclusive; l++)                                                \
      if (lanes.active(l)) sum = static_cast<T>(sum + lanes[l]);                                     \
    return sum;                                                                                      \
  }
MSL_PREFIX_SUM(simd_prefix_inclusive_sum, 1)
MSL_PREFIX_SUM(simd_prefix_exclusive_sum, 0)
template <class T> inline T simd_broadcast_first(T x, MSL_LINE) {
  auto lanes = msl::exchange(x, "simd_broadcast_first", line);
  return lanes[__builtin_ctz(lanes.mask)];
}
template <class T> inline T quad_sum(T x, MSL_LINE) {
  auto lanes = msl::exchange(x, "quad_sum", line);
  uint first = lanes.lane & ~3u;
  T sum = lanes[first];
  for (uint l = first + 1; l < first + 4; l++) sum = static_cast<T>(sum + lanes[l]);
  return sum;
}

// An 8 x 8 matrix over 32 lanes, two neighbours of a row each; the mapping is Apple's, which MLX's kernels rely on.
template <class T, int Columns = 8, int Rows = 8> struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8 x 8");
  vec<T, 2> elements;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    uint r, c;
    place(msl::G.current->lane, r, c);
    elements = vec<T, 2>(r == c ? diagonal : T(0), r == c + 1 ? diagonal : T(0));
  }
  vec<T, 2>& thread_elements() { return elements; }
  static void place(uint lane, uint& row, uint& column) {
    uint quad = lane / 4;
    row = (quad & 4) + (lane / 2) % 4;
    column = (quad & 2) * 2 + (lane % 2) * 2;
  }
};
using simdgroup_float8x8 = simdgroup_matrix<float>;
using simdgroup_half8x8 = simdgroup_matrix<half>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat>;
template <class T, int Columns = 8, int Rows = 8>
inline simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> m;
  m.elements = vec<T, 2>(value);
  return m;
}
#define MSL_AT(j)                                                                                    \
  p[transpose ? (origin.y + c + j) * per_row + origin.x + r : (origin.y + r) * per_row + origin.x + c + j]
template <class T>
inline void simdgroup_load(simdgroup_matrix<T>& m, const T* p, ulong per_row = 8, ulong2 origin = ulong2(0ul),
                           bool transpose = false) {
  uint r, c;
  m.place(msl::G.current->lane, r, c);
  for (uint j = 0; j < 2; j++) m.elements[j] = MSL_AT(j);
}
template <class T>
inline void simdgroup_store(const simdgroup_matrix<T>& m, T* p, ulong per_row = 8, ulong2 origin = ulong2(0ul),
                            bool transpose = false) {
  uint r, c;
  m.place(msl::G.current->lane, r, c);
  for (uint j = 0; j < 2; j++) MSL_AT(j) = m.elements[j];
}
#undef MSL_AT
// d = a b + c, products and sums in float.
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a,
                                          const simdgroup_matrix<B>& b, const simdgroup_matrix<C>& c, MSL_LINE) {
  struct Pair { vec<A, 2> a; vec<B, 2> b; };
  auto lanes = msl::exchange(Pair{a.elements, b.elements}, "simdgroup_multiply_accumulate", line);
  if (lanes.mask != ~0u) msl::fail("simdgroup_multiply_accumulate at line %u: not all 32 lanes are active", line);
  float row[8], columns[8][2]; // this lane's row of a and its two columns of b
  uint r, q, lane_r, lane_q;
  d.place(lanes.lane, r, q);
  for (uint l = 0; l < msl::WIDTH; l++) {
    d.place(l, lane_r, lane_q);
    if (lane_r != r && lane_q != q) continue;
    Pair pair = lanes[l];
    for (int j = 0; j < 2; j++) {
      if (lane_r == r) row[lane_q + j] = float(pair.a[j]);
      if (lane_q == q) columns[lane_r][j] = float(pair.b[j]);
    }
  }
  for (int j = 0; j < 2; j++) {
    float sum = float(c.elements[j]);
    for (int k = 0; k < 8; k++) sum += row[k] * columns[k][j];
    d.elements[j] = static_cast<D>(sum);
  }
}
template <class D, class A, class B>
inline void simdgroup_multiply(simdgroup_matrix<D>& d, const simdgroup_matrix<A>& a, const simdgroup_matrix<B>& b,
                               MSL_LINE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D>(D(0)), line);
}

// ---------------------------------------------------------------- atomics
enum memory_order { memory_order_relaxed };
template <class T> struct _atomic { T v; };
template <class T> using atomic = _atomic<T>;
using atomic_uint = atomic<uint>;
using atomic_int = atomic<int>;
using atomic_float = atomic<float>;
template <class T> struct not_deduced { using type = T; };
template <class T> using same = typename not_deduced<T>::type;
template <class T> inline T atomic_load_explicit(const volatile _atomic<T>* o, memory_order) {
  T t;
  __atomic_load((T*)&o->v, &t, __ATOMIC_RELAXED);
  return t;
}
template <class T> inline void atomic_store_explicit(volatile _atomic<T>* o, same<T> x, memory_order) {
  __atomic_store((T*)&o->v, &x, __ATOMIC_RELAXED);
}
#define MSL_READ_MODIFY_WRITE(name, expression)                                                      \
  template <class T>                                                                                 \
  inline T atomic_fetch_##name##_explicit(volatile _atomic<T>* o, same<T> b, memory_order) {         \
    T a = atomic_load_explicit(o, memory_order_relaxed), result;                                     \
    do result = static_cast<T>(expression);                                                          \
    while (!__atomic_compare_exchange((T*)&o->v, &a, &result, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return a;                                                                                        \
  }
MSL_READ_MODIFY_WRITE(add, a + b)
MSL_READ_MODIFY_WRITE(max, a < b ? b : a)
MSL_READ_MODIFY_WRITE(min, b < a ? b : a)
} // namespace metal
