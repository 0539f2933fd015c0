// Transposition of fp32 matrices on AVX2.
#pragma once

#include <immintrin.h>

// Transposes 8 by 8 elements: `columns` become the columns of `rows`, which are `stride` elements apart.
inline void transpose_block(const __m256 columns[8], float* rows, int stride) {
    __m256 pairs[8], quads[8];
    for (int index = 0; index < 8; index += 2) {
        pairs[index] = _mm256_unpacklo_ps(columns[index], columns[index + 1]);
        pairs[index + 1] = _mm256_unpackhi_ps(columns[index], columns[index + 1]);
    }
    for (int index = 0; index < 8; index += 4)
        for (int part = 0; part < 2; ++part) {
            quads[index + 2 * part] = _mm256_shuffle_ps(pairs[index + part], pairs[index + part + 2], 0x44);
            quads[index + 2 * part + 1] = _mm256_shuffle_ps(pairs[index + part], pairs[index + part + 2], 0xEE);
        }
    for (int row = 0; row < 4; ++row) {
        _mm256_storeu_ps(rows + row * stride, _mm256_permute2f128_ps(quads[row], quads[row + 4], 0x20));
        _mm256_storeu_ps(rows + (row + 4) * stride, _mm256_permute2f128_ps(quads[row], quads[row + 4], 0x31));
    }
}

// Writes 16 elements of each of 16 columns, from element `begin` on, as 16 rows of 16. A null column is zeros.
inline void transpose_16(const float* const columns[16], int begin, float* rows) {
    for (int first = 0; first < 16; first += 8)
        for (int element = 0; element < 16; element += 8) {
            __m256 block[8];
            for (int index = 0; index < 8; ++index) {
                const float* column = columns[first + index];
                block[index] = column ? _mm256_loadu_ps(column + begin + element) : _mm256_setzero_ps();
            }
            transpose_block(block, rows + element * 16 + first, 16);
        }
}
