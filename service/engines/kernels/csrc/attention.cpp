// Causal attention within each sequence of a packed batch, whose keys may lie in several spans of it.
//
// A task is some queries of one sequence with all query heads of one key head. Keys are processed in blocks of 32,
// counted from the first token of the sequence, and a masked key has a weight of exactly zero. The result of a query
// therefore depends on its own keys alone: neither on the other queries of the task nor on positions in the batch.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gemm.h"
#include "kernel_args.h"
#include "scratch_buffer.h"

namespace {

constexpr int TASK_QUERIES = 256;

thread_local ScratchBuffer task_buffer;

struct Task {
    const SequenceSpan* sequence;
    int first_query, num_queries, kv_head;
};

const state* head_of(const HeadsView& view, std::int64_t token, int head) {
    return view.states + token * view.token_stride + head * view.head_stride;
}

// The head size padded with zeros to a multiple of BLOCK, as products need it.
int padded_head_size(const AttentionArgs& args) { return (args.head_size + BLOCK - 1) / BLOCK * BLOCK; }

std::size_t cache_line_multiple(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The working memory of a task, allocated from its thread's scratch memory. `size` is the padded head size.
struct TaskBuffers {
    operand *keys, *values;  // packed panels of all keys of the task
    operand *queries, *weights;  // [BLOCK, size], [BLOCK, num_keys]
    float *scores, *sums;  // [BLOCK, num_keys], [BLOCK, size]
    const state** key_rows;  // [num_keys]: the state of each key; null for padding
    const state** value_rows;

    TaskBuffers(int num_keys, int size) {
        const std::size_t panels = cache_line_multiple(sizeof(operand) * num_keys * size);
        const std::size_t per_key = cache_line_multiple(sizeof(float) * BLOCK * num_keys);
        const std::size_t per_element = cache_line_multiple(sizeof(float) * BLOCK * size);
        const std::size_t rows = cache_line_multiple(sizeof(state*) * num_keys);
        auto* next = static_cast<std::uint8_t*>(
            task_buffer.reserve(2 * panels + 2 * per_key + 2 * per_element + 2 * rows));
        auto allocate = [&next](std::size_t bytes) { return std::exchange(next, next + bytes); };
        keys = reinterpret_cast<operand*>(allocate(panels));
        values = reinterpret_cast<operand*>(allocate(panels));
        weights = reinterpret_cast<operand*>(allocate(per_key));
        scores = reinterpret_cast<float*>(allocate(per_key));
        queries = reinterpret_cast<operand*>(allocate(per_element));
        sums = reinterpret_cast<float*>(allocate(per_element));
        key_rows = reinterpret_cast<const state**>(allocate(rows));
        value_rows = reinterpret_cast<const state**>(allocate(rows));
    }
};

// Finds the states of the keys from `begin_key` up to `end_key` of a sequence; the rest of num_keys is padding.
void find_rows(
    const AttentionArgs& args, const Task& task, int begin_key, int end_key, int num_keys, const TaskBuffers& buffers) {
    int span_begin = 0, found = 0;
    for (int index = 0; index < task.sequence->num_spans; ++index) {
        const KeySpan span = args.spans[task.sequence->first_span + index];
        const int length = span.end - span.begin;
        for (int offset = std::max(0, begin_key - span_begin); offset < length && span_begin + offset < end_key;
             ++offset) {
            buffers.key_rows[found] = head_of(args.key, span.begin + offset, task.kv_head);
            buffers.value_rows[found] = head_of(args.value, span.begin + offset, task.kv_head);
            ++found;
        }
        span_begin += length;
    }
    std::fill(buffers.key_rows + found, buffers.key_rows + num_keys, nullptr);
    std::fill(buffers.value_rows + found, buffers.value_rows + num_keys, nullptr);
}

// Packs the keys as the right-hand matrix of queries x keys: a column is a key.
void pack_keys(const state* const* rows, int num_keys, int head_size, int size, operand* panels) {
    alignas(64) state padded[TILE][BLOCK];
    for (int first = 0; first < num_keys; first += TILE)
        for (int step = 0; step < size / BLOCK; ++step) {
            operand* tile = panels + std::size_t(first / BLOCK) * size * BLOCK + step * STEP_SIZE +
                            first % BLOCK / TILE * TILE_SIZE;
            const int num_present = std::min(BLOCK, head_size - step * BLOCK);
            const state* columns[TILE];
            for (int key = 0; key < TILE; ++key) {
                const state* elements = rows[first + key] ? rows[first + key] + step * BLOCK : nullptr;
                if (elements && num_present < BLOCK) {
                    std::memset(padded[key], 0, sizeof(padded[key]));
                    std::memcpy(padded[key], elements, sizeof(state) * num_present);
                    elements = padded[key];
                }
                columns[key] = elements;
            }
            pack_tile(columns, tile);
        }
}

// Packs the values as the right-hand matrix of weights x values: a column is an element of the head.
void pack_values(const state* const* rows, int num_keys, int head_size, int size, operand* panels) {
    for (int key = 0; key < num_keys; key += 2)
        for (int column = 0; column < size; column += LANES) {
            auto elements_of = [&](int row) { return rows[row] ? rows[row] + column : nullptr; };
            operand* tile = panels + std::size_t(column / BLOCK) * num_keys * BLOCK + key / BLOCK * STEP_SIZE +
                            column % BLOCK / TILE * TILE_SIZE;
            pack_row_pair(
                elements_of(key), elements_of(key + 1), first_lanes(head_size - column), key % BLOCK / 2, tile);
        }
}

// Replaces the products of a query with its keys by cap * tanh(product * scale / cap) / scale.
void apply_softcap(float* products, int num_keys, const AttentionArgs& args) {
    const Vector inner = broadcast(args.scale / args.soft_cap), outer = broadcast(args.soft_cap / args.scale);
    for (int key = 0; key < num_keys; key += LANES)
        store(products + key, mul(tanh(mul(load(products + key), inner)), outer));
}

// Writes the unnormalized softmax weights exp(scale * (product - largest product)) of one query's keys and returns
// their sum. The weights of keys outside of [first, end) are zero.
float exp_weights(
    const float* products, int first, int end, int num_keys, const AttentionArgs& args, operand* weights) {
    Vector maxima = broadcast(-std::numeric_limits<float>::infinity());
    auto visible = [&](int key) { return lanes_between(first - key, end - key); };
    const int begin = first / LANES * LANES;
    for (int key = begin; key < end; key += LANES) maxima = max_in(visible(key), maxima, load(products + key));
    const Vector largest = broadcast(largest_of(maxima)), scale = broadcast(args.scale * LOG2_E);
    Vector sum = zeros();
    if (begin) std::memset(weights, 0, sizeof(operand) * begin);
    for (int key = begin; key < num_keys; key += LANES) {
        const Vector difference = sub(load(products + key), largest);
        const Vector exponentials = select(visible(key), exp2(mul(difference, scale)));
        sum = add(sum, exponentials);
        store(weights + key, exponentials);
    }
    return sum_of(sum);
}

// Copies up to BLOCK queries of one head, padded with zeros to [BLOCK, size].
void copy_queries(const AttentionArgs& args, std::int64_t token, int count, int head, int size, operand* queries) {
    std::memset(queries, 0, sizeof(operand) * BLOCK * size);
    for (int query = 0; query < count; ++query)
        copy_elements(head_of(args.query, token + query, head), args.head_size, queries + query * size);
}

// Divides the weighted sums of values by the sums of the weights and writes them.
void write_output(
    const AttentionArgs& args, const float* sums, int size, int count, const float* weight_sums, state* output) {
    const std::int64_t stride = std::int64_t(args.num_heads) * args.head_size;
    for (int query = 0; query < count; ++query) {
        const Vector factor = broadcast(1.0f / weight_sums[query]);
        for (int column = 0; column < args.head_size; column += LANES)
            store(
                output + query * stride + column, mul(load(sums + query * size + column), factor),
                first_lanes(args.head_size - column));
    }
}

// Up to TILE_ROWS queries of a task, with the keys that any of them attends to. Keys are counted from the task's first key,
// which `TaskBuffers` begin with; `position` is the first query's.
struct QueryBlock {
    std::int64_t token;  // of the first query in the packed batch
    int count, position, begin_key, num_keys;
};

QueryBlock query_block(const AttentionArgs& args, const Task& task, int first, int position) {
    const int count = std::min(TILE_ROWS, task.num_queries - first);
    // Queries attend to keys up to their own; whole blocks of keys outside of every query's window are skipped.
    const int begin_key = args.window ? std::max(0, position - args.window + 1) / BLOCK * BLOCK : 0;
    const int num_keys = (position + count - begin_key + BLOCK - 1) / BLOCK * BLOCK;
    return {task.sequence->own_begin + task.first_query + first, count, position, begin_key, num_keys};
}

// Attention of one head for a block of queries; `num_task_keys` and `size` are the dimensions of the buffers.
void attend_head(
    const AttentionArgs& args, const QueryBlock& block, int head, int num_task_keys, int size,
    const TaskBuffers& buffers) {
    const int count = block.count, num_keys = block.num_keys;
    copy_queries(args, block.token, count, head, size, buffers.queries);
    for (int key = 0; key < num_keys; key += BLOCK)
        multiply(
            buffers.queries, size, buffers.keys + std::size_t(block.begin_key + key) * size, size / BLOCK, count,
            buffers.scores + key, num_keys);
    float weight_sums[BLOCK];
    for (int query = 0; query < count; ++query) {
        const int own = block.position + query - block.begin_key;
        const int first = args.window ? std::max(0, own - args.window + 1) : 0;
        float* products = buffers.scores + std::size_t(query) * num_keys;
        if (args.soft_cap > 0) apply_softcap(products, num_keys, args);
        weight_sums[query] =
            exp_weights(products, first, own + 1, num_keys, args, buffers.weights + std::size_t(query) * num_keys);
    }
    if (count < BLOCK)
        std::memset(
            buffers.weights + std::size_t(count) * num_keys, 0, sizeof(operand) * (BLOCK - count) * num_keys);
    for (int column = 0; column < size; column += BLOCK)
        multiply(
            buffers.weights, num_keys,
            buffers.values + std::size_t(column) * num_task_keys + block.begin_key / BLOCK * STEP_SIZE,
            num_keys / BLOCK, count, buffers.sums + column, size);
    write_output(
        args, buffers.sums, size, count, weight_sums,
        args.output + (block.token * args.num_heads + head) * args.head_size);
}

void run_task(const AttentionArgs& args, const Task& task) {
    const int size = padded_head_size(args);
    const int position = task.sequence->num_shared + task.first_query;  // of the first query in the sequence
    const int end_key = position + task.num_queries;
    const int begin_key = args.window ? std::max(0, position - args.window + 1) / BLOCK * BLOCK : 0;
    const int num_keys = (end_key - begin_key + BLOCK - 1) / BLOCK * BLOCK;
    const TaskBuffers buffers(num_keys, size);
    find_rows(args, task, begin_key, end_key, num_keys, buffers);
    pack_keys(buffers.key_rows, num_keys, args.head_size, size, buffers.keys);
    pack_values(buffers.value_rows, num_keys, args.head_size, size, buffers.values);

    const int group_size = args.num_heads / args.num_kv_heads;  // query heads of one key head
    for (int first = 0; first < task.num_queries; first += TILE_ROWS) {
        const QueryBlock block = query_block(args, task, first, position + first - begin_key);
        for (int head = task.kv_head * group_size; head < (task.kv_head + 1) * group_size; ++head)
            attend_head(args, block, head, num_keys, size, buffers);
    }
}

// Returns all tasks, the most expensive first, so that threads end at about the same time.
std::vector<Task> plan_tasks(const AttentionArgs& args) {
    std::vector<Task> tasks;
    for (int index = 0; index < args.num_sequences; ++index) {
        const SequenceSpan& sequence = args.sequences[index];
        for (int first = 0; first < sequence.num_own; first += TASK_QUERIES)
            for (int head = 0; head < args.num_kv_heads; ++head)
                tasks.push_back({&sequence, first, std::min(TASK_QUERIES, sequence.num_own - first), head});
    }
    auto cost = [](const Task& task) {
        return std::int64_t(task.num_queries) * (task.sequence->num_shared + task.first_query + task.num_queries);
    };
    std::stable_sort(
        tasks.begin(), tasks.end(), [&](const Task& one, const Task& other) { return cost(one) > cost(other); });
    return tasks;
}

}  // namespace

extern "C" {

// Attention of all sequences; tokens that belong to no sequence are not written.
void attention(const AttentionArgs* args) {
    const auto tasks = plan_tasks(*args);
#pragma omp parallel num_threads(args->num_threads)
    {
        const ThreadConfig config;
#pragma omp for schedule(dynamic)
        for (std::size_t task = 0; task < tasks.size(); ++task) run_task(*args, tasks[task]);
    }
}

}
