// AMX in plain C++, so that the kernels for AMX can be tested on any CPU with AVX-512.
//
// The compiler includes this file before each source (-include); it replaces the compiler's AMX intrinsics. Tiles have
// 16 rows of 64 bytes, as the kernels configure them. Products follow the definition of the instruction, except that
// denormal numbers are not flushed to zero.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
    unsigned char rows[16][64];
};

inline thread_local Tile tiles[8];

inline void load(int tile, const void* base, std::size_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(tiles[tile].rows[row], static_cast<const unsigned char*>(base) + row * stride, 64);
}

inline void store(int tile, void* base, std::size_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<unsigned char*>(base) + row * stride, tiles[tile].rows[row], 64);
}

inline void zero(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }

inline float element_at(const Tile& tile, int row, int column) {
    std::uint16_t half;
    std::memcpy(&half, tile.rows[row] + 2 * column, sizeof(half));
    const std::uint32_t bits = std::uint32_t(half) << 16;
    float element;
    std::memcpy(&element, &bits, sizeof(element));
    return element;
}

inline void multiply(int sums, int left, int right) {
    for (int row = 0; row < 16; ++row) {
        float sum[16];
        std::memcpy(sum, tiles[sums].rows[row], 64);
        for (int pair = 0; pair < 16; ++pair)
            for (int column = 0; column < 16; ++column)
                for (int part = 0; part < 2; ++part)
                    sum[column] += element_at(tiles[left], row, 2 * pair + part) *
                                   element_at(tiles[right], pair, 2 * column + part);
        std::memcpy(tiles[sums].rows[row], sum, 64);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
