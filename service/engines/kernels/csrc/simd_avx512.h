// 16 fp32 lanes in one AVX-512 register.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernel_args.h"

using Vector = __m512;
using Lanes = __mmask16;  // a subset of the lanes

// The first `count` lanes; `count` may be negative or above 16.
inline Lanes first_lanes(int count) {
    return count >= 16 ? Lanes(0xFFFF) : Lanes((1u << (count > 0 ? count : 0)) - 1);
}

// The lanes from `begin` up to `end`; both may be negative or above 16.
inline Lanes lanes_between(int begin, int end) { return Lanes(first_lanes(end) & ~first_lanes(begin)); }

inline Vector zeros() { return _mm512_setzero_ps(); }

inline Vector broadcast(float x) { return _mm512_set1_ps(x); }

inline Vector add(Vector x, Vector y) { return _mm512_add_ps(x, y); }

inline Vector sub(Vector x, Vector y) { return _mm512_sub_ps(x, y); }

inline Vector mul(Vector x, Vector y) { return _mm512_mul_ps(x, y); }

// x * y + z.
inline Vector fmadd(Vector x, Vector y, Vector z) { return _mm512_fmadd_ps(x, y, z); }

// x * y - z.
inline Vector fmsub(Vector x, Vector y, Vector z) { return _mm512_fmsub_ps(x, y, z); }

// z - x * y.
inline Vector fnmadd(Vector x, Vector y, Vector z) { return _mm512_fnmadd_ps(x, y, z); }

inline float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }

inline float largest_of(Vector x) { return _mm512_reduce_max_ps(x); }

// The larger elements in some lanes, x in the others.
inline Vector max_in(Lanes lanes, Vector x, Vector y) { return _mm512_mask_max_ps(x, lanes, x, y); }

// x in some lanes, 0 in the others.
inline Vector select(Lanes lanes, Vector x) { return _mm512_maskz_mov_ps(lanes, x); }

inline Vector widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline Vector load(const bf16* address) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address))); }

inline Vector load(const bf16* address, Lanes lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, address)); }

// Rounds to bfloat16, to nearest and ties to even; NaN stays NaN.
inline __m256i narrow(Vector x) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
#else
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000)), 16));
#endif
}

inline void store(bf16* address, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), narrow(x));
}

inline void store(bf16* address, Vector x, Lanes lanes) {
    _mm256_mask_storeu_epi16(address, lanes, narrow(x));
}

inline Vector load(const float* address) { return _mm512_loadu_ps(address); }

inline Vector load(const float* address, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, address); }

inline void store(float* address, Vector x) { _mm512_storeu_ps(address, x); }

inline void store(float* address, Vector x, Lanes lanes) { _mm512_mask_storeu_ps(address, lanes, x); }

// Rounds to the type of states and widens again, where transformers stores an intermediate result.
#ifdef FLOAT_STATES
inline Vector round_to_state(Vector x) { return x; }
#else
inline Vector round_to_state(Vector x) { return widen(narrow(x)); }
#endif

// 2^x as 2^n times a polynomial in f, x = n + f and |f| <= 1/2. For fp32 states its relative error is about 1e-7; else
// one of 1e-6 is far below the resolution of bfloat16. NaN stays NaN, because a reward that is not finite must be
// detected.
inline Vector exp2(Vector x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 fraction = _mm512_sub_ps(x, whole);
#ifdef FLOAT_STATES
    __m512 power = _mm512_set1_ps(1.540353039338161e-4f);
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.3333558146428443e-3f));
#else
    __m512 power = _mm512_set1_ps(1.3333558146428443e-3f);
#endif
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(9.618129107628477e-3f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(5.550410866482158e-2f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(2.402265069591007e-1f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(6.931471805599453e-1f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

// 1 / x for x >= 1 or NaN: an estimate of 14 bits and one Newton step.
inline Vector reciprocal(Vector x) {
    const __m512 estimate = _mm512_rcp14_ps(x);
    const __m512 better = _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
    const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    return _mm512_mask_mov_ps(better, _mm512_cmp_ps_mask(x, infinity, _CMP_EQ_OQ), estimate);
}
