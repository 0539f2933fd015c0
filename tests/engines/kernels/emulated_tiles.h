// AMX in plain C++, so that the kernels for matrix tiles can be tested on any CPU with AVX-512.
//
// It stands in front of a source (-include) and takes the place of the compiler's own intrinsics. Tiles have 16 lines of
// 64 bytes, as the kernels set them up. Multiplying follows the instruction's definition but for how it flushes numbers
// that are too small.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
    unsigned char lines[16][64];
};

inline thread_local Tile tiles[8];

inline void load(int tile, const void* base, std::size_t stride) {
    for (int line = 0; line < 16; ++line)
        std::memcpy(tiles[tile].lines[line], static_cast<const unsigned char*>(base) + line * stride, 64);
}

inline void store(int tile, void* base, std::size_t stride) {
    for (int line = 0; line < 16; ++line)
        std::memcpy(static_cast<unsigned char*>(base) + line * stride, tiles[tile].lines[line], 64);
}

inline void clear(int tile) { std::memset(&tiles[tile], 0, sizeof(Tile)); }

inline float number_at(const Tile& tile, int line, int place) {
    std::uint16_t half;
    std::memcpy(&half, tile.lines[line] + 2 * place, sizeof(half));
    const std::uint32_t bits = std::uint32_t(half) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof(number));
    return number;
}

inline void multiply(int sums, int left, int right) {
    for (int row = 0; row < 16; ++row) {
        float line[16];
        std::memcpy(line, tiles[sums].lines[row], 64);
        for (int pair = 0; pair < 16; ++pair)
            for (int column = 0; column < 16; ++column)
                for (int part = 0; part < 2; ++part)
                    line[column] += number_at(tiles[left], row, 2 * pair + part) *
                                    number_at(tiles[right], pair, 2 * column + part);
        std::memcpy(tiles[sums].lines[row], line, 64);
    }
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) static_cast<void>(shape)
#define _tile_release() static_cast<void>(0)
#define _tile_loadd(tile, base, stride) emulated::load(tile, base, stride)
#define _tile_stored(tile, base, stride) emulated::store(tile, base, stride)
#define _tile_zero(tile) emulated::clear(tile)
#define _tile_dpbf16ps(sums, left, right) emulated::multiply(sums, left, right)
