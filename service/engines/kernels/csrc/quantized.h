// Linear layers in int8: weights and rows are integers, and each 32 numbers of a row or a column share a scale.
//
// A scale is the largest magnitude of its 32 numbers over 127, as in block-wise quantization (Dettmers et al., arXiv
// 2110.02861), so that the few channels that tower above the rest coarsen their neighbours alone. Rows are stored with 128
// added, since the CPU multiplies unsigned with signed integers; what that adds to a sum is known and subtracted. Sums
// of 32 products are exact, their scaled sum is fp32.
#pragma once

#include "products.h"

constexpr int STEPS_AT_ONCE = 32;  // of the inner dimension at most: what of a panel stays in the first-level cache
constexpr int QUAD = 4;
constexpr int MIDDLE = 128;

// The 32 numbers that share a scale.
struct Group {
    __m512 first, second;
    float scale;  // NaN where a number is not finite

    template <class Number>
    explicit Group(const Number* numbers) : Group(load(numbers, ALL), load(numbers + LANES, ALL)) {}

    Group(__m512 first_half, __m512 second_half) : first(first_half), second(second_half) {
        // As integers magnitudes are in the same order, and those that are not finite come last.
        const __m512i sizes[] = {_mm512_castps_si512(_mm512_abs_ps(first)), _mm512_castps_si512(_mm512_abs_ps(second))};
        const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(sizes[0], sizes[1]));
        float top;
        std::memcpy(&top, &bits, sizeof(top));
        scale = top < std::numeric_limits<float>::infinity() ? top * (1 / 127.0f) : std::numeric_limits<float>::quiet_NaN();
        inverse_ = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    }
    __m512i first_integers() const { return _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse_)); }
    __m512i second_integers() const { return _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse_)); }

private:
    static constexpr __mmask16 ALL = 0xFFFF;
    __m512 inverse_;
};

// One group of a panel's 32 columns.
struct Columns {
    std::int8_t* integers;
    float* scales;
    std::int32_t* offsets;
};

// A panel: integers [number / 4][column][4], scales [group][column], what is subtracted [group][column].
struct Panel {
    std::int8_t* integers;
    float* scales;
    std::int32_t* offsets;

    Panel(std::uint8_t* bytes, int width)
        : integers(reinterpret_cast<std::int8_t*>(bytes)),
          scales(reinterpret_cast<float*>(bytes + std::size_t(width) * BLOCK)),
          offsets(reinterpret_cast<std::int32_t*>(scales + width)) {}

    Columns group(int first) const {
        return {integers + std::size_t(first) * BLOCK, scales + first, offsets + first};
    }
};

inline std::size_t panel_bytes(int width) {
    return std::size_t(width) * (BLOCK + sizeof(float) + sizeof(std::int32_t));
}

// Quantizes one row of a weight into one column of a panel; a row that is missing is zeros.
inline void pack_column(const bf16* weights, int width, int column, const Panel& panel) {
    static const bf16 missing[BLOCK] = {};
    for (int first = 0; first < width; first += BLOCK) {
        const Group group(weights ? weights + first : missing);
        const Columns columns = panel.group(first);
        alignas(64) std::int32_t integers[BLOCK];
        _mm512_store_si512(integers, group.first_integers());
        _mm512_store_si512(integers + LANES, group.second_integers());
        std::int32_t sum = 0;
        for (int place = 0; place < BLOCK; ++place) {
            columns.integers[(place / QUAD * BLOCK + column) * QUAD + place % QUAD] = std::int8_t(integers[place]);
            sum += integers[place];
        }
        columns.scales[column] = group.scale;
        columns.offsets[column] = -MIDDLE * sum;
    }
}

// Packs 32 rows of a weight from two places, 16 of each, as one panel.
inline void pack_panel(
    const bf16* first, int num_first, const bf16* second, int num_second, int width, std::uint8_t* bytes) {
    const Panel panel(bytes, width);
    for (int row = 0; row < TILE; ++row) {
        pack_column(row < num_first ? first + std::size_t(row) * width : nullptr, width, row, panel);
        pack_column(row < num_second ? second + std::size_t(row) * width : nullptr, width, TILE + row, panel);
    }
}

// Rows in integers, in this thread's scratch memory, filled up to whole strips.
class Rows {
public:
    template <class Number>
    Rows(const Number* states, int num_rows, int width) : width_(width), num_groups_(width / BLOCK) {
        static thread_local Scratch scratch;
        const std::size_t num_filled = (num_rows + STRIP - 1) / STRIP * STRIP;
        const std::size_t scale_bytes = sizeof(float) * num_filled * num_groups_;
        auto* bytes = static_cast<std::uint8_t*>(scratch.bytes(scale_bytes + num_filled * width));
        scales_ = reinterpret_cast<float*>(bytes);
        integers_ = bytes + scale_bytes;
        for (int row = 0; row < num_rows; ++row) quantize(states + std::size_t(row) * width, row);
        std::memset(integers_ + std::size_t(num_rows) * width, MIDDLE, (num_filled - num_rows) * width);
        std::fill(scales_ + std::size_t(num_rows) * num_groups_, scales_ + num_filled * num_groups_, 0.0f);
    }
    int width() const { return width_; }
    const std::uint8_t* integers(int row) const { return integers_ + std::size_t(row) * width_; }
    const float* scales(int row) const { return scales_ + std::size_t(row) * num_groups_; }

private:
    template <class Number>
    void quantize(const Number* states, int row) {
        const __m512i middle = _mm512_set1_epi32(MIDDLE);
        for (int first = 0; first < width_; first += BLOCK) {
            const Group group(states + first);
            scales_[std::size_t(row) * num_groups_ + first / BLOCK] = group.scale;
            auto* place = reinterpret_cast<__m128i*>(integers_ + std::size_t(row) * width_ + first);
            _mm_storeu_si128(place, _mm512_cvtepi32_epi8(_mm512_add_epi32(group.first_integers(), middle)));
            _mm_storeu_si128(place + 1, _mm512_cvtepi32_epi8(_mm512_add_epi32(group.second_integers(), middle)));
        }
    }

    int width_, num_groups_;
    std::uint8_t* integers_;
    float* scales_;
};

inline Rows rows_of(const bf16* states, int num_rows, int width) { return Rows(states, num_rows, width); }

// Some steps of a panel, as a product reads them.
class Part {
public:
    Part(const std::uint8_t* panel, int width, int first_step, int num_steps)
        : panel_(const_cast<std::uint8_t*>(panel), width), first_(first_step * BLOCK), end_(first_ + num_steps * BLOCK) {}

    // Writes the product with up to 32 rows from this one on, or adds to what stands there.
    template <class Meanwhile>
    void multiply(const Rows& rows, int row, int num_rows, float* sums, Meanwhile meanwhile) const {
        for (int strip = 0; strip < num_rows; strip += STRIP)
            for (int number = first_; number < end_; number += BLOCK)
                multiply_group(
                    rows.integers(row + strip) + number, rows.width(), rows.scales(row + strip) + number / BLOCK,
                    rows.width() / BLOCK, panel_.group(number), number > 0, sums + strip * BLOCK);
        for (int step = first_; step < end_; step += BLOCK) meanwhile(step);
    }

private:
    // One group of eight rows, with strides in numbers, times the same group of 32 columns.
    static void multiply_group(
        const std::uint8_t* rows, std::size_t stride, const float* scales, std::size_t scale_stride,
        const Columns& columns, bool adds, float* product) {
        __m512i sums[STRIP][2];
#pragma GCC unroll 8
        for (int line = 0; line < STRIP; ++line)
            for (int half = 0; half < 2; ++half) sums[line][half] = _mm512_load_si512(columns.offsets + half * TILE);
#pragma GCC unroll 8
        for (int quad = 0; quad < BLOCK / QUAD; ++quad) {
            const __m512i first = _mm512_load_si512(columns.integers + quad * BLOCK * QUAD);
            const __m512i second = _mm512_load_si512(columns.integers + quad * BLOCK * QUAD + TILE * QUAD);
#pragma GCC unroll 8
            for (int line = 0; line < STRIP; ++line) {
                std::int32_t numbers;
                std::memcpy(&numbers, rows + line * stride + quad * QUAD, sizeof(numbers));
                sums[line][0] = _mm512_dpbusd_epi32(sums[line][0], _mm512_set1_epi32(numbers), first);
                sums[line][1] = _mm512_dpbusd_epi32(sums[line][1], _mm512_set1_epi32(numbers), second);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 column_scales = _mm512_load_ps(columns.scales + half * TILE);
#pragma GCC unroll 8
            for (int line = 0; line < STRIP; ++line) {
                const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[line * scale_stride]), column_scales);
                float* place = product + line * BLOCK + half * TILE;
                const __m512 before = adds ? _mm512_load_ps(place) : _mm512_setzero_ps();
                _mm512_store_ps(place, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[line][half]), scale, before));
            }
        }
    }

    Panel panel_;
    int first_, end_;
};
