// Products of bfloat16 matrices on AMX tiles, 32 rows with 32 columns at a time.
//
// The right-hand matrix is packed into panels of 32 columns. Of a panel, each step of 32 numbers of the inner dimension
// is two tiles of 16 columns, one after the other; a tile has 16 lines of pairs, [line][column][2]. Sums are fp32 and
// run over the inner dimension in its own order, so a row's result does not depend on how many rows there are.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "numbers.h"

constexpr int BLOCK = 32;
constexpr int TILE = 16;
constexpr int STEP_NUMBERS = BLOCK * BLOCK;  // of one panel and one step

// While it lives, this thread's tiles have 16 lines of 64 bytes.
class Tiles {
public:
    Tiles() {
        alignas(64) struct {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes_per_line[16] = {};
            std::uint8_t lines[16] = {};
        } shape;
        for (int tile = 0; tile < 8; ++tile) {
            shape.bytes_per_line[tile] = 64;
            shape.lines[tile] = TILE;
        }
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Writes [32, 32] into `product`, or adds to what stands there; all 32 rows of `left` are read. Strides are in numbers.
// `meanwhile(step)` is what this core's vector units do while its tile unit multiplies.
template <class Meanwhile>
inline void multiply(
    const bf16* left, std::size_t left_stride, const bf16* panel, int num_steps, float* product,
    std::size_t product_stride, bool adds, Meanwhile meanwhile) {
    const std::size_t stride = left_stride * sizeof(bf16), product_bytes = product_stride * sizeof(float);
    if (adds) {
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
        _tile_loadd(4, left + step * BLOCK, stride);
        _tile_loadd(6, panel + step * STEP_NUMBERS, 64);
        _tile_loadd(7, panel + step * STEP_NUMBERS + STEP_NUMBERS / 2, 64);
        _tile_loadd(5, left + TILE * left_stride + step * BLOCK, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        meanwhile(step);
    }
    _tile_stored(0, product, product_bytes);
    _tile_stored(1, product + TILE, product_bytes);
    _tile_stored(2, product + TILE * product_stride, product_bytes);
    _tile_stored(3, product + TILE * product_stride + TILE, product_bytes);
}

inline void multiply(
    const bf16* left, std::size_t left_stride, const bf16* panel, int num_steps, float* product,
    std::size_t product_stride) {
    multiply(left, left_stride, panel, num_steps, product, product_stride, false, [](int) {});
}

// Packs one step of one tile: 16 rows of 32 numbers become 16 lines of 16 pairs. Missing rows are zeros.
inline void pack_tile(const bf16* const rows[TILE], bf16* tile) {
    __m512i lines[TILE];
    for (int row = 0; row < TILE; ++row)
        lines[row] = rows[row] ? _mm512_loadu_si512(rows[row]) : _mm512_setzero_si512();
    // A transposition of 16 by 16 pairs in four rounds of exchanges.
    __m512i mixed[TILE];
    for (int row = 0; row < TILE; row += 2) {
        mixed[row] = _mm512_unpacklo_epi32(lines[row], lines[row + 1]);
        mixed[row + 1] = _mm512_unpackhi_epi32(lines[row], lines[row + 1]);
    }
    for (int row = 0; row < TILE; row += 4) {
        lines[row] = _mm512_unpacklo_epi64(mixed[row], mixed[row + 2]);
        lines[row + 1] = _mm512_unpackhi_epi64(mixed[row], mixed[row + 2]);
        lines[row + 2] = _mm512_unpacklo_epi64(mixed[row + 1], mixed[row + 3]);
        lines[row + 3] = _mm512_unpackhi_epi64(mixed[row + 1], mixed[row + 3]);
    }
    for (int row = 0; row < 4; ++row) {
        mixed[row] = _mm512_shuffle_i32x4(lines[row], lines[row + 4], 0x88);
        mixed[row + 4] = _mm512_shuffle_i32x4(lines[row], lines[row + 4], 0xDD);
        mixed[row + 8] = _mm512_shuffle_i32x4(lines[row + 8], lines[row + 12], 0x88);
        mixed[row + 12] = _mm512_shuffle_i32x4(lines[row + 8], lines[row + 12], 0xDD);
    }
    for (int row = 0; row < 4; ++row) {
        _mm512_storeu_si512(tile + (row)*BLOCK, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0x88));
        _mm512_storeu_si512(tile + (row + 8) * BLOCK, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0xDD));
        _mm512_storeu_si512(tile + (row + 4) * BLOCK, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0x88));
        _mm512_storeu_si512(tile + (row + 12) * BLOCK, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0xDD));
    }
}
