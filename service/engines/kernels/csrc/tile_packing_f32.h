// Packing of fp32 matrices into tiles.
#pragma once

#include "scratch_buffer.h"
#ifdef USE_AVX2
#include "transpose_avx2.h"
#else
#include "transpose_avx512.h"
#endif

// Packs the same columns of two consecutive rows of a matrix. A null row and lanes left out are zeros.
inline void pack_row_pair(const float* even, const float* odd, Lanes lanes, int pair, float* tile) {
    store(tile + 2 * pair * TILE, even ? load(even, lanes) : zeros());
    store(tile + (2 * pair + 1) * TILE, odd ? load(odd, lanes) : zeros());
}

// Packs one step of one tile: 16 columns of 32 inner elements each become 32 rows. A null column is zeros.
inline void pack_tile(const float* const columns[TILE], float* tile) {
    for (int element = 0; element < BLOCK; element += TILE) transpose_16(columns, element, tile + element * TILE);
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
