// Vectors of 16 fp32 lanes, on the registers of the target CPU, and the functions of them that all targets share.
#pragma once

#ifdef USE_AVX2
#include "simd_avx2.h"
#else
#include "simd_avx512.h"
#endif

constexpr int LANES = 16;
constexpr float LOG2_E = 1.44269504088896341f;

inline Vector exp(Vector x) { return exp2(mul(x, broadcast(LOG2_E))); }

// 1 / (1 + e^-x).
inline Vector sigmoid(Vector x) { return reciprocal(add(broadcast(1.0f), exp(sub(zeros(), x)))); }

inline Vector silu(Vector x) { return mul(x, sigmoid(x)); }

// 2 / (1 + e^-2x) - 1.
inline Vector tanh(Vector x) { return fmsub(broadcast(2.0f), sigmoid(add(x, x)), broadcast(1.0f)); }

// GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415).
inline Vector gelu_tanh(Vector x) {
    const Vector cube = mul(mul(x, x), x);
    const Vector inner = fmadd(cube, broadcast(0.044715f), x);
    const Vector tangent = tanh(mul(inner, broadcast(0.7978845608028654f)));
    return mul(mul(x, broadcast(0.5f)), add(tangent, broadcast(1.0f)));
}

// The activation of a gate; the same values as in `bindings.py`.
enum Activation { SILU = 0, GELU_TANH = 1 };

template <Activation ACTIVATION>
inline Vector activate(Vector x) {
    return ACTIVATION == SILU ? silu(x) : gelu_tanh(x);
}
