// Transposition of matrices of 32-bit elements on AVX-512.
#pragma once

#include <immintrin.h>

// Transposes 16 by 16 elements in place, in four rounds of exchanges.
inline void transpose_16(__m512i rows[16]) {
    __m512i mixed[16];
    for (int row = 0; row < 16; row += 2) {
        mixed[row] = _mm512_unpacklo_epi32(rows[row], rows[row + 1]);
        mixed[row + 1] = _mm512_unpackhi_epi32(rows[row], rows[row + 1]);
    }
    for (int row = 0; row < 16; row += 4) {
        rows[row] = _mm512_unpacklo_epi64(mixed[row], mixed[row + 2]);
        rows[row + 1] = _mm512_unpackhi_epi64(mixed[row], mixed[row + 2]);
        rows[row + 2] = _mm512_unpacklo_epi64(mixed[row + 1], mixed[row + 3]);
        rows[row + 3] = _mm512_unpackhi_epi64(mixed[row + 1], mixed[row + 3]);
    }
    for (int row = 0; row < 4; ++row) {
        mixed[row] = _mm512_shuffle_i32x4(rows[row], rows[row + 4], 0x88);
        mixed[row + 4] = _mm512_shuffle_i32x4(rows[row], rows[row + 4], 0xDD);
        mixed[row + 8] = _mm512_shuffle_i32x4(rows[row + 8], rows[row + 12], 0x88);
        mixed[row + 12] = _mm512_shuffle_i32x4(rows[row + 8], rows[row + 12], 0xDD);
    }
    for (int row = 0; row < 4; ++row) {
        rows[row] = _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0x88);
        rows[row + 8] = _mm512_shuffle_i32x4(mixed[row], mixed[row + 8], 0xDD);
        rows[row + 4] = _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0x88);
        rows[row + 12] = _mm512_shuffle_i32x4(mixed[row + 4], mixed[row + 12], 0xDD);
    }
}

// Writes 16 elements of each of 16 columns, from element `begin` on, as 16 rows of 16. A null column is zeros.
inline void transpose_16(const float* const columns[16], int begin, float* rows) {
    __m512i block[16];
    for (int column = 0; column < 16; ++column)
        block[column] = columns[column] ? _mm512_loadu_si512(columns[column] + begin) : _mm512_setzero_si512();
    transpose_16(block);
    for (int row = 0; row < 16; ++row) _mm512_storeu_si512(rows + row * 16, block[row]);
}
