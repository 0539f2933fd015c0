// Products of bfloat16 matrices with packed panels, by the fastest unit of the target CPU.
//
// Sums are fp32 and run over the inner dimension in its order, so the result of a row does not depend on the number of
// rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "scratch_buffer.h"
#ifdef USE_AMX_BF16
#include "gemm_amx.h"
#else
#include "gemm_avx512.h"
#endif

inline void multiply(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride) {
    multiply(left, left_stride, panel, num_steps, num_rows, product, product_stride, false, [](int) {});
}

// Copies elements, converted to the type of the output.
inline void copy_elements(const bf16* elements, std::size_t count, bf16* output) {
    std::memcpy(output, elements, sizeof(bf16) * count);
}

inline void copy_elements(const bf16* elements, std::size_t count, float* output) {
    for (std::size_t index = 0; index < count; index += LANES) {
        const __mmask16 lanes = first_lanes(int(std::min(count - index, std::size_t(LANES))));
        store(output + index, load(elements + index, lanes), lanes);
    }
}

// Returns elements as operands: themselves where they are bfloat16, else converted into the buffer.
template <class Element>
const Element* as_operands(const bf16* elements, std::size_t count, ScratchBuffer& buffer) {
    if constexpr (std::is_same_v<Element, bf16>) return elements;
    auto* output = static_cast<Element*>(buffer.reserve(sizeof(Element) * count));
    copy_elements(elements, count, output);
    return output;
}

// The same for steps of a packed panel.
template <class Element>
const Element* panel_as_operands(const bf16* packed, int num_steps, ScratchBuffer& buffer) {
    if constexpr (std::is_same_v<Element, bf16>) return packed;
    auto* tiles = static_cast<Element*>(buffer.reserve(sizeof(Element) * num_steps * STEP_SIZE));
    for (int row = 0; row < num_steps * BLOCK; ++row)
        store_pairs(tiles, row, _mm512_loadu_si512(packed + row * BLOCK));
    return tiles;
}
