// Root mean square norms (Zhang and Sennrich, arXiv 1910.07467), as transformers' model families round them.
#pragma once

#include <cmath>

#include "kernel_args.h"
#include "simd.h"

// Where a norm rounds to bfloat16 and what it multiplies by; the same values as in `bindings.py`.
enum NormKind { ROUND_BEFORE_WEIGHT = 0, ONE_PLUS_WEIGHT = 1, ROUND_AFTER_WEIGHT = 2 };

// Writes the norm of one row of `width` elements; the result is rounded where the output is bfloat16.
template <class Element>
inline void normalize(const bf16* states, int width, NormParams norm, Element* output) {
    __m512 squares = _mm512_setzero_ps();
    for (int column = 0; column < width; column += LANES) {
        const __m512 elements = load(states + column, first_lanes(width - column));
        squares = _mm512_fmadd_ps(elements, elements, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / float(width);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + norm.epsilon));
    for (int column = 0; column < width; column += LANES) {
        const __mmask16 lanes = first_lanes(width - column);
        __m512 elements = _mm512_mul_ps(load(states + column, lanes), scale);
        __m512 factors = load(norm.weight + column, lanes);
        if (norm.kind == ROUND_BEFORE_WEIGHT) elements = round_to_bf16(elements);
        if (norm.kind == ONE_PLUS_WEIGHT) factors = _mm512_add_ps(factors, _mm512_set1_ps(1.0f));
        store(output + column, _mm512_mul_ps(elements, factors), lanes);
    }
}
