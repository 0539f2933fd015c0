// The memory layout of the right-hand matrix of a product.
//
// The matrix is packed into panels of BLOCK = 32 columns. In a panel, each step of 32 elements of the inner dimension
// is two tiles of TILE = 16 columns, one after the other. A tile has 16 rows of 16 pairs, [pair of inner
// elements][column][2], as AMX and AVX-512 BF16 read them. With fp32 operands the two rows of a pair follow each other,
// [32 rows][column].
#pragma once

#include <immintrin.h>

#include <cstring>

#include "simd.h"

// The type in which products read their operands: bfloat16 where the CPU multiplies it faster than fp32.
#if defined(USE_AMX_BF16) || defined(USE_AVX512_BF16)
using operand = bf16;
#else
using operand = float;
#endif

constexpr int BLOCK = 32;
constexpr int TILE = 16;
constexpr int STEP_SIZE = BLOCK * BLOCK;  // elements of one step of a panel
constexpr int TILE_SIZE = BLOCK * TILE;  // elements of one step of a tile

// Writes one row of pairs of a tile.
inline void store_pairs(bf16* tile, int row, __m512i pairs) { _mm512_storeu_si512(tile + row * BLOCK, pairs); }

inline void store_pairs(float* tile, int row, __m512i pairs) {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)));
    _mm512_storeu_ps(tile + 2 * row * TILE, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    _mm512_storeu_ps(tile + (2 * row + 1) * TILE, _mm512_castsi512_ps(second));
}

// Packs one step of one tile: 16 columns of 32 inner elements each become 16 rows of 16 pairs. A null column is zeros.
template <class Element>
inline void pack_tile(const bf16* const columns[TILE], Element* tile) {
    __m512i pairs[TILE];
    for (int column = 0; column < TILE; ++column)
        pairs[column] = columns[column] ? _mm512_loadu_si512(columns[column]) : _mm512_setzero_si512();
    // Transposes 16 by 16 pairs in four rounds of exchanges.
    __m512i mixed[TILE];
    for (int row = 0; row < TILE; row += 2) {
        mixed[row] = _mm512_unpacklo_epi32(pairs[row], pairs[row + 1]);
        mixed[row + 1] = _mm512_unpackhi_epi32(pairs[row], pairs[row + 1]);
    }
    for (int row = 0; row < TILE; row += 4) {
        pairs[row] = _mm512_unpacklo_epi64(mixed[row], mixed[row + 2]);
        pairs[row + 1] = _mm512_unpackhi_epi64(mixed[row], mixed[row + 2]);
        pairs[row + 2] = _mm512_unpacklo_epi64(mixed[row + 1], mixed[row + 3]);
        pairs[row + 3] = _mm512_unpackhi_epi64(mixed[row + 1], mixed[row + 3]);
    }
    for (int row = 0; row < 4; ++row) {
        mixed[row] = _mm512_shuffle_i32x4(pairs[row], pairs[row + 4], 0x88);
        mixed[row + 4] = _mm512_shuffle_i32x4(pairs[row], pairs[row + 4], 0xDD);
        mixed[row + 8] = _mm512_shuffle_i32x4(pairs[row + 8], pairs[row + 12], 0x88);
        mixed[row + 12] = _mm512_shuffle_i32x4(pairs[row + 8], pairs[row + 12], 0xDD);
    }
    for (int row = 0; row < 4; ++row) {
        store_pairs(tile, row, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0x88));
        store_pairs(tile, row + 8, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0xDD));
        store_pairs(tile, row + 4, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0x88));
        store_pairs(tile, row + 12, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0xDD));
    }
}
