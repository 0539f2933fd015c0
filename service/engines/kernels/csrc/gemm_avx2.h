// Products of fp32 on AVX2 vectors, up to 6 rows by 16 columns at a time, whose sums fill twelve of sixteen registers.
#pragma once

#include <algorithm>

#include "panel_packing.h"

// AVX2 needs no configuration of a thread.
struct ThreadConfig {
    ThreadConfig() {}  // not trivial, so that compilers do not warn of an unused variable
};

// Rows of a product are computed in multiples of this.
constexpr int ROW_STEP = 2;

// Most rows of a product, and what the rows of a block are a multiple of: whole strips of six, the fastest.
constexpr int TILE_ROWS = 30;
constexpr int BLOCK_ROW_STEP = 6;

// Steps of a panel that stay in a first-level cache of 32 KiB beside a strip of rows.
constexpr int CACHED_STEPS = 4;

// Multiplies some rows by the 16 columns of a tile in each step of a panel.
template <int ROWS>
inline void multiply_strip(
    const float* left, std::size_t left_stride, const float* tile, int num_steps, float* product,
    std::size_t product_stride, bool accumulate) {
    __m256 sums[ROWS][2];
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            sums[row][half] =
                accumulate ? _mm256_loadu_ps(product + row * product_stride + half * 8) : _mm256_setzero_ps();
    for (int step = 0; step < num_steps; ++step, left += BLOCK, tile += STEP_SIZE)
#pragma GCC unroll 2
        for (int element = 0; element < BLOCK; ++element) {
            const __m256 first = _mm256_loadu_ps(tile + element * TILE);
            const __m256 second = _mm256_loadu_ps(tile + element * TILE + 8);
#pragma GCC unroll 6
            for (int row = 0; row < ROWS; ++row) {
                const __m256 factor = _mm256_broadcast_ss(left + row * left_stride + element);
                sums[row][0] = _mm256_fmadd_ps(factor, first, sums[row][0]);
                sums[row][1] = _mm256_fmadd_ps(factor, second, sums[row][1]);
            }
        }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; ++row)
        for (int half = 0; half < 2; ++half)
            _mm256_storeu_ps(product + row * product_stride + half * 8, sums[row][half]);
}

// The rows of the next strip: six, but two strips of four instead of six and two, whose sums would be too few to keep
// both multipliers busy.
inline int strip_rows(int num_rows) {
    if (num_rows >= 6 && num_rows != 8) return 6;
    return num_rows >= 4 ? 4 : 2;
}

// Operands that a kernel writes and then multiplies are stored row by row.
inline std::size_t operand_offset(int row, int column, int width) { return std::size_t(row) * width + column; }

inline LeftStrides operand_strides(int width) { return row_strides(width); }

// Writes left x panel [num_rows rounded up to ROW_STEP, 32] into `product`, or adds it to the product if `accumulate`;
// as many rows of `left` are read. Strides are in elements. `interleave(step)` is called once for each step.
template <class Interleave>
inline void multiply(
    const float* left, LeftStrides strides, const float* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride, bool accumulate, Interleave interleave) {
    const int end = (num_rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP;
    // Both tiles of some steps for a strip of rows, which is then in the first-level cache for the second tile.
    for (int step = 0; step < num_steps; step += CACHED_STEPS)
        for (int row = 0, count; row < end; row += count) {
            count = strip_rows(end - row);
            const auto strip = count == 6 ? multiply_strip<6> : count == 4 ? multiply_strip<4> : multiply_strip<2>;
            for (int tile = 0; tile < 2; ++tile)
                strip(
                    left + row * strides.row + step * BLOCK, strides.row, panel + step * STEP_SIZE + tile * TILE_SIZE,
                    std::min(CACHED_STEPS, num_steps - step), product + row * product_stride + tile * TILE,
                    product_stride, accumulate || step);
        }
    for (int step = 0; step < num_steps; ++step) interleave(step);
}
