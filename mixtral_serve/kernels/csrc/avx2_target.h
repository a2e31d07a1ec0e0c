// The rest of a translation unit that includes this is compiled for AVX2 and FMA; it ends with clang's `attribute pop`.
// Standard headers come before it, so that no function of theirs is compiled so.
#pragma once

#if !defined(__clang__)
#pragma GCC target("avx2,fma,f16c")
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#include <immintrin.h>

#define MIXTRAL_UNROLL _Pragma("GCC unroll 8")
