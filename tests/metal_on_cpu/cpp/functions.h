// MSL's mathematical functions. Half and bfloat are computed in float and rounded once. fast:: and precise:: are the
// same functions here: the emulator cannot stand for the last bits of a GPU.
#pragma once
#include "types.h"

namespace metal {
template <class T> using if_float = enable_if_t<is_floating_point_v<T>, int>;
template <class T> using if_number = enable_if_t<is_arithmetic_v<T>, int>;
#define MSL_UNARY(name, expression)                                                                  \
  template <class T, if_float<T> = 0>                                                                \
  inline T name(T t) { float x = float(t); return static_cast<T>(expression); }                      \
  template <class T, int N>                                                                          \
  inline vec<T, N> name(vec<T, N> v) { for (int i = 0; i < N; i++) v[i] = name(v[i]); return v; }
#define MSL_BINARY(name, expression)                                                                 \
  template <class T, if_float<T> = 0>                                                                \
  inline T name(T s, T t) { float x = float(s), y = float(t); return static_cast<T>(expression); }
#define MSL_FUNCTIONS                                                                                \
  MSL_UNARY(exp, std::exp(x)) MSL_UNARY(exp2, std::exp2(x))                                          \
  MSL_UNARY(log, std::log(x)) MSL_UNARY(log2, std::log2(x))                                          \
  MSL_UNARY(sqrt, std::sqrt(x)) MSL_UNARY(rsqrt, 1.0f / std::sqrt(x))                                \
  MSL_UNARY(sin, std::sin(x)) MSL_UNARY(cos, std::cos(x)) MSL_UNARY(tanh, std::tanh(x))              \
  MSL_UNARY(floor, std::floor(x)) MSL_UNARY(ceil, std::ceil(x)) MSL_UNARY(trunc, std::trunc(x))      \
  MSL_UNARY(rint, std::nearbyint(x)) MSL_UNARY(round, std::round(x)) MSL_UNARY(fabs, std::fabs(x))   \
  MSL_BINARY(pow, std::pow(x, y)) MSL_BINARY(fmod, std::fmod(x, y)) MSL_BINARY(divide, x / y)        \
  MSL_BINARY(atan2, std::atan2(x, y))                                                                \
  MSL_BINARY(fmin, std::fmin(x, y)) MSL_BINARY(fmax, std::fmax(x, y))                                \
  template <class T, if_number<T> = 0> inline T min(T a, T b) { return b < a ? b : a; }              \
  template <class T, if_number<T> = 0> inline T max(T a, T b) { return a < b ? b : a; }              \
  template <class T, if_number<T> = 0> inline T abs(T a) { return a < T(0) ? T(-a) : a; }            \
  template <class T, if_number<T> = 0> inline T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MSL_FUNCTIONS
namespace fast { MSL_FUNCTIONS }
namespace precise { MSL_FUNCTIONS }

inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline half fma(half a, half b, half c) { return half(std::fma(float(a), float(b), float(c))); }
template <class T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) a[i] = T(fma(a[i], b[i], c[i]));
  return a;
}
template <class T, if_float<T> = 0> inline bool isnan(T x) { return std::isnan(float(x)); }
template <class T, if_float<T> = 0> inline bool isinf(T x) { return std::isinf(float(x)); }
template <class T, if_float<T> = 0> inline bool isfinite(T x) { return std::isfinite(float(x)); }
template <class T> inline T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = T(0);
  for (int i = 0; i < N; i++) sum += a[i] * b[i];
  return sum;
}
template <class T> using uniform = T; // the same in all threads, says the kernel
template <class T> constexpr T make_uniform(T t) { return t; }
inline int popcount(uint x) { return __builtin_popcount(x); }
inline uint mulhi(uint a, uint b) { return uint((uint64_t(a) * b) >> 32); }
} // namespace metal
