// Vectors of 16 fp32 lanes: bfloat16 or fp32 in memory, fp32 in registers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernel_args.h"

constexpr int LANES = 16;

// The mask of the first `count` lanes; `count` may be negative or above 16.
inline __mmask16 first_lanes(int count) {
    return count >= LANES ? __mmask16(0xFFFF) : __mmask16((1u << (count > 0 ? count : 0)) - 1);
}

inline __m512 widen(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

inline __m512 load(const bf16* address) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(address))); }

inline __m512 load(const bf16* address, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, address)); }

// Rounds to bfloat16, to nearest and ties to even; NaN stays NaN.
inline __m256i narrow(__m512 x) {
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

inline void store(bf16* address, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), narrow(x));
}

inline void store(bf16* address, __m512 x, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(address, lanes, narrow(x));
}

inline __m512 load(const float* address, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, address); }

inline void store(float* address, __m512 x) { _mm512_storeu_ps(address, x); }

inline void store(float* address, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(address, lanes, x); }

// Rounds to bfloat16 and widens again, where transformers stores an intermediate result in bfloat16.
inline __m512 round_to_bf16(__m512 x) { return widen(narrow(x)); }

// 2^x as 2^n times a polynomial in f, x = n + f and |f| <= 1/2; its relative error of about 1e-6 is far below the
// resolution of bfloat16. NaN stays NaN, because a reward that is not finite must be detected.
inline __m512 exp2(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 fraction = _mm512_sub_ps(x, whole);
    __m512 power = _mm512_set1_ps(1.3333558146428443e-3f);
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(9.618129107628477e-3f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(5.550410866482158e-2f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(2.402265069591007e-1f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(6.931471805599453e-1f));
    power = _mm512_fmadd_ps(power, fraction, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

constexpr float LOG2_E = 1.44269504088896341f;

inline __m512 exp(__m512 x) { return exp2(_mm512_mul_ps(x, _mm512_set1_ps(LOG2_E))); }

// 1 / x for x >= 1 or NaN: an estimate of 14 bits and one Newton step.
inline __m512 reciprocal(__m512 x) {
    const __m512 estimate = _mm512_rcp14_ps(x);
    const __m512 better = _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
    const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    return _mm512_mask_mov_ps(better, _mm512_cmp_ps_mask(x, infinity, _CMP_EQ_OQ), estimate);
}

// 1 / (1 + e^-x).
inline __m512 sigmoid(__m512 x) {
    const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), x);
    return reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), exp(negative)));
}

inline __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid(x)); }

// 2 / (1 + e^-2x) - 1.
inline __m512 tanh(__m512 x) {
    return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), sigmoid(_mm512_add_ps(x, x)), _mm512_set1_ps(1.0f));
}

// GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).
inline __m512 gelu_tanh(__m512 x) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
    const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
    const __m512 tangent = tanh(_mm512_mul_ps(inner, _mm512_set1_ps(0.7978845608028654f)));
    return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), _mm512_add_ps(tangent, _mm512_set1_ps(1.0f)));
}

// The activation of a gate; the same values as in `bindings.py`.
enum Activation { SILU = 0, GELU_TANH = 1 };

template <Activation ACTIVATION>
inline __m512 activate(__m512 x) {
    return ACTIVATION == SILU ? silu(x) : gelu_tanh(x);
}
