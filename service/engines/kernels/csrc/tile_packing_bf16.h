// Packing of bfloat16 matrices into tiles on AVX-512: as pairs, or as fp32 in the rows of pairs.
#pragma once

#include <type_traits>

#include "scratch_buffer.h"
#include "transpose_avx512.h"

// Writes one row of pairs of a tile.
inline void store_pairs(bf16* tile, int row, __m512i pairs) { _mm512_storeu_si512(tile + row * BLOCK, pairs); }

inline void store_pairs(float* tile, int row, __m512i pairs) {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000)));
    _mm512_storeu_ps(tile + 2 * row * TILE, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
    _mm512_storeu_ps(tile + (2 * row + 1) * TILE, _mm512_castsi512_ps(second));
}

// Packs the same columns of two consecutive rows of a matrix as one row of pairs. A null row and lanes left out are zeros.
template <class Element>
inline void pack_row_pair(const bf16* even, const bf16* odd, Lanes lanes, int pair, Element* tile) {
    auto load_bits = [&](const bf16* row) {
        return _mm512_cvtepu16_epi32(row ? _mm256_maskz_loadu_epi16(lanes, row) : _mm256_setzero_si256());
    };
    store_pairs(tile, pair, _mm512_or_si512(load_bits(even), _mm512_slli_epi32(load_bits(odd), 16)));
}

// Packs one step of one tile: 16 columns of 32 inner elements each become 16 rows of 16 pairs. A null column is zeros.
template <class Element>
inline void pack_tile(const bf16* const columns[TILE], Element* tile) {
    __m512i pairs[TILE];
    for (int column = 0; column < TILE; ++column)
        pairs[column] = columns[column] ? _mm512_loadu_si512(columns[column]) : _mm512_setzero_si512();
    transpose_16(pairs);
    for (int row = 0; row < TILE; ++row) store_pairs(tile, row, pairs[row]);
}

// Bytes of one packed weight. There is one format: as in the states.
inline std::size_t weight_bytes(PanelFormat /*format*/) { return sizeof(bf16); }

// Packs one step of one tile of a weight.
inline void pack_weights(const bf16* const columns[TILE], PanelFormat /*format*/, std::uint8_t* tile) {
    pack_tile(columns, reinterpret_cast<bf16*>(tile));
}

// Returns steps of a packed weight as operands: themselves where they are bfloat16, else widened into the buffer.
inline const operand* panel_operands(
    const std::uint8_t* packed, PanelFormat /*format*/, int num_steps, ScratchBuffer& buffer) {
    if constexpr (std::is_same_v<operand, bf16>) return reinterpret_cast<const operand*>(packed);
    const auto* pairs = reinterpret_cast<const bf16*>(packed);
    auto* tiles = static_cast<operand*>(buffer.reserve(sizeof(operand) * num_steps * STEP_SIZE));
    for (int row = 0; row < num_steps * BLOCK; ++row)
        store_pairs(tiles, row, _mm512_loadu_si512(pairs + row * BLOCK));
    return tiles;
}
