// The arguments of the exported kernels, one struct for each.
//
// `abi.py` declares the same structs for ctypes and compares their sizes when it loads the library. States, weights and
// biases are bfloat16 and row-major unless stated otherwise. `num_threads` is the number of OpenMP threads.
#pragma once

#include <cstdint>

using bf16 = std::uint16_t;

// A root mean square norm; `kind` is a NormKind, where it rounds and what it multiplies by.
struct NormParams {
    const bf16* weight;  // [width]
    float epsilon;
    std::int32_t kind;
};

// A packed weight of a linear layer.
struct LinearWeight {
    const std::uint8_t* panels;
    const bf16* bias;  // [outputs], or null
    std::int32_t outputs;
};

// The packed weights of a gated feed-forward layer: down(act(gate(x)) * up(x)).
struct GatedMlpWeights {
    const std::uint8_t* gate_up_panels;
    const std::uint8_t* down_panels;
    std::int32_t inner;  // outputs of gate and of up each
    std::int32_t activation;  // an Activation
};

struct RmsNormArgs {
    const bf16* states;  // [num_rows, width]
    bf16* output;  // [num_rows, width]
    NormParams norm;
    std::int64_t num_rows;
    std::int32_t width, num_threads;
};

struct ApplyRopeArgs {
    bf16* states;  // [num_tokens, num_heads, head size], changed in place; strides in elements
    std::int64_t token_stride, head_stride;
    const bf16* cosines;  // [num_tokens, rotary_size]
    const bf16* sines;  // [num_tokens, rotary_size]
    std::int32_t num_tokens, num_heads, rotary_size, num_threads;
};

struct ActAndMulArgs {
    bf16* gate;  // [num_elements], overwritten
    const bf16* up;  // [num_elements]
    std::int64_t num_elements;
    std::int32_t activation, num_threads;
};

struct LinearArgs {
    const bf16* states;  // [num_rows, width]
    bf16* output;  // [num_rows, weight.outputs]
    LinearWeight weight;
    std::int32_t num_rows, width, num_threads;
};

struct GatedMlpArgs {
    const bf16* states;  // [num_rows, width]
    bf16* output;  // [num_rows, width]
    GatedMlpWeights mlp;
    std::int32_t num_rows, width, num_threads;
};

constexpr int MAX_PROJECTIONS = 3;  // query, key and value

struct NormQkvArgs {
    const bf16* states;  // [num_rows, width]
    NormParams norm;
    LinearWeight projections[MAX_PROJECTIONS];
    bf16* outputs[MAX_PROJECTIONS];  // [num_rows, projections[i].outputs] each
    std::int32_t num_projections, num_rows, width, num_threads;
};

struct AttnOutMlpArgs {
    bf16* states;  // [num_rows, width], changed in place
    const bf16* attended;  // [num_rows, attended_width]
    LinearWeight attn_out;
    NormParams norm;
    GatedMlpWeights mlp;
    std::int32_t num_rows, width, attended_width, num_threads;
};

// States [tokens, heads, head size]; strides in elements, a head's elements are contiguous.
struct HeadsView {
    const bf16* states;
    std::int64_t token_stride, head_stride;
};

// One sequence of a packed batch: its own tokens, how many tokens precede them, and the spans that hold all its keys.
struct SequenceSpan {
    std::int32_t own_begin, num_own, num_shared, first_span, num_spans;
};

// Keys from `begin` up to `end`, as indices into the tokens of key and value.
struct KeySpan {
    std::int32_t begin, end;
};

struct AttentionArgs {
    HeadsView query, key, value;
    bf16* output;  // [tokens, num_heads, head_size]
    const SequenceSpan* sequences;
    const KeySpan* spans;
    std::int32_t num_sequences, num_heads, num_kv_heads, head_size;
    float scale;  // of the scores; positive
    float soft_cap;  // scores become cap * tanh(score / cap); 0: they are not capped
    std::int32_t window;  // keys that a query attends to, its own included; 0: all up to its own
    std::int32_t num_threads;
};
