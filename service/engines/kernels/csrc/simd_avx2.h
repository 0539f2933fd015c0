// 16 fp32 lanes in two AVX2 registers.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernel_args.h"

struct Vector {
    __m256 low, high;
};

// The lanes from `begin` up to `end`; both may be negative or above 16.
struct Lanes {
    int begin, end;

    bool all() const { return begin <= 0 && end >= 16; }
    __m256i low() const { return mask(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
    __m256i high() const { return mask(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)); }

private:
    __m256i mask(__m256i lanes) const {
        return _mm256_andnot_si256(
            _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lanes), _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes));
    }
};

// The first `count` lanes; `count` may be negative or above 16.
inline Lanes first_lanes(int count) { return {0, count}; }

inline Lanes lanes_between(int begin, int end) { return {begin, end}; }

inline Vector zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

inline Vector broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

inline Vector add(Vector x, Vector y) { return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)}; }

inline Vector sub(Vector x, Vector y) { return {_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)}; }

inline Vector mul(Vector x, Vector y) { return {_mm256_mul_ps(x.low, y.low), _mm256_mul_ps(x.high, y.high)}; }

// x * y + z.
inline Vector fmadd(Vector x, Vector y, Vector z) {
    return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}

// x * y - z.
inline Vector fmsub(Vector x, Vector y, Vector z) {
    return {_mm256_fmsub_ps(x.low, y.low, z.low), _mm256_fmsub_ps(x.high, y.high, z.high)};
}

// z - x * y.
inline Vector fnmadd(Vector x, Vector y, Vector z) {
    return {_mm256_fnmadd_ps(x.low, y.low, z.low), _mm256_fnmadd_ps(x.high, y.high, z.high)};
}

inline float sum_of(Vector x) {
    const __m256 sums = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline float largest_of(Vector x) {
    const __m256 larger = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(larger), _mm256_extractf128_ps(larger, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// The larger elements in some lanes, x in the others.
inline Vector max_in(Lanes lanes, Vector x, Vector y) {
    const Vector larger = {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)};
    if (lanes.all()) return larger;
    return {
        _mm256_blendv_ps(x.low, larger.low, _mm256_castsi256_ps(lanes.low())),
        _mm256_blendv_ps(x.high, larger.high, _mm256_castsi256_ps(lanes.high()))};
}

// x in some lanes, 0 in the others.
inline Vector select(Lanes lanes, Vector x) {
    if (lanes.all()) return x;
    return {
        _mm256_and_ps(x.low, _mm256_castsi256_ps(lanes.low())),
        _mm256_and_ps(x.high, _mm256_castsi256_ps(lanes.high()))};
}

inline Vector load(const float* address) { return {_mm256_loadu_ps(address), _mm256_loadu_ps(address + 8)}; }

inline Vector load(const float* address, Lanes lanes) {
    if (lanes.all()) return load(address);
    return {_mm256_maskload_ps(address, lanes.low()), _mm256_maskload_ps(address + 8, lanes.high())};
}

inline void store(float* address, Vector x) {
    _mm256_storeu_ps(address, x.low);
    _mm256_storeu_ps(address + 8, x.high);
}

// A store of some lanes is slow on AMD CPUs before Zen 4.
inline void store(float* address, Vector x, Lanes lanes) {
    if (lanes.all()) return store(address, x);
    _mm256_maskstore_ps(address, lanes.low(), x.low);
    _mm256_maskstore_ps(address + 8, lanes.high(), x.high);
}

inline __m256 widen(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }

inline Vector load(const bf16* address) {
    const auto* bits = reinterpret_cast<const __m128i*>(address);
    return {widen(_mm_loadu_si128(bits)), widen(_mm_loadu_si128(bits + 1))};
}

// States are fp32: there is nothing to round.
inline Vector round_to_state(Vector x) { return x; }

// 2^x as 2^n times a polynomial in f, x = n + f and |f| <= 1/2, with a relative error of about 1e-7. NaN stays NaN,
// because a reward that is not finite must be detected: the larger or smaller of a limit and NaN is NaN.
inline __m256 exp2(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(129.0f), _mm256_max_ps(_mm256_set1_ps(-151.0f), x));
    const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256 fraction = _mm256_sub_ps(x, whole);
    __m256 power = _mm256_set1_ps(1.540353039338161e-4f);
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(1.3333558146428443e-3f));
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(9.618129107628477e-3f));
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(5.550410866482158e-2f));
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(2.402265069591007e-1f));
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(6.931471805599453e-1f));
    power = _mm256_fmadd_ps(power, fraction, _mm256_set1_ps(1.0f));
    // 2^n as the product of two factors, because n may be beyond the exponents of one.
    const __m256i exponent = _mm256_cvtps_epi32(whole), half = _mm256_srai_epi32(exponent, 1);
    auto power_of_two = [](__m256i n) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    };
    return _mm256_mul_ps(_mm256_mul_ps(power, power_of_two(half)), power_of_two(_mm256_sub_epi32(exponent, half)));
}

inline Vector exp2(Vector x) { return {exp2(x.low), exp2(x.high)}; }

inline Vector reciprocal(Vector x) {
    const __m256 one = _mm256_set1_ps(1.0f);
    return {_mm256_div_ps(one, x.low), _mm256_div_ps(one, x.high)};
}
