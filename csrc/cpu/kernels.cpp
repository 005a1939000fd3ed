// The operators, compiled once for every instruction set (LOWKERNELS_ISA names it) and chosen at run time.
// A is what products read, T the call's dtype: they differ where bf16 is multiplied in fp32.
#include "attention.h"
#include "stencil.h"
#include "winograd.h"

namespace lowkernels::LOWKERNELS_ISA {
namespace {

// Rows [y0, y1) of a convolution's output: what to read, copied to `scratch` with its zero border unless x serves as it is. What all
// threads are going to read, each makes for itself here and elsewhere: lines that one writes and another reads cost more than the copy.
template <class A, class T>
struct Input {
    const Images& images;
    const Conv& conv;
    i64 channels, stride, padding;

    bool copied() const { return padding > 0 || !same<A, T> || conv.in != channels; }
    i64 rows(i64 outputs) const { return (outputs - 1) * stride + conv.k; }
    i64 columns() const { return (images.w_out - 1) * stride + conv.k; }
    i64 scratch_elements(i64 outputs) const { return copied() ? rows(outputs) * columns() * conv.in : 0; }

    Source<A> source(const Team& team, i64 image, i64 y0, i64 y1, A* scratch) const {
        const T* x = static_cast<const T*>(images.x) + image * images.h * images.w * channels;
        if constexpr (same<A, T>) {
            if (!copied()) {
                const i64 row = images.w * channels;
                return window(x + y0 * stride * row, row, channels, conv.k, stride, y1 - y0, images.w_out);
            }
        }
        const i64 row = columns() * conv.in;
        warm<A>(conv, team.rank);
        for (i64 r = 0; r < rows(y1 - y0); ++r)
            padded_row(scratch + r * row, x, images.h, images.w, channels, y0 * stride - padding + r, -padding, columns(), conv.in);
        return window<A>(scratch, row, conv.in, conv.k, stride, y1 - y0, images.w_out);
    }
};

auto nothing = [](Team&, char*) {};

template <class A>
i64 scratch_pitch(i64 columns) {
    return round_up(columns, NW) + 64 / i64(sizeof(A));
}

WinogradBlock winograd_block(const Images& images, i64 padding, i64 channels, i64 y0, i64 y1) {
    return {images.h, images.w, padding, y0, y1, images.w_out, channels};
}

// Rows a block of a Winograd convolution may have: its transformed input stays in the cache.
template <class A>
Blocks winograd_blocks(const Images& images, const Conv& conv, i64 threads) {
    const i64 row = 16 * divide_up(images.w_out, 2) * conv.in * i64(sizeof(A)) / 2;
    Blocks blocks(images.h_out, row, CACHE + CACHE / 4, images.n, threads);
    blocks.rows = round_up(blocks.rows, 2);
    blocks.count = divide_up(images.h_out, blocks.rows);
    return blocks;
}

template <class A, class T>
void conv_act(const ConvAct& call, const Context& context) {
    const Images& im = call.images;
    const Conv& conv = call.conv;
    const i64 channels = call.channels;
    const Input<A, T> input{im, conv, channels, call.stride, call.padding};
    const T* residual = static_cast<const T*>(call.residual);
    T* out = static_cast<T*>(im.out);
    const i64 pixels = im.h_out * im.w_out;

    if (call.pool) {
        const i64 scratch = input.scratch_elements(im.h_out) * i64(sizeof(A));
        parallel(context, im.n, 0, 0, scratch, nothing, [&](Team& team, char*, i64 image) {
            Source<A> source = input.source(team, image, 0, im.h_out, reinterpret_cast<A*>(team.own));
            const T* add = residual ? residual + image * pixels * conv.out : nullptr;
            team.run(panels_of(conv.out), [&](i64 panel, i64 next) {
                const int width = panel_width(conv.out, panel);
                const i64 column = panel * NW, columns = smaller(width, conv.out - column);
                double total[NW] = {};
                Prefetch prefetch = prefetch_panel<A>(conv, next);
                panel_tiles(source, panel_of<A>(conv, panel), width, 0, tiles_of_run(source) * source.runs, prefetch,
                            [&](float* c, i64 rows, i64 run, i64 pixel) {
                                alignas(64) float y[MR * NW];
                                finish(call.act, c, rows, width, conv.bias + column, y, static_cast<const float*>(nullptr), width, width);
                                const T* from = add ? add + (run * im.w_out + pixel) * conv.out + column : nullptr;
                                for (i64 r = 0; from && r < rows; ++r)
                                    for (i64 i = 0; i < columns; ++i) y[r * width + i] += to_float(from[r * conv.out + i]);
                                for (int v = 0; v < width; v += VL) {
                                    V part = {};
                                    for (i64 r = 0; r < rows; ++r) part += load(y + r * width + v);
                                    for (int i = 0; i < VL; ++i) total[v + i] += part[i];
                                }
                            });
                for (i64 i = 0; i < columns; ++i) from_float(out + image * conv.out + column + i, float(total[i] / double(pixels)));
            });
        });
        return;
    }

    if (conv.winograd) {
        const Blocks blocks = winograd_blocks<A>(im, conv, context.threads);
        const WinogradBlock largest = winograd_block(im, call.padding, channels, 0, blocks.rows);
        parallel(context, im.n * blocks.count, 0, 0, largest.own_bytes<A>(), nothing, [&](Team& team, char*, i64 item) {
                     const i64 image = item / blocks.count, y0 = blocks.begin(item % blocks.count), y1 = blocks.end(item % blocks.count);
                     const T* x = static_cast<const T*>(im.x) + image * im.h * im.w * channels;
                     const i64 at = (image * pixels + y0 * im.w_out) * conv.out;
                     winograd<A>(team, x, winograd_block(im, call.padding, channels, y0, y1), conv, call.act,
                              Target<T>{out + at, residual ? residual + at : nullptr, conv.out, im.w_out * conv.out, conv.out}, team.own);
                 });
        return;
    }

    // With few weights, the copy may be made in smaller pieces, which stay nearer.
    const bool light = conv.k * conv.k * conv.in * conv.out * i64(sizeof(A)) < CACHE / 8;
    const Blocks blocks(im.h_out, call.stride * im.w * conv.in * i64(sizeof(A)), light ? CACHE / 4 : CACHE, im.n, context.threads);
    parallel(context, im.n * blocks.count, 0, 0, input.scratch_elements(blocks.rows) * i64(sizeof(A)), nothing,
             [&](Team& team, char*, i64 item) {
                 const i64 image = item / blocks.count, y0 = blocks.begin(item % blocks.count), y1 = blocks.end(item % blocks.count);
                 const i64 at = (image * pixels + y0 * im.w_out) * conv.out;
                 Source<A> source = input.source(team, image, y0, y1, reinterpret_cast<A*>(team.own));
                 product(team, source, conv, call.act,
                         Target<T>{out + at, residual ? residual + at : nullptr, conv.out, im.w_out * conv.out, conv.out});
             });
}

template <class A, class T>
void fused_mbconv(const FusedMBConv& call, const Context& context) {
    const Images& im = call.images;
    const Conv &conv = call.conv, &project = call.project;
    const i64 channels = conv.in, pixels = im.h_out * im.w_out, pitch = scratch_pitch<A>(conv.out);
    const Input<A, T> input{im, conv, channels, call.stride, call.padding};
    const T* x = static_cast<const T*>(im.x);
    T* out = static_cast<T*>(im.out);
    const bool transformed = conv.winograd;
    Blocks blocks(im.h_out, im.w_out * conv.out * i64(sizeof(A)), CACHE, im.n, context.threads);
    if (transformed) {
        Blocks finer = winograd_blocks<A>(im, conv, context.threads);
        if (finer.rows < blocks.rows) blocks = finer;
        blocks.rows = round_up(blocks.rows, 2);
        blocks.count = divide_up(im.h_out, blocks.rows);
    }
    const WinogradBlock largest = winograd_block(im, call.padding, channels, 0, blocks.rows);

    struct Scratch {
        A* expanded;
        float* partial;
        i64 bytes;
    };
    auto layout = [&](char* base) {
        Arena arena(base);
        Scratch s;
        s.expanded = arena.take<A>(blocks.rows * im.w_out * pitch);
        s.partial = arena.take<float>(partial_floats(conv.out, blocks.rows * im.w_out, project.out));
        s.bytes = arena.used;
        return s;
    };
    const i64 own = transformed ? largest.own_bytes<A>() : input.scratch_elements(blocks.rows) * i64(sizeof(A));
    parallel(context, im.n * blocks.count, 0, layout(nullptr).bytes, own, nothing, [&](Team& team, char*, i64 item) {
        const i64 image = item / blocks.count, y0 = blocks.begin(item % blocks.count), y1 = blocks.end(item % blocks.count);
        const Scratch s = layout(team.item);
        const Target<A> expanded{s.expanded, nullptr, pitch, im.w_out * pitch, round_up(conv.out, NW)};
        if (transformed)
            winograd<A>(team, x + image * im.h * im.w * channels, winograd_block(im, call.padding, channels, y0, y1), conv, call.act, expanded,
                        team.own, &project);
        else
            product(team, input.source(team, image, y0, y1, reinterpret_cast<A*>(team.own)), conv, call.act, expanded, &project);
        const i64 at = (image * pixels + y0 * im.w_out) * project.out;
        projection(team, s.expanded, (y1 - y0) * im.w_out, pitch, project, NONE,
                   Target<T>{out + at, call.residual ? x + at : nullptr, project.out, 0, project.out}, s.partial);
    });
}

template <class A, class T>
void inverted_residual(const InvertedResidual& call, const Context& context) {
    const Images& im = call.images;
    const Conv &expand = call.expand, &project = call.project;
    const Depthwise& dw = call.depthwise;
    const bool expands = expand.weight != nullptr;
    const i64 channels = expands ? expand.in : dw.channels, hidden = dw.channels, pixels = im.h_out * im.w_out;
    const i64 pitch = scratch_pitch<A>(hidden), columns = (im.w_out - 1) * call.stride + dw.k;
    const T* x = static_cast<const T*>(im.x);
    T* out = static_cast<T*>(im.out);

    const i64 widest = larger(im.w_out * hidden * i64(sizeof(A)), 2 * call.stride * columns * NW * i64(sizeof(float)));
    const Blocks blocks(im.h_out, widest, CACHE, im.n, context.threads);
    auto input_rows = [&](i64 rows) { return (rows - 1) * call.stride + dw.k; };
    const bool copies = expands && !same<A, T>;

    struct Scratch {
        A* filtered;
        A* input;
        float* partial;
        i64 bytes;
    };
    auto layout = [&](char* base) {
        Arena arena(base);
        Scratch s;
        s.filtered = arena.take<A>(blocks.rows * im.w_out * pitch);
        s.input = arena.take<A>(copies ? input_rows(blocks.rows) * im.w * channels : 0);
        s.partial = arena.take<float>(partial_floats(hidden, blocks.rows * im.w_out, project.out));
        s.bytes = arena.used;
        return s;
    };
    const i64 own = input_rows(blocks.rows) * columns * NW * i64(sizeof(float));
    parallel(context, im.n * blocks.count, 0, layout(nullptr).bytes, own, nothing, [&](Team& team, char*, i64 item) {
        const i64 image_index = item / blocks.count, y0 = blocks.begin(item % blocks.count), y1 = blocks.end(item % blocks.count);
        const Scratch s = layout(team.item);
        const T* image = x + image_index * im.h * im.w * channels;
        // Rows of the panel, and those of them that lie in the image.
        const i64 top = y0 * call.stride - call.padding, rows = input_rows(y1 - y0);
        const i64 first = larger(top, 0), last = larger(smaller(top + rows, im.h), first);
        const i64 inside = smaller(im.w, columns - call.padding);
        const A* source = nullptr;
        if constexpr (same<A, T>) {
            source = image + first * im.w * channels;
        } else if (expands) {
            team.run(last - first, [&](i64 r, i64) {
                convert(s.input + r * im.w * channels, image + (first + r) * im.w * channels, im.w * channels);
            });
            source = s.input;
        }
        float* panel_input = reinterpret_cast<float*>(team.own);
        int bordered = 0;  // the width of panels for which this thread's border is zero
        team.run(panels_of(hidden), [&](i64 panel, i64 next) {
            const int width = panel_width(hidden, panel);
            const i64 channel = panel * NW, row = columns * width;
            if (expands) {
                if (bordered != width) std::memset(panel_input, 0, rows * row * sizeof(float));
                bordered = width;
                const Source<A> pixels_of{{source, channels, 0, 1, int(channels)}, im.w * channels, last - first, inside};
                float* to = panel_input + (first - top) * row + call.padding * width - channel;
                panel_product(pixels_of, expand, call.expand_act, Target<float>{to, nullptr, width, row, channel + width}, panel, 0,
                              tiles_of_run(pixels_of) * pixels_of.runs,
                              next >= 0 ? prefetch_panel<A>(expand, next) : prefetch_panel<A>(project, team.rank));
            } else {
                fill_panel(panel_input, image, im.h, im.w, channels, top, rows, -call.padding, columns, channel, width,
                           Affine({nullptr, nullptr, 0}, {0, 0}, channel, width));
            }
            depthwise_panel(panel_input, columns, width, dw, channel, call.stride, call.depthwise_act, y1 - y0, im.w_out,
                            s.filtered + channel, pitch);
        });
        const i64 at = (image_index * pixels + y0 * im.w_out) * project.out;
        projection(team, s.filtered, (y1 - y0) * im.w_out, pitch, project, call.project_act,
                   Target<T>{out + at, call.residual ? x + at : nullptr, project.out, 0, project.out}, s.partial);
    });
}

template <class T>
void measure(Team& team, const T* x, i64 images, i64 elements, Moments* to) {
    const i64 pieces = pieces_of(elements);
    team.run(images * pieces, [&](i64 unit, i64) {
        to[unit] = moments(x + unit / pieces * elements + unit % pieces * PIECE, piece_size(elements, unit % pieces));
    });
}

template <class A, class T>
void gn_mlp(const GnMlp& call, const Context& context) {
    const Images& im = call.images;
    const Conv &fc1 = call.fc1, &fc2 = call.fc2;
    const i64 channels = fc1.in, area = im.h * im.w, elements = area * channels, pieces = pieces_of(elements);
    const i64 in_pitch = scratch_pitch<A>(channels), pitch = scratch_pitch<A>(fc1.out);
    const T* x = static_cast<const T*>(im.x);
    T* out = static_cast<T*>(im.out);
    // Everything after the statistics is per pixel, so blocks of pixels may span images.
    const Blocks blocks(im.n * area, fc1.out * i64(sizeof(A)), CACHE, 1, context.threads);

    struct Scratch {
        A* hidden;
        float* partial;
        i64 bytes;
    };
    auto layout = [&](char* base) {
        Arena arena(base);
        Scratch s;
        s.hidden = arena.take<A>(blocks.rows * pitch);
        s.partial = arena.take<float>(partial_floats(fc1.out, blocks.rows, fc2.out));
        s.bytes = arena.used;
        return s;
    };
    parallel(
        context, blocks.count, im.n * pieces * i64(sizeof(Moments)), layout(nullptr).bytes, blocks.rows * in_pitch * i64(sizeof(A)),
        [&](Team& team, char* common) {
            warm<A>(fc1, team.rank);
            measure(team, x, im.n, elements, reinterpret_cast<Moments*>(common));
        },
        [&](Team& team, char* common, i64 block) {
            const Scratch s = layout(team.item);
            A* input = reinterpret_cast<A*>(team.own);
            const i64 begin = blocks.begin(block), count = blocks.end(block) - begin;
            for (i64 p = 0; p < count;) {
                const i64 image = (begin + p) / area, stop = smaller(count, (image + 1) * area - begin);
                const Scale scale = merge(reinterpret_cast<Moments*>(common) + image * pieces, elements, call.norm.eps);
                for (i64 channel = 0; channel < channels; channel += VL) {
                    const Affine affine(call.norm, scale, channel, VL);
                    for (i64 q = p; q < stop; ++q) {
                        const V value = load(x + (begin + q) * channels + channel, channels - channel);
                        store(input + q * in_pitch + channel, (value - affine.mean) * affine.scale[0] + affine.shift[0]);
                    }
                }
                p = stop;
            }
            product(team, matrix<A>(input, count, in_pitch, channels), fc1, call.act,
                    Target<A>{s.hidden, nullptr, pitch, 0, round_up(fc1.out, NW)}, &fc2);
            const i64 at = begin * fc2.out;
            projection(team, s.hidden, count, pitch, fc2, NONE,
                       Target<T>{out + at, call.residual ? x + at : nullptr, fc2.out, 0, fc2.out}, s.partial);
        });
}

template <class A, class T>
void lowtention(const Lowtention& call, const Context& context) {
    const Images& im = call.images;
    const Depthwise& dw = call.depthwise;
    const i64 channels = dw.channels, elements = im.h * im.w * channels, pieces = call.norm.weight ? pieces_of(elements) : 0;
    const i64 h = divide_up(im.h, call.stride), w = divide_up(im.w, call.stride), tokens = h * w, inner = call.qkv.out / 3;
    const i64 pitch = scratch_pitch<A>(channels), qkv_pitch = scratch_pitch<float>(3 * inner), grid_row = (w + 2) * inner;
    const i64 columns = (w - 1) * call.stride + dw.k, out_channels = call.up[0].out;
    const T* x = static_cast<const T*>(im.x);
    T* out = static_cast<T*>(im.out);
    const bool transformed = call.up[0].winograd;

    // Rows of the depthwise output a thread makes at a time: its input panel stays in the cache.
    const i64 rows_at_once = larger(1, smaller(h, (CACHE / 2) / (call.stride * columns * NW * i64(sizeof(float)))));
    const i64 row_groups = divide_up(h, rows_at_once);
    const Heads shape{nullptr, tokens, qkv_pitch, inner / call.heads, call.heads};
    // Panels of columns that belong to one head, or 0 where they do not end where heads do.
    const i64 head_panels = 3 * shape.dim % NW ? 0 : 3 * shape.dim / NW;
    const WinogradBlock up_block{h + 2, w + 2, 0, 0, im.h, im.w, inner};

    struct Scratch {
        A* filtered;
        float* qkv;
        float* packed;
        A* grid;
        i64 bytes;
    };
    auto layout = [&](char* base) {
        Arena arena(base);
        Scratch s;
        s.filtered = arena.take<A>(tokens * pitch);
        s.qkv = arena.take<float>(tokens * qkv_pitch);
        s.packed = arena.take<float>(call.heads * shape.packed_floats());
        s.grid = arena.take<A>((h + 2) * grid_row);
        s.bytes = arena.used;
        return s;
    };
    const i64 panel_floats = ((rows_at_once - 1) * call.stride + dw.k) * columns * NW;
    const i64 own = larger(larger(panel_floats, MR * shape.scores_pitch()) * i64(sizeof(float)), transformed ? up_block.own_bytes<A>() : 0);
    parallel(
        context, im.n, im.n * pieces * i64(sizeof(Moments)), layout(nullptr).bytes, own,
        [&](Team& team, char* common) {
            warm<A>(call.qkv, team.rank * larger(1, head_panels));
            if (pieces) measure(team, x, im.n, elements, reinterpret_cast<Moments*>(common));
        },
        [&](Team& team, char* common, i64 image) {
            const Scratch s = layout(team.item);
            float* own_floats = reinterpret_cast<float*>(team.own);
            const T* image_x = x + image * elements;
            const Scale scale = pieces ? merge(reinterpret_cast<Moments*>(common) + image * pieces, elements, call.norm.eps) : Scale{0, 0};
            const i64 panels = panels_of(channels) * row_groups;
            team.run(panels + h + 2, [&](i64 unit, i64) {
                if (unit >= panels) return (void)std::memset(s.grid + (unit - panels) * grid_row, 0, grid_row * sizeof(A));
                const i64 panel = unit / row_groups, y0 = unit % row_groups * rows_at_once, y1 = smaller(h, y0 + rows_at_once);
                const int width = panel_width(channels, panel);
                const i64 channel = panel * NW, border = dw.k / 2;
                fill_panel(own_floats, image_x, im.h, im.w, channels, y0 * call.stride - border, (y1 - y0 - 1) * call.stride + dw.k,
                           -border, columns, channel, width, Affine(call.norm, scale, channel, width));
                depthwise_panel(own_floats, columns, width, dw, channel, call.stride, NONE, y1 - y0, w,
                                s.filtered + y0 * w * pitch + channel, pitch);
            });
            const Source<A> filtered = matrix<A>(s.filtered, tokens, pitch, channels);
            const Target<float> projected{s.qkv, nullptr, qkv_pitch, 0, round_up(3 * inner, NW)};
            Heads heads = shape;
            heads.qkv = s.qkv;
            auto pack = [&](i64 head) { pack_head(heads, head, s.packed + head * heads.packed_floats()); };
            const i64 tiles = tiles_of_run(filtered);
            auto attend_tile = [&](i64 head, i64 tile) {
                const i64 begin = tile * tokens / tiles, end = (tile + 1) * tokens / tiles;
                attend(heads, head, s.packed + head * heads.packed_floats(), begin, end - begin, own_floats,
                       [&](i64 token, const float* values, i64 count, i64 channel) {
                           A* to = s.grid + (token / w + 1) * grid_row + (token % w + 1) * inner + head * heads.dim + channel;
                           convert(to, values, count);
                       });
            };
            if (head_panels && call.heads % team.size == 0) {
                // A head's projection stays with the thread that attends to it.
                warm<A>(call.up[0], team.rank);
                team.run(call.heads, [&](i64 head, i64 next) {
                    for (i64 i = 0, panel = head * head_panels; i < head_panels; ++i, ++panel) {
                        const Prefetch prefetch = i + 1 < head_panels ? prefetch_panel<A>(call.qkv, panel + 1)
                                                  : next >= 0         ? prefetch_panel<A>(call.qkv, next * head_panels)
                                                                      : prefetch_panel<A>(call.up[0], team.rank);
                        panel_product(filtered, call.qkv, NONE, projected, panel, 0, tiles, prefetch);
                    }
                    pack(head);
                    for (i64 tile = 0; tile < tiles; ++tile) attend_tile(head, tile);
                });
            } else {
                product(team, filtered, call.qkv, NONE, projected);
                team.run(call.heads, [&](i64 head, i64) { pack(head); });
                warm<A>(call.up[0], team.rank);
                team.run(call.heads * tiles, [&](i64 unit, i64) { attend_tile(unit / tiles, unit % tiles); });
            }

            T* image_out = out + image * im.h * im.w * out_channels;
            const T* add = call.residual ? image_x : nullptr;
            if (call.stride == 1) {
                const Target<T> target{image_out, add, out_channels, im.w * out_channels, out_channels};
                if (transformed)
                    winograd<A>(team, s.grid, up_block, call.up[0], NONE, target, team.own);
                else
                    product(team, window<A>(s.grid, grid_row, inner, 3, 1, im.h, im.w), call.up[0], NONE, target);
                return;
            }
            // Output (2 i + py, 2 j + px) is a 2x2 convolution of the grid at (i + py, j + px) of its zero border's frame.
            const i64 out_panels = panels_of(out_channels);
            team.run(4 * out_panels, [&](i64 unit, i64 next) {
                const i64 parity = unit % 4, py = parity / 2, px = parity % 2, panel = unit / 4;
                const i64 rows = (im.h - py + 1) / 2, pixels = (im.w - px + 1) / 2;
                if (rows == 0 || pixels == 0) return;
                const i64 at = (py * im.w + px) * out_channels;
                const Target<T> target{image_out + at, add ? add + at : nullptr, 2 * out_channels, 2 * im.w * out_channels, out_channels};
                const Source<A> source = window<A>(s.grid + py * grid_row + px * inner, grid_row, inner, 2, 1, rows, pixels);
                panel_product(source, call.up[parity], NONE, target, panel, 0, tiles_of_run(source) * rows,
                              next >= 0 ? prefetch_panel<A>(call.up[next % 4], next / 4) : Prefetch{nullptr, nullptr, 0});
            });
        });
}

// What stands between blocks in a model's head: little work, so one thread does it.
template <class T>
void norm_act(const NormAct& call) {
    const i64 channels = call.channels;
    for (i64 row = 0; row < call.n; ++row) {
        const T* x = static_cast<const T*>(call.x) + row * channels;
        T* out = static_cast<T*>(call.out) + row * channels;
        Scale scale{0, 1};
        if (call.norm.weight) {
            const Moments all = moments(x, channels);
            scale = {float(all.mean), float(1.0 / __builtin_sqrt((all.deviation < 0 ? 0 : all.deviation) / double(channels) + call.norm.eps))};
        }
        with_activation(call.act, [&](auto known) {
            for (i64 i = 0; i < channels; i += VL) {
                const i64 count = smaller(VL, channels - i);
                V value = load(x + i, count);
                if (call.norm.weight) value = (value - scale.mean) * (load(call.norm.weight + i, count) * scale.rstd) + load(call.norm.bias + i, count);
                write(activate<known.value, T>(value), out + i, static_cast<const T*>(nullptr), count);
            }
        });
    }
}

template <class T>
void pool(const Pool& call) {
    typedef double Doubles __attribute__((vector_size(VL * 8)));
    for (i64 image = 0; image < call.n; ++image) {
        const T* x = static_cast<const T*>(call.x) + image * call.pixels * call.channels;
        for (i64 i = 0; i < call.channels; i += VL) {
            const i64 count = smaller(VL, call.channels - i);
            Doubles total = {};
            for (i64 pixel = 0; pixel < call.pixels; ++pixel) total += __builtin_convertvector(load(x + pixel * call.channels + i, count), Doubles);
            const V mean = __builtin_convertvector(total / double(call.pixels), V);
            write(mean, static_cast<T*>(call.out) + image * call.channels + i, static_cast<const T*>(nullptr), count);
        }
    }
}

template <class A, class T>
constexpr Kernels kernels_of = {conv_act<A, T>, inverted_residual<A, T>, fused_mbconv<A, T>, lowtention<A, T>, gn_mlp<A, T>,
                                norm_act<T>,    pool<T>,                 VL,                 same<A, bf16>};

}  // namespace

// The kernels for fp32 calls, or null where another instruction set's serve them as well; and those for bf16 calls.
extern const Kernels* const fp32;
extern const Kernels* const half;
#if defined(__AVX512BF16__)
const Kernels* const fp32 = nullptr;
const Kernels* const half = &kernels_of<bf16, bf16>;
#else
const Kernels* const fp32 = &kernels_of<float, float>;
const Kernels* const half = &kernels_of<float, bf16>;
#endif

}  // namespace lowkernels::LOWKERNELS_ISA
