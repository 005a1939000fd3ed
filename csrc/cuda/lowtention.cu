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
//   registers      128 and two CTAs an SM; 255 and one for heads of more than 48 channels
//   from L2        x three times (twice for the statistics), all weights once for each 64 tokens
#include "api.h"
#include "fragments.cuh"

namespace lowkernels {
namespace {

constexpr int kRows = 64, kTiles = kRows / 16;  // tokens at a time
constexpr int kUpGroups = 2;

LK_DEVICE float larger(float a, float b) { return a > b ? a : b; }

// The sum over the block of `value`, the same to the last bit on every run. Needs kWarps floats that nobody else uses.
LK_DEVICE float block_sum(float value, float* scratch) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
    if (lane_index() == 0) scratch[warp_index()] = value;
    block_sync();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; w++) sum += scratch[w];
    return sum;
}

struct Statistics {
    float mean, rstd;
};

// In two passes: the second one over differences from the mean, which does not cancel.
template <typename T>
LK_DEVICE Statistics statistics(const T* x, int64_t count, float eps, float* scratch) {
    float sum = 0.0f, squares = 0.0f;
    for (int64_t i = thread_index() * 4; i < count; i += kThreads * 4) {
        const Float4 v = load4(x + i);
        sum += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]);
    }
    const float mean = block_sum(sum, scratch) / static_cast<float>(count);
    for (int64_t i = thread_index() * 4; i < count; i += kThreads * 4) {
        const Float4 v = load4(x + i);
#pragma unroll
        for (int c = 0; c < 4; c++) squares += (v.v[c] - mean) * (v.v[c] - mean);
    }
    const float variance = block_sum(squares, scratch + kWarps) / static_cast<float>(count);
    return {mean, reciprocal_root(variance + eps)};
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

// Rows of QKV from D: columns are q of all heads, then k, then v.
template <typename T>
LK_DEVICE void project(const Lowtention& p, const T* tile, int depth, T* qkv, int length) {
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
                float v[4];
                four_columns(acc[m][0], half, v);
                store4(qkv + (m * 16 + half * 8 + lane_index() / 4) * length + group * kGroup + lane_index() % 4 * 4, v);
            }
        }
    }
}

// 16 queries of one head, of STEPS * 16 channels, at `q`; the result replaces them. k and v point to the head's first token.
template <typename T, int STEPS>
LK_DEVICE void attend(T* q, const T* k, const T* v, int length, int tokens, float scale) {
    const int lane = lane_index();
    uint32_t query[STEPS][4];
    const uint32_t from = tile_address(q, length);
#pragma unroll
    for (int s = 0; s < STEPS; s++) ldmatrix_x4(query[s], from + s * 32);

    float out[2 * STEPS][4], maximum[2], sum[2] = {};
    clear(out);
    maximum[0] = maximum[1] = -1e30f;
    for (int first = 0; first < tokens; first += kRows) {
        float score[2 * kTiles][4];
        clear(score);
        // Keys are the columns of the second operand as they lie: 8 keys by 8 channels a matrix, two matrices a fragment.
        const uint32_t key = shared_address(k + (first + lane / 16 * 8 + lane % 8) * length + lane / 8 % 2 * 8);
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
                    at = first + j * 8 + lane % 4 * 2 + i < tokens ? at * scale : -1e30f;
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
        const uint32_t value = shared_address(v + (first + lane / 8 % 2 * 8 + lane % 8) * length + lane / 16 * 8);
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
    warp_sync();  // all lanes have read the queries
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += shuffle_xor(total, 1);
        total += shuffle_xor(total, 2);
        const float share = 1.0f / total;
#pragma unroll
        for (int j = 0; j < 2 * STEPS; j++) {
            T* to = q + (lane / 4 + half * 8) * length + j * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t*>(to) = pack2(T{}, out[j][2 * half] * share, out[j][2 * half + 1] * share);
        }
    }
}

// The transposed convolution, bias, crop and residual. Output pixel (stride i + py, stride j + px) takes the tokens around (i, j);
// `zeros` is a row of QKV for those outside of the grid.
template <typename T>
LK_DEVICE void upsample(const Lowtention& p, const T* x, const T* rows, const T* zeros, int length, T* out) {
    const int lane = lane_index(), side = p.stride == 1 ? 3 : 2, steps = p.inner / 16, depth = side * side * steps;
    const int groups = ceil_div(p.co, kGroup), pairs = ceil_div(groups, kUpGroups), blocks = ceil_div(p.tokens, kRows);
    for (int task = warp_index(); task < p.stride * p.stride * blocks * pairs; task += kWarps) {
        const int group = task % pairs * kUpGroups, block = task / pairs % blocks, parity = task / pairs / blocks;
        const int py = parity / p.stride, px = parity % p.stride;
        float acc[kTiles][kUpGroups][2][4];
        clear(acc);
        const Bits8* weight = static_cast<const Bits8*>(p.up) + (static_cast<int64_t>(parity) * groups + group) * depth * kWarp;
        for (int tap = 0; tap < side * side; tap++) {
            uint32_t a[kTiles];
#pragma unroll
            for (int m = 0; m < kTiles; m++) {
                const int token = block * kRows + m * 16 + lane % 16;
                const int i = token / p.grid_w - 1 + py + tap / side, j = token % p.grid_w - 1 + px + tap % side;
                const bool inside = token < p.tokens && i >= 0 && i < p.grid_h && j >= 0 && j < p.grid_w;
                a[m] = shared_address((inside ? rows + (i * p.grid_w + j) * length : zeros) + lane / 16 * 8);
            }
            multiply<T>(acc, a, kTiles, weight + tap * steps * kWarp, depth, steps, groups - group);
        }
#pragma unroll
        for (int g = 0; g < kUpGroups; g++) {
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
LK_KERNEL(kThreads, STEPS > 3 ? 1 : 2)
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
        project(p, tile, depth, qkv + first * length, length);
        block_sync();  // these rows of QKV are whole, and nobody reads D any more
    }
    const int tiles = ceil_div(p.tokens, 16);
    for (int task = warp_index(); task < p.heads * tiles; task += kWarps) {
        const int head = task / tiles * STEPS * 16;
        T* query = qkv + task % tiles * 16 * length + head;
        attend<T, STEPS>(query, qkv + p.inner + head, qkv + 2 * p.inner + head, length, p.tokens, p.scale);
    }
    block_sync();  // every head's result stands in its queries' place
    upsample(p, x, qkv, zeros, length, out);
}

template <typename T, int STEPS>
int launch_steps(const Lowtention& p, void* stream) {
    const size_t depth = (p.c + 15) / 16 * 16, rows = (p.tokens + kRows - 1) / kRows * kRows;
    const size_t shared = 2 * (kRows * (depth + 8) + (rows + 1) * (3 * p.inner + 8)) + 2 * kWarps * sizeof(float);
    return launch(lowtention<T, STEPS>, {p.n, 1}, kThreads, shared, stream, p);
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
