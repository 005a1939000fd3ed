// Products with their epilogue: bias, activation, residual, rounding.
#pragma once
#include "team.h"
#include "tile.h"

namespace lowkernels::LOWKERNELS_ISA {

// What rows of a product are made of: `runs` runs of `pixels` rows each; a run is `run` elements after the one before it.
template <class A>
struct Source {
    Rows<A> first;
    i64 run, runs, pixels;
};

// Where results go; the residual lies the same way. Only the first `columns` columns are written.
template <class T>
struct Target {
    T* data;
    const T* residual;
    i64 pixel, run, columns;
};

// The residual is added last; only the first `columns` columns are written.
template <class T, class R>
LK_INLINE void write(V x, T* to, const R* add, i64 columns) {
    if (VL <= columns) {
        if (add) x += load(add);
        return store(to, x);
    }
    float values[VL];
    store(values, x);
    for (int i = 0; i < columns; ++i) from_float(to + i, values[i] + (add ? to_float(add[i]) : 0.0f));
}

template <int ACT, class T, class R>
void finish(const float* c, i64 rows, int width, const float* bias, T* out, const R* residual, i64 pixel, i64 columns) {
    i64 r = 0;
    // Two rows at a time.
    for (; width == NW && columns >= NW && r + 2 <= rows; r += 2) {
        Vs<4> x;
        for (int i = 0; i < 4; ++i) x.v[i] = load(c + r * NW + i * VL) + load(bias + i % 2 * VL);
        x = activate<ACT, T>(x);
        for (int i = 0; i < 4 && residual; ++i) x.v[i] += load(residual + (r + i / 2) * pixel + i % 2 * VL);
        store(out + r * pixel, x.v[0], x.v[1]);
        store(out + (r + 1) * pixel, x.v[2], x.v[3]);
    }
    for (; r < rows; ++r) {
        for (int v = 0; v < width; v += VL)
            write(activate<ACT, T>(load(c + r * width + v) + load(bias + v)), out + r * pixel + v,
                  residual ? residual + r * pixel + v : nullptr, columns - v);
    }
}

template <int ACT>
struct Constant {
    static constexpr int value = ACT;
};

// f(Constant<act>()): the activation as a template argument.
template <class F>
LK_INLINE void with_activation(int act, const F& f) {
    switch (act) {
        case NONE: return f(Constant<NONE>());
        case RELU: return f(Constant<RELU>());
        case RELU6: return f(Constant<RELU6>());
        case HARDSWISH: return f(Constant<HARDSWISH>());
        case SILU: return f(Constant<SILU>());
        case GELU: return f(Constant<GELU>());
        case GELU_TANH: return f(Constant<GELU_TANH>());
    }
}

template <class T, class R>
void finish(int act, const float* c, i64 rows, int width, const float* bias, T* out, const R* residual, i64 pixel, i64 columns) {
    with_activation(act, [&](auto known) { finish<known.value>(c, rows, width, bias, out, residual, pixel, columns); });
}

LK_INLINE i64 panels_of(i64 columns) { return divide_up(columns, NW); }
LK_INLINE int panel_width(i64 columns, i64 panel) { return columns - panel * NW > VL ? NW : VL; }

template <class A>
LK_INLINE const A* panel_of(const Conv& conv, i64 panel) {
    return static_cast<const A*>(conv.weight) + panel * NW * conv.k * conv.k * conv.in;
}

template <class A>
LK_INLINE const A* winograd_panel(const Conv& conv, i64 panel) {
    return static_cast<const A*>(conv.winograd) + panel * NW * 16 * conv.in;
}

template <class A>
LK_INLINE Prefetch prefetch_panel(const Conv& conv, i64 panel) {
    if (panel < 0 || panel >= panels_of(conv.out)) return {nullptr, nullptr, 0};
    // Of a transformed convolution, its first slab.
    const char* p = reinterpret_cast<const char*>(conv.winograd ? winograd_panel<A>(conv, panel) : panel_of<A>(conv, panel));
    const i64 depth = conv.winograd ? conv.in : conv.k * conv.k * conv.in;
    return {p, p + panel_width(conv.out, panel) * depth * i64(sizeof(A)), 0};
}

// Asks for the panel a thread will probably begin with, while it still does something else.
template <class A>
LK_INLINE void warm(const Conv& conv, i64 first) {
    constexpr i64 enough = 64 << 10;
    const Prefetch panel = prefetch_panel<A>(conv, first);
    for (const char* p = panel.next; p < panel.end && p < panel.next + enough; p += 64) __builtin_prefetch(p, 0, 2);
}

// The tiles of a run, equally high.
template <class A>
LK_INLINE i64 tiles_of_run(const Source<A>& source) {
    return divide_up(source.pixels, MR);
}

// As many cache lines a step as it takes to be done when the last of these tiles is.
template <class A>
LK_INLINE void set_pace(Prefetch& prefetch, const Rows<A>& rows, i64 tiles) {
    const i64 steps = tiles * rows.segments * larger(1, rows.length / (4 * Operand<A>::step));
    prefetch.advance = smaller(4, divide_up(prefetch.end - prefetch.next, 64 * larger(1, steps))) * 64;
}

// Calls use(tile, rows, run, pixel) for the tiles [begin, end) of one panel of columns.
template <class A, class F>
LK_INLINE void panel_tiles(const Source<A>& source, const A* weight, int width, i64 begin, i64 end, Prefetch& prefetch, const F& use) {
    alignas(64) float c[MR * NW];
    const i64 per_run = tiles_of_run(source);
    set_pace(prefetch, source.first, end - begin);
    i64 run = begin / per_run, index = begin % per_run;
    for (i64 tile = begin; tile < end; ++tile) {
        i64 pixel = index * source.pixels / per_run;
        i64 rows = (index + 1) * source.pixels / per_run - pixel;
        Rows<A> a = source.first;
        a.data += run * source.run + pixel * a.pixel;
        multiply<A>(int(rows), width, a, weight, c, prefetch);
        use(c, rows, run, pixel);
        if (++index == per_run) index = 0, ++run;
    }
}

// One panel of columns of the product, tiles [begin, end) of its rows.
template <class A, class T>
void panel_product(const Source<A>& source, const Conv& conv, int act, const Target<T>& target, i64 panel, i64 begin, i64 end,
                   Prefetch prefetch) {
    const int width = panel_width(conv.out, panel);
    const i64 column = panel * NW;
    const i64 columns = smaller(width, target.columns - column);
    panel_tiles(source, panel_of<A>(conv, panel), width, begin, end, prefetch,
                [&](const float* c, i64 rows, i64 run, i64 pixel) {
                    i64 at = run * target.run + pixel * target.pixel + column;
                    finish(act, c, rows, width, conv.bias + column, target.data + at,
                           target.residual ? target.residual + at : nullptr, target.pixel, columns);
                });
}

// How many groups of row tiles make enough units for the team, given the number of panels.
LK_INLINE i64 groups_of(const Team& team, i64 panels, i64 tiles) {
    return team.size == 1 ? 1 : smaller(tiles, divide_up(4 * team.size, panels));
}

// The whole product by the team. While it runs, `then`'s first panels are prefetched.
template <class A, class T>
void product(Team& team, const Source<A>& source, const Conv& conv, int act, const Target<T>& target, const Conv* then = nullptr) {
    const i64 panels = panels_of(conv.out), tiles = tiles_of_run(source) * source.runs;
    const i64 groups = groups_of(team, panels, tiles);
    team.run(panels * groups, [&](i64 unit, i64 next) {
        i64 panel = unit / groups, group = unit % groups;
        Prefetch prefetch{nullptr, nullptr, 0};
        if (next >= 0) {
            if (next / groups != panel) prefetch = prefetch_panel<A>(conv, next / groups);
        } else if (then) {
            prefetch = prefetch_panel<A>(*then, team.rank);
        }
        panel_product(source, conv, act, target, panel, group * tiles / groups, (group + 1) * tiles / groups, prefetch);
    });
}

// `pixels` rows that follow one another, `stride` elements apart.
template <class A>
LK_INLINE Source<A> matrix(const A* data, i64 pixels, i64 stride, i64 depth) {
    return {{data, stride, 0, 1, int(depth)}, 0, 1, pixels};
}

// The projection of an expanded tensor by the team that has just made it, panel by panel. A long sum is two: of the first half of those
// panels and of the other, so that a team can leave every half where it was made and exchange sums, which are fewer. That depends on the
// depth alone, for the result must not depend on the team.
LK_INLINE i64 first_half(i64 depth) { return depth >= 384 ? panels_of(depth) / 2 * NW : depth; }

LK_INLINE i64 partial_floats(i64 depth, i64 pixels, i64 columns) {
    return first_half(depth) < depth ? 2 * pixels * round_up(columns, NW) : 0;
}

// `pixels` rows, `pitch` apart. `partial` has room for partial_floats and is seen by the whole team.
template <class A, class T>
void projection(Team& team, const A* expanded, i64 pixels, i64 pitch, const Conv& conv, int act, const Target<T>& target, float* partial) {
    const i64 depth = conv.in, half = first_half(depth), panels = panels_of(conv.out);
    if (half == depth) return product(team, matrix<A>(expanded, pixels, pitch, depth), conv, act, target);
    const Source<A> halves[2] = {matrix<A>(expanded, pixels, pitch, half), matrix<A>(expanded + half, pixels, pitch, depth - half)};
    // Rows from `pixel` on of one panel, whose sums are those of both halves.
    const auto finish_sum = [&](const float* first, const float* second, i64 panel, i64 pixel, i64 rows) {
        const int width = panel_width(conv.out, panel);
        const i64 column = panel * NW, at = pixel * target.pixel + column;
        alignas(64) float c[MR * NW];
        for (i64 i = 0; i < rows * width; i += VL) store(c + i, load(first + i) + load(second + i));
        finish(act, c, rows, width, conv.bias + column, target.data + at, target.residual ? target.residual + at : nullptr, target.pixel,
               smaller(width, target.columns - column));
    };
    if (team.size == 1) {
        for (i64 panel = 0; panel < panels; ++panel) {
            const int width = panel_width(conv.out, panel);
            const i64 tiles = divide_up(pixels, MR);
            const A* weight = panel_of<A>(conv, panel);
            Prefetch prefetch = prefetch_panel<A>(conv, panel + 1);
            set_pace(prefetch, matrix<A>(expanded, pixels, pitch, depth).first, tiles);
            for (i64 tile = 0; tile < tiles; ++tile) {
                alignas(64) float c[2][MR * NW];
                const i64 pixel = tile * pixels / tiles, rows = (tile + 1) * pixels / tiles - pixel;
                for (int i = 0; i < 2; ++i) {
                    Rows<A> a = halves[i].first;
                    a.data += pixel * pitch;
                    multiply<A>(int(rows), width, a, weight + i * half * width, c[i], prefetch);
                }
                finish_sum(c[0], c[1], panel, pixel, rows);
            }
        }
        return;
    }
    const i64 tiles = divide_up(pixels, MR), groups = smaller(tiles, divide_up(2 * team.size, panels)), pitch_out = panels * NW;
    // [half][panel][pixel][width]
    const auto sums = [&](i64 i, i64 panel) { return partial + i * pixels * pitch_out + panel * pixels * NW; };
    team.run(2 * panels * groups, [&](i64 unit, i64 next) {
        const i64 i = unit / (panels * groups), panel = unit / groups % panels, group = unit % groups;
        const int width = panel_width(conv.out, panel);
        const A* weight = panel_of<A>(conv, panel) + i * half * width;
        Prefetch prefetch{nullptr, nullptr, 0};
        if (next >= 0 && next / groups != unit / groups) {
            const i64 j = next / (panels * groups), after = next / groups % panels, row = panel_width(conv.out, after);
            const A* p = panel_of<A>(conv, after) + j * half * row;
            prefetch = {reinterpret_cast<const char*>(p), reinterpret_cast<const char*>(p + (j ? depth - half : half) * row), 0};
        }
        const i64 begin = group * tiles / groups, end = (group + 1) * tiles / groups;
        set_pace(prefetch, halves[i].first, end - begin);
        for (i64 tile = begin; tile < end; ++tile) {
            const i64 pixel = tile * pixels / tiles, rows = (tile + 1) * pixels / tiles - pixel;
            Rows<A> a = halves[i].first;
            a.data += pixel * pitch;
            multiply<A>(int(rows), width, a, weight, sums(i, panel) + pixel * width, prefetch);
        }
    });
    const i64 chunks = smaller(pixels, 8 * team.size);
    team.run(chunks, [&](i64 chunk, i64) {
        const i64 begin = chunk * pixels / chunks, end = (chunk + 1) * pixels / chunks;
        for (i64 panel = 0; panel < panels; ++panel) {
            const int width = panel_width(conv.out, panel);
            for (i64 from = begin; from < end; from += MR)
                finish_sum(sums(0, panel) + from * width, sums(1, panel) + from * width, panel, from, smaller(MR, end - from));
        }
    });
}

template <class A, class T>
LK_INLINE void convert(A* to, const T* from, i64 count) {
    i64 i = 0;
    for (; i + VL <= count; i += VL) store(to + i, load(from + i));
    for (; i < count; ++i) from_float(to + i, to_float(from[i]));
}

LK_INLINE void convert(float* to, const float* from, i64 count) { std::memcpy(to, from, count * sizeof(float)); }
LK_INLINE void convert(bf16* to, const bf16* from, i64 count) { std::memcpy(to, from, count * sizeof(bf16)); }

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Pixels [left, left + count) of image row y, zero outside the image, with `to_channels` channels each.
template <class A, class T>
void padded_row(A* to, const T* image, i64 h, i64 w, i64 c, i64 y, i64 left, i64 count, i64 to_channels) {
    if (y < 0 || y >= h) {
        std::memset(to, 0, count * to_channels * sizeof(A));
        return;
    }
    const i64 from = larger(left, 0), until = larger(smaller(left + count, w), from);
    std::memset(to, 0, (from - left) * to_channels * sizeof(A));
    A* inside = to + (from - left) * to_channels;
    const T* row = image + (y * w + from) * c;
    if (c == to_channels) {
        convert(inside, row, (until - from) * c);
    } else if (same<A, bf16> && same<T, bf16> && c == 3 && to_channels == 4) {
        // Photographs: eight pixels at a time, which are in the first 24 of 32 values, get a fourth channel.
        typedef std::uint16_t Values __attribute__((vector_size(64)));
        const Values places = {0,  1,  2,  32, 3,  4,  5,  32, 6,  7,  8,  32, 9,  10, 11, 32,
                               12, 13, 14, 32, 15, 16, 17, 32, 18, 19, 20, 32, 21, 22, 23, 32};
        for (i64 i = 0; i < until - from; i += 8) {
            const i64 left_over = until - from - i;
            Values pixels = {};
            std::memcpy(&pixels, row + 3 * i, 3 * left_over >= 32 ? 64 : 6 * smaller(8, left_over));
            pixels = __builtin_shuffle(pixels, Values{}, places);
            std::memcpy(inside + 4 * i, &pixels, 8 * smaller(8, left_over));
        }
    } else {
        for (i64 i = 0; i < until - from; ++i) {
            for (i64 j = 0; j < to_channels; ++j)
                from_float(inside + i * to_channels + j, j < c ? to_float(row[i * c + j]) : 0.0f);
        }
    }
    std::memset(inside + (until - from) * to_channels, 0, (left + count - until) * to_channels * sizeof(A));
}

// A k x k convolution's source: a window over rows of `row` elements, pixels of `channels`.
template <class A>
LK_INLINE Source<A> window(const A* data, i64 row, i64 channels, i64 k, i64 stride, i64 runs, i64 pixels) {
    return {{data, stride * channels, row, int(k), int(k * channels)}, stride * row, runs, pixels};
}

// Blocks of rows an image is cut into, so that one block's `row_bytes` * rows stay within the cache; whole images where they fit.
struct Blocks {
    i64 count, rows, height;

    Blocks(i64 height, i64 row_bytes, i64 budget, i64 images, i64 threads) : height(height) {
        i64 wanted = divide_up(height, larger(1, smaller(height, budget / row_bytes)));
        if (wanted > 1 && images < threads) wanted = smaller(height, round_up(wanted, threads));
        rows = divide_up(height, wanted);
        count = divide_up(height, rows);
    }

    i64 begin(i64 block) const { return block * rows; }
    i64 end(i64 block) const { return smaller(height, (block + 1) * rows); }
};

constexpr i64 CACHE = 400 << 10;  // bytes of a core's L2 that one intermediate may fill

}  // namespace lowkernels::LOWKERNELS_ISA
