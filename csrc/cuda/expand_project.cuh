// What fused_mbconv and gn_mlp share: two products back to back. The first one, over the k x k taps of a window in shared memory, makes
// kChunk expanded channels at a time; its accumulators, activated and rounded, are the second one's A fragments as they stand (the
// m16n8k16 accumulator has the layout of its A operand), and the second product accumulates over all chunks. Expanded channels exist
// in registers only.
//
// Rows are a CTA's output pixels: a rectangle of one image, or consecutive pixels that may run over into the next images. The input
// under them is copied to shared memory once, padding as zeros, and every tap reads it by ldmatrix at shifted addresses. Weights come
// through a ring of kStages stages that all warps read; the next ones are always under way, across products and chunks.
//
// Shared memory read for one mma (m16n8k16) of a warp of M row tiles, expanding H groups of 16 columns at a time:
//   first product   256 / M bytes of weights + 256 / H of inputs: 192 for M 2, H 4
//   second product  256 / M bytes of weights: 128 for M 2
// An SM of sm_80 has 256 bytes of bandwidth in the time of one mma. From L2, a CTA reads its window once and all weights once.
#pragma once

#include "split.cuh"

namespace lowkernels {

// TILES 16-row tiles, EXPAND groups of expanded channels and GROUPS groups of output channels a warp. SPLIT warps share the same rows,
// each with expanded channels of its own; they add up at the end, in an order that never changes.
template <int TILES, int EXPAND, int GROUPS, int SPLIT>
struct Chain {
    static constexpr int kTiles = TILES, kExpand = EXPAND, kGroups = GROUPS, kSplit = SPLIT;
    static constexpr int kRowWarps = kWarps / SPLIT, kRows = kRowWarps * TILES * 16;
    static constexpr int kChunkGroups = EXPAND * SPLIT;
    // A stage holds fragments of 16 x 16 weights, 512 bytes each.
    static constexpr int kStage = kChunkGroups <= 8 ? 16 : 32, kStages = kStage == 16 ? 4 : 3;
    // Of the first product: steps of depth 16 of all groups of the chunk.
    static constexpr int kSteps = kStage / kChunkGroups;
    // Of the second: for each of the SPLIT warps, steps of its own expanded channels, or a part of the groups of one.
    static constexpr int kProjectGroups = GROUPS * SPLIT <= kStage ? GROUPS : kStage / SPLIT;
    static constexpr int kProjectSteps = kStage / (kProjectGroups * SPLIT) < EXPAND ? kStage / (kProjectGroups * SPLIT) : EXPAND;
    static constexpr int kProjectPieces = EXPAND / kProjectSteps * (GROUPS / kProjectGroups);
    static constexpr int kAccumulators = TILES * (EXPAND + GROUPS) * 8;
    static constexpr int kPerSM = kAccumulators > 96 ? 1 : 2;
    // The shape for few images: few rows, few expanded channels at a time, split-K.
    static constexpr bool kSplits = EXPAND == 1;
    static_assert(EXPAND % kProjectSteps == 0 && GROUPS % kProjectGroups == 0, "pieces are whole");
};

// The shapes compiled, by the number lowkernels/backends/cuda/chains.py chooses. gn_mlp has no use for the first, of few output columns.
#define LK_CHAINS(X) X(1, 2, 4, 8, 1) X(2, 2, 4, 8, 2) X(3, 2, 2, 10, 1) X(4, 1, 4, 16, 1) X(5, 1, 4, 16, 4) X(6, 1, 1, 16, 4)
#define LK_ALL_CHAINS(X) X(0, 1, 4, 4, 1) LK_CHAINS(X)

// The window in shared memory: pixels of `pixel` elements, rows of `pitch`. With stride 2 even columns come first, then odd ones, from
// `odd`: the pixels that neighbouring outputs read with one tap are neighbours. `pixel` is an odd number of 16-byte units and `pitch`
// carries on where the tile's row ends, so that ldmatrix meets no bank twice; but where an image ends, and where stride 2 meets an odd width.
struct Layout {
    int rows, columns, odd, pixel, pitch;
    int image_rows;     // of window that the outputs of one whole image read, padding included
    int width, pixels;  // of a CTA: between the starts of output rows, and altogether
};

// What a launch has: the call, and what follows from it, which constant memory holds better than registers.
struct Task {
    ExpandProject p;
    Layout layout;
    int depth;                          // input channels rounded up to 16, in bytes
    int steps, expanded;                // of the first product, of depth 16; groups of expanded channels
    int expand_pieces, pieces, chunks;  // pieces of weights in a chunk
};

// A CTA's pixels. Output rows of all images are counted on; `first` is the one of the first pixel, `skew` pixels into it.
struct Pixels {
    int64_t first;
    int rows, y, x, skew;  // rows there are from `first`; place of the first row in its image

    struct Pixel {
        int row, x;  // output row from `first`
        int window_row, window_column;
        bool live;
    };
    LK_DEVICE Pixel at(const Task& t, int index) const {
        const Geometry& g = t.p.g;
        Pixel pixel;
        pixel.row = (index + skew) / t.layout.width;
        pixel.window_column = (index + skew) % t.layout.width;
        pixel.x = x + pixel.window_column;
        pixel.live = index < t.layout.pixels && pixel.row < rows && pixel.x < g.wo;
        pixel.window_row = window_row(t, pixel.row);
        return pixel;
    }
    // The first row of window that output row `row` from `first` reads.
    LK_DEVICE int window_row(const Task& t, int row) const {
        const int below = y + row, image = below / t.p.g.ho;
        return image * t.layout.image_rows + (below - image * t.p.g.ho - y) * t.p.g.stride;
    }
    // Rows of window.
    LK_DEVICE int window_rows(const Task& t) const {
        const int last = (skew + t.layout.pixels - 1) / t.layout.width;
        return window_row(t, last < rows ? last : rows - 1) + t.p.g.kernel;
    }
};

LK_DEVICE Pixels pixels_of(const Geometry& g, int block) {
    Pixels p;
    if (g.images == 0) {
        const int64_t begin = static_cast<int64_t>(block) * g.tile_w, rows = static_cast<int64_t>(g.n) * g.ho;
        p.first = begin / g.wo;
        p.skew = static_cast<int>(begin - p.first * g.wo);
        p.rows = static_cast<int>(rows - p.first < g.tile_w ? rows - p.first : g.tile_w);
        p.y = static_cast<int>(p.first % g.ho);
        p.x = 0;
        return p;
    }
    const int tiles_x = ceil_div(g.wo, g.tile_w), tiles = ceil_div(g.ho, g.tile_h) * tiles_x, tile = block % tiles;
    p.y = tile / tiles_x * g.tile_h;
    p.x = tile % tiles_x * g.tile_w;
    p.first = static_cast<int64_t>(block / tiles) * g.ho + p.y;
    p.rows = g.ho - p.y;
    p.skew = 0;
    return p;
}

// Elements of window column `x` from the start of its row.
LK_DEVICE int column_offset(const Layout& l, int stride, int x) { return (stride == 1 ? x : x % 2 * l.odd + x / 2) * l.pixel; }

// The window, zeros where there is no image or no channel. A warp copies whole rows.
template <typename T, int PIECE, int WARPS>
LK_DEVICE void copy_window(const Task& t, const Pixels& pixels, T* window) {
    constexpr int elements = PIECE / 2;
    const Geometry& g = t.p.g;
    const int pieces = t.depth / PIECE, per_image = t.layout.image_rows;
    const int rows = pixels.window_rows(t);
    const int64_t image0 = pixels.first / g.ho;
    for (int row = warp_index(); row < rows; row += WARPS) {
        const int below = pixels.y * g.stride + row, y = below % per_image - g.padding;
        const int64_t image = image0 + below / per_image;
        const bool inside = image < g.n && y >= 0 && y < g.h;
        const T* from = static_cast<const T*>(t.p.x) + (inside ? (image * g.h + y) * g.w * g.c : 0);
        T* to = window + row * t.layout.pitch;
        for (int i = lane_index(); i < t.layout.columns * pieces; i += kWarp) {
            const int column = i / pieces, channel = i % pieces * elements, x = pixels.x * g.stride - g.padding + column;
            const bool valid = inside && x >= 0 && x < g.w && channel < g.c;
            const T* source = from + (valid ? static_cast<int64_t>(x) * g.c + channel : 0);
            cp_async<PIECE>(to + column_offset(t.layout, g.stride, column) + channel, source, valid);
        }
    }
    cp_async_commit();
}

template <typename T, int WARPS = kWarps>
LK_DEVICE void copy_window(const Task& t, const Pixels& pixels, T* window) {
    if (t.p.g.c % 8 == 0)
        copy_window<T, 16, WARPS>(t, pixels, window);
    else
        copy_window<T, 8, WARPS>(t, pixels, window);
}

// Where each step of the first product finds its inputs: bytes from where a row's window starts.
template <int WARPS = kWarps>
LK_DEVICE void make_taps(const Task& t, int* taps) {
    const Geometry& g = t.p.g;
    for (int step = thread_index(); step < t.steps; step += WARPS * kWarp) {
        const int tap = step / (t.depth / 32), channel = step % (t.depth / 32) * 32;
        taps[step] = (tap / g.kernel * t.layout.pitch + column_offset(t.layout, g.stride, tap % g.kernel)) * 2 + channel;
    }
}

// The chunks of a CTA.
template <typename C>
LK_DEVICE int first_chunk_of(const Task& t) {
    return C::kSplits ? first_chunk(t.p.split) : 0;
}
template <typename C>
LK_DEVICE int end_chunk_of(const Task& t) {
    if (!C::kSplits) return t.chunks;
    const int end = end_chunk(t.p.split);
    return end < t.chunks ? end : t.chunks;
}

// The ring of weights. Pieces follow each other as the products use them: of each chunk the first product's, then the second's.
template <typename C>
struct Weights {
    const Task& t;
    Bits8* ring;
    int chunk, piece = 0;      // to be copied next
    int copied = 0, used = 0;  // stages

    LK_DEVICE Weights(const Task& task, Bits8* to) : t(task), ring(to), chunk(first_chunk_of<C>(task)) {
#pragma unroll
        for (int i = 0; i < C::kStages - 1; i++) copy();
    }

    // Starts the next piece's copies, a group of cp.async even if there are none. A warp copies whole fragments.
    LK_DEVICE void copy() {
        if (chunk < end_chunk_of<C>(t)) {
            const int first = chunk * C::kChunkGroups, number = piece - t.expand_pieces;
#pragma unroll
            for (int i = 0; i < C::kStage / kWarps; i++) {
                const int fragment = warp_index() + i * kWarps;
                const void* from = t.p.expand;
                bool valid;
                int at;  // in fragments
                if (number < 0) {
                    const int group = first + fragment / C::kSteps, step = piece * C::kSteps + fragment % C::kSteps;
                    valid = group < t.expanded && step < t.steps;
                    at = group * t.steps + step;
                } else {
                    constexpr int parts = C::kGroups / C::kProjectGroups;
                    const int group = block_y() * C::kGroups + number % parts * C::kProjectGroups + fragment % C::kProjectGroups;
                    const int row = fragment / C::kProjectGroups, split = row / C::kProjectSteps;
                    const int step = first + split * C::kExpand + number / parts * C::kProjectSteps + row % C::kProjectSteps;
                    valid = split < C::kSplit && group * kGroup < t.p.g.co && step < t.expanded;
                    at = group * t.expanded + step;
                    from = t.p.project;
                }
                const Bits8* source = static_cast<const Bits8*>(from) + static_cast<int64_t>(valid ? at : 0) * kWarp + lane_index();
                cp_async<16>(ring + (copied * C::kStage + fragment) * kWarp + lane_index(), source, valid);
            }
            copied = copied + 1 == C::kStages ? 0 : copied + 1;
            if (++piece == t.pieces) piece = 0, chunk++;
        }
        cp_async_commit();
    }

    // The next piece, for this lane.
    LK_DEVICE const Bits8* next() {
        cp_async_wait<C::kStages - 2>();
        block_sync();  // the piece has landed for every warp, and nobody reads the one before
        copy();
        const Bits8* stage = ring + used * C::kStage * kWarp + lane_index();
        used = used + 1 == C::kStages ? 0 : used + 1;
        return stage;
    }
};

template <typename T, typename C>
struct Products {
    float out[C::kTiles][C::kGroups][2][4];
    uint32_t rows[C::kTiles];  // where this lane's rows start for ldmatrix

    LK_DEVICE void run(const Task& t, const Pixels& pixels, const T* window, const int* taps, Weights<C>& weights) {
        const int lane = lane_index(), first_row = warp_index() % C::kRowWarps * C::kTiles * 16, split = warp_index() / C::kRowWarps;
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) {
            const Pixels::Pixel pixel = pixels.at(t, first_row + m * 16 + lane % 16);
            // Rows that are no pixel compute something and are not stored.
            const int at = pixel.live ? pixel.window_row * t.layout.pitch + pixel.window_column * t.layout.pixel : 0;
            rows[m] = shared_address(window + at + lane / 16 * 8);
        }
        clear(out);
        // The bias is one of the sums' terms: added at the end, its loads would not fit into registers beside them.
        if (split == 0 && (!C::kSplits || first_chunk(t.p.split) == 0)) {
#pragma unroll
            for (int g = 0; g < C::kGroups; g++) add_bias(out, g, load4(t.p.project_bias + column(t.p, g)));
        }
        const bool live = first_row < t.layout.pixels;
        for (int chunk = first_chunk_of<C>(t); chunk < end_chunk_of<C>(t); chunk++) {
            const int first = chunk * C::kChunkGroups + split * C::kExpand;
            float hidden[C::kTiles][C::kExpand][2][4];
            clear(hidden);
#pragma unroll
            for (int h = 0; h < C::kExpand; h++)
                if (live_column(t, first + h)) add_bias(hidden, h, load4(t.p.expand_bias + (first + h) * kGroup + lane % 4 * 4));
            for (int first_step = 0; first_step < t.steps; first_step += C::kSteps) {
                const Bits8* stage = weights.next() + split * C::kExpand * C::kSteps * kWarp;
                if (!live) continue;
                auto step = [&](int s) {
                    Bits8 b[C::kExpand];
#pragma unroll
                    for (int h = 0; h < C::kExpand; h++) b[h] = stage[(h * C::kSteps + s) * kWarp];
                    multiply_step<T>(hidden, rows, taps[first_step + s], C::kTiles, b, C::kExpand);
                };
                if (first_step + C::kSteps <= t.steps) {
#pragma unroll 2  // more would spill
                    for (int s = 0; s < C::kSteps; s++) step(s);
                } else {
#pragma unroll 1
                    for (int s = 0; s < t.steps - first_step; s++) step(s);
                }
            }
            uint32_t a[C::kTiles][C::kExpand][4];
#pragma unroll
            for (int m = 0; m < C::kTiles; m++)
#pragma unroll
                for (int h = 0; h < C::kExpand; h++) {
                    activate(t.p.act, hidden[m][h]);  // few at a time, or the intermediate values spill
                    // What fills up the tile is zero, whatever the inputs: an infinity times a weight of zero would be NaN.
                    const bool live_group = live_column(t, first + h);
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        a[m][h][i] = live_group ? pack2(T{}, hidden[m][h][i / 2][i % 2 * 2], hidden[m][h][i / 2][i % 2 * 2 + 1]) : 0;
                }
#pragma unroll
            for (int step = 0; step < C::kExpand; step += C::kProjectSteps) {
#pragma unroll
                for (int group = 0; group < C::kGroups; group += C::kProjectGroups) {
                    const Bits8* stage = weights.next() + split * C::kProjectSteps * C::kProjectGroups * kWarp;
                    if (!live) continue;
#pragma unroll
                    for (int s = 0; s < C::kProjectSteps; s++) {
#pragma unroll
                        for (int g = 0; g < C::kProjectGroups; g++) {
                            const Bits8 b = stage[(s * C::kProjectGroups + g) * kWarp];
#pragma unroll
                            for (int m = 0; m < C::kTiles; m++) {
                                mma(T{}, out[m][group + g][0], a[m][step + s], b.word[0], b.word[1]);
                                mma(T{}, out[m][group + g][1], a[m][step + s], b.word[2], b.word[3]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Adds up what the warps of the same rows have, in halves: sums of two, of four, of eight. Takes `scratch` from whoever had it.
    LK_DEVICE void add_up(float* scratch) {
        const int split = warp_index() / C::kRowWarps;
#pragma unroll
        for (int half = C::kSplit / 2; half > 0; half /= 2) {
            // [warp][fragment][lane], the warps of the upper half.
            float* at = scratch + ((split % half * C::kRowWarps + warp_index() % C::kRowWarps) * C::kTiles * C::kGroups * 2 * kWarp + lane_index()) * 4;
            block_sync();  // nobody reads the scratch memory any more
            for_each_fragment([&](float(&sum)[4], int i) {
                if (split >= half && split < 2 * half) store4(at + i * kWarp * 4, sum);
            });
            block_sync();  // the upper half's sums are there
            for_each_fragment([&](float(&sum)[4], int i) {
                if (split >= half) return;
                const Float4 other = load4(at + i * kWarp * 4);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += other.v[j];
            });
        }
    }

    template <typename F>
    LK_DEVICE void for_each_fragment(F f) {
#pragma unroll
        for (int m = 0; m < C::kTiles; m++)
#pragma unroll
            for (int g = 0; g < C::kGroups; g++)
#pragma unroll
                for (int h = 0; h < 2; h++) f(out[m][g][h], (m * C::kGroups + g) * 2 + h);
    }

    // Leaves the sums for the CTA that comes last, or takes all CTAs' if this one does. The pixels are in shared memory, like `flag`.
    LK_DEVICE bool join(const Task& t, const Pixels& pixels, int* flag) {
        const ExpandProject& p = t.p;
        float* mine = sums_of_block(p.split, p.g);
        for_each_output(t, pixels, [&](int m, int g, int half, int64_t at) {
            float v[4];
            four_columns(out[m][g], half, v);
            store4(mine + at, v);
        });
        if (!comes_last(p.split, ceil_div(p.g.co, C::kGroups * kGroup), flag)) return false;
        for_each_output(t, pixels, [&](int m, int g, int half, int64_t at) {
            float v[4];
            add_sums(p.split, p.g, at, v);
#pragma unroll
            for (int c = 0; c < 4; c++) out[m][g][c / 2][2 * half + c % 2] = v[c];
        });
        return true;
    }

    // f(tile, group, half, where) for this lane's outputs, four neighbouring columns at a time.
    template <typename F>
    LK_DEVICE void for_each_output(const Task& t, const Pixels& pixels, F f) {
        const ExpandProject& p = t.p;
        const int warp = warp_index(), first_column = block_y() * C::kGroups * kGroup + lane_index() % 4 * 4;
        if (warp >= C::kRowWarps) return;
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Pixels::Pixel pixel = pixels.at(t, (warp * C::kTiles + m) * 16 + half * 8 + lane_index() / 4);
                if (!pixel.live) continue;
                const int64_t at = ((pixels.first + pixel.row) * p.g.wo + pixel.x) * p.g.co + first_column;
#pragma unroll
                for (int g = 0; g < C::kGroups; g++)
                    if (first_column + g * kGroup < p.g.co) f(m, g, half, at + g * kGroup);
            }
        }
    }

    // The residual; then the CTA's pixels go out, 32 bytes of neighbouring channels at a time.
    LK_DEVICE void store(const Task& t, const Pixels& pixels) {
        const ExpandProject& p = t.p;
        const int lane = lane_index(), warp = warp_index(), first_column = block_y() * C::kGroups * kGroup + lane % 4 * 4;
        if (warp >= C::kRowWarps) return;
#pragma unroll
        for (int m = 0; m < C::kTiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Pixels::Pixel pixel = pixels.at(t, (warp * C::kTiles + m) * 16 + half * 8 + lane / 4);
                if (!pixel.live || first_column >= p.g.co) continue;
                const int64_t at = ((pixels.first + pixel.row) * p.g.wo + pixel.x) * p.g.co;
#pragma unroll
                for (int first = 0; first < C::kGroups; first += kBatch) {
                    Bits4 r[kBatch] = {};
                    if (p.residual) {
#pragma unroll
                        for (int g = 0; g < kBatch; g++)
                            r[g] = *reinterpret_cast<const Bits4*>(static_cast<const T*>(p.x) + at + column(p, first + g));
                    }
#pragma unroll
                    for (int g = 0; g < kBatch; g++) {
                        float v[4];
                        four_columns(out[m][first + g], half, v);
                        v[0] += unpack_low(T{}, r[g].low), v[1] += unpack_high(T{}, r[g].low);
                        v[2] += unpack_low(T{}, r[g].high), v[3] += unpack_high(T{}, r[g].high);
                        const int to = first_column + (first + g) * kGroup;
                        if (to < p.g.co) store4(static_cast<T*>(p.out) + at + to, v);
                    }
                }
            }
        }
    }

private:
    // Whether this lane's four columns in a group of the expansion are expanded channels.
    static LK_DEVICE bool live_column(const Task& t, int group) { return group * kGroup + lane_index() % 4 * 4 < t.p.expanded; }

    // The first of this lane's four columns in group `g`. Loads are not made to wait for each other by conditions: where there is no
    // such group they read the first one's again.
    static LK_DEVICE int column(const ExpandProject& p, int g) {
        const int first = block_y() * C::kGroups * kGroup + lane_index() % 4 * 4;
        return first + g * kGroup < p.g.co ? first + g * kGroup : first;
    }

    static constexpr int kBatch = C::kGroups % 4 == 0 ? 4 : 5;  // groups; eight would spill
};

inline int positive_remainder(int a, int b) { return (a % b + b) % b; }

inline Layout layout_of(const Geometry& g) {
    auto larger = [](int a, int b) { return a > b ? a : b; };
    Layout l;
    l.width = g.images == 0 ? g.wo : g.tile_w;
    l.pixels = g.tile_h * g.tile_w;
    l.image_rows = (g.ho - 1) * g.stride + g.kernel;
    int lines = g.tile_h, crossings = 0;
    if (g.images == 0) {
        // Lines of outputs and ends of images that the pixels may meet, wherever they begin.
        const int64_t plane = static_cast<int64_t>(g.ho) * g.wo;
        lines = g.tile_w % g.wo == 0 ? g.tile_w / g.wo : (g.tile_w + g.wo - 2) / g.wo + 1;
        crossings = g.tile_w % plane == 0 ? static_cast<int>(g.tile_w / plane) - 1 : (lines - 2) / g.ho + 1;
        if (lines == 1) crossings = 0;
    }
    l.rows = (lines - 1) * g.stride + g.kernel + crossings * larger(0, g.kernel - g.stride);
    l.columns = (l.width - 1) * g.stride + g.kernel;
    l.odd = (l.columns + 1) / 2;
    l.pixel = (g.c + 15) / 16 * 16 + 8;
    const int held = g.stride == 1 ? l.columns : 2 * l.odd;
    l.pitch = held * l.pixel + positive_remainder((l.width / g.stride - held) * (l.pixel / 8), 8) * 8;
    return l;
}

template <typename C>
Task task_of(const ExpandProject& p) {
    Task t{};
    t.p = p;
    t.layout = layout_of(p.g);
    t.depth = (p.g.c + 15) / 16 * 32;
    t.steps = p.g.kernel * p.g.kernel * (t.depth / 32);
    t.expanded = (p.expanded + kGroup - 1) / kGroup;
    t.expand_pieces = (t.steps + C::kSteps - 1) / C::kSteps;
    t.pieces = t.expand_pieces + C::kProjectPieces;
    t.chunks = (t.expanded + C::kChunkGroups - 1) / C::kChunkGroups;
    return t;
}

// A CTA's shared memory: its pixels, which registers are too dear for, the ring, the window, the taps. Sums of warps that share rows go
// where the ring and the window were.
template <typename T, typename C>
struct Shared {
    Pixels* pixels;
    Bits8* ring;
    T* window;
    int* taps;

    LK_DEVICE explicit Shared(const Task& t) {
        pixels = reinterpret_cast<Pixels*>(dynamic_shared());
        ring = reinterpret_cast<Bits8*>(dynamic_shared() + kPixels);
        window = reinterpret_cast<T*>(ring + C::kStage * C::kStages * kWarp);
        taps = reinterpret_cast<int*>(window + t.layout.rows * t.layout.pitch);
    }
    LK_DEVICE float* sums() const { return reinterpret_cast<float*>(ring); }

    static size_t bytes(const Task& t) {
        const size_t ring = C::kStage * C::kStages * 512, window = static_cast<size_t>(t.layout.rows) * t.layout.pitch * 2;
        const size_t sums = C::kSplit > 1 ? kWarps / 2 * C::kTiles * C::kGroups * 1024 : 0, all = ring + window + t.steps * sizeof(int);
        return kPixels + (all > sums ? all : sums);
    }

private:
    static constexpr int kPixels = 32;
    static_assert(sizeof(Pixels) <= kPixels, "room for the pixels");
};

template <typename C>
Grid grid_of(const Geometry& g) {
    const int64_t tiles = static_cast<int64_t>((g.ho + g.tile_h - 1) / g.tile_h) * ((g.wo + g.tile_w - 1) / g.tile_w);
    const int64_t pixels = static_cast<int64_t>(g.n) * g.ho * g.wo;
    return {g.images == 0 ? (pixels + g.tile_w - 1) / g.tile_w : g.n * tiles, (g.co + C::kGroups * kGroup - 1) / (C::kGroups * kGroup)};
}

}  // namespace lowkernels
