// Root mean square norms (Zhang and Sennrich, arXiv 1910.07467), as transformers' model families round them.
#pragma once

#include <cmath>

#include "kernel_args.h"
#include "simd.h"

// Where a norm rounds to the type of states and what it multiplies by; the same values as in `bindings.py`.
enum NormKind { ROUND_BEFORE_WEIGHT = 0, ONE_PLUS_WEIGHT = 1, ROUND_AFTER_WEIGHT = 2 };

// Writes the norm of one row of `width` elements, LANES of them at each `output(column)`; the result is rounded to the
// type of the output.
template <class Output>
inline void normalize(const state* states, int width, NormParams norm, Output output) {
    Vector squares = zeros();
    for (int column = 0; column < width; column += LANES) {
        const Vector elements = load(states + column, first_lanes(width - column));
        squares = fmadd(elements, elements, squares);
    }
    const float mean = sum_of(squares) / float(width);
    const Vector scale = broadcast(1.0f / std::sqrt(mean + norm.epsilon));
    for (int column = 0; column < width; column += LANES) {
        const Lanes lanes = first_lanes(width - column);
        Vector elements = mul(load(states + column, lanes), scale);
        Vector factors = load(norm.weight + column, lanes);
        if (norm.kind == ROUND_BEFORE_WEIGHT) elements = round_to_state(elements);
        if (norm.kind == ONE_PLUS_WEIGHT) factors = add(factors, broadcast(1.0f));
        store(output(column), mul(elements, factors), lanes);
    }
}
