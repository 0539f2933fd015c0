// Packing of fp32 matrices into tiles on AVX2.
#pragma once

#include "scratch_buffer.h"

// Packs the same columns of two consecutive rows of a matrix. A null row and lanes left out are zeros.
inline void pack_row_pair(const float* even, const float* odd, Lanes lanes, int pair, float* tile) {
    store(tile + 2 * pair * TILE, even ? load(even, lanes) : zeros());
    store(tile + (2 * pair + 1) * TILE, odd ? load(odd, lanes) : zeros());
}

// Transposes 8 by 8 elements: `columns` become the columns of `rows`, which are TILE elements apart.
inline void transpose_block(const __m256 columns[8], float* rows) {
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
        _mm256_storeu_ps(rows + row * TILE, _mm256_permute2f128_ps(quads[row], quads[row + 4], 0x20));
        _mm256_storeu_ps(rows + (row + 4) * TILE, _mm256_permute2f128_ps(quads[row], quads[row + 4], 0x31));
    }
}

// Packs one step of one tile: 16 columns of 32 inner elements each become 32 rows. A null column is zeros.
inline void pack_tile(const float* const columns[TILE], float* tile) {
    for (int first = 0; first < TILE; first += 8)
        for (int element = 0; element < BLOCK; element += 8) {
            __m256 block[8];
            for (int index = 0; index < 8; ++index) {
                const float* column = columns[first + index];
                block[index] = column ? _mm256_loadu_ps(column + element) : _mm256_setzero_ps();
            }
            transpose_block(block, tile + element * TILE + first);
        }
}

// Bytes of one packed weight.
inline std::size_t weight_bytes(PanelFormat format) { return format == AS_BF16 ? sizeof(bf16) : sizeof(float); }

// Packs one step of one tile of a weight.
inline void pack_weights(const float* const columns[TILE], PanelFormat format, std::uint8_t* tile) {
    if (format == NATIVE) return pack_tile(columns, reinterpret_cast<float*>(tile));
    float elements[TILE_SIZE];
    pack_tile(columns, elements);
    for (int index = 0; index < TILE_SIZE; ++index) {
        std::uint32_t bits;
        std::memcpy(&bits, elements + index, sizeof(bits));
        reinterpret_cast<bf16*>(tile)[index] = bf16(bits >> 16);
    }
}

// Returns steps of a packed weight as operands: themselves where they are fp32, else widened into the buffer.
inline const float* panel_operands(
    const std::uint8_t* packed, PanelFormat format, int num_steps, ScratchBuffer& buffer) {
    if (format == NATIVE) return reinterpret_cast<const float*>(packed);
    const auto* narrow = reinterpret_cast<const bf16*>(packed);
    auto* tiles = static_cast<float*>(buffer.reserve(sizeof(float) * num_steps * STEP_SIZE));
    for (int index = 0; index < num_steps * STEP_SIZE; index += LANES) store(tiles + index, load(narrow + index));
    return tiles;
}
