// The operands of linear layers in int8: quantized panels, quantized input rows and the product of both.
//
// Each group of 32 consecutive elements of an input row or of a weight row shares a scale: the group's largest
// magnitude over 127 (block-wise quantization, Dettmers et al., arXiv 2110.02861). An outlier channel therefore reduces
// the precision of its own group alone. Input rows are stored as uint8 with ZERO_POINT added, since VNNI multiplies
// unsigned by signed integers; what the zero point adds to a sum is precomputed for each column and subtracted. Sums of
// 32 products are exact integers; their scaled sum is fp32.
#pragma once

#include "gemm.h"

constexpr int MAX_SLICE_STEPS = 32;  // most steps in one slice of a panel: a slice must stay in the first-level cache
constexpr int QUAD = 4;  // int8 products that VNNI adds up in one lane
constexpr int ZERO_POINT = 128;

// The quantization of 32 elements that share a scale.
struct Group {
    __m512 first, second;
    float scale;  // NaN where an element is not finite

    template <class Element>
    explicit Group(const Element* elements) : Group(load(elements, ALL_LANES), load(elements + LANES, ALL_LANES)) {}

    Group(__m512 first_half, __m512 second_half) : first(first_half), second(second_half) {
        // Read as integers, magnitudes keep their order, and infinity and NaN are the largest.
        const __m512i magnitudes[] = {
            _mm512_castps_si512(_mm512_abs_ps(first)), _mm512_castps_si512(_mm512_abs_ps(second))};
        const int bits = _mm512_reduce_max_epi32(_mm512_max_epi32(magnitudes[0], magnitudes[1]));
        float largest;
        std::memcpy(&largest, &bits, sizeof(largest));
        const bool is_finite = largest < std::numeric_limits<float>::infinity();
        scale = is_finite ? largest * (1 / 127.0f) : std::numeric_limits<float>::quiet_NaN();
        inverse_ = _mm512_set1_ps(largest > 0 ? 127.0f / largest : 0.0f);
    }
    __m512i first_integers() const { return _mm512_cvtps_epi32(_mm512_mul_ps(first, inverse_)); }
    __m512i second_integers() const { return _mm512_cvtps_epi32(_mm512_mul_ps(second, inverse_)); }

private:
    static constexpr __mmask16 ALL_LANES = 0xFFFF;
    __m512 inverse_;
};

// One group of each of a panel's 32 columns.
struct PanelGroup {
    std::int8_t* integers;  // [element / 4][column][4]
    float* scales;  // [column]
    std::int32_t* corrections;  // [column]: minus ZERO_POINT times the sum of the column's integers
};

// A panel: the integers, scales and corrections of all its groups, each in an array of its own.
struct Panel {
    std::int8_t* integers;
    float* scales;
    std::int32_t* corrections;

    Panel(std::uint8_t* bytes, int width)
        : integers(reinterpret_cast<std::int8_t*>(bytes)),
          scales(reinterpret_cast<float*>(bytes + std::size_t(width) * BLOCK)),
          corrections(reinterpret_cast<std::int32_t*>(scales + width)) {}

    // The group that begins at this element, a multiple of 32; each group has 32 scales, so they share the offset.
    PanelGroup group(int element) const {
        return {integers + std::size_t(element) * BLOCK, scales + element, corrections + element};
    }
};

// Bytes of one panel of a weight of this width.
inline std::size_t panel_bytes(int width, PanelFormat /*format*/) {
    return std::size_t(width) * (BLOCK + sizeof(float) + sizeof(std::int32_t));
}

// Quantizes one weight row into one column of a panel; a null row is zeros.
inline void pack_column(const bf16* weights, int width, int column, const Panel& panel) {
    static const bf16 zeros[BLOCK] = {};
    for (int element = 0; element < width; element += BLOCK) {
        const Group group(weights ? weights + element : zeros);
        const PanelGroup packed = panel.group(element);
        alignas(64) std::int32_t integers[BLOCK];
        _mm512_store_si512(integers, group.first_integers());
        _mm512_store_si512(integers + LANES, group.second_integers());
        std::int32_t sum = 0;
        for (int index = 0; index < BLOCK; ++index) {
            packed.integers[(index / QUAD * BLOCK + column) * QUAD + index % QUAD] = std::int8_t(integers[index]);
            sum += integers[index];
        }
        packed.scales[column] = group.scale;
        packed.corrections[column] = -ZERO_POINT * sum;
    }
}

// Packs two groups of up to 16 weight rows each as the 32 columns of one panel; missing rows are zeros.
inline void pack_panel(
    const bf16* first, int num_first, const bf16* second, int num_second, int width, PanelFormat /*format*/,
    std::uint8_t* bytes) {
    const Panel panel(bytes, width);
    for (int row = 0; row < TILE; ++row) {
        pack_column(row < num_first ? first + std::size_t(row) * width : nullptr, width, row, panel);
        pack_column(row < num_second ? second + std::size_t(row) * width : nullptr, width, TILE + row, panel);
    }
}

// The quantized input rows of a product in this thread's scratch memory, padded to a multiple of STRIP rows.
class InputRows {
public:
    template <class Element>
    InputRows(const Element* states, int num_rows, int width) : width_(width), num_groups_(width / BLOCK) {
        static thread_local ScratchBuffer buffer;
        const std::size_t num_padded = (num_rows + STRIP - 1) / STRIP * STRIP;
        const std::size_t scale_bytes = sizeof(float) * num_padded * num_groups_;
        auto* bytes = static_cast<std::uint8_t*>(buffer.reserve(scale_bytes + num_padded * width));
        scales_ = reinterpret_cast<float*>(bytes);
        integers_ = bytes + scale_bytes;
        for (int row = 0; row < num_rows; ++row) quantize(states + std::size_t(row) * width, row);
        std::memset(integers_ + std::size_t(num_rows) * width, ZERO_POINT, (num_padded - num_rows) * width);
        std::fill(scales_ + std::size_t(num_rows) * num_groups_, scales_ + num_padded * num_groups_, 0.0f);
    }
    template <class Element>
    static InputRows written(const Element* rows, int num_rows, int width) {
        return InputRows(rows, num_rows, width);
    }
    int width() const { return width_; }
    const std::uint8_t* integers(int row) const { return integers_ + std::size_t(row) * width_; }
    const float* scales(int row) const { return scales_ + std::size_t(row) * num_groups_; }

private:
    template <class Element>
    void quantize(const Element* states, int row) {
        const __m512i zero_point = _mm512_set1_epi32(ZERO_POINT);
        for (int element = 0; element < width_; element += BLOCK) {
            const Group group(states + element);
            scales_[std::size_t(row) * num_groups_ + element / BLOCK] = group.scale;
            auto* output = reinterpret_cast<__m128i*>(integers_ + std::size_t(row) * width_ + element);
            _mm_storeu_si128(output, _mm512_cvtepi32_epi8(_mm512_add_epi32(group.first_integers(), zero_point)));
            _mm_storeu_si128(output + 1, _mm512_cvtepi32_epi8(_mm512_add_epi32(group.second_integers(), zero_point)));
        }
    }

    int width_, num_groups_;
    std::uint8_t* integers_;
    float* scales_;
};

// The input rows of bfloat16 states [num_rows, width].
inline InputRows input_rows(const bf16* states, int num_rows, int width) { return InputRows(states, num_rows, width); }

// Consecutive steps of a panel, as operands of a product; a step is one group.
class PanelSlice {
public:
    PanelSlice(const std::uint8_t* panel, int width, PanelFormat /*format*/, int first_step, int num_steps)
        : panel_(const_cast<std::uint8_t*>(panel), width),
          begin_(first_step * BLOCK),
          end_(begin_ + num_steps * BLOCK) {}

    // Writes the product with `num_rows` rows of a tile; slices after the first add to it.
    template <class Interleave>
    void multiply(
        const InputRows& rows, int tile, int /*num_tiles*/, int num_rows, float* product, Interleave interleave) const {
        const int row = tile * TILE_ROWS;
        for (int strip = 0; strip < num_rows; strip += STRIP)
            for (int element = begin_; element < end_; element += BLOCK)
                multiply_group(
                    rows.integers(row + strip) + element, rows.width(), rows.scales(row + strip) + element / BLOCK,
                    rows.width() / BLOCK, panel_.group(element), element > 0, product + strip * BLOCK);
        for (int element = begin_; element < end_; element += BLOCK) interleave((element - begin_) / BLOCK);
    }

private:
    // Multiplies one group of eight rows by the same group of 32 columns. Strides are in elements.
    static void multiply_group(
        const std::uint8_t* rows, std::size_t stride, const float* scales, std::size_t scale_stride,
        const PanelGroup& columns, bool accumulate, float* product) {
        __m512i sums[STRIP][2];
#pragma GCC unroll 8
        for (int row = 0; row < STRIP; ++row)
            for (int half = 0; half < 2; ++half) sums[row][half] = _mm512_load_si512(columns.corrections + half * TILE);
#pragma GCC unroll 8
        for (int quad = 0; quad < BLOCK / QUAD; ++quad) {
            const __m512i first = _mm512_load_si512(columns.integers + quad * BLOCK * QUAD);
            const __m512i second = _mm512_load_si512(columns.integers + quad * BLOCK * QUAD + TILE * QUAD);
#pragma GCC unroll 8
            for (int row = 0; row < STRIP; ++row) {
                std::int32_t elements;
                std::memcpy(&elements, rows + row * stride + quad * QUAD, sizeof(elements));
                sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], _mm512_set1_epi32(elements), first);
                sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], _mm512_set1_epi32(elements), second);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 column_scales = _mm512_load_ps(columns.scales + half * TILE);
#pragma GCC unroll 8
            for (int row = 0; row < STRIP; ++row) {
                const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(scales[row * scale_stride]), column_scales);
                float* output = product + row * BLOCK + half * TILE;
                const __m512 before = accumulate ? _mm512_load_ps(output) : _mm512_setzero_ps();
                _mm512_store_ps(output, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[row][half]), scale, before));
            }
        }
    }

    Panel panel_;
    int begin_, end_;
};
