// The operands of linear layers with bfloat16 or fp32 weights: packed panels, input rows and the product of both.
#pragma once

#include "gemm.h"

// Most steps of the inner dimension in one slice of a panel: a slice must stay in the first-level cache.
#ifdef USE_AVX2
constexpr int MAX_SLICE_STEPS = CACHED_STEPS;
#else
constexpr int MAX_SLICE_STEPS = 40 / int(sizeof(operand));
#endif

// Bytes of one panel of a weight of this width.
inline std::size_t panel_bytes(int width, PanelFormat format) { return weight_bytes(format) * width * BLOCK; }

// Packs two groups of up to 16 weight rows each as the 32 columns of one panel; missing rows are zeros.
inline void pack_panel(
    const state* first, int num_first, const state* second, int num_second, int width, PanelFormat format,
    std::uint8_t* panel) {
    for (int step = 0; step < width / BLOCK; ++step)
        for (int half = 0; half < 2; ++half) {
            const state* weights = half ? second : first;
            const int num_present = half ? num_second : num_first;
            const state* columns[TILE];
            for (int row = 0; row < TILE; ++row)
                columns[row] = row < num_present ? weights + std::size_t(row) * width + step * BLOCK : nullptr;
            pack_weights(columns, format, panel + weight_bytes(format) * (step * STEP_SIZE + half * TILE_SIZE));
        }
}

// The input rows of a product, read TILE_ROWS at a time.
class InputRows {
public:
    // Rows one after the other; a last incomplete group is copied and padded with zeros.
    InputRows(const operand* rows, int num_rows, int width)
        : rows_(rows), num_rows_(num_rows), width_(width), strides_(row_strides(width)) {
        static thread_local ScratchBuffer buffer;
        const int first = num_rows / TILE_ROWS * TILE_ROWS;
        if (first == num_rows) return;
        tail_ = static_cast<operand*>(buffer.reserve(sizeof(operand) * TILE_ROWS * width));
        std::memset(tail_, 0, sizeof(operand) * TILE_ROWS * width);
        std::memcpy(tail_, rows + std::size_t(first) * width, sizeof(operand) * (num_rows - first) * width);
    }
    // Rows that were written at `operand_offset`; their number is a multiple of TILE_ROWS.
    static InputRows written(const operand* rows, int num_rows, int width) {
        InputRows written(rows, num_rows, width);
        written.strides_ = operand_strides(width);
        return written;
    }
    int width() const { return width_; }
    LeftStrides strides() const { return strides_; }
    const operand* from(int row, int step) const {
        const operand* first = row + TILE_ROWS <= num_rows_
                                   ? rows_ + row / TILE * strides_.tile + row % TILE * strides_.row
                                   : tail_;
        return first + step * strides_.step;
    }

private:
    const operand* rows_;
    int num_rows_, width_;
    LeftStrides strides_;
    operand* tail_ = nullptr;
};

// The input rows of states [num_rows, width].
inline InputRows input_rows(const state* states, int num_rows, int width) {
    static thread_local ScratchBuffer buffer;
    return InputRows(as_operands<operand>(states, std::size_t(num_rows) * width, buffer), num_rows, width);
}

// Consecutive steps of a panel, as operands of a product.
class PanelSlice {
public:
    PanelSlice(const std::uint8_t* panel, int /*width*/, PanelFormat format, int first_step, int num_steps)
        : packed_(panel + weight_bytes(format) * first_step * STEP_SIZE),
          num_bytes_(weight_bytes(format) * num_steps * STEP_SIZE),
          first_step_(first_step),
          num_steps_(num_steps) {
        static thread_local ScratchBuffer buffer;
        operands_ = panel_operands(packed_, format, num_steps, buffer);
    }

    // Writes the product with `num_rows` rows of a tile, one of `num_tiles`; slices after the first add to it. Meanwhile a
    // part of the weights that follow these is loaded into the second-level cache, where that gains.
    template <class Interleave>
    void multiply(
        const InputRows& rows, int tile, int num_tiles, int num_rows, float* product, Interleave interleave) const {
#if defined(USE_AVX2) || defined(USE_AMX_BF16)
        auto run = [&](int step) {
            prefetch_next(tile * num_steps_ + step, num_tiles * num_steps_);
            interleave(step);
        };
#else
        auto run = interleave;
#endif
        ::multiply(
            rows.from(tile * TILE_ROWS, first_step_), rows.strides(), operands_, num_steps_, num_rows, product, BLOCK,
            first_step_ > 0, run);
    }

private:
    // Loads part `index` of `count` of the next weights.
    void prefetch_next(int index, int count) const {
        const std::uint8_t* next = packed_ + num_bytes_;
        for (std::size_t byte = num_bytes_ * index / count / 64 * 64; byte < num_bytes_ * (index + 1) / count; byte += 64)
            _mm_prefetch(reinterpret_cast<const char*>(next + byte), _MM_HINT_T1);
    }

    const std::uint8_t* packed_;
    std::size_t num_bytes_;
    const operand* operands_;
    int first_step_, num_steps_;
};
