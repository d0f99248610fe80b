// Declarations only: an MSL kernel is type-checked with clang's C++ for OpenCL, which has the same address spaces.
#pragma clang diagnostic ignored "-Wunknown-attributes"
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#define METAL_FUNC inline
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private
#define kernel __kernel
#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long uint64_t;
typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef half float16_t;
typedef float bfloat; // spaces are what is checked here
typedef bfloat bfloat16_t;
#define VECTOR(T, N)                                        \
  typedef T T##N __attribute__((ext_vector_type(N)));       \
  template <class... From> T##N make_##T##N(From...); // a kernel's float4(x) becomes make_float4(x)
#define VECTORS(T) VECTOR(T, 2) VECTOR(T, 3) VECTOR(T, 4)
VECTORS(float) VECTORS(half) VECTORS(int) VECTORS(uint) VECTORS(short) VECTORS(ushort) VECTORS(char) VECTORS(uchar)
VECTORS(long) VECTORS(ulong) VECTORS(bfloat)
template <class To, class From> To as_type(From);

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
#define UNARY(name) template <class T> T name(T);
#define BINARY(name) template <class T> T name(T, T);
#define SHUFFLE(name) template <class T> T name(T, ushort);
UNARY(simd_sum) UNARY(simd_product) UNARY(simd_max) UNARY(simd_min) UNARY(simd_broadcast_first) UNARY(quad_sum)
bool simd_any(bool);
bool simd_all(bool);
SHUFFLE(simd_shuffle) SHUFFLE(simd_shuffle_xor) SHUFFLE(simd_shuffle_down) SHUFFLE(simd_shuffle_up)
SHUFFLE(simd_broadcast)
#define FUNCTIONS                                                                                        \
  UNARY(exp) UNARY(exp2) UNARY(log) UNARY(log2) UNARY(sqrt) UNARY(rsqrt) UNARY(sin) UNARY(cos) UNARY(tanh) \
  UNARY(floor) UNARY(ceil) UNARY(trunc) UNARY(rint) UNARY(round) UNARY(fabs) UNARY(abs)                  \
  BINARY(pow) BINARY(fmod) BINARY(divide) BINARY(fmin) BINARY(fmax) BINARY(min) BINARY(max)              \
  template <class T> T clamp(T, T, T);
FUNCTIONS
namespace fast { FUNCTIONS }
namespace precise { FUNCTIONS }
template <class T> T fma(T, T, T);
template <class T> T select(T, T, bool);
template <class T> bool isnan(T);
template <class T> bool isinf(T);
template <class T> bool isfinite(T);
template <class V> float dot(V, V);

template <class T, int Columns = 8, int Rows = 8> struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread T* thread_elements();
  T elements[2];
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;
template <class T, int Columns = 8, int Rows = 8> simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
#define LOAD_STORE(space)                                                                               \
  template <class T>                                                                                    \
  void simdgroup_load(thread simdgroup_matrix<T>& m, const space T* p, ulong per_row = 8,               \
                      ulong2 origin = make_ulong2(0), bool transpose = false);                          \
  template <class T>                                                                                    \
  void simdgroup_store(simdgroup_matrix<T> m, space T* p, ulong per_row = 8,                            \
                       ulong2 origin = make_ulong2(0), bool transpose = false);
LOAD_STORE(device) LOAD_STORE(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D>& d, thread simdgroup_matrix<A>& a,
                                   thread simdgroup_matrix<B>& b, thread simdgroup_matrix<C>& c);
template <class D, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<D>& d, thread simdgroup_matrix<A>& a, thread simdgroup_matrix<B>& b);

enum memory_order { memory_order_relaxed };
template <class T> struct atomic { T value; };
template <class T> T atomic_load_explicit(const volatile device atomic<T>*, memory_order);
template <class T, class U> void atomic_store_explicit(volatile device atomic<T>*, U, memory_order);
template <class T, class U> T atomic_fetch_add_explicit(volatile device atomic<T>*, U, memory_order);
} // namespace metal
using namespace metal;
