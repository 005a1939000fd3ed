// lowtention: [GroupNorm(1)] -> depthwise -> q, k, v -> softmax(q k^T / sqrt(d)) v -> transposed convolution -> crop [+ x]: the whole
// block of one image in one CTA. Nottebaum et al., "LowFormer", arXiv 2409.03460.
//
// Tokens go through in blocks of 64 rows: normalised and convolved into D, multiplied into the rows of QKV. Each warp then takes 16
// queries of one head at a time, with a running softmax over blocks of 64 keys, and leaves their result where the queries were. The
// transposed convolution is, for each parity of the output pixel, a product over taps of rows shifted by whole tokens: ldmatrix takes
// any row address, so nothing is copied.
//
// Budget of a CTA (256 threads), with c channels and the inner channels i of all heads rounded up to 16, t tokens rounded up to 64:
//   shared memory  128 (c + 8) + 2 (t + 1) (3 i + 8) + 64 bytes: 43.7 KB for c 128, i 64; 84.9 KB for c 256, i 128 (up to 64 tokens)
//   registers      128 and two CTAs an SM; 255 and one for heads of more than 32 channels
//   from L2        x twice for the statistics, once for every tap of a token and once as residual; all weights once for each 64
//                  tokens; LowFormer-B1's 14x14x128, L1 keeping all to nothing: 353 to 707 KB an image
//
// Images whose QKV does not fit go through global memory in three launches: QKV of 64 tokens a CTA (tokens_kernel), attention of 128
// queries of one head a CTA over keys that come in by cp.async (attention_kernel), the transposed convolution of 64 tokens a CTA
// (upsample_kernel). Their shared memory: 128 (c + 8) + 64; 768 (d + 8) for heads of d channels; 2 (67 + 2 grid_w) (i + 8) bytes.
#include "api.h"
#include "fragments.cuh"
#include "statistics.cuh"

namespace lowkernels {
namespace {

constexpr int kRows = 64, kTiles = kRows / 16;  // tokens at a time

LK_DEVICE float larger(float a, float b) { return a > b ? a : b; }

struct Statistics {
    float mean, rstd;
};

// Needs 2 kWarps floats.
template <typename T>
LK_DEVICE Statistics statistics(const T* x, int64_t count, float eps, float* scratch) {
    const Moments m = moments(count / 4, scratch, [=](int64_t i) { return load4(x + 4 * i); });
    return {m.mean, reciprocal_root(m.squares / static_cast<float>(count) + eps)};
}

// D [kRows][row_length(depth)]: the tokens from `first`, zeros beyond the last one. Padding is zeros of the normalised input.
template <typename T>
LK_DEVICE void convolve(const Lowtention& p, const T* x, const Statistics& s, int first, int depth, T* tile) {
    const int quads = depth / 4;
    for (int i = thread_index(); i < kRows * quads; i += kThreads) {
        const int row = i / quads, channel = i % quads * 4, token = first + row;
        float acc[4] = {};
        if (token < p.tokens && channel < p.c) {
            Float4 scale = {{1.0f, 1.0f, 1.0f, 1.0f}}, shift = {};
            if (p.norm_weight) {
                scale = load4(p.norm_weight + channel);
                shift = load4(p.norm_bias + channel);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    scale.v[c] *= s.rstd;
                    shift.v[c] -= s.mean * scale.v[c];
                }
            }
            const Float4 bias = load4(p.dw_bias + channel);
#pragma unroll
            for (int c = 0; c < 4; c++) acc[c] = bias.v[c];
            const int y0 = token / p.grid_w * p.stride - p.kernel / 2, x0 = token % p.grid_w * p.stride - p.kernel / 2;
            for (int ky = 0; ky < p.kernel; ky++) {
                for (int kx = 0; kx < p.kernel; kx++) {
                    const int y = y0 + ky, at = x0 + kx;
                    if (y < 0 || y >= p.h || at < 0 || at >= p.w) continue;
                    const Float4 v = load4(x + (static_cast<int64_t>(y) * p.w + at) * p.c + channel);
                    const Float4 w = load4(p.dw + (ky * p.kernel + kx) * depth + channel);
#pragma unroll
                    for (int c = 0; c < 4; c++) acc[c] += w.v[c] * (v.v[c] * scale.v[c] + shift.v[c]);
                }
            }
        }
        store4(tile + row * row_length(depth) + channel, acc);
    }
}

// The first `live` rows of QKV from D: columns are q of all heads, then k, then v.
template <typename T>
LK_DEVICE void project(const Lowtention& p, const T* tile, int depth, T* qkv, int length, int live) {
    uint32_t a[kTiles];
#pragma unroll
    for (int m = 0; m < kTiles; m++) a[m] = tile_address(tile + m * 16 * row_length(depth), row_length(depth));
    for (int group = warp_index(); group < 3 * p.inner / kGroup; group += kWarps) {
        float acc[kTiles][1][2][4];
        clear(acc);
        const Bits8* weight = static_cast<const Bits8*>(p.qkv) + static_cast<int64_t>(group) * (depth / 16) * kWarp;
        multiply<T>(acc, a, kTiles, weight, 0, depth / 16, 1);
#pragma unroll
        for (int m = 0; m < kTiles; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = m * 16 + half * 8 + lane_index() / 4;
                if (row >= live) continue;
                float v[4];
                four_columns(acc[m][0], half, v);
                store4(qkv + row * length + group * kGroup + lane_index() % 4 * 4, v);
            }
        }
    }
}

// A warp's 16 queries of one head of STEPS * 16 channels, and the softmax so far.
template <typename T, int STEPS>
struct Attention {
    uint32_t query[STEPS][4];
    float out[2 * STEPS][4], maximum[2], sum[2];

    LK_DEVICE void begin(const T* q, int length) {
        const uint32_t from = tile_address(q, length);
#pragma unroll
        for (int s = 0; s < STEPS; s++) ldmatrix_x4(query[s], from + s * 32);
        clear(out);
        maximum[0] = maximum[1] = -1e30f;
        sum[0] = sum[1] = 0.0f;
    }

    // kRows keys, of which the first `live` count, and their values.
    LK_DEVICE void add(const T* k, const T* v, int length, int live, float scale) {
        const int lane = lane_index();
        float score[2 * kTiles][4];
        clear(score);
        // Keys are the columns of the second operand as they lie: 8 keys by 8 channels a matrix, two matrices a fragment.
        const uint32_t key = shared_address(k + (lane / 16 * 8 + lane % 8) * length + lane / 8 % 2 * 8);
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                uint32_t b[4];
                ldmatrix_x4(b, key + (j * 16 * length + s * 16) * 2);
                mma(T{}, score[2 * j], query[s], b[0], b[1]);
                mma(T{}, score[2 * j + 1], query[s], b[2], b[3]);
            }
        }
        // Halves of a fragment are rows lane / 4 and lane / 4 + 8; the four lanes of a quad share a row.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = maximum[half];
#pragma unroll
            for (int j = 0; j < 2 * kTiles; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& at = score[j][2 * half + i];
                    at = j * 8 + lane % 4 * 2 + i < live ? at * scale : -1e30f;
                    largest = larger(at, largest);
                }
            }
            largest = larger(largest, shuffle_xor(largest, 1));
            largest = larger(largest, shuffle_xor(largest, 2));
            const float shrink = exponential(maximum[half] - largest);
            maximum[half] = largest;
            sum[half] *= shrink;
#pragma unroll
            for (int j = 0; j < 2 * kTiles; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& at = score[j][2 * half + i];
                    at = exponential(at - largest);
                    sum[half] += at;
                }
            }
#pragma unroll
            for (int j = 0; j < 2 * STEPS; j++) {
                out[j][2 * half] *= shrink;
                out[j][2 * half + 1] *= shrink;
            }
        }
        // Values are transposed on the way: 8 tokens by 8 channels a matrix.
        const uint32_t value = shared_address(v + (lane / 8 % 2 * 8 + lane % 8) * length + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < kTiles; j++) {
            const float* low = score[2 * j];
            const float* high = score[2 * j + 1];
            const uint32_t a[4] = {pack2(T{}, low[0], low[1]), pack2(T{}, low[2], low[3]), pack2(T{}, high[0], high[1]),
                                   pack2(T{}, high[2], high[3])};
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                uint32_t b[4];
                ldmatrix_x4_transposed(b, value + (j * 16 * length + s * 16) * 2);
                mma(T{}, out[2 * s], a, b[0], b[1]);
                mma(T{}, out[2 * s + 1], a, b[2], b[3]);
            }
        }
    }

    // The first `live` of the 16 rows at `to`.
    LK_DEVICE void store(T* to, int length, int live) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            const float share = 1.0f / total;
            const int row = lane_index() / 4 + half * 8;
            if (row >= live) continue;
#pragma unroll
            for (int j = 0; j < 2 * STEPS; j++)
                *reinterpret_cast<uint32_t*>(to + row * length + j * 8 + lane_index() % 4 * 2) =
                    pack2(T{}, out[j][2 * half] * share, out[j][2 * half + 1] * share);
        }
    }
};

// The transposed convolution, bias, crop and residual. Output pixel (stride i + py, stride j + px) takes the tokens around (i, j);
// `rows` is the shared address token 0 has or would have, `zeros` that of a row for those outside of the grid, `pitch` the bytes between
// rows. Makes `blocks` blocks of tokens from `first`; a warp takes GROUPS groups of columns at a time.
template <typename T, int GROUPS>
LK_DEVICE void upsample(const Lowtention& p, const T* x, uint32_t rows, uint32_t zeros, int pitch, int first, int blocks, T* out) {
    const int lane = lane_index(), side = p.stride == 1 ? 3 : 2, steps = p.inner / 16, depth = side * side * steps;
    const int groups = ceil_div(p.co, kGroup), pairs = ceil_div(groups, GROUPS);
    for (int task = warp_index(); task < p.stride * p.stride * blocks * pairs; task += kWarps) {
        const int group = task % pairs * GROUPS, block = first + task / pairs % blocks, parity = task / pairs / blocks;
        const int py = parity / p.stride, px = parity % p.stride;
        float acc[kTiles][GROUPS][2][4];
        clear(acc);
        const Bits8* weight = static_cast<const Bits8*>(p.up) + (static_cast<int64_t>(parity) * groups + group) * depth * kWarp;
        for (int tap = 0; tap < side * side; tap++) {
            uint32_t a[kTiles];
#pragma unroll
            for (int m = 0; m < kTiles; m++) {
                const int token = block * kRows + m * 16 + lane % 16;
                const int i = token / p.grid_w - 1 + py + tap / side, j = token % p.grid_w - 1 + px + tap % side;
                const bool inside = token < p.tokens && i >= 0 && i < p.grid_h && j >= 0 && j < p.grid_w;
                a[m] = (inside ? rows + (i * p.grid_w + j) * pitch : zeros) + lane / 16 * 16;
            }
            multiply<T>(acc, a, kTiles, weight + tap * steps * kWarp, depth, steps, groups - group);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int column = (group + g) * kGroup + lane % 4 * 4;
            if (column >= p.co) continue;
            add_bias(acc, g, load4(p.up_bias + column));
#pragma unroll
            for (int m = 0; m < kTiles; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int token = block * kRows + m * 16 + half * 8 + lane / 4;
                    const int y = token / p.grid_w * p.stride + py, at = token % p.grid_w * p.stride + px;
                    if (token >= p.tokens || y >= p.h || at >= p.w) continue;
                    const int64_t pixel = static_cast<int64_t>(y) * p.w + at;
                    float v[4];
                    four_columns(acc[m][g], half, v);
                    if (p.residual) {
                        const Float4 r = load4(x + pixel * p.c + column);
#pragma unroll
                        for (int c = 0; c < 4; c++) v[c] += r.v[c];
                    }
                    store4(out + pixel * p.co + column, v);
                }
            }
        }
    }
}

template <typename T, int STEPS>
LK_KERNEL(kThreads, STEPS > 2 ? 1 : 2)
lowtention(Lowtention p) {
    const int depth = ceil_div(p.c, 16) * 16, length = row_length(3 * p.inner), rows = ceil_div(p.tokens, kRows) * kRows;
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    T* qkv = tile + kRows * row_length(depth);
    T* zeros = qkv + rows * length;
    float* scratch = reinterpret_cast<float*>(zeros + length);
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(block_x()) * p.h * p.w * p.c;
    T* out = static_cast<T*>(p.out) + static_cast<int64_t>(block_x()) * p.h * p.w * p.co;

    const float none[4] = {};
    for (int i = thread_index() * 4; i < p.inner; i += kThreads * 4) store4(zeros + i, none);
    Statistics s = {0.0f, 1.0f};
    if (p.norm_weight) s = statistics(x, static_cast<int64_t>(p.h) * p.w * p.c, p.eps, scratch);
    for (int first = 0; first < rows; first += kRows) {
        convolve(p, x, s, first, depth, tile);
        block_sync();  // D is whole
        project(p, tile, depth, qkv + first * length, length, kRows);
        block_sync();  // these rows of QKV are whole, and nobody reads D any more
    }
    const int tiles = ceil_div(p.tokens, 16);
    for (int task = warp_index(); task < p.heads * tiles; task += kWarps) {
        const int head = task / tiles * STEPS * 16;
        T* query = qkv + task % tiles * 16 * length + head;
        Attention<T, STEPS> attention;
        attention.begin(query, length);
        for (int first = 0; first < p.tokens; first += kRows) {
            const T* key = qkv + first * length + p.inner + head;
            attention.add(key, key + p.inner, length, p.tokens - first, p.scale);
        }
        warp_sync();  // all lanes have read the queries
        attention.store(query, length, 16);
    }
    block_sync();  // every head's result stands in its queries' place
    upsample<T, 2>(p, x, shared_address(qkv), shared_address(zeros), length * 2, 0, rows / kRows, out);
}

// The three launches of larger images. QKV is [image][token][3 inner] in global memory, the result of attention [image][token][inner].

template <typename T>
LK_KERNEL(kThreads, 2)
tokens_kernel(Lowtention p) {
    const int depth = ceil_div(p.c, 16) * 16, blocks = ceil_div(p.tokens, kRows), first = block_x() % blocks * kRows;
    const int64_t image = block_x() / blocks;
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    float* scratch = reinterpret_cast<float*>(tile + kRows * row_length(depth));
    const T* x = static_cast<const T*>(p.x) + image * p.h * p.w * p.c;
    Statistics s = {0.0f, 1.0f};
    if (p.norm_weight) s = statistics(x, static_cast<int64_t>(p.h) * p.w * p.c, p.eps, scratch);
    convolve(p, x, s, first, depth, tile);
    block_sync();  // D of this block is whole
    T* qkv = static_cast<T*>(p.qkv_rows) + (image * p.tokens + first) * 3 * p.inner;
    project(p, tile, depth, qkv, 3 * p.inner, p.tokens - first);
}

// `rows` rows of a head's channels, from token `first`, zeros beyond the last one.
template <typename T, int STEPS>
LK_DEVICE void copy_rows(const Lowtention& p, const T* from, int first, int rows, T* to) {
    constexpr int pieces = STEPS * 2, length = row_length(STEPS * 16);
    for (int i = thread_index(); i < rows * pieces; i += kThreads) {
        const int row = i / pieces, channel = i % pieces * 8;
        const bool inside = first + row < p.tokens;
        const int64_t at = static_cast<int64_t>(inside ? first + row : 0) * 3 * p.inner + channel;
        cp_async<16>(to + row * length + channel, from + at, inside);
    }
}

template <typename T, int STEPS>
LK_KERNEL(kThreads, STEPS > 2 ? 1 : 2)
attention_kernel(Lowtention p) {
    constexpr int length = row_length(STEPS * 16), queries = kWarps * 16;
    const int blocks = ceil_div(p.tokens, queries);
    const int first_query = block_x() % blocks * queries, head = block_x() / blocks % p.heads * STEPS * 16;
    const int64_t image = block_x() / blocks / p.heads;
    T* query = reinterpret_cast<T*>(dynamic_shared());
    T* stages = query + queries * length;  // keys and values of kRows tokens, twice
    const T* qkv = static_cast<const T*>(p.qkv_rows) + image * p.tokens * 3 * p.inner + head;

    auto copy = [&](int first) {
        T* to = stages + first / kRows % 2 * 2 * kRows * length;
        copy_rows<T, STEPS>(p, qkv + p.inner, first, kRows, to);
        copy_rows<T, STEPS>(p, qkv + 2 * p.inner, first, kRows, to + kRows * length);
        cp_async_commit();
    };

    copy_rows<T, STEPS>(p, qkv, first_query, queries, query);
    copy(0);
    Attention<T, STEPS> attention;
    const int row = warp_index() * 16;
    for (int first = 0; first < p.tokens; first += kRows) {
        cp_async_wait<0>();
        block_sync();  // these keys have landed, and nobody reads the other stage any more
        if (first + kRows < p.tokens) copy(first + kRows);
        if (first == 0) attention.begin(query + row * length, length);
        const T* key = stages + first / kRows % 2 * 2 * kRows * length;
        attention.add(key, key + kRows * length, length, p.tokens - first, p.scale);
    }
    T* out = static_cast<T*>(p.attended) + (image * p.tokens + first_query + row) * p.inner + head;
    attention.store(out, p.inner, p.tokens - first_query - row);
}

template <typename T>
LK_KERNEL(kThreads, 2)
upsample_kernel(Lowtention p) {
    const int blocks = ceil_div(p.tokens, kRows), block = block_x() % blocks, length = row_length(p.inner), reach = p.grid_w + 1;
    const int64_t image = block_x() / blocks;
    const int begin = block * kRows - reach < 0 ? 0 : block * kRows - reach;
    const int end = (block + 1) * kRows + reach > p.tokens ? p.tokens : (block + 1) * kRows + reach;
    T* zeros = reinterpret_cast<T*>(dynamic_shared());
    T* rows = zeros + length;
    const float none[4] = {};
    for (int i = thread_index() * 4; i < p.inner; i += kThreads * 4) store4(zeros + i, none);
    const T* attended = static_cast<const T*>(p.attended) + (image * p.tokens + begin) * p.inner;
    const int pieces = p.inner / 8;
    for (int i = thread_index(); i < (end - begin) * pieces; i += kThreads)
        cp_async<16>(rows + i / pieces * length + i % pieces * 8, attended + static_cast<int64_t>(i) * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();  // the tokens in reach and the row of zeros are there
    const T* x = static_cast<const T*>(p.x) + image * p.h * p.w * p.c;
    T* out = static_cast<T*>(p.out) + image * p.h * p.w * p.co;
    upsample<T, 1>(p, x, shared_address(rows) - begin * length * 2, shared_address(zeros), length * 2, block, 1, out);
}

template <typename T, int STEPS>
int launch_one(const Lowtention& p, void* stream) {
    const size_t depth = (p.c + 15) / 16 * 16, rows = (p.tokens + kRows - 1) / kRows * kRows;
    const size_t shared = 2 * (kRows * (depth + 8) + (rows + 1) * (3 * p.inner + 8)) + 2 * kWarps * sizeof(float);
    return launch(lowtention<T, STEPS>, {p.n, 1}, kThreads, shared, stream, p);
}

template <typename T, int STEPS>
int launch_three(const Lowtention& p, void* stream) {
    constexpr int queries = kWarps * 16;
    const int64_t images = p.n, blocks = (p.tokens + kRows - 1) / kRows, query_blocks = (p.tokens + queries - 1) / queries;
    const size_t depth = (p.c + 15) / 16 * 16;
    const size_t tile = 2 * kRows * (depth + 8) + 2 * kWarps * sizeof(float), rows = 2 * (queries + 4 * kRows) * (STEPS * 16 + 8);
    const size_t reach = 2 * (kRows + 2 * (p.grid_w + 1) + 1) * (p.inner + 8);
    int error = launch(tokens_kernel<T>, {images * blocks, 1}, kThreads, tile, stream, p);
    if (error == 0) error = launch(attention_kernel<T, STEPS>, {images * p.heads * query_blocks, 1}, kThreads, rows, stream, p);
    if (error == 0) error = launch(upsample_kernel<T>, {images * blocks, 1}, kThreads, reach, stream, p);
    return error;
}

template <typename T, int STEPS>
int launch_steps(const Lowtention& p, void* stream) {
    return p.qkv_rows ? launch_three<T, STEPS>(p, stream) : launch_one<T, STEPS>(p, stream);
}

template <typename T>
int launch_dtype(const Lowtention& p, void* stream) {
    switch (p.inner / p.heads) {
        case 16: return launch_steps<T, 1>(p, stream);
        case 32: return launch_steps<T, 2>(p, stream);
        case 48: return launch_steps<T, 3>(p, stream);
        case 64: return launch_steps<T, 4>(p, stream);
        default: return kNoSuchConfig;
    }
}

}  // namespace

int lowkernels_lowtention(const Lowtention& p, Dtype dtype, int, void* stream) {
    return dtype == kHalf ? launch_dtype<half_t>(p, stream) : launch_dtype<bf16_t>(p, stream);
}

}  // namespace lowkernels
