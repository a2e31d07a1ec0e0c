// The rest of a translation unit that includes this is compiled for AVX-512 with VNNI; it ends with clang's `attribute
// pop`. Standard headers come before it, so that no function of theirs is compiled so.
//
// What is compiled so has passed its property tests on a CPU that has it (ADR 6 says which, and how to see that it is
// still the same code). Whoever changes it runs them on such a CPU again.
#pragma once

#if !defined(__clang__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prfchw")
// GCC's own header reads what it calls undefined, and warns about it wherever it is inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#else
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prfchw"))), apply_to = function)
#endif
#include <immintrin.h>

#define MIXTRAL_UNROLL _Pragma("GCC unroll 16")
