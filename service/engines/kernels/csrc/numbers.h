// Numbers of sixteen lanes: bfloat16 in and out, fp32 in between.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <limits>

using bf16 = std::uint16_t;

constexpr int LANES = 16;

inline __mmask16 first_lanes(int count) {
    return count >= LANES ? __mmask16(0xFFFF) : __mmask16((1u << (count > 0 ? count : 0)) - 1);
}

inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512 load(const bf16* place) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(place))); }

inline __m512 load(const bf16* place, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, place)); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline __m256i narrow(__m512 numbers) {
#ifdef __AVX512BF16__
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(numbers));
#else
    const __m512i bits = _mm512_castps_si512(numbers);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 nan = _mm512_cmp_ps_mask(numbers, numbers, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7FC00000)), 16));
#endif
}

inline void store(bf16* place, __m512 numbers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), narrow(numbers));
}

inline void store(bf16* place, __m512 numbers, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(place, lanes, narrow(numbers));
}

inline __m512 load(const float* place, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, place); }

inline void store(float* place, __m512 numbers) { _mm512_storeu_ps(place, numbers); }

inline void store(float* place, __m512 numbers, __mmask16 lanes) { _mm512_mask_storeu_ps(place, lanes, numbers); }

// Rounds to bfloat16 and back: where transformers stores a result, so that ours is the same.
inline __m512 rounded(__m512 numbers) { return widen(narrow(numbers)); }

// Two to the power of each number: 2^n times a polynomial for 2^f, |f| <= 1/2, with a relative error of some 1e-6, far
// below what bfloat16 can show. NaN stays NaN, for a reward that is not finite must be found out.
inline __m512 power_of_two(__m512 numbers) {
    const __m512 whole = _mm512_roundscale_ps(numbers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(numbers, whole);
    __m512 power = _mm512_set1_ps(1.3333558146428443e-3f);
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(9.618129107628477e-3f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(5.550410866482158e-2f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(2.402265069591007e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(6.931471805599453e-1f));
    power = _mm512_fmadd_ps(power, part, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(power, whole);
}

constexpr float LOG2_OF_E = 1.44269504088896341f;

inline __m512 exponential(__m512 numbers) { return power_of_two(_mm512_mul_ps(numbers, _mm512_set1_ps(LOG2_OF_E))); }

// One over each number, which is at least one, or NaN: an estimate of 14 bits and a step of Newton's.
inline __m512 reciprocal(__m512 numbers) {
    const __m512 estimate = _mm512_rcp14_ps(numbers);
    const __m512 better = _mm512_mul_ps(estimate, _mm512_fnmadd_ps(numbers, estimate, _mm512_set1_ps(2.0f)));
    const __m512 infinity = _mm512_set1_ps(std::numeric_limits<float>::infinity());
    return _mm512_mask_mov_ps(better, _mm512_cmp_ps_mask(numbers, infinity, _CMP_EQ_OQ), estimate);
}

// 1 / (1 + e^-x).
inline __m512 logistic(__m512 numbers) {
    const __m512 negative = _mm512_sub_ps(_mm512_setzero_ps(), numbers);
    return reciprocal(_mm512_add_ps(_mm512_set1_ps(1.0f), exponential(negative)));
}

inline __m512 silu(__m512 numbers) { return _mm512_mul_ps(numbers, logistic(numbers)); }

// 2 / (1 + e^-2x) - 1.
inline __m512 hyperbolic_tangent(__m512 numbers) {
    return _mm512_fmsub_ps(_mm512_set1_ps(2.0f), logistic(_mm512_add_ps(numbers, numbers)), _mm512_set1_ps(1.0f));
}

// The tangent form of the Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415).
inline __m512 gelu(__m512 numbers) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(numbers, numbers), numbers);
    const __m512 inner = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), numbers);
    const __m512 tangent = hyperbolic_tangent(_mm512_mul_ps(inner, _mm512_set1_ps(0.7978845608028654f)));
    return _mm512_mul_ps(_mm512_mul_ps(numbers, _mm512_set1_ps(0.5f)), _mm512_add_ps(tangent, _mm512_set1_ps(1.0f)));
}

// The activations of gates; the same numbers as in `library.py`.
enum Activation { SILU = 0, GELU_TANH = 1 };

template <Activation ACTIVATION>
inline __m512 activated(__m512 numbers) {
    return ACTIVATION == SILU ? silu(numbers) : gelu(numbers);
}
