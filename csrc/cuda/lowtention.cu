// lowtention: [GroupNorm(1)] -> depthwise -> q, k, v -> softmax(q k^T / sqrt(d)) v -> transposed convolution -> crop [+ x]: the whole
// block of one image, or of several with few tokens, in one CTA. Nottebaum et al., "LowFormer", arXiv 2409.03460.
//
// A CTA's rows are the tokens of its images, one image behind the other without gaps: 98 rows of two images of 7x7 are seven 16-row
// tiles. They go through in blocks of 64 or 128: normalised and convolved into D, multiplied into the rows of QKV. Each warp then takes
// 16 queries of one head at a time, with a running softmax over blocks of 64 keys, and leaves their result where the queries were. The
// transposed convolution is, for each parity of the output pixel, a product over taps of rows shifted by whole tokens: ldmatrix takes
// any row address, so nothing is copied. No row's result depends on what other rows there are: an image's is the same to the last bit
// in whatever company.
//
// With fewer images than multiprocessors several CTAs have the same images: each does all up to attention again, and a share of the
// transposed convolution, which is most of the products and weights.
//
// Budget of a CTA (256 threads), with c channels and the inner channels i of all heads rounded up to 16, and m images, whose r tokens
// are rounded up to 16; blocks are of b rows, 64 for one image or up to 64 tokens together, 128 else:
//   shared memory  2 (c + 8) min(b, r) + 2 (r + 1) (3 i + 8) + 16 r + 72 m bytes: an image of 49 tokens 43.5 KB for c 128, i 64, and
//                  83.8 KB for c 256, i 128; two of them 75.8 and 146.2 KB
//   registers      128 and two CTAs an SM; 255 and one with blocks of 128, and for heads of more than 32 channels
//   from L2        x twice for the statistics, once for every tap of a token and once as residual; all weights once for each b rows;
//                  LowFormer-B1's 14x14x128, one image a CTA, L1 keeping all to nothing: 353 to 707 KB an image
//
// Images whose QKV does not fit go through global memory in three launches: QKV of 64 tokens a CTA (tokens_kernel), attention of 128
// queries of one head a CTA over keys that come in by cp.async (attention_kernel), the transposed convolution of 64 tokens a CTA
// (upsample_kernel). Their shared memory: 128 (c + 8) + 1096; 768 (d + 8) for heads of d channels; 2 (67 + 2 grid_w) (i + 8) + 1024
// bytes.
#include "api.h"
#include "fragments.cuh"
#include "statistics.cuh"

#include <limits>

namespace lowkernels {
namespace {

constexpr int kKeys = 64, kKeyTiles = kKeys / 16;  // at a time
constexpr float kInfinity = std::numeric_limits<float>::infinity();

LK_DEVICE float larger(float a, float b) { return a > b ? a : b; }
LK_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Which token a row is. Rows that are none have i < 0, far outside of every grid.
struct alignas(16) Row {
    int image, number;  // in the call and in the CTA
    int i, j;           // in the grid
};

// Of `count` rows, the tokens from `first`, counted through the images from `image` on; `end` is the number of tokens there.
LK_DEVICE void find_rows(const Lowtention& p, int image, int first, int end, int count, Row* rows) {
    for (int row = thread_index(); row < count; row += kThreads) {
        const int number = (first + row) / p.tokens, token = (first + row) % p.tokens;
        rows[row] = first + row < end ? Row{image + number, number, token / p.grid_w, token % p.grid_w} : Row{0, 0, -(1 << 20), 0};
    }
}

struct Statistics {
    float mean, rstd;
};

// Of `images` images, AT_ONCE at a time, so that as many loads are under way. Needs 2 images kWarps floats. The caller waits for all.
template <typename T, int AT_ONCE>
LK_DEVICE void statistics(const Lowtention& p, const T* x, int images, float* sums, Statistics* result) {
    const int64_t size = static_cast<int64_t>(p.h) * p.w * p.c;
    float* squares = sums + images * kWarps;
    // add(n, v): four values of image first + n.
    auto read = [&](int first, auto add) {
        for (int64_t i = thread_index(); i < size / 4; i += kThreads) {
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                if (first + n < images) add(n, load4(x + (first + n) * size + 4 * i));
        }
    };
    auto leave = [&](int first, const float (&values)[AT_ONCE], float* to) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++)
            if (first + n < images) leave_sum(values[n], to + (first + n) * kWarps);
    };
    const float count = static_cast<float>(size);
    for (int first = 0; first < images; first += AT_ONCE) {
        float sum[AT_ONCE] = {};
        read(first, [&](int n, const Float4& v) { sum[n] += (v.v[0] + v.v[1]) + (v.v[2] + v.v[3]); });
        leave(first, sum, sums);
    }
    block_sync();  // the sums of all warps are there
    for (int first = 0; first < images; first += AT_ONCE) {
        float mean[AT_ONCE], sum[AT_ONCE] = {};
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) mean[n] = total<kWarps>(sums + smaller(first + n, images - 1) * kWarps) / count;
        read(first, [&](int n, const Float4& v) {
#pragma unroll
            for (int c = 0; c < 4; c++) sum[n] += (v.v[c] - mean[n]) * (v.v[c] - mean[n]);
        });
        leave(first, sum, squares);
    }
    block_sync();  // the squares of all warps are there
    if (thread_index() < images) {
        const int at = thread_index() * kWarps;
        result[thread_index()] = {total<kWarps>(sums + at) / count, reciprocal_root(total<kWarps>(squares + at) / count + p.eps)};
    }
}

// D [count][row_length(depth)]: the tokens of `rows`, zeros where there is none. Padding is zeros of the normalised input. A thread makes
// AT_ONCE rows at a time, with the same weights. `x` is the first image.
template <typename T, int AT_ONCE>
LK_DEVICE void convolve(const Lowtention& p, const T* x, const Statistics* statistics, const Row* rows, int count, int depth, T* tile) {
    const int quads = depth / 4, apart = count / AT_ONCE;
    const int64_t size = static_cast<int64_t>(p.h) * p.w * p.c;
    for (int i = thread_index(); i < apart * quads; i += kThreads) {
        const int row = i / quads, channel = i % quads * 4;
        const T* from[AT_ONCE];
        int y0[AT_ONCE], x0[AT_ONCE];
        Float4 scale[AT_ONCE], shift[AT_ONCE];
        float acc[AT_ONCE][4];
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            const Row r = rows[row + n * apart];
            const bool live = r.i >= 0 && channel < p.c;
            from[n] = x + r.number * size + channel;
            y0[n] = live ? r.i * p.stride - p.kernel / 2 : -p.kernel;
            x0[n] = r.j * p.stride - p.kernel / 2;
            scale[n] = {{1.0f, 1.0f, 1.0f, 1.0f}}, shift[n] = {};
            if (p.norm_weight) {
                const Statistics s = statistics[r.number];
                const Float4 weight = load4(p.norm_weight + channel), bias = load4(p.norm_bias + channel);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    scale[n].v[c] = weight.v[c] * s.rstd;
                    shift[n].v[c] = bias.v[c] - s.mean * scale[n].v[c];
                }
            }
            const Float4 bias = load4(p.dw_bias + channel);
#pragma unroll
            for (int c = 0; c < 4; c++) acc[n][c] = live ? bias.v[c] : 0.0f;
        }
        for (int ky = 0; ky < p.kernel; ky++) {
            for (int kx = 0; kx < p.kernel; kx++) {
                const Float4 w = load4(p.dw + (ky * p.kernel + kx) * depth + channel);
#pragma unroll
                for (int n = 0; n < AT_ONCE; n++) {
                    const int y = y0[n] + ky, at = x0[n] + kx;
                    if (y < 0 || y >= p.h || at < 0 || at >= p.w) continue;
                    const Float4 v = load4(from[n] + (static_cast<int64_t>(y) * p.w + at) * p.c);
#pragma unroll
                    for (int c = 0; c < 4; c++) acc[n][c] += w.v[c] * (v.v[c] * scale[n].v[c] + shift[n].v[c]);
                }
            }
        }
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) store4(tile + (row + n * apart) * row_length(depth) + channel, acc[n]);
    }
}

// The first `live` rows of QKV from `tiles` 16-row tiles of D: columns are q of all heads, then k, then v.
template <typename T, int TILES>
LK_DEVICE void project(const Lowtention& p, const T* tile, int depth, T* qkv, int length, int tiles, int live) {
    uint32_t a[TILES];
#pragma unroll
    for (int m = 0; m < TILES; m++) a[m] = tile_address(tile + m * 16 * row_length(depth), row_length(depth));
    for (int group = warp_index(); group < 3 * p.inner / kGroup; group += kWarps) {
        float acc[TILES][1][2][4];
        clear(acc);
        const Bits8* weight = static_cast<const Bits8*>(p.qkv) + static_cast<int64_t>(group) * (depth / 16) * kWarp;
        multiply<T>(acc, a, tiles, weight, 0, depth / 16, 1);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
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

    // The first `live` of the 16 rows at `q`; the others repeat the last.
    LK_DEVICE void begin(const T* q, int length, int live) {
        const uint32_t from = shared_address(q + smaller(lane_index() % 16, live - 1) * length + lane_index() / 16 * 8);
#pragma unroll
        for (int s = 0; s < STEPS; s++) ldmatrix_x4(query[s], from + s * 32);
        clear(out);
        maximum[0] = maximum[1] = -1e30f;
        sum[0] = sum[1] = 0.0f;
    }

    // The first `live` of kKeys keys, and their values. If the rows behind them are NEIGHBOURS, another image's, `zeros` is read in their
    // place, a row of them: a share of zero in a neighbour's value would let its infinities in. Else they are zeros themselves.
    template <bool NEIGHBOURS>
    LK_DEVICE void add(const T* k, const T* v, const T* zeros, int length, int live, float scale) {
        const int lane = lane_index();
        float score[2 * kKeyTiles][4];
        clear(score);
        // Keys are the columns of the second operand as they lie: 8 keys by 8 channels a matrix, two matrices a fragment.
        const int key = lane / 16 * 8 + lane % 8;
        const uint32_t key_address = shared_address(k + key * length + lane / 8 % 2 * 8), zero_address = shared_address(zeros);
#pragma unroll
        for (int j = 0; j < kKeyTiles; j++) {
            if (j * 16 >= live) continue;
            const uint32_t from = !NEIGHBOURS || j * 16 + key < live ? key_address + j * 16 * length * 2 : zero_address;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                uint32_t b[4];
                ldmatrix_x4(b, from + s * 32);
                mma(T{}, score[2 * j], query[s], b[0], b[1]);
                mma(T{}, score[2 * j + 1], query[s], b[2], b[3]);
            }
        }
        // Halves of a fragment are rows lane / 4 and lane / 4 + 8; the four lanes of a quad share a row.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float largest = maximum[half];
#pragma unroll
            for (int j = 0; j < 2 * kKeyTiles; j++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float& at = score[j][2 * half + i];
                    at = j * 8 + lane % 4 * 2 + i < live ? at * scale : -kInfinity;
                    largest = larger(at, largest);
                }
            }
            largest = larger(largest, shuffle_xor(largest, 1));
            largest = larger(largest, shuffle_xor(largest, 2));
            const float shrink = exponential(maximum[half] - largest);
            maximum[half] = largest;
            sum[half] *= shrink;
#pragma unroll
            for (int j = 0; j < 2 * kKeyTiles; j++) {
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
        const int value = lane / 8 % 2 * 8 + lane % 8;
        const uint32_t value_address = shared_address(v + value * length + lane / 16 * 8);
#pragma unroll
        for (int j = 0; j < kKeyTiles; j++) {
            if (j * 16 >= live) continue;
            const float* low = score[2 * j];
            const float* high = score[2 * j + 1];
            const uint32_t a[4] = {pack2(T{}, low[0], low[1]), pack2(T{}, low[2], low[3]), pack2(T{}, high[0], high[1]),
                                   pack2(T{}, high[2], high[3])};
            const uint32_t from = !NEIGHBOURS || j * 16 + value < live ? value_address + j * 16 * length * 2 : zero_address;
#pragma unroll
            for (int s = 0; s < STEPS; s++) {
                uint32_t b[4];
                ldmatrix_x4_transposed(b, from + s * 32);
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

// The transposed convolution, bias, crop and residual, of `count` rows. Output pixel (stride i + py, stride j + px) takes the tokens
// around (i, j), which are rows around this one's; `inputs` is the shared address of the first, `zeros` that of a row for tokens outside
// of the grid, `pitch` the bytes between rows. A warp makes TILES tiles and GROUPS groups of columns at a time.
template <typename T, int TILES, int GROUPS>
LK_DEVICE void upsample(const Lowtention& p, const Row* rows, int count, uint32_t inputs, uint32_t zeros, int pitch) {
    const int lane = lane_index(), side = p.stride == 1 ? 3 : 2, steps = p.inner / 16, depth = side * side * steps;
    const int groups = ceil_div(p.co, kGroup), pairs = ceil_div(groups, GROUPS), blocks = ceil_div(count, TILES * 16);
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    // Neighbouring tasks are of different CTAs, and a CTA's of different schedulers.
    const int share = block_x() % p.shares;
    for (int task = warp_index() * p.shares + share; task < p.stride * p.stride * blocks * pairs; task += kWarps * p.shares) {
        const int group = task % pairs * GROUPS, first = task / pairs % blocks * TILES * 16, parity = task / pairs / blocks;
        const int py = parity / p.stride, px = parity % p.stride, tiles = (count - first) / 16;
        float acc[TILES][GROUPS][2][4];
        clear(acc);
        const Bits8* weight = static_cast<const Bits8*>(p.up) + (static_cast<int64_t>(parity) * groups + group) * depth * kWarp;
        for (int tap = 0; tap < side * side; tap++) {
            uint32_t a[TILES];
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                a[m] = zeros + lane / 16 * 16;
                if (m >= tiles) continue;
                const int row = first + m * 16 + lane % 16, down = py + tap / side - 1, right = px + tap % side - 1;
                const int i = rows[row].i + down, j = rows[row].j + right;
                const bool inside = i >= 0 && i < p.grid_h && j >= 0 && j < p.grid_w;
                if (inside) a[m] = inputs + (row + down * p.grid_w + right) * pitch + lane / 16 * 16;
            }
            multiply<T>(acc, a, tiles, weight + tap * steps * kWarp, depth, steps, groups - group);
        }
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int column = (group + g) * kGroup + lane % 4 * 4;
            if (column >= p.co) continue;
            add_bias(acc, g, load4(p.up_bias + column));
#pragma unroll
            for (int m = 0; m < TILES; m++) {
                if (m >= tiles) continue;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const Row row = rows[first + m * 16 + half * 8 + lane / 4];
                    const int y = row.i * p.stride + py, at = row.j * p.stride + px;
                    if (row.i < 0 || y >= p.h || at >= p.w) continue;
                    const int64_t pixel = (static_cast<int64_t>(row.image) * p.h + y) * p.w + at;
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

// TILES 16-row tiles at a time.
template <typename T, int STEPS, int TILES>
LK_KERNEL(kThreads, STEPS > 2 || TILES > 4 ? 1 : 2)
lowtention(Lowtention p) {
    constexpr int block = TILES * 16, at_once = TILES / 4;
    const int depth = ceil_div(p.c, 16) * 16, length = row_length(3 * p.inner);
    const int image = block_x() / p.shares * p.images, images = smaller(p.images, p.n - image);
    const int rows = ceil_div(images * p.tokens, 16) * 16;
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    T* qkv = tile + smaller(rows, block) * row_length(depth);
    T* zeros = qkv + rows * length;
    Row* table = reinterpret_cast<Row*>(zeros + length);
    Statistics* statistics_of = reinterpret_cast<Statistics*>(table + rows);
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(image) * p.h * p.w * p.c;

    const float none[4] = {};
    for (int i = thread_index() * 4; i < length; i += kThreads * 4) store4(zeros + i, none);
    find_rows(p, image, 0, images * p.tokens, rows, table);
    if (p.norm_weight) statistics<T, at_once>(p, x, images, reinterpret_cast<float*>(statistics_of + images), statistics_of);
    block_sync();  // the table and the statistics are there
    for (int first = 0; first < rows; first += block) {
        const int count = smaller(rows - first, block);
        convolve<T, at_once>(p, x, statistics_of, table + first, count, depth, tile);
        block_sync();  // D is whole
        project<T, TILES>(p, tile, depth, qkv + first * length, length, count / 16, count);
        block_sync();  // these rows of QKV are whole, and nobody reads D any more
    }
    const int tiles = ceil_div(p.tokens, 16);
    for (int task = warp_index(); task < images * p.heads * tiles; task += kWarps) {
        const int first_query = task % tiles * 16, head = task / tiles % p.heads * STEPS * 16, live = smaller(p.tokens - first_query, 16);
        T* tokens = qkv + task / tiles / p.heads * p.tokens * length + head;
        T* query = tokens + first_query * length;
        Attention<T, STEPS> attention;
        attention.begin(query, length, live);
        for (int first = 0; first < p.tokens; first += kKeys) {
            const T* key = tokens + first * length + p.inner;
            attention.template add<true>(key, key + p.inner, zeros, length, p.tokens - first, p.scale);
        }
        warp_sync();  // all lanes have read the queries
        attention.store(query, length, live);
    }
    block_sync();  // every head's result stands in its queries' place
    upsample<T, TILES, 2>(p, table, rows, shared_address(qkv), shared_address(zeros), length * 2);
}

// The three launches of larger images, for kRows tokens at a time. QKV is [image][token][3 inner] in global memory, the result of
// attention [image][token][inner].
constexpr int kRows = 64, kTiles = kRows / 16;

template <typename T>
LK_KERNEL(kThreads, 2)
tokens_kernel(Lowtention p) {
    const int depth = ceil_div(p.c, 16) * 16, blocks = ceil_div(p.tokens, kRows), first = block_x() % blocks * kRows;
    const int image = block_x() / blocks;
    T* tile = reinterpret_cast<T*>(dynamic_shared());
    Row* table = reinterpret_cast<Row*>(tile + kRows * row_length(depth));
    Statistics* statistics_of = reinterpret_cast<Statistics*>(table + kRows);
    const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(image) * p.h * p.w * p.c;
    find_rows(p, 0, first, p.tokens, kRows, table);
    if (p.norm_weight) statistics<T, 1>(p, x, 1, reinterpret_cast<float*>(statistics_of + 1), statistics_of);
    block_sync();  // the table and the statistics are there
    convolve<T, 1>(p, x, statistics_of, table, kRows, depth, tile);
    block_sync();  // D of this block is whole
    T* qkv = static_cast<T*>(p.qkv_rows) + (static_cast<int64_t>(image) * p.tokens + first) * 3 * p.inner;
    project<T, kTiles>(p, tile, depth, qkv, 3 * p.inner, kTiles, p.tokens - first);
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
    T* stages = query + queries * length;  // keys and values of kKeys tokens, twice
    const T* qkv = static_cast<const T*>(p.qkv_rows) + image * p.tokens * 3 * p.inner + head;

    auto copy = [&](int first) {
        T* to = stages + first / kKeys % 2 * 2 * kKeys * length;
        copy_rows<T, STEPS>(p, qkv + p.inner, first, kKeys, to);
        copy_rows<T, STEPS>(p, qkv + 2 * p.inner, first, kKeys, to + kKeys * length);
        cp_async_commit();
    };

    copy_rows<T, STEPS>(p, qkv, first_query, queries, query);
    copy(0);
    Attention<T, STEPS> attention;
    const int row = warp_index() * 16;
    for (int first = 0; first < p.tokens; first += kKeys) {
        cp_async_wait<0>();
        block_sync();  // these keys have landed, and nobody reads the other stage any more
        if (first + kKeys < p.tokens) copy(first + kKeys);
        if (first == 0) attention.begin(query + row * length, length, 16);
        const T* key = stages + first / kKeys % 2 * 2 * kKeys * length;
        attention.template add<false>(key, key + kKeys * length, nullptr, length, p.tokens - first, p.scale);
    }
    T* out = static_cast<T*>(p.attended) + (image * p.tokens + first_query + row) * p.inner + head;
    attention.store(out, p.inner, p.tokens - first_query - row);
}

template <typename T>
LK_KERNEL(kThreads, 2)
upsample_kernel(Lowtention p) {
    const int blocks = ceil_div(p.tokens, kRows), first = block_x() % blocks * kRows, length = row_length(p.inner), reach = p.grid_w + 1;
    const int image = block_x() / blocks;
    const int begin = first - reach < 0 ? 0 : first - reach;
    const int end = smaller(first + kRows + reach, p.tokens);
    Row* table = reinterpret_cast<Row*>(dynamic_shared());
    T* zeros = reinterpret_cast<T*>(table + kRows);
    T* rows = zeros + length;
    const float none[4] = {};
    for (int i = thread_index() * 4; i < p.inner; i += kThreads * 4) store4(zeros + i, none);
    find_rows(p, image, first, p.tokens, kRows, table);
    const T* attended = static_cast<const T*>(p.attended) + (static_cast<int64_t>(image) * p.tokens + begin) * p.inner;
    const int pieces = p.inner / 8;
    for (int i = thread_index(); i < (end - begin) * pieces; i += kThreads)
        cp_async<16>(rows + i / pieces * length + i % pieces * 8, attended + static_cast<int64_t>(i) * 8, true);
    cp_async_commit();
    cp_async_wait<0>();
    block_sync();  // the tokens in reach, the row of zeros and the table are there
    upsample<T, kTiles, 1>(p, table, kRows, shared_address(rows + (first - begin) * length), shared_address(zeros), length * 2);
}

template <typename T, int STEPS, int TILES>
int launch_one(const Lowtention& p, void* stream) {
    const size_t depth = (p.c + 15) / 16 * 16, rows = (p.images * p.tokens + 15) / 16 * 16, block = TILES * 16;
    const size_t tile = 2 * (rows < block ? rows : block) * (depth + 8), qkv = 2 * (rows + 1) * (3 * p.inner + 8);
    const size_t shared = tile + qkv + rows * sizeof(Row) + p.images * (sizeof(Statistics) + 2 * kWarps * sizeof(float));
    return launch(lowtention<T, STEPS, TILES>, {int64_t{(p.n + p.images - 1) / p.images} * p.shares, 1}, kThreads, shared, stream, p);
}

template <typename T, int STEPS>
int launch_three(const Lowtention& p, void* stream) {
    constexpr int queries = kWarps * 16;
    const int64_t images = p.n, blocks = (p.tokens + kRows - 1) / kRows, query_blocks = (p.tokens + queries - 1) / queries;
    const size_t depth = (p.c + 15) / 16 * 16;
    const size_t table = kRows * sizeof(Row), tile = 2 * kRows * (depth + 8) + table + sizeof(Statistics) + 2 * kWarps * sizeof(float);
    const size_t rows = 2 * (queries + 4 * kKeys) * (STEPS * 16 + 8);
    const size_t reach = table + 2 * (kRows + 2 * (p.grid_w + 1) + 1) * (p.inner + 8);
    int error = launch(tokens_kernel<T>, {images * blocks, 1}, kThreads, tile, stream, p);
    if (error == 0) error = launch(attention_kernel<T, STEPS>, {images * p.heads * query_blocks, 1}, kThreads, rows, stream, p);
    if (error == 0) error = launch(upsample_kernel<T>, {images * blocks, 1}, kThreads, reach, stream, p);
    return error;
}

template <typename T, int STEPS>
int launch_steps(const Lowtention& p, void* stream) {
    if (p.qkv_rows) return launch_three<T, STEPS>(p, stream);
    if (p.images == 1 || p.images * p.tokens <= 64) return launch_one<T, STEPS, 4>(p, stream);
    if (p.images * p.tokens <= 128) return launch_one<T, STEPS, 8>(p, stream);
    return kNoSuchConfig;
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
