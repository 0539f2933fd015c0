// Norms, gates and rotary position embeddings: one read and one write where transformers' operations take three to ten.

#include <algorithm>

#include "kernel_args.h"
#include "rms_norm.h"

namespace {

// Rotates the first `2 * half` elements of one head in place; the elements of a pair are `half` apart.
void rotate_head(state* head, const state* cosines, const state* sines, int half) {
    for (int index = 0; index < half; index += LANES) {
        const Lanes lanes = first_lanes(half - index);
        const Vector first = load(head + index, lanes), second = load(head + half + index, lanes);
        const Vector first_rotated =
            fnmadd(second, load(sines + index, lanes), mul(first, load(cosines + index, lanes)));
        const Vector second_rotated =
            fmadd(first, load(sines + half + index, lanes), mul(second, load(cosines + half + index, lanes)));
        store(head + index, first_rotated, lanes);
        store(head + half + index, second_rotated, lanes);
    }
}

template <Activation ACTIVATION>
void act_and_mul_lanes(state* gate, const state* up, Lanes lanes) {
    store(gate, mul(activate<ACTIVATION>(load(gate, lanes)), load(up, lanes)), lanes);
}

}  // namespace

extern "C" {

// Root mean square norm of each row of the states.
void rms_norm(const RmsNormArgs* args) {
    const std::int64_t width = args->width;
#pragma omp parallel for num_threads(args->num_threads) schedule(static)
    for (std::int64_t row = 0; row < args->num_rows; ++row) {
        state* const output = args->output + row * width;
        normalize(args->states + row * width, int(width), args->norm, [=](int column) { return output + column; });
    }
}

// Writes act(gate) * up over the gate, element by element.
void act_and_mul(const ActAndMulArgs* args) {
    state* const gate = args->gate;
    const state* const up = args->up;
    const std::int64_t num_elements = args->num_elements;
    const bool is_silu = args->activation == SILU;
#pragma omp parallel for num_threads(args->num_threads) schedule(static)
    for (std::int64_t index = 0; index < num_elements; index += LANES) {
        const std::int64_t left = num_elements - index;
        const Lanes lanes = first_lanes(int(std::min(left, std::int64_t(LANES))));
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
        state* const heads = args->states + token * args->token_stride;
        for (int head = 0; head < args->num_heads; ++head)
            rotate_head(
                heads + head * args->head_stride, args->cosines + angle, args->sines + angle, rotary_size / 2);
    }
}

}
