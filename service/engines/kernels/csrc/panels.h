// How the right-hand matrix of a product is laid out.
//
// It is packed into panels of 32 columns. Of a panel, each step of 32 numbers of the inner dimension is two tiles of 16
// columns, one after the other; a tile has 16 lines of pairs, [line][column][2]. Where products are made of single
// numbers a pair's two lines follow each other, [32 lines][column].
#pragma once

#include <immintrin.h>

#include <cstring>

#include "numbers.h"

// What products multiply: bfloat16 where the CPU has units for it that are faster than those for fp32.
#if defined(WITH_AMX) || defined(WITH_PAIRS)
using operand = bf16;
#else
using operand = float;
#endif

constexpr int BLOCK = 32;
constexpr int TILE = 16;
constexpr int STEP_NUMBERS = BLOCK * BLOCK;  // of one panel and one step

// Writes one line of pairs of a tile.
inline void put_pairs(bf16* tile, int line, __m512i pairs) { _mm512_storeu_si512(tile + line * BLOCK, pairs); }

inline void put_pairs(float* tile, int line, __m512i pairs) {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)));
    _mm512_storeu_ps(tile + 2 * line * TILE, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    _mm512_storeu_ps(tile + (2 * line + 1) * TILE, _mm512_castsi512_ps(second));
}

// Packs one step of one tile: 16 rows of 32 numbers become 16 lines of 16 pairs. Missing rows are zeros.
template <class Number>
inline void pack_tile(const bf16* const rows[TILE], Number* tile) {
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
        put_pairs(tile, row, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0x88));
        put_pairs(tile, row + 8, _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0xDD));
        put_pairs(tile, row + 4, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0x88));
        put_pairs(tile, row + 12, _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0xDD));
    }
}
