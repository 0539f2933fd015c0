// Root mean square norms (Zhang and Sennrich, arXiv 1910.07467), as transformers' families round them.
#pragma once

#include <cmath>

#include "numbers.h"

// Where the families round and what they multiply with; the same numbers as in `library.py`.
enum Norm { ROUNDED_FIRST = 0, ONE_PLUS_WEIGHT = 1, ROUNDED_LAST = 2 };

struct RmsNorm {
    const bf16* weight;
    float epsilon;
    int kind;
};

// Writes one row of `width` numbers over their root mean square, times the weight; rounded last where the output is.
template <class Number>
inline void normalize(const bf16* states, int width, const RmsNorm& norm, Number* output) {
    __m512 squares = _mm512_setzero_ps();
    for (int place = 0; place < width; place += LANES) {
        const __m512 numbers = load(states + place, first_lanes(width - place));
        squares = _mm512_fmadd_ps(numbers, numbers, squares);
    }
    const float mean = _mm512_reduce_add_ps(squares) / float(width);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(mean + norm.epsilon));
    for (int place = 0; place < width; place += LANES) {
        const __mmask16 lanes = first_lanes(width - place);
        __m512 numbers = _mm512_mul_ps(load(states + place, lanes), scale);
        __m512 factors = load(norm.weight + place, lanes);
        if (norm.kind == ROUNDED_FIRST) numbers = rounded(numbers);
        if (norm.kind == ONE_PLUS_WEIGHT) factors = _mm512_add_ps(factors, _mm512_set1_ps(1.0f));
        store(output + place, _mm512_mul_ps(numbers, factors), lanes);
    }
}
