// Scalars, vectors, limits and type traits of MSL. `half` is the compiler's _Float16; `bfloat` is made here.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef _Float16 half;

// As in MSL, integers become a bfloat implicitly, float and half only explicitly.
struct bfloat {
  uint16_t bits;
  struct raw {};
  template <class I>
  using if_int = std::enable_if_t<std::is_integral<I>::value>;

  bfloat() = default;
  constexpr bfloat(uint16_t b, raw) : bits(b) {}
  static constexpr bfloat from_bits(uint16_t b) { return bfloat(b, raw{}); }
  static constexpr uint16_t round(float f) { // to nearest, ties to even; a NaN stays one
    uint32_t u = __builtin_bit_cast(uint32_t, f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);
    return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  }
  template <class I, class = if_int<I>>
  constexpr bfloat(I i) : bits(round(float(i))) {}
  explicit constexpr bfloat(float f) : bits(round(f)) {}
  explicit constexpr bfloat(double f) : bits(round(float(f))) {}
  explicit constexpr bfloat(half f) : bits(round(float(f))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
  constexpr bfloat operator-() const { return from_bits(bits ^ 0x8000); }
#define MSL_BF_OP(op)                                                                                \
  friend constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); }   \
  template <class I, class = if_int<I>>                                                              \
  friend constexpr bfloat operator op(bfloat a, I b) { return bfloat(float(a) op float(b)); }        \
  template <class I, class = if_int<I>>                                                              \
  friend constexpr bfloat operator op(I a, bfloat b) { return bfloat(float(a) op float(b)); }        \
  template <class U>                                                                                 \
  constexpr bfloat& operator op##=(U b) { return *this = bfloat(float(*this) op float(b)); }
  MSL_BF_OP(+) MSL_BF_OP(-) MSL_BF_OP(*) MSL_BF_OP(/)
#undef MSL_BF_OP
};
constexpr half operator""h(long double v) { return half(v); }
constexpr bfloat operator""bf(long double v) { return bfloat(float(v)); }

namespace metal {
using ::bfloat;
using ::half;
using std::bool_constant;
using std::conditional_t;
using std::declval;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed_v;
using std::is_unsigned_v;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;
template <class... B> struct _disjunction : std::disjunction<B...> {};
template <class T> using remove_addrspace_t = std::remove_cv_t<T>;
template <class T> struct is_floating_point : std::is_floating_point<T> {};
template <> struct is_floating_point<half> : true_type {};
template <> struct is_floating_point<bfloat> : true_type {};
template <class T> constexpr bool is_floating_point_v = is_floating_point<std::remove_cv_t<T>>::value;
template <class T> constexpr bool is_arithmetic_v = is_floating_point_v<T> || std::is_integral_v<T>;

template <class T> struct numeric_limits : std::numeric_limits<T> {};
#define MSL_LIMITS(T, MAKE, MAX, MIN, INF, NOT_A_NUMBER, EPSILON)                                    \
  template <> struct numeric_limits<T> {                                                             \
    static constexpr bool is_specialized = true, is_signed = true, is_integer = false;               \
    static constexpr T max() { return MAKE(MAX); }                                                   \
    static constexpr T lowest() { return MAKE(MAX | 0x8000); }                                       \
    static constexpr T min() { return MAKE(MIN); }                                                   \
    static constexpr T infinity() { return MAKE(INF); }                                              \
    static constexpr T quiet_NaN() { return MAKE(NOT_A_NUMBER); }                                    \
    static constexpr T epsilon() { return MAKE(EPSILON); }                                           \
  };
constexpr half half_bits(uint16_t b) { return __builtin_bit_cast(half, b); }
MSL_LIMITS(half, half_bits, 0x7bff, 0x0400, 0x7c00, 0x7e00, 0x1400)
MSL_LIMITS(bfloat, bfloat::from_bits, 0x7f7f, 0x0080, 0x7f80, 0x7fc0, 0x3c00)

// Vectors of 2 to 4, aligned as on the GPU (a vec<T, 3> takes the room of four). No swizzles but single components.
template <class T, int N> struct vec;
#define MSL_OP(op)                                                                                   \
  friend constexpr vec operator op(vec a, const vec& b) {                                            \
    for (int i = 0; i < size; i++) a[i] = static_cast<T>(a[i] op b[i]);                              \
    return a;                                                                                        \
  }                                                                                                  \
  constexpr vec& operator op##=(const vec& b) { return *this = *this op b; }
#define MSL_INT_OP(op)                                                                               \
  template <class U = T>                                                                             \
  friend constexpr enable_if_t<is_integral_v<U>, vec> operator op(vec a, const vec& b) {             \
    for (int i = 0; i < size; i++) a[i] = static_cast<T>(a[i] op b[i]);                              \
    return a;                                                                                        \
  }
#define MSL_COMPARE(op)                                                                              \
  friend constexpr auto operator op(const vec& a, const vec& b) {                                    \
    vec<bool, size> r(false);                                                                        \
    for (int i = 0; i < size; i++) r[i] = a[i] op b[i];                                              \
    return r;                                                                                        \
  }
#define MSL_VEC_COMMON(N)                                                                            \
  static constexpr int size = N;                                                                     \
  vec() = default;                                                                                   \
  constexpr T& operator[](int i) { return (&x)[i]; }                                                 \
  constexpr const T& operator[](int i) const { return (&x)[i]; }                                     \
  template <class U, class = enable_if_t<!is_same_v<U, T>>>                                          \
  explicit constexpr vec(const vec<U, N>& o) : vec(T(0)) {                                           \
    for (int i = 0; i < N; i++) (*this)[i] = static_cast<T>(o[i]);                                   \
  }                                                                                                  \
  MSL_OP(+) MSL_OP(-) MSL_OP(*) MSL_OP(/)                                                            \
  MSL_INT_OP(%) MSL_INT_OP(&) MSL_INT_OP(|) MSL_INT_OP(^) MSL_INT_OP(<<) MSL_INT_OP(>>)              \
  MSL_COMPARE(<) MSL_COMPARE(>) MSL_COMPARE(<=) MSL_COMPARE(>=) MSL_COMPARE(==) MSL_COMPARE(!=)      \
  constexpr vec operator-() const {                                                                  \
    vec r(*this);                                                                                    \
    for (int i = 0; i < N; i++) r[i] = static_cast<T>(-r[i]);                                        \
    return r;                                                                                        \
  }
template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  constexpr vec(T a) : x(a), y(a) {}
  constexpr vec(T a, T b) : x(a), y(b) {}
  MSL_VEC_COMMON(2)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  constexpr vec(T a) : x(a), y(a), z(a) {}
  constexpr vec(T a, T b, T c) : x(a), y(b), z(c) {}
  MSL_VEC_COMMON(3)
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  constexpr vec(T a) : x(a), y(a), z(a), w(a) {}
  constexpr vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  constexpr vec(vec<T, 2> a, vec<T, 2> b) : x(a.x), y(a.y), z(b.x), w(b.y) {}
  MSL_VEC_COMMON(4)
};
#define MSL_VECTORS(NAME, T)  \
  typedef vec<T, 2> NAME##2;  \
  typedef vec<T, 3> NAME##3;  \
  typedef vec<T, 4> NAME##4;
MSL_VECTORS(float, float) MSL_VECTORS(half, half) MSL_VECTORS(bfloat, bfloat) MSL_VECTORS(bool, bool)
MSL_VECTORS(int, int) MSL_VECTORS(short, short) MSL_VECTORS(char, int8_t) MSL_VECTORS(long, long)
MSL_VECTORS(uint, uint) MSL_VECTORS(ushort, ushort) MSL_VECTORS(uchar, uint8_t) MSL_VECTORS(ulong, ulong)
} // namespace metal

template <class To, class From>
inline To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
