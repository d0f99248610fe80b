// Enough of <metal_stdlib> for compute kernels to compile as C++17 (clang >= 15, g++ >= 12) and run on a CPU.
#pragma once
#include "simd.h"

inline half log1p(half x) { return half(std::log1p(float(x))); } // MLX defines float's and bfloat's

// The language's own words, last: nothing of C++'s headers may follow.
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define METAL_FUNC inline
#define UNROLL // kernels' own word for an unrolled loop, which would only take longer to compile here
#define __METAL__ 1
#define __METAL_VERSION__ 310
#define double MSL_has_no_double
#define kernel
#define device
#define constant const
#define thread
#define threadgroup
#define MSL_TG(id, type, name, ...) auto& name = msl::threadgroup_variable<type __VA_ARGS__>(id)
#define MSL_TG_ZERO(name) msl::zero_once(&name, sizeof name)
using namespace metal;
