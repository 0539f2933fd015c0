// Linear layers, gated feed-forward layers and the two halves of a block around attention, with weights packed ahead.
//
// Each thread takes blocks of rows that stay in its own cache while all weights pass by. What follows each other without
// looking at other rows (norms, products, gates, residuals) runs whole for a block, so that states in between never
// leave that cache.

#include <algorithm>

#include "norms.h"
#ifdef WITH_INT8
#include "quantized.h"
#else
#include "plain.h"
#endif

namespace {

constexpr int ROWS_AT_ONCE = 256;  // of a block at most: with its inner states about a core's second-level cache

thread_local Scratch product_scratch;
thread_local Scratch norm_scratch;
thread_local Scratch inner_scratch;

int num_blocks_of(int num, int block) { return (num + block - 1) / block; }

int filled(int num, int step) { return num_blocks_of(num, step) * step; }

// Rows of the blocks that share `num_rows` out evenly, in whole tiles.
int rows_of_block(int num_rows, int num_threads) {
    const int blocks = num_threads * num_blocks_of(num_rows, num_threads * ROWS_AT_ONCE);
    return filled(num_blocks_of(num_rows, blocks), BLOCK);
}

// A product [32, 32] whose lines wait to be finished, a few at a time.
template <class Finish>
class Waiting {
public:
    explicit Waiting(Finish finish) : finish_(finish) {}

    void take(const float* sums, int row, int num_lines, int panel) {
        finish_lines(BLOCK);
        sums_ = sums, row_ = row, num_lines_ = num_lines, panel_ = panel, next_ = 0;
    }
    void finish_lines(int count) {
        for (const int end = std::min(next_ + count, num_lines_); next_ < end; ++next_)
            finish_(sums_ + next_ * BLOCK, row_, next_, panel_);
    }

private:
    Finish finish_;
    const float* sums_ = nullptr;
    int row_ = 0, num_lines_ = 0, panel_ = 0, next_ = 0;
};

// Multiplies a block of rows with some panels and lets `finish(sums, row, line, panel)` finish each line of each product.
// A product is finished while the next one is multiplied, by units that have nothing else to do. A long inner dimension
// goes in parts, so that the part of a panel stays in the first-level cache for all rows.
template <class Finish>
void multiply_block(
    const Rows& rows, int num_rows, const std::uint8_t* panels, int first_panel, int end_panel, Finish finish) {
    const int width = rows.width(), num_steps = width / BLOCK, row_tiles = num_blocks_of(num_rows, BLOCK);
    const int num_parts = num_blocks_of(num_steps, STEPS_AT_ONCE);
    const int steps = num_blocks_of(num_steps, num_parts);
    const int kept = num_parts > 1 ? row_tiles + 1 : 2;  // products: of all rows and the one that waits, or by turns
    float* products = static_cast<float*>(product_scratch.bytes(sizeof(float) * kept * BLOCK * BLOCK));
    Waiting<Finish> waiting(finish);
    int turn = 0;
    for (int panel = first_panel; panel < end_panel; ++panel) {
        const int base = turn;
        for (int step = 0; step < num_steps; step += steps) {
            const int count = std::min(steps, num_steps - step);
            const int lines_at_once = num_blocks_of(BLOCK, count);
            const Part part(panels + panel * panel_bytes(width), width, step, count);
            for (int tile = 0; tile < row_tiles; ++tile) {
                const int lines = filled(std::min(BLOCK, num_rows - tile * BLOCK), ROW_STEP);
                float* sums = products + (base + tile) % kept * BLOCK * BLOCK;
                part.multiply(rows, tile * BLOCK, lines, sums, [&](int) { waiting.finish_lines(lines_at_once); });
                if (step + count == num_steps) waiting.take(sums, tile * BLOCK, lines, panel);
            }
        }
        turn = (base + row_tiles) % kept;
    }
    waiting.finish_lines(BLOCK);
}

// Writes 32 columns of a product, bias added, as far as the output is wide.
struct Output {
    bf16* states;
    int num_rows, width;
    const bf16* bias;

    void operator()(const float* sums, int row, int line, int panel) const {
        if (row + line >= num_rows) return;
        for (int column = panel * BLOCK, half = 0; half < 2; ++half, column += LANES) {
            const __mmask16 lanes = first_lanes(width - column);
            const __m512 added = bias ? load(bias + column, lanes) : _mm512_setzero_ps();
            store(
                states + std::size_t(row + line) * width + column,
                _mm512_add_ps(_mm512_load_ps(sums + half * LANES), added), lanes);
        }
    }
};

// Adds 32 columns of a product, and a bias if there is one, to what stands in the output.
struct Addition {
    Output output;

    void operator()(const float* sums, int row, int line, int panel) const {
        if (row + line >= output.num_rows) return;
        for (int column = panel * BLOCK, half = 0; half < 2; ++half, column += LANES) {
            const __mmask16 lanes = first_lanes(output.width - column);
            bf16* place = output.states + std::size_t(row + line) * output.width + column;
            __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + half * LANES), load(place, lanes));
            if (output.bias) sum = _mm512_add_ps(sum, load(output.bias + column, lanes));
            store(place, sum, lanes);
        }
    }
};

// Writes 16 columns of act(gate) * up; a panel has 16 columns of both.
template <Activation ACTIVATION>
struct Gate {
    operand* states;
    int width;

    void operator()(const float* sums, int row, int line, int panel) const {
        const __m512 gate = _mm512_load_ps(sums), up = _mm512_load_ps(sums + LANES);
        store(
            states + std::size_t(row + line) * width + panel * LANES,
            _mm512_mul_ps(activated<ACTIVATION>(gate), up));
    }
};

// A gated feed-forward layer for a block of rows; `finish` takes the products of its last weight.
template <class Finish>
void run_gated(
    const Rows& rows, int num_rows, const std::uint8_t* gated_panels, int inner, const std::uint8_t* down_panels,
    int activation, Finish finish) {
    const int num_filled = filled(num_rows, BLOCK);
    auto* opened = static_cast<operand*>(inner_scratch.bytes(sizeof(operand) * num_filled * inner));
    if (activation == SILU)
        multiply_block(rows, num_rows, gated_panels, 0, inner / TILE, Gate<SILU>{opened, inner});
    else
        multiply_block(rows, num_rows, gated_panels, 0, inner / TILE, Gate<GELU_TANH>{opened, inner});
    const int num_panels = num_blocks_of(rows.width(), BLOCK);
    multiply_block(Rows(opened, num_filled, inner), num_rows, down_panels, 0, num_panels, finish);
}

// The norms of a block of rows in this thread's scratch memory, filled up with zeros.
Rows norms_of(const bf16* states, int num_rows, int width, const RmsNorm& norm) {
    const int num_filled = filled(num_rows, BLOCK);
    auto* normed = static_cast<operand*>(norm_scratch.bytes(sizeof(operand) * num_filled * width));
    for (int row = 0; row < num_rows; ++row)
        normalize(states + std::size_t(row) * width, width, norm, normed + std::size_t(row) * width);
    std::memset(normed + std::size_t(num_rows) * width, 0, sizeof(operand) * (num_filled - num_rows) * width);
    return Rows(normed, num_filled, width);
}

// Hands each thread blocks of rows, first row and count.
template <class Run>
void for_blocks(int num_rows, int num_threads, Run run) {
    const int block = rows_of_block(num_rows, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const Unit unit;
#pragma omp for schedule(static)
        for (int first = 0; first < num_rows; first += block) run(first, std::min(block, num_rows - first));
    }
}

}  // namespace

extern "C" {

// Bytes of 32 packed rows of a weight.
std::int64_t bytes_of_panel(int width) { return std::int64_t(panel_bytes(width)); }

// Packs a weight [outputs, width] into ceil(outputs / 32) panels.
void pack_weight(const bf16* weight, int outputs, int width, std::uint8_t* panels, int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int panel = 0; panel < num_blocks_of(outputs, BLOCK); ++panel) {
        const bf16* first = weight + std::size_t(panel) * BLOCK * width;
        const int left = outputs - panel * BLOCK;
        pack_panel(
            first, left, first + std::size_t(TILE) * width, left - TILE, width, panels + panel * panel_bytes(width));
    }
}

// Packs the weights [outputs, width] of gate and up by turns of 16 rows into outputs / 16 panels.
void pack_gated(const bf16* gate, const bf16* up, int outputs, int width, std::uint8_t* panels, int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int panel = 0; panel < outputs / TILE; ++panel) {
        const std::size_t place = std::size_t(panel) * TILE * width;
        pack_panel(gate + place, TILE, up + place, TILE, width, panels + panel * panel_bytes(width));
    }
}

// states [rows, width] times weight, plus bias if there is one: output [rows, outputs].
void linear(
    const bf16* states, int num_rows, int width, const std::uint8_t* panels, int outputs, const bf16* bias, bf16* output,
    int num_threads) {
    const int num_panels = num_blocks_of(outputs, BLOCK);
    const int block = rows_of_block(num_rows, num_threads);
    const int row_blocks = num_blocks_of(num_rows, block);
    // Too few rows for all threads: they share the columns out instead.
    const int column_blocks = row_blocks >= num_threads ? 1 : std::min(num_panels, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const Unit unit;
#pragma omp for schedule(static)
        for (int task = 0; task < row_blocks * column_blocks; ++task) {
            const int first = task / column_blocks * block;
            const int count = std::min(block, num_rows - first);
            const int part = task % column_blocks;
            const Rows rows = rows_of(states + std::size_t(first) * width, count, width);
            multiply_block(
                rows, count, panels, num_panels * part / column_blocks, num_panels * (part + 1) / column_blocks,
                Output{output + std::size_t(first) * outputs, count, outputs, bias});
        }
    }
}

// down(act(gate(states)) * up(states)): states and output [rows, width]; inner states have `inner` numbers.
void gated_layer(
    const bf16* states, int num_rows, int width, const std::uint8_t* gated_panels, int inner, const std::uint8_t* down_panels,
    int activation, bf16* output, int num_threads) {
    for_blocks(num_rows, num_threads, [=](int first, int count) {
        const std::size_t place = std::size_t(first) * width;
        run_gated(
            rows_of(states + place, count, width), count, gated_panels, inner, down_panels, activation,
            Output{output + place, count, width, nullptr});
    });
}

// What comes before attention in a block: the norm of states [rows, width], times each of some packed weights.
void project(
    const bf16* states, int num_rows, int width, const bf16* norm_weight, float epsilon, int norm_kind, int num_weights,
    const std::uint8_t* const* panels, const int* outputs, const bf16* const* biases, bf16* const* products, int num_threads) {
    const RmsNorm norm{norm_weight, epsilon, norm_kind};
    for_blocks(num_rows, num_threads, [=](int first, int count) {
        const Rows normed = norms_of(states + std::size_t(first) * width, count, width, norm);
        for (int weight = 0; weight < num_weights; ++weight) {
            const int wide = outputs[weight];
            multiply_block(
                normed, count, panels[weight], 0, num_blocks_of(wide, BLOCK),
                Output{products[weight] + std::size_t(first) * wide, count, wide, biases[weight]});
        }
    });
}

// What comes behind attention in a block, in place: states += output weight times attended [rows, attended width];
// states += feed-forward layer of their norm.
void conclude(
    bf16* states, const bf16* attended, int num_rows, int width, int attended_width, const std::uint8_t* output_panels,
    const bf16* output_bias, const bf16* norm_weight, float epsilon, int norm_kind, const std::uint8_t* gated_panels, int inner,
    const std::uint8_t* down_panels, int activation, int num_threads) {
    const RmsNorm norm{norm_weight, epsilon, norm_kind};
    for_blocks(num_rows, num_threads, [=](int first, int count) {
        bf16* own = states + std::size_t(first) * width;
        multiply_block(
            rows_of(attended + std::size_t(first) * attended_width, count, attended_width), count,
            output_panels, 0, num_blocks_of(width, BLOCK), Addition{{own, count, width, output_bias}});
        run_gated(
            norms_of(own, count, width, norm), count, gated_panels, inner, down_panels, activation,
            Addition{{own, count, width, nullptr}});
    });
}

}
