// Products on AMX tiles, 32 rows by 32 columns at a time.
#pragma once

#include "panel_packing.h"

// Configures this thread's tiles with 16 rows of 64 bytes; the destructor releases them.
class AmxTileConfig {
public:
    AmxTileConfig() {
        alignas(64) struct {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes_per_row[16] = {};
            std::uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes_per_row[tile] = 64;
            config.rows[tile] = TILE;
        }
        _tile_loadconfig(&config);
    }
    ~AmxTileConfig() { _tile_release(); }
    AmxTileConfig(const AmxTileConfig&) = delete;
    AmxTileConfig& operator=(const AmxTileConfig&) = delete;
};

using ThreadConfig = AmxTileConfig;

// Rows of a product are computed in multiples of this.
constexpr int ROW_STEP = BLOCK;

// Most rows of a product, and what the rows of a block are a multiple of.
constexpr int TILE_ROWS = BLOCK;
constexpr int BLOCK_ROW_STEP = BLOCK;

// Operands that a kernel writes and then multiplies are stored tile by tile, 16 rows of 32 elements without gaps, since a
// tile whose rows are far apart takes longer to load.
inline std::size_t operand_offset(int row, int column, int width) {
    return std::size_t(row / TILE * (width / BLOCK) + column / BLOCK) * TILE_SIZE + row % TILE * BLOCK + column % BLOCK;
}

inline LeftStrides operand_strides(int width) { return {BLOCK, TILE_SIZE, std::size_t(TILE) * width}; }

// Writes left x panel [32, 32] into `product`, or adds it to the product if `accumulate`; 32 rows of `left` are read.
// Strides are in elements. `interleave(step)` runs on the vector units while the tile unit multiplies.
template <class Interleave>
inline void multiply(
    const bf16* left, LeftStrides strides, const bf16* panel, int num_steps, int /*num_rows*/, float* product,
    std::size_t product_stride, bool accumulate, Interleave interleave) {
    const std::size_t left_bytes = strides.row * sizeof(bf16), product_bytes = product_stride * sizeof(float);
    if (accumulate) {
        _tile_loadd(0, product, product_bytes);
        _tile_loadd(1, product + TILE, product_bytes);
        _tile_loadd(2, product + TILE * product_stride, product_bytes);
        _tile_loadd(3, product + TILE * product_stride + TILE, product_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int step = 0; step < num_steps; ++step) {
        _tile_loadd(4, left + step * strides.step, left_bytes);
        _tile_loadd(6, panel + step * STEP_SIZE, 64);
        _tile_loadd(7, panel + step * STEP_SIZE + TILE_SIZE, 64);
        _tile_loadd(5, left + strides.tile + step * strides.step, left_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        interleave(step);
    }
    _tile_stored(0, product, product_bytes);
    _tile_stored(1, product + TILE, product_bytes);
    _tile_stored(2, product + TILE * product_stride, product_bytes);
    _tile_stored(3, product + TILE * product_stride + TILE, product_bytes);
}
