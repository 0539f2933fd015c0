// Norms, gates and rotary position embeddings: one read and one write where transformers' operations take three to ten.

#include "kernel_args.h"
#include "rms_norm.h"

namespace {

// Rotates the first `2 * half` elements of one head in place; the elements of a pair are `half` apart.
void rotate_head(bf16* head, const bf16* cosines, const bf16* sines, int half) {
    for (int index = 0; index < half; index += LANES) {
        const __mmask16 lanes = first_lanes(half - index);
        const __m512 first = load(head + index, lanes), second = load(head + half + index, lanes);
        const __m512 first_rotated = _mm512_fnmadd_ps(
            second, load(sines + index, lanes), _mm512_mul_ps(first, load(cosines + index, lanes)));
        const __m512 second_rotated = _mm512_fmadd_ps(
            first, load(sines + half + index, lanes), _mm512_mul_ps(second, load(cosines + half + index, lanes)));
        store(head + index, first_rotated, lanes);
        store(head + half + index, second_rotated, lanes);
    }
}

template <Activation ACTIVATION>
void act_and_mul_lanes(bf16* gate, const bf16* up, __mmask16 lanes) {
    store(gate, _mm512_mul_ps(activate<ACTIVATION>(load(gate, lanes)), load(up, lanes)), lanes);
}

}  // namespace

extern "C" {

// Root mean square norm of each row of the states.
void rms_norm(const RmsNormArgs* args) {
    const std::int64_t width = args->width;
#pragma omp parallel for num_threads(args->num_threads) schedule(static)
    for (std::int64_t row = 0; row < args->num_rows; ++row)
        normalize(args->states + row * width, int(width), args->norm, args->output + row * width);
}

// Writes act(gate) * up over the gate, element by element.
void act_and_mul(const ActAndMulArgs* args) {
    bf16* const gate = args->gate;
    const bf16* const up = args->up;
    const std::int64_t num_elements = args->num_elements;
    const bool is_silu = args->activation == SILU;
#pragma omp parallel for num_threads(args->num_threads) schedule(static)
    for (std::int64_t index = 0; index < num_elements; index += LANES) {
        const std::int64_t left = num_elements - index;
        const __mmask16 lanes = left < LANES ? first_lanes(int(left)) : 0xFFFF;
        if (is_silu)
            act_and_mul_lanes<SILU>(gate + index, up + index, lanes);
        else
            act_and_mul_lanes<GELU_TANH>(gate + index, up + index, lanes);
    }
}

// Rotates, in place, the first `rotary_size` elements of each head (RoFormer, arXiv 2104.09864).
void apply_rope(const ApplyRopeArgs* args) {
    const int rotary_size = args->rotary_size;
#pragma omp parallel for num_threads(args->num_threads) schedule(static)
    for (int token = 0; token < args->num_tokens; ++token) {
        const std::int64_t angle = std::int64_t(token) * rotary_size;
        bf16* const heads = args->states + token * args->token_stride;
        for (int head = 0; head < args->num_heads; ++head)
            rotate_head(
                heads + head * args->head_stride, args->cosines + angle, args->sines + angle, rotary_size / 2);
    }
}

}
