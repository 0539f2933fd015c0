// Products on AVX-512 vectors, up to 32 rows by 32 columns at a time: of bfloat16 pairs, or of fp32 elements.
#pragma once

#include "panel_packing.h"

// AVX-512 needs no configuration of a thread.
struct ThreadConfig {
    ThreadConfig() {}  // not trivial, so that compilers do not warn of an unused variable
};

constexpr int STRIP = 8;  // rows whose sums stay in registers while a panel is read once

// Rows of a product are computed in multiples of this.
constexpr int ROW_STEP = STRIP;

// Most rows of a product, and what the rows of a block are a multiple of.
constexpr int TILE_ROWS = BLOCK;
constexpr int BLOCK_ROW_STEP = BLOCK;

#ifdef USE_AVX512_BF16
constexpr int VECTORS_PER_STEP = BLOCK / 2;  // of one tile: one for each pair of inner elements

// Adds the products of a pair of elements with 16 columns.
inline __m512 multiply_add(__m512 sum, const bf16* pair, __m512 columns) {
    std::int32_t both;
    std::memcpy(&both, pair, sizeof(both));
    return _mm512_dpbf16_ps(
        sum, reinterpret_cast<__m512bh>(_mm512_set1_epi32(both)), reinterpret_cast<__m512bh>(columns));
}
#else
constexpr int VECTORS_PER_STEP = BLOCK;  // of one tile: one for each inner element

// Adds the products of an element with 16 columns.
inline __m512 multiply_add(__m512 sum, const float* element, __m512 columns) {
    return _mm512_fmadd_ps(_mm512_set1_ps(*element), columns, sum);
}
#endif

constexpr int ELEMENTS_PER_VECTOR = BLOCK / VECTORS_PER_STEP;  // inner elements of one column

// Multiplies eight rows by a panel.
inline void multiply_strip(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, float* product,
    std::size_t product_stride, bool accumulate) {
    __m512 sums[STRIP][2];
#pragma GCC unroll 8
    for (int row = 0; row < STRIP; ++row)
        for (int half = 0; half < 2; ++half)
            sums[row][half] =
                accumulate ? _mm512_loadu_ps(product + row * product_stride + half * TILE) : _mm512_setzero_ps();
    for (int step = 0; step < num_steps; ++step)
        for (int vector = 0; vector < VECTORS_PER_STEP; ++vector) {
            const operand* columns = panel + step * STEP_SIZE + vector * ELEMENTS_PER_VECTOR * TILE;
            const __m512 first = _mm512_load_ps(reinterpret_cast<const float*>(columns));
            const __m512 second = _mm512_load_ps(reinterpret_cast<const float*>(columns + TILE_SIZE));
#pragma GCC unroll 8
            for (int row = 0; row < STRIP; ++row) {
                const operand* elements = left + row * left_stride + step * BLOCK + vector * ELEMENTS_PER_VECTOR;
                sums[row][0] = multiply_add(sums[row][0], elements, first);
                sums[row][1] = multiply_add(sums[row][1], elements, second);
            }
        }
#pragma GCC unroll 8
    for (int row = 0; row < STRIP; ++row)
        for (int half = 0; half < 2; ++half)
            _mm512_storeu_ps(product + row * product_stride + half * TILE, sums[row][half]);
}

// Operands that a kernel writes and then multiplies are stored row by row.
inline std::size_t operand_offset(int row, int column, int width) { return std::size_t(row) * width + column; }

inline LeftStrides operand_strides(int width) { return row_strides(width); }

// Writes left x panel [num_rows rounded up to ROW_STEP, 32] into `product`, or adds it to the product if `accumulate`;
// as many rows of `left` are read. Strides are in elements. `interleave(step)` is called once for each step.
template <class Interleave>
inline void multiply(
    const operand* left, LeftStrides strides, const operand* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride, bool accumulate, Interleave interleave) {
    for (int row = 0; row < num_rows; row += STRIP)
        multiply_strip(
            left + row * strides.row, strides.row, panel, num_steps, product + row * product_stride, product_stride,
            accumulate);
    for (int step = 0; step < num_steps; ++step) interleave(step);
}
