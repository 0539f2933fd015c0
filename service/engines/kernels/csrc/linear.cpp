// Linear layers, gated feed-forward layers, and the two halves of a decoder block around attention, on packed weights.
//
// Each thread takes blocks of rows that stay in its core's cache while all weights are read. Consecutive operations
// that need no other rows (norms, products, gates, residuals) run completely for one block, so that intermediate states
// never leave that cache.

#include <algorithm>

#include "kernel_args.h"
#include "rms_norm.h"
#ifdef USE_AVX512_VNNI
#include "linear_int8.h"
#else
#include "linear_float.h"
#endif

namespace {

// Most rows of a block: with its intermediate states about the size of a core's second-level cache, which on CPUs without
// AVX-512 is smaller, while states there are twice as large.
#ifdef USE_AVX2
constexpr int MAX_BLOCK_ROWS = 128;
#else
constexpr int MAX_BLOCK_ROWS = 256;
#endif

// Most rows for which the threads divide the columns of the weights of a block's second half, and share the rows. With
// more, the threads' intermediate states no longer fit a second-level cache.
constexpr int MAX_SHARED_ROWS = 192;

thread_local ScratchBuffer product_buffer;
thread_local ScratchBuffer norm_buffer;
thread_local ScratchBuffer inner_buffer;
thread_local ScratchBuffer shared_inner_buffer;  // of the thread that calls a kernel; all of its threads use it

int ceil_div(int count, int divisor) { return (count + divisor - 1) / divisor; }

int round_up(int count, int multiple) { return ceil_div(count, multiple) * multiple; }

// The division of rows into blocks of about the same size, as many for each thread; all but the last one have a multiple
// of BLOCK_ROW_STEP rows.
class RowBlocks {
public:
    RowBlocks(int num_rows, int num_threads)
        : num_rows_(num_rows),
          num_steps_(ceil_div(num_rows, BLOCK_ROW_STEP)),
          count_(std::min(num_steps_, num_threads * ceil_div(num_rows, num_threads * MAX_BLOCK_ROWS))) {}

    int count() const { return count_; }
    int begin(int block) const {
        return std::min(num_rows_, int(std::int64_t(num_steps_) * block / count_) * BLOCK_ROW_STEP);
    }
    int num_rows(int block) const { return begin(block + 1) - begin(block); }

private:
    int num_rows_, num_steps_, count_;
};

// A product [TILE_ROWS, 32] whose epilogue (activation, bias, rounding) runs later, a few rows at a time.
template <class Epilogue>
class DeferredEpilogue {
public:
    explicit DeferredEpilogue(Epilogue epilogue) : epilogue_(epilogue) {}

    // Completes the previous product and takes the next one.
    void take(const float* product, int first_row, int num_rows, int panel) {
        advance(BLOCK);
        product_ = product, first_row_ = first_row, num_rows_ = num_rows, panel_ = panel, next_row_ = 0;
    }
    // Runs the epilogue of up to `count` more rows.
    void advance(int count) {
        for (const int end = std::min(next_row_ + count, num_rows_); next_row_ < end; ++next_row_)
            epilogue_(product_ + next_row_ * BLOCK, first_row_ + next_row_, panel_);
    }

private:
    Epilogue epilogue_;
    const float* product_ = nullptr;
    int first_row_ = 0, num_rows_ = 0, panel_ = 0, next_row_ = 0;
};

// The panels of a packed weight, or some of them.
struct PanelRange {
    const std::uint8_t* panels;
    PanelFormat format;
    int begin, end;
};

PanelRange all_panels(const LinearWeight& weight) {
    return {weight.panels, PanelFormat(weight.format), 0, ceil_div(weight.outputs, BLOCK)};
}

PanelRange gate_up_panels(const GatedMlpWeights& mlp) {
    return {mlp.gate_up_panels, PanelFormat(mlp.format), 0, mlp.inner / TILE};
}

PanelRange down_panels(const GatedMlpWeights& mlp, int width) {
    return {mlp.down_panels, PanelFormat(mlp.format), 0, ceil_div(width, BLOCK)};
}

// One of `count` parts of about the same number of panels.
PanelRange part_of(const PanelRange& range, int index, int count) {
    const int size = range.end - range.begin;
    return {range.panels, range.format, range.begin + size * index / count, range.begin + size * (index + 1) / count};
}

// Multiplies a block of rows by panels and calls `epilogue(products, row, panel)` for each row of each product.
//
// The epilogue of a product runs while the next product is multiplied, on units that are otherwise idle. A long inner
// dimension is processed in slices, so that a slice of a panel stays in the first-level cache for all rows.
template <class Epilogue>
void multiply_block(const InputRows& rows, int num_rows, PanelRange range, Epilogue epilogue) {
    const int width = rows.width(), num_steps = width / BLOCK, num_row_tiles = ceil_div(num_rows, TILE_ROWS);
    const int num_slices = ceil_div(num_steps, MAX_SLICE_STEPS);
    const int slice_steps = ceil_div(num_steps, num_slices);
    // Products in memory: with several slices those of all row tiles, else one; and one whose epilogue is pending.
    const int num_products = num_slices > 1 ? num_row_tiles + 1 : 2;
    float* products = static_cast<float*>(product_buffer.reserve(sizeof(float) * num_products * BLOCK * BLOCK));
    DeferredEpilogue<Epilogue> pending(epilogue);
    int next_product = 0;
    for (int panel = range.begin; panel < range.end; ++panel) {
        const int base = next_product;
        for (int step = 0; step < num_steps; step += slice_steps) {
            const int count = std::min(slice_steps, num_steps - step);
            const int rows_per_step = ceil_div(BLOCK, count);
            const PanelSlice slice(
                range.panels + panel * panel_bytes(width, range.format), width, range.format, step, count);
            for (int tile = 0; tile < num_row_tiles; ++tile) {
                const int tile_rows = round_up(std::min(TILE_ROWS, num_rows - tile * TILE_ROWS), ROW_STEP);
                float* product = products + (base + tile) % num_products * BLOCK * BLOCK;
                slice.multiply(
                    rows, tile, num_row_tiles, tile_rows, product, [&](int) { pending.advance(rows_per_step); });
                if (step + count == num_steps) pending.take(product, tile * TILE_ROWS, tile_rows, panel);
            }
        }
        next_product = (base + num_row_tiles) % num_products;
    }
    pending.advance(BLOCK);
}

// Epilogue: writes 32 columns of a product, bias added; columns beyond the output's width are left out.
struct StoreEpilogue {
    state* output;
    int num_rows, width;
    const state* bias;

    void operator()(const float* products, int row, int panel) const {
        if (row >= num_rows) return;
        for (int column = panel * BLOCK, half = 0; half < 2; ++half, column += LANES) {
            const Lanes lanes = first_lanes(width - column);
            const Vector added = bias ? load(bias + column, lanes) : zeros();
            store(output + std::size_t(row) * width + column, add(load(products + half * LANES), added), lanes);
        }
    }
};

// Epilogue: adds 32 columns of a product, and a bias if there is one, to the states (the residual connection).
struct ResidualEpilogue {
    state* states;
    int num_rows, width;
    const state* bias;

    void operator()(const float* products, int row, int panel) const {
        if (row >= num_rows) return;
        for (int column = panel * BLOCK, half = 0; half < 2; ++half, column += LANES) {
            const Lanes lanes = first_lanes(width - column);
            state* output = states + std::size_t(row) * width + column;
            Vector sum = add(load(products + half * LANES), load(output, lanes));
            if (bias) sum = add(sum, load(bias + column, lanes));
            store(output, sum, lanes);
        }
    }
};

// Epilogue: writes 16 columns of act(gate) * up; a panel has 16 columns of gate and 16 of up.
template <Activation ACTIVATION>
struct GateEpilogue {
    operand* output;
    int width;

    void operator()(const float* products, int row, int panel) const {
        const Vector gate = load(products), up = load(products + LANES);
        store(output + operand_offset(row, panel * LANES, width), mul(activate<ACTIVATION>(gate), up));
    }
};

// Writes act(gate) * up for a block of rows and some panels of gate and up; `gated` has a multiple of TILE_ROWS rows.
void multiply_gate_up(
    const InputRows& rows, int num_rows, const GatedMlpWeights& mlp, const PanelRange& range, operand* gated) {
    if (mlp.activation == SILU)
        multiply_block(rows, num_rows, range, GateEpilogue<SILU>{gated, mlp.inner});
    else
        multiply_block(rows, num_rows, range, GateEpilogue<GELU_TANH>{gated, mlp.inner});
}

// Allocates the intermediate states of a gated feed-forward layer for rows padded to a multiple of TILE_ROWS.
operand* reserve_inner(ScratchBuffer& buffer, int num_rows, const GatedMlpWeights& mlp) {
    return static_cast<operand*>(buffer.reserve(sizeof(operand) * round_up(num_rows, TILE_ROWS) * mlp.inner));
}

// Runs a gated feed-forward layer for a block of rows; `epilogue` receives the products of the down projection.
template <class Epilogue>
void run_gated_mlp(const InputRows& rows, int num_rows, const GatedMlpWeights& mlp, Epilogue epilogue) {
    operand* gated = reserve_inner(inner_buffer, num_rows, mlp);
    multiply_gate_up(rows, num_rows, mlp, gate_up_panels(mlp), gated);
    const InputRows inner = InputRows::written(gated, round_up(num_rows, TILE_ROWS), mlp.inner);
    multiply_block(inner, num_rows, down_panels(mlp, rows.width()), epilogue);
}

// Returns the norms of a block of rows, in this thread's scratch memory and padded with zeros.
InputRows normalized_rows(const state* states, int num_rows, int width, const NormParams& norm) {
    const int num_padded = round_up(num_rows, TILE_ROWS);
    auto* normalized = static_cast<operand*>(norm_buffer.reserve(sizeof(operand) * num_padded * width));
    for (int row = 0; row < num_padded; ++row) {
        auto output = [=](int column) { return normalized + operand_offset(row, column, width); };
        if (row < num_rows)
            normalize(states + std::size_t(row) * width, width, norm, output);
        else
            for (int column = 0; column < width; column += LANES) store(output(column), zeros());
    }
    return InputRows::written(normalized, num_padded, width);
}

// Calls `run(first row, number of rows)` for each block of rows, on `num_threads` threads.
template <class Run>
void for_each_block(int num_rows, int num_threads, Run run) {
    const RowBlocks blocks(num_rows, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const ThreadConfig config;
#pragma omp for schedule(static)
        for (int block = 0; block < blocks.count(); ++block) run(blocks.begin(block), blocks.num_rows(block));
    }
}

// `attn_out_mlp` with the columns of the weights divided among the threads instead of the rows: for few rows this is
// faster, because each thread reads a part of the weights only. The bits are the same.
void attn_out_mlp_by_columns(const AttnOutMlpArgs& args) {
    const int num_rows = args.num_rows, width = args.width, num_threads = args.num_threads;
    operand* gated = reserve_inner(shared_inner_buffer, num_rows, args.mlp);
#pragma omp parallel num_threads(num_threads)
    {
        const ThreadConfig config;
        // Each loop ends with a barrier: all states, then all gated products are complete.
#pragma omp for schedule(static)
        for (int part = 0; part < num_threads; ++part)
            multiply_block(
                input_rows(args.attended, num_rows, args.attended_width), num_rows,
                part_of(all_panels(args.attn_out), part, num_threads),
                ResidualEpilogue{args.states, num_rows, width, args.attn_out.bias});
#pragma omp for schedule(static)
        for (int part = 0; part < num_threads; ++part)
            multiply_gate_up(
                normalized_rows(args.states, num_rows, width, args.norm), num_rows, args.mlp,
                part_of(gate_up_panels(args.mlp), part, num_threads), gated);
#pragma omp for schedule(static)
        for (int part = 0; part < num_threads; ++part)
            multiply_block(
                InputRows::written(gated, round_up(num_rows, TILE_ROWS), args.mlp.inner), num_rows,
                part_of(down_panels(args.mlp, width), part, num_threads),
                ResidualEpilogue{args.states, num_rows, width, nullptr});
    }
}

}  // namespace

extern "C" {

// Returns the bytes of a packed panel: 32 rows of a weight of this width.
std::int64_t packed_panel_bytes(int width, int format) {
    return std::int64_t(panel_bytes(width, PanelFormat(format)));
}

// Packs a weight [outputs, width] into ceil(outputs / 32) panels.
void pack_weight(
    const state* weight, int outputs, int width, int format, std::uint8_t* panels, int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int panel = 0; panel < ceil_div(outputs, BLOCK); ++panel) {
        const state* first = weight + std::size_t(panel) * BLOCK * width;
        const int left = outputs - panel * BLOCK;
        pack_panel(
            first, left, first + std::size_t(TILE) * width, left - TILE, width, PanelFormat(format),
            panels + panel * packed_panel_bytes(width, format));
    }
}

// Packs the weights [outputs, width] of gate and up into outputs / 16 panels, of 16 columns of each.
void pack_gate_up(
    const state* gate, const state* up, int outputs, int width, int format, std::uint8_t* panels, int num_threads) {
#pragma omp parallel for num_threads(num_threads)
    for (int panel = 0; panel < outputs / TILE; ++panel) {
        const std::size_t offset = std::size_t(panel) * TILE * width;
        pack_panel(
            gate + offset, TILE, up + offset, TILE, width, PanelFormat(format),
            panels + panel * packed_panel_bytes(width, format));
    }
}

// output = states x weight + bias.
void linear(const LinearArgs* args) {
    const int num_rows = args->num_rows, width = args->width, num_threads = args->num_threads;
    const int outputs = args->weight.outputs, num_panels = ceil_div(outputs, BLOCK);
    const RowBlocks blocks(num_rows, num_threads);
    // With fewer blocks of rows than threads, the columns are divided among the threads too.
    const int num_column_blocks = blocks.count() >= num_threads ? 1 : std::min(num_panels, num_threads);
#pragma omp parallel num_threads(num_threads)
    {
        const ThreadConfig config;
#pragma omp for schedule(static)
        for (int task = 0; task < blocks.count() * num_column_blocks; ++task) {
            const int block = task / num_column_blocks, first = blocks.begin(block), count = blocks.num_rows(block);
            const int column = task % num_column_blocks;
            const InputRows rows = input_rows(args->states + std::size_t(first) * width, count, width);
            const PanelRange range{
                args->weight.panels, PanelFormat(args->weight.format), num_panels * column / num_column_blocks,
                num_panels * (column + 1) / num_column_blocks};
            multiply_block(
                rows, count, range,
                StoreEpilogue{args->output + std::size_t(first) * outputs, count, outputs, args->weight.bias});
        }
    }
}

// output = down(act(gate(states)) * up(states)).
void gated_mlp(const GatedMlpArgs* args) {
    const int width = args->width;
    for_each_block(args->num_rows, args->num_threads, [=](int first, int count) {
        const std::size_t offset = std::size_t(first) * width;
        run_gated_mlp(
            input_rows(args->states + offset, count, width), count, args->mlp,
            StoreEpilogue{args->output + offset, count, width, nullptr});
    });
}

// The part of a block before attention: outputs[i] = norm(states) x projections[i] + bias.
void norm_qkv(const NormQkvArgs* args) {
    const int width = args->width;
    for_each_block(args->num_rows, args->num_threads, [=](int first, int count) {
        const InputRows rows = normalized_rows(args->states + std::size_t(first) * width, count, width, args->norm);
        for (int index = 0; index < args->num_projections; ++index) {
            const LinearWeight& weight = args->projections[index];
            state* output = args->outputs[index] + std::size_t(first) * weight.outputs;
            multiply_block(
                rows, count, all_panels(weight),
                StoreEpilogue{output, count, weight.outputs, weight.bias});
        }
    });
}

// The part of a block after attention: states += attended x attn_out + bias; states += mlp(norm(states)).
void attn_out_mlp(const AttnOutMlpArgs* args) {
    if (args->num_rows <= MAX_SHARED_ROWS && args->num_threads > 1) return attn_out_mlp_by_columns(*args);
    const int width = args->width, attended_width = args->attended_width;
    for_each_block(args->num_rows, args->num_threads, [=](int first, int count) {
        state* states = args->states + std::size_t(first) * width;
        const state* attended = args->attended + std::size_t(first) * attended_width;
        multiply_block(
            input_rows(attended, count, attended_width), count, all_panels(args->attn_out),
            ResidualEpilogue{states, count, width, args->attn_out.bias});
        run_gated_mlp(
            normalized_rows(states, count, width, args->norm), count, args->mlp,
            ResidualEpilogue{states, count, width, nullptr});
    });
}

}
