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

// Where the left-hand matrix of a product has its elements: distances, in elements, between rows of a tile, between
// steps, and between tiles of TILE rows. Only AMX reads steps that do not follow each other in a row.
struct LeftStrides {
    std::size_t row, step, tile;
};

// The strides of a matrix whose rows are `stride` elements apart.
inline LeftStrides row_strides(std::size_t stride) { return {stride, BLOCK, TILE * stride}; }

#ifdef FLOAT_STATES
#include "tile_packing_f32.h"
#else
#include "tile_packing_bf16.h"
#endif
