// The arguments of the exported kernels, one struct for each.
//
// `abi.py` declares the same structs for ctypes and compares their sizes when it loads the library. Tensors are
// row-major. `num_threads` is the number of OpenMP threads.
#pragma once

#include <cstdint>

using bf16 = std::uint16_t;

// The type of states, weights and biases.
#ifdef FLOAT_STATES
using state = float;
#else
using state = bf16;
#endif

// How panels store weights; the same values as in `bindings.py`.
enum PanelFormat {
    NATIVE = 0,  // as states, or in the integers of the library
    AS_BF16 = 1  // fp32 weights that bfloat16 represents exactly
};

// A root mean square norm; `kind` is a NormKind, where it rounds and what it multiplies by.
struct NormParams {
    const state* weight;  // [width]
    float epsilon;
    std::int32_t kind;
};

// A packed weight of a linear layer.
struct LinearWeight {
    const std::uint8_t* panels;
    const state* bias;  // [outputs], or null
    std::int32_t outputs;
    std::int32_t format;  // a PanelFormat
};

// The packed weights of a gated feed-forward layer: down(act(gate(x)) * up(x)).
struct GatedMlpWeights {
    const std::uint8_t* gate_up_panels;
    const std::uint8_t* down_panels;
    std::int32_t inner;  // outputs of gate and of up each
    std::int32_t activation;  // an Activation
    std::int32_t format;  // a PanelFormat, of all panels
};

struct RmsNormArgs {
    const state* states;  // [num_rows, width]
    state* output;  // [num_rows, width]
    NormParams norm;
    std::int64_t num_rows;
    std::int32_t width, num_threads;
};

struct ApplyRopeArgs {
    state* states;  // [num_tokens, num_heads, head size], changed in place; strides in elements
    std::int64_t token_stride, head_stride;
    const state* cosines;  // [num_tokens, rotary_size]
    const state* sines;  // [num_tokens, rotary_size]
    std::int32_t num_tokens, num_heads, rotary_size, num_threads;
};

struct ActAndMulArgs {
    state* gate;  // [num_elements], overwritten
    const state* up;  // [num_elements]
    std::int64_t num_elements;
    std::int32_t activation, num_threads;
};

struct LinearArgs {
    const state* states;  // [num_rows, width]
    state* output;  // [num_rows, weight.outputs]
    LinearWeight weight;
    std::int32_t num_rows, width, num_threads;
};

struct GatedMlpArgs {
    const state* states;  // [num_rows, width]
    state* output;  // [num_rows, width]
    GatedMlpWeights mlp;
    std::int32_t num_rows, width, num_threads;
};

constexpr int MAX_PROJECTIONS = 3;  // query, key and value

struct NormQkvArgs {
    const state* states;  // [num_rows, width]
    NormParams norm;
    LinearWeight projections[MAX_PROJECTIONS];
    state* outputs[MAX_PROJECTIONS];  // [num_rows, projections[i].outputs] each
    std::int32_t num_projections, num_rows, width, num_threads;
};

struct AttnOutMlpArgs {
    state* states;  // [num_rows, width], changed in place
    const state* attended;  // [num_rows, attended_width]
    LinearWeight attn_out;
    NormParams norm;
    GatedMlpWeights mlp;
    std::int32_t num_rows, width, attended_width, num_threads;
};

// States [tokens, heads, head size]; strides in elements, a head's elements are contiguous.
struct HeadsView {
    const state* states;
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
    state* output;  // [tokens, num_heads, head_size]
    const SequenceSpan* sequences;
    const KeySpan* spans;
    std::int32_t num_sequences, num_heads, num_kv_heads, head_size;
    float scale;  // of the scores; positive
    float soft_cap;  // scores become cap * tanh(score / cap); 0: they are not capped
    std::int32_t window;  // keys that a query attends to, its own included; 0: all up to its own
    std::int32_t num_threads;
};
