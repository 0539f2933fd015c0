// Linear layers whose weights are in bfloat16: their rows, their packed panels and the product of both.
#pragma once

#include "products.h"

// Of the inner dimension at most: what of a panel stays in the first-level cache.
constexpr int STEPS_AT_ONCE = 40 / int(sizeof(operand));

// Bytes of one panel of a weight of this width.
inline std::size_t panel_bytes(int width) { return sizeof(bf16) * std::size_t(width) * BLOCK; }

// Packs 32 rows of a weight from two places, 16 of each, as one panel.
inline void pack_panel(
    const bf16* first, int num_first, const bf16* second, int num_second, int width, std::uint8_t* panel) {
    for (int step = 0; step < width / BLOCK; ++step)
        for (int half = 0; half < 2; ++half) {
            const bf16* weights = half ? second : first;
            const int present = half ? num_second : num_first;
            const bf16* rows[TILE];
            for (int row = 0; row < TILE; ++row)
                rows[row] = row < present ? weights + std::size_t(row) * width + step * BLOCK : nullptr;
            pack_tile(rows, reinterpret_cast<bf16*>(panel) + step * STEP_NUMBERS + half * STEP_NUMBERS / 2);
        }
}

// Rows as a product reads them, 32 at a time: where they stand, or where too few are left, copied and filled up with
// zeros.
class Rows {
public:
    Rows(const operand* rows, int num_rows, int width) : rows_(rows), num_rows_(num_rows), width_(width) {
        static thread_local Scratch scratch;
        const int first = num_rows / BLOCK * BLOCK;
        if (first == num_rows) return;
        tail_ = static_cast<operand*>(scratch.bytes(sizeof(operand) * BLOCK * width));
        std::memset(tail_, 0, sizeof(operand) * BLOCK * width);
        std::memcpy(tail_, rows + std::size_t(first) * width, sizeof(operand) * (num_rows - first) * width);
    }
    int width() const { return width_; }
    const operand* from(int row) const { return row + BLOCK <= num_rows_ ? rows_ + std::size_t(row) * width_ : tail_; }

private:
    const operand* rows_;
    int num_rows_, width_;
    operand* tail_ = nullptr;
};

inline Rows rows_of(const bf16* states, int num_rows, int width) {
    static thread_local Scratch scratch;
    return Rows(converted<operand>(states, std::size_t(num_rows) * width, scratch), num_rows, width);
}

// Some steps of a panel, as a product reads them.
class Part {
public:
    Part(const std::uint8_t* panel, int /*width*/, int first_step, int num_steps)
        : first_step_(first_step), num_steps_(num_steps) {
        static thread_local Scratch scratch;
        numbers_ = converted_panel<operand>(
            reinterpret_cast<const bf16*>(panel) + std::size_t(first_step) * STEP_NUMBERS, num_steps, scratch);
    }

    // Writes the product with up to 32 rows from this one on, or adds to what stands there.
    template <class Meanwhile>
    void multiply(const Rows& rows, int row, int num_rows, float* sums, Meanwhile meanwhile) const {
        ::multiply(
            rows.from(row) + first_step_ * BLOCK, rows.width(), numbers_, num_steps_, num_rows, sums, BLOCK,
            first_step_ > 0, meanwhile);
    }

private:
    const operand* numbers_;
    int first_step_, num_steps_;
};
