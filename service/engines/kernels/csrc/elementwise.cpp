// Norms, gates and rotary positions: one reading and one writing where transformers' operations take three to ten.

#include "norms.h"

namespace {

// Rotates the first numbers of one head in place: pairs are half of them apart.
void rotate_head(bf16* head, const bf16* cosines, const bf16* sines, int half) {
    for (int place = 0; place < half; place += LANES) {
        const __mmask16 lanes = first_lanes(half - place);
        const __m512 first = load(head + place, lanes), second = load(head + half + place, lanes);
        const __m512 turned = _mm512_fnmadd_ps(
            second, load(sines + place, lanes), _mm512_mul_ps(first, load(cosines + place, lanes)));
        const __m512 other = _mm512_fmadd_ps(
            first, load(sines + half + place, lanes), _mm512_mul_ps(second, load(cosines + half + place, lanes)));
        store(head + place, turned, lanes);
        store(head + half + place, other, lanes);
    }
}

template <Activation ACTIVATION>
void open_numbers(bf16* gate, const bf16* up, std::int64_t place, __mmask16 lanes) {
    const __m512 opened = activated<ACTIVATION>(load(gate + place, lanes));
    store(gate + place, _mm512_mul_ps(opened, load(up + place, lanes)), lanes);
}

}  // namespace

extern "C" {

// Root mean square norm of states [rows, width] with weight [width].
void rms_norm(
    const bf16* states, std::int64_t num_rows, int width, const bf16* weight, float epsilon, int kind, bf16* output,
    int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (std::int64_t row = 0; row < num_rows; ++row)
        normalize(states + row * width, width, {weight, epsilon, kind}, output + row * width);
}

// Writes act(gate) * up over the gate, number by number.
void open_gate(bf16* gate, const bf16* up, std::int64_t num_numbers, int activation, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (std::int64_t place = 0; place < num_numbers; place += LANES) {
        const __mmask16 lanes = num_numbers - place < LANES ? first_lanes(int(num_numbers - place)) : 0xFFFF;
        if (activation == SILU)
            open_numbers<SILU>(gate, up, place, lanes);
        else
            open_numbers<GELU_TANH>(gate, up, place, lanes);
    }
}

// Rotates, in place, the first `rotated` numbers of the heads of `states`; cosines and sines are [tokens, rotated].
void rotate(
    bf16* states, std::int64_t token_stride, std::int64_t head_stride, int num_tokens, int num_heads,
    const bf16* cosines, const bf16* sines, int rotated, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static)
    for (int token = 0; token < num_tokens; ++token) {
        const std::int64_t angle = std::int64_t(token) * rotated;
        for (int head = 0; head < num_heads; ++head)
            rotate_head(
                states + token * token_stride + head * head_stride, cosines + angle, sines + angle, rotated / 2);
    }
}

}
