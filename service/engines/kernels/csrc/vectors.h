// Products on AVX-512 vectors, 32 rows with 32 columns at a time: of pairs of bfloat16, or of single fp32 numbers.
#pragma once

#include "panels.h"

// There is nothing to set up for a thread.
class Unit {
public:
    Unit() {}  // not trivial, so that nobody warns of an unused one
};

constexpr int STRIP = 8;  // rows whose sums stay in registers while a panel passes by

// Rows of a product are computed in multiples of this.
constexpr int ROW_STEP = STRIP;

#ifdef WITH_PAIRS
constexpr int LINES_OF_STEP = BLOCK / 2;

inline __m512 added(__m512 sum, const bf16* pair, __m512 line) {
    std::int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    return _mm512_dpbf16_ps(
        sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)), reinterpret_cast<__m512bh>(line));
}
#else
constexpr int LINES_OF_STEP = BLOCK;

inline __m512 added(__m512 sum, const float* number, __m512 line) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*number), line, sum);
}
#endif

constexpr int NUMBERS_OF_LINE = BLOCK / LINES_OF_STEP;  // of one column

// Multiplies eight rows with a panel.
inline void multiply_strip(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, float* product,
    std::size_t product_stride, bool adds) {
    __m512 sums[STRIP][2];
#pragma GCC unroll 8
    for (int row = 0; row < STRIP; ++row)
        for (int half = 0; half < 2; ++half)
            sums[row][half] =
                adds ? _mm512_loadu_ps(product + row * product_stride + half * TILE) : _mm512_setzero_ps();
    for (int step = 0; step < num_steps; ++step)
        for (int line = 0; line < LINES_OF_STEP; ++line) {
            const operand* place = panel + step * STEP_NUMBERS + line * NUMBERS_OF_LINE * TILE;
            const __m512 first = _mm512_load_ps(reinterpret_cast<const float*>(place));
            const __m512 second = _mm512_load_ps(reinterpret_cast<const float*>(place + STEP_NUMBERS / 2));
#pragma GCC unroll 8
            for (int row = 0; row < STRIP; ++row) {
                const operand* number = left + row * left_stride + step * BLOCK + line * NUMBERS_OF_LINE;
                sums[row][0] = added(sums[row][0], number, first);
                sums[row][1] = added(sums[row][1], number, second);
            }
        }
#pragma GCC unroll 8
    for (int row = 0; row < STRIP; ++row)
        for (int half = 0; half < 2; ++half)
            _mm512_storeu_ps(product + row * product_stride + half * TILE, sums[row][half]);
}

// Writes [num_rows, 32], rounded up to whole strips, into `product`, or adds to what stands there; as many rows of
// `left` are read. Strides are in numbers. `meanwhile(step)` is called for each step; here nothing else waits for it.
template <class Meanwhile>
inline void multiply(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride, bool adds, Meanwhile meanwhile) {
    for (int row = 0; row < num_rows; row += STRIP)
        multiply_strip(
            left + row * left_stride, left_stride, panel, num_steps, product + row * product_stride, product_stride,
            adds);
    for (int step = 0; step < num_steps; ++step) meanwhile(step);
}
