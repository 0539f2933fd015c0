// Causal attention within each sequence of a packed row, whose keys may stand in several pieces of it.
//
// A task is some queries of one sequence with all query heads that share one head of keys. Keys come in blocks of 32
// counted from the sequence's beginning, and what a query must not see counts zero, so a query's result depends on its
// own keys alone: not on which queries are asked for, nor on where in the row anything stands.

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "products.h"
#include "scratch.h"

namespace {

constexpr int QUERIES_OF_TASK = 256;

thread_local Scratch task_scratch;

// A sequence as `packing.py` lays it out: its own tokens in the row, how many stand before them, its pieces.
struct Strand {
    std::int32_t own_begin, num_own, num_shared, first_span, num_spans;
};

struct Span {
    std::int32_t begin, end;
};

// States [tokens, heads, numbers], with strides in numbers.
struct Heads {
    const bf16* states;
    std::int64_t token_stride, head_stride;

    const bf16* at(std::int64_t token, int head) const { return states + token * token_stride + head * head_stride; }
};

struct Task {
    const Strand* strand;
    int first_query, num_queries, key_head;
};

struct Work {
    Heads query, key, value;
    bf16* output;
    int num_heads, num_key_heads, head_size;
    const Span* spans;
    float scale, soft_cap;
    int window;

    int filled_size() const { return (head_size + BLOCK - 1) / BLOCK * BLOCK; }
};

std::size_t in_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// What a task works on, cut out of its thread's scratch memory.
struct Desk {
    operand *keys, *values, *queries, *weights;
    float *scores, *sums;
    const bf16** key_rows;
    const bf16** value_rows;

    Desk(int num_keys, int size) {
        const std::size_t panel = in_lines(sizeof(operand) * num_keys * size);
        const std::size_t square = in_lines(sizeof(float) * BLOCK * num_keys);
        const std::size_t block = in_lines(sizeof(float) * BLOCK * size);
        const std::size_t rows = in_lines(sizeof(bf16*) * num_keys);
        auto* place = static_cast<std::uint8_t*>(task_scratch.bytes(2 * panel + 2 * square + 2 * block + 2 * rows));
        auto cut = [&place](std::size_t bytes) { return std::exchange(place, place + bytes); };
        keys = reinterpret_cast<operand*>(cut(panel));
        values = reinterpret_cast<operand*>(cut(panel));
        weights = reinterpret_cast<operand*>(cut(square));
        scores = reinterpret_cast<float*>(cut(square));
        queries = reinterpret_cast<operand*>(cut(block));
        sums = reinterpret_cast<float*>(cut(block));
        key_rows = reinterpret_cast<const bf16**>(cut(rows));
        value_rows = reinterpret_cast<const bf16**>(cut(rows));
    }
};

// Finds the tokens from `oldest` up to `newest` of a sequence in the row; null where there is none, up to num_keys.
void find_rows(const Work& work, const Task& task, int oldest, int newest, int num_keys, const Desk& desk) {
    int depth = 0, found = 0;
    for (int piece = 0; piece < task.strand->num_spans; ++piece) {
        const Span span = work.spans[task.strand->first_span + piece];
        const int length = span.end - span.begin;
        for (int place = std::max(0, oldest - depth); place < length && depth + place < newest; ++place) {
            desk.key_rows[found] = work.key.at(span.begin + place, task.key_head);
            desk.value_rows[found] = work.value.at(span.begin + place, task.key_head);
            ++found;
        }
        depth += length;
    }
    std::fill(desk.key_rows + found, desk.key_rows + num_keys, nullptr);
    std::fill(desk.value_rows + found, desk.value_rows + num_keys, nullptr);
}

// Packs the keys as the right-hand side of query times key: columns are keys.
void pack_keys(const bf16* const* rows, int num_keys, int head_size, int size, operand* panels) {
    alignas(64) bf16 filled[TILE][BLOCK];
    for (int first = 0; first < num_keys; first += TILE)
        for (int step = 0; step < size / BLOCK; ++step) {
            operand* tile = panels + std::size_t(first / BLOCK) * size * BLOCK + step * STEP_NUMBERS +
                         first % BLOCK / TILE * STEP_NUMBERS / 2;
            const int present = std::min(BLOCK, head_size - step * BLOCK);
            const bf16* lines[TILE];
            for (int row = 0; row < TILE; ++row) {
                const bf16* line = rows[first + row] ? rows[first + row] + step * BLOCK : nullptr;
                if (line && present < BLOCK) {
                    std::memset(filled[row], 0, sizeof(filled[row]));
                    std::memcpy(filled[row], line, sizeof(bf16) * present);
                    line = filled[row];
                }
                lines[row] = line;
            }
            pack_tile(lines, tile);
        }
}

// Packs the values as the right-hand side of weights times values: columns are numbers of a head.
void pack_values(const bf16* const* rows, int num_keys, int head_size, int size, operand* panels) {
    for (int key = 0; key < num_keys; key += 2)
        for (int column = 0; column < size; column += LANES) {
            const __mmask16 lanes = first_lanes(head_size - column);
            auto read = [&](const bf16* row) {
                return row ? _mm256_maskz_loadu_epi16(lanes, row + column) : _mm256_setzero_si256();
            };
            const __m512i even = _mm512_cvtepu16_epi32(read(rows[key]));
            const __m512i odd = _mm512_cvtepu16_epi32(read(rows[key + 1]));
            operand* tile = panels + std::size_t(column / BLOCK) * num_keys * BLOCK + key / BLOCK * STEP_NUMBERS +
                            column % BLOCK / TILE * STEP_NUMBERS / 2;
            put_pairs(tile, key % BLOCK / 2, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
        }
}

// Bends the products of a query and its keys to cap * tanh(product * scale / cap), which is divided by the scale again.
void bend(float* products, int num_keys, const Work& work) {
    const __m512 inner = _mm512_set1_ps(work.scale / work.soft_cap), outer = _mm512_set1_ps(work.soft_cap / work.scale);
    for (int key = 0; key < num_keys; key += LANES) {
        const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(products + key), inner);
        _mm512_storeu_ps(products + key, _mm512_mul_ps(hyperbolic_tangent(scaled), outer));
    }
}

// Turns one query's products with its keys into weights that are not yet divided by their sum, and returns that sum.
// What lies outside of [first, end) weighs zero.
float weigh(const float* products, int first, int end, int num_keys, const Work& work, operand* weights) {
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    auto seen = [&](int key) { return __mmask16(first_lanes(end - key) & ~first_lanes(first - key)); };
    const int begin = first / LANES * LANES;
    for (int key = begin; key < end; key += LANES)
        largest = _mm512_mask_max_ps(largest, seen(key), largest, _mm512_loadu_ps(products + key));
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest)), scale = _mm512_set1_ps(work.scale * LOG2_OF_E);
    __m512 sum = _mm512_setzero_ps();
    if (begin) std::memset(weights, 0, sizeof(operand) * begin);
    for (int key = begin; key < num_keys; key += LANES) {
        const __m512 below = _mm512_sub_ps(_mm512_loadu_ps(products + key), top);
        const __m512 numbers = _mm512_maskz_mov_ps(seen(key), power_of_two(_mm512_mul_ps(below, scale)));
        sum = _mm512_add_ps(sum, numbers);
        store(weights + key, numbers);
    }
    return _mm512_reduce_add_ps(sum);
}

// Copies up to 32 queries of one head, filled up with zeros.
void copy_queries(const Work& work, std::int64_t token, int count, int head, int size, operand* queries) {
    std::memset(queries, 0, sizeof(operand) * BLOCK * size);
    for (int query = 0; query < count; ++query)
        copy_numbers(work.query.at(token + query, head), work.head_size, queries + query * size);
}

void write_output(const Work& work, const float* sums, int size, int count, const float* totals, bf16* output) {
    const std::int64_t stride = std::int64_t(work.num_heads) * work.head_size;
    for (int query = 0; query < count; ++query) {
        const __m512 share = _mm512_set1_ps(1.0f / totals[query]);
        for (int column = 0; column < work.head_size; column += LANES)
            store(
                output + query * stride + column, _mm512_mul_ps(_mm512_loadu_ps(sums + query * size + column), share),
                first_lanes(work.head_size - column));
    }
}

void attend_task(const Work& work, const Task& task) {
    const int size = work.filled_size();
    const int depth = task.strand->num_shared + task.first_query;
    const int newest = depth + task.num_queries;
    const int oldest = work.window ? std::max(0, depth - work.window + 1) / BLOCK * BLOCK : 0;
    const int num_keys = (newest - oldest + BLOCK - 1) / BLOCK * BLOCK;
    const Desk desk(num_keys, size);
    find_rows(work, task, oldest, newest, num_keys, desk);
    pack_keys(desk.key_rows, num_keys, work.head_size, size, desk.keys);
    pack_values(desk.value_rows, num_keys, work.head_size, size, desk.values);

    const int sharers = work.num_heads / work.num_key_heads;
    for (int first = 0; first < task.num_queries; first += BLOCK) {
        const int count = std::min(BLOCK, task.num_queries - first);
        const std::int64_t token = task.strand->own_begin + task.first_query + first;
        // These queries see keys up to their own; blocks of keys out of the window of all of them are left out.
        const int last_key = depth + first + count - oldest;
        const int begin_key =
            work.window ? std::max(0, depth + first - work.window + 1 - oldest) / BLOCK * BLOCK : 0;
        const int keys = (last_key - begin_key + BLOCK - 1) / BLOCK * BLOCK;
        for (int head = task.key_head * sharers; head < (task.key_head + 1) * sharers; ++head) {
            copy_queries(work, token, count, head, size, desk.queries);
            for (int key = 0; key < keys; key += BLOCK)
                multiply(
                    desk.queries, size, desk.keys + std::size_t(begin_key + key) * size, size / BLOCK,
                    count, desk.scores + key, keys);
            float totals[BLOCK];
            for (int query = 0; query < count; ++query) {
                const int own = depth + first + query - oldest - begin_key;
                const int eldest = work.window ? std::max(0, own - work.window + 1) : 0;
                float* products = desk.scores + std::size_t(query) * keys;
                if (work.soft_cap > 0) bend(products, keys, work);
                totals[query] =
                    weigh(products, eldest, own + 1, keys, work, desk.weights + std::size_t(query) * keys);
            }
            if (count < BLOCK)
                std::memset(desk.weights + std::size_t(count) * keys, 0, sizeof(operand) * (BLOCK - count) * keys);
            for (int column = 0; column < size; column += BLOCK)
                multiply(
                    desk.weights, keys,
                    desk.values + std::size_t(column) * num_keys + begin_key / BLOCK * STEP_NUMBERS, keys / BLOCK,
                    count, desk.sums + column, size);
            write_output(
                work, desk.sums, size, count, totals,
                work.output + (token * work.num_heads + head) * work.head_size);
        }
    }
}

std::vector<Task> tasks_of(const Strand* strands, int num_strands, int num_key_heads) {
    std::vector<Task> tasks;
    for (int strand = 0; strand < num_strands; ++strand)
        for (int first = 0; first < strands[strand].num_own; first += QUERIES_OF_TASK)
            for (int head = 0; head < num_key_heads; ++head)
                tasks.push_back(
                    {&strands[strand], first, std::min(QUERIES_OF_TASK, strands[strand].num_own - first), head});
    auto cost = [](const Task& task) {
        return std::int64_t(task.num_queries) * (task.strand->num_shared + task.first_query + task.num_queries);
    };
    std::stable_sort(
        tasks.begin(), tasks.end(), [&](const Task& one, const Task& other) { return cost(one) > cost(other); });
    return tasks;
}

}  // namespace

extern "C" {

// Attention of all strands; output is [tokens, heads, head size]. `window`: keys that a query sees, 0: all before it;
// `soft_cap`: scores are bent to cap * tanh(score / cap), 0: not at all.
void attend(
    const bf16* query, std::int64_t query_token, std::int64_t query_head, const bf16* key, std::int64_t key_token,
    std::int64_t key_head, const bf16* value, std::int64_t value_token, std::int64_t value_head, bf16* output,
    int num_heads, int num_key_heads, int head_size, const std::int32_t* strands, int num_strands,
    const std::int32_t* spans, float scale, int window, float soft_cap, int num_threads) {
    const Work work{
        {query, query_token, query_head},
        {key, key_token, key_head},
        {value, value_token, value_head},
        output,
        num_heads,
        num_key_heads,
        head_size,
        reinterpret_cast<const Span*>(spans),
        scale,
        soft_cap,
        window};
    const auto tasks = tasks_of(reinterpret_cast<const Strand*>(strands), num_strands, num_key_heads);
#pragma omp parallel num_threads(num_threads)
    {
        const Unit unit;
#pragma omp for schedule(dynamic)
        for (std::size_t task = 0; task < tasks.size(); ++task) attend_task(work, tasks[task]);
    }
}

}
