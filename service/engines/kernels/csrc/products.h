// Products of bfloat16 matrices with packed panels, by the fastest unit of the CPU that is compiled for.
//
// Sums are fp32 and run over the inner dimension in its own order, so a row's result does not depend on how many rows
// there are.
#pragma once

#include <algorithm>
#include <type_traits>

#include "scratch.h"
#ifdef WITH_AMX
#include "gemm_amx.h"
#else
#include "vectors.h"
#endif

inline void multiply(
    const operand* left, std::size_t left_stride, const operand* panel, int num_steps, int num_rows, float* product,
    std::size_t product_stride) {
    multiply(left, left_stride, panel, num_steps, num_rows, product, product_stride, false, [](int) {});
}

// Copies numbers as products multiply them.
inline void copy_numbers(const bf16* numbers, std::size_t count, bf16* output) {
    std::memcpy(output, numbers, sizeof(bf16) * count);
}

inline void copy_numbers(const bf16* numbers, std::size_t count, float* output) {
    for (std::size_t place = 0; place < count; place += LANES) {
        const __mmask16 lanes = first_lanes(int(std::min(count - place, std::size_t(LANES))));
        store(output + place, load(numbers + place, lanes), lanes);
    }
}

// Numbers as products multiply them: where they stand, or converted into scratch memory.
template <class Number>
const Number* converted(const bf16* numbers, std::size_t count, Scratch& scratch) {
    if constexpr (std::is_same_v<Number, bf16>) return numbers;
    auto* output = static_cast<Number*>(scratch.bytes(sizeof(Number) * count));
    copy_numbers(numbers, count, output);
    return output;
}

// The same of a packed panel's steps.
template <class Number>
const Number* converted_panel(const bf16* packed, int num_steps, Scratch& scratch) {
    if constexpr (std::is_same_v<Number, bf16>) return packed;
    auto* tile = static_cast<Number*>(scratch.bytes(sizeof(Number) * num_steps * STEP_NUMBERS));
    for (int line = 0; line < num_steps * BLOCK; ++line)
        put_pairs(tile, line, _mm512_loadu_si512(packed + line * BLOCK));
    return tile;
}
