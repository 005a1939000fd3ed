// mbconv on Hopper, for stride 1, 3x3 and many channels, see mbconv.cu: products by warpgroups run by themselves, both operands in shared
// memory, while the CUDA cores convolve and activate.
//
// Expanded channels go through 64 at a time. While chunk c is convolved, window to D, the expansion of chunk c + 1 is under way; while
// that one's sums are activated, into the same window, D is projected. Each slab of weights has a barrier, so the window and D need
// none of their own but before the last chunk, which is convolved without an expansion.
//
// Of the depthwise convolution a thread has four channels of a segment, up to eight neighbouring outputs of a line: a value is read
// and converted once for the three taps of a line.
//
// Budget of a CTA (256 threads), with c input channels rounded up to 128 and w pixels of window:
//   shared memory  64 KB (48 KB) of weights under way + 16 KB for D + 256 c + (160 or 320) w bytes
//   registers      255 a thread; one CTA an SM
//   from L2        the inputs under the window, all weights and the residual once a CTA of up to 256 output columns, depthwise weights
//                  once a warp; LowFormer-B1's 7x7x256, two images a CTA, L1 keeping all to nothing: 554 to 705 KB an image
#include "mbconv.cuh"
#include "warpgroup.cuh"

namespace lowkernels {
namespace {

// STAGES slabs under way.
template <int STAGES>
struct WideMBConv {
    static constexpr int kThreads = 2 * kWarpgroup;
    static constexpr int kStages = STAGES, kRing = STAGES * kSlabBytes;
    static constexpr int kParts = 2, kColumns = kParts * kSlabColumns;
};
static_assert(kThreads == 2 * kWarpgroup, "window.cuh deals the depthwise convolution to as many threads");

// The shapes compiled, by the number lowkernels/backends/cuda/hopper_mbconv.py chooses.
#define LK_WIDE_MBCONVS(X) X(0, 4) X(1, 3)

constexpr int kWideRows = 128;  // of a CTA's products, 64 of each warpgroup
constexpr int kTaps = 3;     // of a line
constexpr int kSegment = 8;  // outputs of a line that a thread makes
// A unit: 64 of depth of a product. Of the expansion two units of 64 columns are a slab.
constexpr int kUnitDepth = kSlabDepth, kUnitBytes = kUnitDepth * kChunk * 2;
// Bytes of a unit's depth of a CTA's rows, and of one warpgroup's.
constexpr int kRowsBytes = kWideRows * kUnitDepth * 2, kGroupBytes = kRowsBytes / 2;

struct WideMBConvTask {
    MBConv p;
    int slabs, chunks;  // of one chunk's expansion, of expanded channels
    int segment;        // outputs
};

// Where the 16 bytes of channels 8 * unit of a row lie in a matrix of rows of 128 bytes, swizzled.
LK_DEVICE int swizzled(int row, int unit) { return row * 128 + ((unit ^ row % 8) << 4); }

// X [units][rows][64], whole slabs, zero where there is no image or no channel.
template <typename T, int PIECE>
LK_DEVICE void copy_rows(const WideMBConvTask& t, const Place& place, const Inside& in, unsigned char* inputs) {
    const Geometry& g = t.p.g;
    constexpr int elements = PIECE / 2, pieces = kUnitDepth / elements;
    const int pixels = in.h * in.w;
    for (int i = thread_index(); i < kWideRows * pieces * 2 * t.slabs; i += kThreads) {
        const int unit = i / (kWideRows * pieces), row = i / pieces % kWideRows, channel = i % pieces * elements;
        const int number = row / pixels, image = place.image + number;
        const int y = in.y + row % pixels / in.w, x = in.x + row % pixels % in.w, from = unit * kUnitDepth + channel;
        const bool valid = number < g.images && image < g.n && from < g.c;
        const int64_t at = ((static_cast<int64_t>(image) * g.h + y) * g.w + x) * g.c + from;
        unsigned char* to = inputs + unit * kRowsBytes + swizzled(row, channel / 8) + channel % 8 * 2;
        cp_async<PIECE>(to, static_cast<const T*>(t.p.x) + (valid ? at : 0), valid);
    }
    cp_async_commit();
}

// A thread's share of the depthwise convolution, [segment of a line][four channels] of a chunk.
template <typename W>
struct Segment {
    float acc[2][kSegment / 2][4];
    const W* from;  // the first input in the window
    int row, count, reach;  // in D, outputs, and the inputs of a line under them; none: 0

    LK_DEVICE Segment(const WideMBConvTask& t, const Place& place, const W* window) {
        const Geometry& g = t.p.g;
        const int slot = thread_index() / kQuads, quad = thread_index() % kQuads, across = ceil_div(g.tile_w, t.segment);
        const int line = slot / across, x = slot % across * t.segment, left = g.tile_w - x;
        const int image = line / g.tile_h, y = line % g.tile_h;
        count = image < g.images ? (left < t.segment ? left : t.segment) : 0;
        reach = count > 0 ? count + kTaps - 1 : 0;
        row = line * g.tile_w + x;
        from = window + ((image * place.window_h + y) * place.window_w + x) * kWindowLength + quad * 4;
    }

    LK_DEVICE void begin(const float* bias) {
        const Float4 initial = load4(bias + thread_index() % kQuads * 4);
#pragma unroll
        for (int i = 0; i < kSegment; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) of(i)[c] = initial.v[c];
    }

    LK_DEVICE float (&of(int i))[4] { return acc[i / (kSegment / 2)][i % (kSegment / 2)]; }

    // One line of taps. Outputs beyond the segment's last take part as far as their inputs are read for others.
    LK_DEVICE void add(const W* line, const Float4 (&w)[kTaps]) {
#pragma unroll
        for (int j = 0; j < kSegment + kTaps - 1; j++) {
            if (j < reach) {
                const Float4 v = load4(line + j * kWindowLength);
#pragma unroll
                for (int tap = 0; tap < kTaps; tap++)
                    if (j - tap >= 0 && j - tap < kSegment)
#pragma unroll
                        for (int c = 0; c < 4; c++) of(j - tap)[c] += v.v[c] * w[tap].v[c];
            }
        }
    }

    template <typename T>
    LK_DEVICE void finish(T, int act, unsigned char* tile) {
        // Half of it at a time: all needs more registers than there are.
        activate(act, acc[0]);
        activate(act, acc[1]);
        const int quad = thread_index() % kQuads;
        int to = row;
        recompute(to);  // eight addresses would be kept over all chunks, and spilled
#pragma unroll
        for (int i = 0; i < kSegment; i++)
            if (i < count) store4(reinterpret_cast<T*>(tile + swizzled(to + i, quad / 2) + quad % 2 * 8), of(i));
    }
};

// Bias and activation of a chunk's expansion, into the window. Half of it at a time: all needs more registers than there are.
template <typename W>
LK_DEVICE void publish(const MBConv& p, int chunk, const float (&hidden)[kChunk / 8][4], const int (&target)[2], W* window) {
    constexpr int groups = kChunk / kGroup / 2;
#pragma unroll
    for (int begin = 0; begin < kChunk / kGroup; begin += groups) {
        const int column = begin * kGroup + lane_index() % 4 * 4, channel = chunk * kChunk + column;
        float v[groups][2][4];
#pragma unroll
        for (int g = 0; g < groups; g++) {
            const Float4 bias = channel + g * kGroup < p.expanded ? load4(p.expand_bias + channel + g * kGroup) : Float4{};
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int c = 0; c < 4; c++) v[g][half][c] = hidden[2 * (begin + g) + c / 2][2 * half + c % 2] + bias.v[c];
        }
        activate(p.act, v);
#pragma unroll
        for (int g = 0; g < groups; g++) {
            // Whatever the inputs: an infinity times a weight of zero would be NaN.
            if (channel + g * kGroup >= p.expanded) clear(v[g]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int to = target[half];
                recompute(to);
                if (to >= 0) store4(window + to + column + g * kGroup, v[g][half]);
            }
        }
    }
}

// Where a row of D is in the output, or -1.
LK_DEVICE int64_t output_of(const Geometry& g, const Place& p, int row) {
    const int pixels = g.tile_h * g.tile_w, number = row / pixels, pixel = row % pixels;
    const int image = p.image + number, y = p.y + pixel / g.tile_w, x = p.x + pixel % g.tile_w;
    if (number >= g.images || image >= g.n || y >= g.ho || x >= g.wo) return -1;
    return ((static_cast<int64_t>(image) * g.ho + y) * g.wo + x) * g.co;
}

template <typename T, typename C>
LK_KERNEL(C::kThreads, 1)
mbconv_sm90(WideMBConvTask t) {
    if constexpr (kWarpgroupProducts) {
        using W = typename Kept<T>::type;
        const MBConv& p = t.p;
        const Place place = place_of(p.g, block_x());
        const Inside in = inside_of(p.g, place);
        unsigned char* ring = dynamic_shared();
        unsigned char* tile = ring + C::kRing;
        unsigned char* inputs = tile + kRowsBytes;
        W* window = reinterpret_cast<W*>(inputs + 2 * t.slabs * kRowsBytes);

        if (p.g.c % 8 == 0)
            copy_rows<T, 16>(t, place, in, inputs);
        else
            copy_rows<T, 8>(t, place, in, inputs);
        const int count = t.chunks * (t.slabs + C::kParts);
        Slabs<C> slabs(static_cast<const Bits8*>(p.expand) + static_cast<int64_t>(block_y()) * count * kSlabUnits, count, ring);
        // The border stays zero; padding comes after the activation, so no bias may reach it. So do rows of D that are no pixel.
        const float zeros[4] = {};
        const int quads = p.g.images * place.window_h * place.window_w * (kWindowLength / 4);
        for (int i = thread_index(); i < quads; i += kThreads) store4(window + i * 4, zeros);
        for (int i = thread_index(); i < kRowsBytes / 8; i += kThreads) *reinterpret_cast<Bits4*>(tile + i * 8) = {};

        // Where in the window this lane's two rows of the expansion go.
        int target[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int pixel = window_pixel(p.g, place, in, warp_index() * 16 + half * 8 + lane_index() / 4);
            target[half] = pixel < 0 ? -1 : pixel * kWindowLength;
        }
        int rows = thread_index() / kWarpgroup * kGroupBytes;  // where this warpgroup's begin in 64 of depth of X, and in D
        const int channels = t.chunks * kChunk;
        Segment<W> segment(t, place, window);
        float out[C::kParts][kSlabColumns / 8][4];
        float hidden[kChunk / 8][4];
        for (int chunk = -1; chunk < t.chunks; chunk++) {
            const bool convolved = chunk >= 0, more = chunk + 1 < t.chunks;
            if (!more) {
                wgmma_wait<0>();
                block_sync();  // the window is whole, and nobody's products read D
            }
            const float* weight = p.dw + chunk * kChunk + thread_index() % kQuads * 4;
            if (convolved) segment.begin(p.dw_bias + chunk * kChunk);
            for (int i = 0; i < kTaps || (more && i < t.slabs); i++) {
                Float4 w[kTaps];
                if (convolved && i < kTaps) {
#pragma unroll
                    for (int tap = 0; tap < kTaps; tap++) w[tap] = load4(weight + (i * kTaps + tap) * channels);
                }
                if (more && i < t.slabs) {
                    const uint32_t weights = slabs.next();
                    const uint32_t x = shared_address(inputs) + 2 * i * kRowsBytes + rows;
#pragma unroll
                    for (int step = 0; step < 2 * kSlabSteps; step++) {
                        const int unit = step / kSlabSteps;
                        wgmma_fence();
                        wgmma(T{}, hidden, slab_operand(x + unit * kRowsBytes, step % kSlabSteps),
                              slab_operand(weights + unit * kUnitBytes, step % kSlabSteps), i + step > 0);
                    }
                    wgmma_commit();
                }
                if (convolved && i < kTaps) segment.add(segment.from + i * place.window_w * kWindowLength, w);
                wgmma_wait<1>();
            }
            if (convolved) segment.finish(T{}, p.act, tile);
            wgmma_wait<0>();
            wgmma_settle(hidden);
#pragma unroll
            for (int part = 0; part < C::kParts; part++) {
                if (convolved) {
                    const uint32_t weights = slabs.next();  // D is whole, and nobody reads the window any more
                    recompute(rows);
#pragma unroll
                    for (int step = 0; step < kSlabSteps; step++) {
                        wgmma_fence();
                        wgmma(T{}, out[part], slab_operand(shared_address(tile) + rows, step), slab_operand(weights, step), chunk + step > 0);
                    }
                    wgmma_commit();
                }
                if (part == 0 && more) publish(p, chunk + 1, hidden, target, window);
                wgmma_wait<1>();
            }
        }
        wgmma_wait<0>();
        int block = block_x();
        recompute(block);  // or what is known of the place would be kept, and spilled
        int64_t at[2];
#pragma unroll
        for (int part = 0; part < C::kParts; part++) wgmma_settle(out[part]);
#pragma unroll
        for (int half = 0; half < 2; half++) at[half] = output_of(p.g, place_of(p.g, block), warp_index() * 16 + half * 8 + lane_index() / 4);
        store_rows<T>(out, block_y() * C::kColumns + lane_index() % 4 * 4, p.g.co, p.project_bias,
                      p.residual ? static_cast<const T*>(p.x) : nullptr, static_cast<T*>(p.out), at);
    } else {
        refuse();
    }
}

template <typename C, typename T>
int launch_config(const MBConv& p, void* stream) {
    const Geometry& g = p.g;
    WideMBConvTask t{};
    t.p = p;
    t.slabs = (g.c + 2 * kUnitDepth - 1) / (2 * kUnitDepth);
    t.chunks = (p.expanded + kChunk - 1) / kChunk;
    const int across = (g.tile_w + kSegment - 1) / kSegment;
    t.segment = (g.tile_w + across - 1) / across;
    auto smaller = [](int a, int b) { return a < b ? a : b; };
    const int window_h = g.tile_h + kTaps - 1, window_w = g.tile_w + kTaps - 1;
    const int inside = g.images * smaller(window_h, g.h) * smaller(window_w, g.w);
    if (g.kernel != kTaps || g.stride != 1 || t.slabs < 2) return kNoSuchConfig;
    if (inside > kWideRows || g.images * g.tile_h * g.tile_w > kWideRows || g.images * g.tile_h * across > kSlots) return kNoSuchConfig;
    const size_t window = static_cast<size_t>(g.images) * window_h * window_w * kWindowLength * sizeof(typename Kept<T>::type);
    const size_t shared = C::kRing + static_cast<size_t>(1 + 2 * t.slabs) * kRowsBytes + window;
    const int64_t tiles = static_cast<int64_t>((g.ho + g.tile_h - 1) / g.tile_h) * ((g.wo + g.tile_w - 1) / g.tile_w);
    const Grid grid = {(g.n + g.images - 1) / g.images * tiles, (g.co + C::kColumns - 1) / C::kColumns};
    return launch(mbconv_sm90<T, C>, grid, C::kThreads, shared, stream, t);
}

}  // namespace

int lowkernels_mbconv_sm90(const MBConv& p, Dtype dtype, int config, void* stream) {
    switch (config) {
#define LK_CASE(number, stages)                                                       \
    case number:                                                                      \
        return dtype == kHalf ? launch_config<WideMBConv<stages>, half_t>(p, stream)  \
                              : launch_config<WideMBConv<stages>, bf16_t>(p, stream);
        LK_WIDE_MBCONVS(LK_CASE)
#undef LK_CASE
        default: return kNoSuchConfig;
    }
}

}  // namespace lowkernels
