// softmax(q k^T / sqrt(d)) v for whole rows of scores, in fp32.
#pragma once
#include "product.h"

namespace lowkernels::LOWKERNELS_ISA {

// One image's heads: `qkv` holds, for every token, q | k | v of head 0, then of head 1, and so on.
struct Heads {
    const float* qkv;
    i64 tokens, pitch, dim, count;

    i64 scores_pitch() const { return round_up(tokens, NW) + VL; }
    i64 key_floats() const { return round_up(tokens, NW) * dim; }
    i64 value_floats() const { return round_up(dim, NW) * tokens; }
    i64 packed_floats() const { return key_floats() + value_floats(); }
    const float* of(i64 head) const { return qkv + 3 * dim * head; }
};

// Keys as panels of tokens, values as panels of channels, as the register tile reads its second operand.
LK_INLINE void pack_head(const Heads& heads, i64 head, float* keys) {
    const i64 d = heads.dim;
    float* values = keys + heads.key_floats();
    for (i64 t0 = 0; t0 < heads.tokens; t0 += NW) {
        const i64 width = panel_width(heads.tokens, t0 / NW), valid = smaller(width, heads.tokens - t0);
        for (i64 i = 0; i < d; ++i, keys += width) {
            for (i64 t = 0; t < valid; ++t) keys[t] = heads.of(head)[(t0 + t) * heads.pitch + d + i];
            for (i64 t = valid; t < width; ++t) keys[t] = 0;
        }
    }
    for (i64 i0 = 0; i0 < d; i0 += NW) {
        const i64 width = panel_width(d, i0 / NW), valid = smaller(width, d - i0);
        for (i64 t = 0; t < heads.tokens; ++t, values += width) {
            const float* from = heads.of(head) + t * heads.pitch + 2 * d + i0;
            for (i64 i = 0; i < valid; ++i) values[i] = from[i];
            for (i64 i = valid; i < width; ++i) values[i] = 0;
        }
    }
}

// exp(scale * (row - max)) in place; returns the sum. Padding columns hold -infinity and become nothing.
LK_INLINE float exponentials(float* row, i64 padded, float scale) {
    V highest = load(row);
    for (i64 i = VL; i < padded; i += VL) highest = maximum(load(row + i), highest);
    const float top = across(highest, [](V a, V b) { return maximum(a, b); });
    V total = {};
    i64 i = 0;
    for (; i + 4 * VL <= padded; i += 4 * VL) {
        Vs<4> e;
        for (int j = 0; j < 4; ++j) e.v[j] = (load(row + i + j * VL) - top) * scale;
        e = exponential(e);
        for (int j = 0; j < 4; ++j) store(row + i + j * VL, e.v[j]), total += e.v[j];
    }
    for (; i < padded; i += VL) {
        V e = exponential((load(row + i) - top) * scale);
        store(row + i, e);
        total += e;
    }
    return across(total, [](V a, V b) { return a + b; });
}

// Tokens [begin, begin + count) of one head, count <= MR. use(token, values, width, channel) receives the results, token by token,
// in pieces of `width` floats of which those below `dim` count.
template <class F>
void attend(const Heads& heads, i64 head, const float* packed, i64 begin, i64 count, float* scores, const F& use) {
    alignas(64) float c[MR * NW];
    const i64 pitch = heads.scores_pitch(), tokens = heads.tokens, d = heads.dim;
    const float* values = packed + heads.key_floats();
    Prefetch none{nullptr, nullptr, 0};
    const Rows<float> queries{heads.of(head) + begin * heads.pitch, heads.pitch, 0, 1, int(d)};
    for (i64 t0 = 0; t0 < tokens; t0 += NW) {
        const int width = panel_width(tokens, t0 / NW);
        multiply<float>(int(count), width, queries, packed + t0 * d, c, none);
        for (i64 r = 0; r < count; ++r)
            for (int v = 0; v < width; v += VL) {
                const V x = load(c + r * width + v);
                // Columns beyond the tokens hold -infinity.
                store(scores + r * pitch + t0 + v, lanes() < std::int32_t(smaller(VL, tokens - t0 - v)) ? x : V{} - __builtin_inff());
            }
    }
    const i64 padded = round_up(tokens, VL);
    float inverse[MR];
    for (i64 r = 0; r < count; ++r) {
        inverse[r] = 1.0f / exponentials(scores + r * pitch, padded, 1.0f / __builtin_sqrtf(float(d)));
    }
    const Rows<float> weights{scores, pitch, 0, 1, int(tokens)};
    for (i64 i0 = 0; i0 < d; i0 += NW) {
        const int width = panel_width(d, i0 / NW);
        multiply<float>(int(count), width, weights, values + i0 * tokens, c, none);
        for (i64 r = 0; r < count; ++r) {
            for (int v = 0; v < width; v += VL) store(c + r * width + v, load(c + r * width + v) * inverse[r]);
            use(begin + r, c + r * width, smaller(width, d - i0), i0);
        }
    }
}

}  // namespace lowkernels::LOWKERNELS_ISA
