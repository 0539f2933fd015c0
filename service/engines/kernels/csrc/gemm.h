// Products of matrices with packed panels, by the fastest unit of the target CPU.
//
// Sums are fp32 and run over the inner dimension in its order, so the result of a row does not depend on the number of
// rows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "scratch_buffer.h"
#if defined(USE_AVX2)
#include "gemm_avx2.h"
#elif defined(USE_AMX_BF16)
#include "gemm_amx.h"
#else
#include "gemm_avx512.h"
#endif

inline void multiply(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride) {
    multiply(left, row_strides(left_stride), panel, num_steps, num_rows, product, product_stride, false, [](int) {});
}

// Copies elements, converted to the type of the output.
template <class Element>
inline void copy_elements(const state* elements, std::size_t count, Element* output) {
    if constexpr (std::is_same_v<Element, state>) {
        std::memcpy(output, elements, sizeof(state) * count);
        return;
    }
    for (std::size_t index = 0; index < count; index += LANES) {
        const Lanes lanes = first_lanes(int(std::min(count - index, std::size_t(LANES))));
        store(output + index, load(elements + index, lanes), lanes);
    }
}

// Returns states as operands: themselves where the type is the same, else converted into the buffer.
template <class Element>
const Element* as_operands(const state* elements, std::size_t count, ScratchBuffer& buffer) {
    if constexpr (std::is_same_v<Element, state>) return elements;
    auto* output = static_cast<Element*>(buffer.reserve(sizeof(Element) * count));
    copy_elements(elements, count, output);
    return output;
}
