// Products on AMX tiles, 32 rows with 32 columns at a time.
#pragma once

#include "panels.h"

// While it lives, this thread's tiles have 16 lines of 64 bytes.
class Unit {
public:
    Unit() {
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
    ~Unit() { _tile_release(); }
    Unit(const Unit&) = delete;
    Unit& operator=(const Unit&) = delete;
};

// All 32 rows of a product are computed, however many are asked for.
constexpr int ROW_STEP = BLOCK;

// Writes [32, 32] into `product`, or adds to what stands there; all 32 rows of `left` are read. Strides are in numbers.
// `meanwhile(step)` is what this core's vector units do while its tile unit multiplies.
template <class Meanwhile>
inline void multiply(
    const bf16* left, std::size_t left_stride, const bf16* panel, int num_steps, int /*num_rows*/, float* product,
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
