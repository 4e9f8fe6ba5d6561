// Optional ReLU - pointwise 1x1 convolution of a concatenation that never exists as a whole. A task is one image of one
// variant (forward) or one group of images (backward).
//
// The products read the parts where they lie, or rectified blocks of a few pixels and channels: a copy of a whole tile
// would be made while no product runs. Everything is prefetched a fixed distance ahead, evenly between the arithmetic.
#include <string.h>

#include "cpu/matrix.h"
#include "cpu/product.h"

namespace pn::PN_NAMESPACE {

namespace {

// Input floats between what is read or written and what is prefetched, about.
constexpr int64_t kFloatsAhead = 2048;

struct Geometry {
  int out_height, out_width, in_channels, variants;
  int64_t in_pixels, out_pixels;
  int64_t in_ahead, out_ahead;  // pixels to the one that is prefetched, not less than are multiplied together
};

int32_t check(const char* name, const pn_pointwise* a, bool backward, Geometry* s) {
  PN_REQUIRE(a->parts && a->part_count >= 1 && a->part_count <= 8, "%s: needs 1 to 8 parts, not %d", name,
             a->part_count);
  PN_REQUIRE(a->images > 0 && a->height > 0 && a->width > 0 && a->out_channels > 0,
             "%s: images %d, height %d, width %d and out_channels %d must be positive", name, a->images, a->height,
             a->width, a->out_channels);
  PN_REQUIRE(a->stride == 1 || a->stride == 2, "%s: stride must be 1 or 2, not %d", name, a->stride);
  PN_REQUIRE(a->offset == 0 || a->offset == 1, "%s: offset must be 0 or 1, not %d", name, a->offset);
  PN_REQUIRE(a->y_offset >= 0 && a->y_offset + int64_t(a->out_channels) <= a->y_channels,
             "%s: channels %d to %d are not within y_channels %d", name, a->y_offset, a->y_offset + a->out_channels,
             a->y_channels);
  int64_t channels = 0;
  s->variants = 1;
  for (int i = 0; i < a->part_count; i++) {
    PN_REQUIRE(a->parts[i].variants >= 1 && a->parts[i].channels >= 1, "%s: part %d has %d variants and %d channels",
               name, i, a->parts[i].variants, a->parts[i].channels);
    s->variants = max(s->variants, a->parts[i].variants);
    channels += a->parts[i].channels;
  }
  PN_REQUIRE(channels <= 1 << 24, "%s: too many channels", name);
  for (int i = 0; i < a->part_count; i++)
    PN_REQUIRE(a->parts[i].variants == 1 || a->parts[i].variants == s->variants,
               "%s: part %d has %d variants, others have %d", name, i, a->parts[i].variants, s->variants);
  PN_REQUIRE(!backward || s->variants == 1, "%s: takes one variant, not %d", name, s->variants);
  s->in_channels = int(channels);
  s->out_height = (a->height + a->stride - 1) / a->stride;
  s->out_width = (a->width + a->stride - 1) / a->stride;
  s->in_pixels = int64_t(a->height) * a->width;
  s->out_pixels = int64_t(s->out_height) * s->out_width;
  s->in_ahead = s->out_ahead = max<int64_t>(16, kFloatsAhead / s->in_channels);
  if (a->stride == 2) {
    const int64_t rows = (s->out_ahead + s->out_width - 1) / s->out_width;
    s->in_ahead = rows * a->stride * a->width;
    s->out_ahead = rows * s->out_width;
  }
  return PN_OK;
}

// Calls f(first, source, count) for the runs of output pixels first.., relative to `begin`, that read the input pixels
// source, source + stride, ... of one row; source is -1 where they lie outside the image.
template <class F>
PN_INLINE void for_each_run(const pn_pointwise* a, const Geometry& s, int64_t begin, int64_t end, F f) {
  if (a->stride == 1 && a->offset == 0) return f(0, begin, end - begin);
  const int64_t readable = a->width > a->offset ? (a->width - 1 - a->offset) / a->stride + 1 : 0;  // outputs of a row
  for (int64_t p = begin, next; p < end; p = next) {
    const int64_t row = p / s.out_width, column = p % s.out_width;
    next = min(end, (row + 1) * s.out_width);
    const int64_t in_row = row * a->stride + a->offset;
    const int64_t inside = in_row < a->height ? min(next - p, max<int64_t>(0, readable - column)) : 0;
    if (inside > 0) f(p - begin, in_row * a->width + column * a->stride + a->offset, inside);
    if (p + inside < next) f(p + inside - begin, -1, next - p - inside);
  }
}

// Channels of pixels that are a constant distance apart.
struct Source {
  const float* x;
  int64_t step;
  int channels;
  int64_t ahead;  // distance of what is to be prefetched
};

// What a product reads: pixels through ReLU, where there is one.
template <bool kRelu>
struct Sources {
  const Source* sources;
  int count;
  int64_t pixel;
  int depth;

  PN_INLINE Sources from(int p) const { return {sources, count, pixel + p, depth}; }
  template <int P, class F>
  PN_INLINE void for_each_run(F f) const {
    for (int i = 0; i < count; i++) {
      const int64_t step = sources[i].step;
      const float* a = sources[i].x + pixel * step;
      for (int k0 = 0; k0 < sources[i].channels; k0 += 16, a += 16) {
        const int channels = min(16, sources[i].channels - k0);
        const float *b = a + 8 * step, *ahead = a + sources[i].ahead;
#pragma GCC unroll 16
        for (int p = 0; p < P; p++, ahead += step) __builtin_prefetch(ahead);
        if (kRelu) {
          // Once a value: as it is read, there would be a maximum for every multiply-add or two.
          alignas(64) float block[P * 16];
          const float* x = a;
#pragma GCC unroll 16
          for (int p = 0; p < P; p++, x += step)
            for (int c = 0; c < channels; c += L) store(block + p * 16 + c, relu(load_partial(x + c, channels - c)));
          asm volatile("" ::: "memory");  // the products load single values, instead of moving them out of vectors
          f(channels, [&block](int p) PN_LAMBDA_INLINE { return block + p * 16; });
        } else {
          f(channels, [a, b, step](int p) PN_LAMBDA_INLINE { return (p < 8 ? a : b) + p % 8 * step; });
        }
      }
    }
  }
};

// Input floats of a tile of the backward pass. The longer tiles make more use of the weights, but are too much for the
// nearest cache where x is read twice, for the gradient of the weights, or dx is collected.
constexpr int64_t kBackwardTileFloats = 2048, kInputGradientTileFloats = 16384;

// Makes sources of the pixels that the output pixels begin..end-1 of an image read, and returns how many: of the parts
// themselves where such pixels are a constant distance apart and make up `whole` register tiles, or one of a copy.
int make_sources(const pn_pointwise* a, const Geometry& s, int64_t variant, int64_t image, int64_t begin, int64_t end,
                 bool whole, float* copy, Source* sources) {
  int count = 0;
  for_each_run(a, s, begin, end, [&](int64_t first, int64_t source, int64_t pixels) {
    const bool direct = source >= 0 && pixels == end - begin && whole;
    float* to = copy + first * s.in_channels;
    if (source < 0) memset(to, 0, size_t(pixels) * s.in_channels * 4);
    for (int i = 0; i < a->part_count && source >= 0; i++) {
      const pn_part& part = a->parts[i];
      const float* x =
          part.x + (((part.variants == 1 ? 0 : variant) * a->images + image) * s.in_pixels + source) * part.channels;
      const int64_t step = int64_t(a->stride) * part.channels, ahead = s.in_ahead * part.channels;
      if (direct) {
        sources[count++] = {x, step, part.channels, ahead};
      } else {
        for (int c = 0; c < part.channels; c += L) {
          for (int64_t p = 0; p < pixels; p++) {
            __builtin_prefetch(x + p * step + c + ahead);
            store_partial(to + p * s.in_channels + c, load_partial(x + p * step + c, part.channels - c),
                          part.channels - c);
          }
        }
        to += part.channels;
      }
    }
  });
  if (!count) sources[count++] = {copy, s.in_channels, s.in_channels, 0};
  return count;
}

// A tile of pixels: planes of one vector of channels, `plane` floats apart.
struct Tile {
  float* memory;
  int64_t plane;

  float* at(int channel, int64_t pixel) const { return memory + channel / L * plane + pixel * L + channel % L; }
};

// Prefetches what will be written.
void prefetch_output(const float* y, int64_t step, int channels, int64_t pixels) {
  for (int64_t p = 0; p < pixels; p++, y += step)
    for (int c = 0; c < channels; c += 16) __builtin_prefetch(y + c, 1);
}

// The tile = pixels begin..end-1 of an image's gradient with its pending coefficients.
void load_gradient(const pn_pointwise* a, const Geometry& s, int64_t image, int64_t begin, int64_t end,
                   const Tile& tile) {
  for (int c = 0; c < a->out_channels; c += L) {
    const int count = a->out_channels - c;
    const int64_t first = (image * s.out_pixels + begin) * a->y_channels + a->y_offset + c;
    vec coefficients[3] = {};
    if (a->coefficients)
      for (int i = 0; i < 3; i++)
        coefficients[i] = load_partial(a->coefficients + i * a->y_channels + a->y_offset + c, count);
    with_lanes(count, [&](auto full) PN_LAMBDA_INLINE {
      load_gradient_pixels<full.value, true>(a->g + first, a->coefficients ? a->y + first : nullptr, coefficients,
                                             a->y_channels, s.out_ahead * a->y_channels, end - begin, count,
                                             tile.at(c, 0));
    });
  }
}

// Whether a part's dx goes past the cache: all its pixels are written, in their order.
bool streams_part(const pn_pointwise* a, const Geometry& s, const pn_part& part, bool between) {
  return !part.accumulate && ((a->stride == 1 && a->offset == 0) || between) &&
         is_streamed(part.dx, part.channels, a->images * s.in_pixels * part.channels);
}

// A vector of channels of dx, of pixels that are a constant distance apart: like a source, but to be written.
struct Target {
  float* dx;
  const float* x;  // null: there is no ReLU
  int64_t step, ahead;
  int64_t zero;  // distance of a pixel that gets zeros; 0: there is none
  bool added, streamed;
};

// Makes targets of the input pixels source, source + stride, ... of an image, for all vectors of the channels whose
// gradient is wanted. With `between`, the pixels in between get zeros where they are not added to.
void make_targets(const pn_pointwise* a, const Geometry& s, int64_t image, int64_t source, bool between,
                  Target* targets) {
  for (int i = 0; i < a->part_count; i++) {
    const pn_part& part = a->parts[i];
    if (!part.dx) continue;
    const int64_t first = (image * s.in_pixels + source) * part.channels;
    for (int c = 0; c < part.channels; c += L)
      *targets++ = {part.dx + first + c,
                    a->relu ? part.x + first + c : nullptr,
                    int64_t(a->stride) * part.channels,
                    s.in_ahead * part.channels,
                    between && !part.accumulate ? part.channels : 0,
                    part.accumulate != 0,
                    streams_part(a, s, part, between)};
  }
}

// Zeros for the pixels of the input row below `pixels` of these.
void clear_row_below(const pn_pointwise* a, const Geometry& s, int64_t image, int64_t source, int64_t pixels) {
  for (int i = 0; i < a->part_count; i++) {
    const pn_part& part = a->parts[i];
    if (!part.dx || part.accumulate) continue;
    const bool streamed = streams_part(a, s, part, true);
    float* dx = part.dx + (image * s.in_pixels + source + a->width) * part.channels;
    for (int64_t c = 0; c < 2 * pixels * part.channels; c += L) streamed ? stream(dx + c, vec{}) : store(dx + c, vec{});
  }
}

// dx of the pixels from `pixel` on, from a register tile of the product.
template <int P, int V>
PN_INLINE void write_gradients(const vec (&sum)[P][V], const Target* targets, int64_t pixel) {
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) {
    const Target t = targets[v];
    float* dx = t.dx + pixel * t.step;
    const float* x = t.x + pixel * t.step;
#pragma GCC unroll 16
    for (int p = 0; p < P; p++, dx += t.step, x += t.step) {
      vec d = sum[p][v];
      if (t.x) {
        __builtin_prefetch(x + t.ahead);
        d = load(x) > 0.0f ? d : vec{};
      }
      if (t.streamed) {
        stream(dx, d);
        if (t.zero) stream(dx + t.zero, vec{});
      } else {
        __builtin_prefetch(dx + t.ahead, 1);
        if (t.added) d += load(dx);
        store(dx, d);
        if (t.zero) store(dx + t.zero, vec{});
      }
    }
  }
}

// The same for any number of channels and pixels, from a tile of all the channels that are wanted.
void write_gradients(const pn_pointwise* a, const Geometry& s, int64_t image, int64_t source, int64_t pixels,
                     const Tile& tile) {
  int at = 0;
  for (int i = 0; i < a->part_count; i++) {
    const pn_part& part = a->parts[i];
    if (!part.dx) continue;
    const int64_t first = (image * s.in_pixels + source) * part.channels, step = int64_t(a->stride) * part.channels;
    for (int c = 0, count; c < part.channels; c += count, at += count) {
      count = min(L - at % L, part.channels - c);  // the part's vector may straddle two of the tile's
      const float *from = tile.at(at, 0), *x = part.x + first + c;
      float* dx = part.dx + first + c;
      with_lanes(count, [&](auto full) PN_LAMBDA_INLINE {
        for (int64_t p = 0; p < pixels; p++, from += L, dx += step, x += step) {
          vec d = load_lanes<full.value>(from, count);
          if (a->relu) {
            __builtin_prefetch(x + s.in_ahead * part.channels);
            d = load_lanes<full.value>(x, count) > 0.0f ? d : vec{};
          }
          __builtin_prefetch(dx + s.in_ahead * part.channels, 1);
          if (part.accumulate) d += load_lanes<full.value>(dx, count);
          store_lanes<full.value>(dx, d, count);
        }
      });
    }
  }
}

int vectors(int channels) { return (channels + L - 1) / L; }

}  // namespace

int32_t pointwise_forward(pn_context* context, const pn_pointwise* a) {
  Geometry s;
  if (int32_t status = check("pointwise_forward", a, false, &s)) return status;
  PN_REQUIRE(a->weight && a->y, "pointwise_forward: weight or y is null");
  for (int i = 0; i < a->part_count; i++) PN_REQUIRE(a->parts[i].x, "pointwise_forward: part %d is null", i);

  const int out_vectors = vectors(a->out_channels);
  // Pixels that are multiplied together. Those of an output row are a constant distance apart.
  const int64_t block = a->stride == 2 && s.out_width % 16 == 8 ? 8 : 16;
  const int64_t row = int64_t(out_vectors) * L, copy_floats = block * s.in_channels;
  const int64_t local = copy_floats + Statistics::floats(block, out_vectors), weight_floats = s.in_channels * row;
  if (!reserve(context, weight_floats, local)) return fail(PN_OUT_OF_MEMORY, "pointwise_forward: no memory for tiles");
  float* weight = static_cast<float*>(context->shared.get(weight_floats * 4));
  pack_pointwise(a->weight, s.in_channels, a->out_channels, false, weight);
  const bool streamed = a->y_offset % L == 0 && a->out_channels % L == 0 &&
                        is_streamed(a->y, a->y_channels, s.variants * a->images * s.out_pixels * a->y_channels);
  const int64_t y_ahead = s.out_ahead * a->y_channels;

  parallel_for(context, int64_t(s.variants) * a->images, [&](int64_t task, int thread) {
    const int64_t variant = task / a->images, image = task % a->images;
    float* copy = local_scratch(context, thread, local);
    Statistics statistics(copy + copy_floats, out_vectors);
    float* y = a->y + task * s.out_pixels * a->y_channels + a->y_offset;
    for (int64_t begin = 0; begin < s.out_pixels; begin += block) {
      const int pixels = int(min<int64_t>(block, s.out_pixels - begin));
      Source sources[8];
      const int count = make_sources(a, s, variant, image, begin, begin + pixels, pixels % 8 == 0, copy, sources);
      if (!streamed) prefetch_output(y + begin * a->y_channels + y_ahead, a->y_channels, a->out_channels, pixels);
      const auto run = [&](const auto& input) PN_LAMBDA_INLINE {
        product(
            input, pixels, weight, out_vectors, []() PN_LAMBDA_INLINE {},
            [&]<int P, int V>(const vec(&sum)[P][V], int p0, int v0) PN_LAMBDA_INLINE {
              const int left = pixels - p0;
              write_tile(sum, y + (begin + p0) * a->y_channels + v0 * L, a->y_channels, left,
                         a->out_channels - (v0 + V - 1) * L, streamed);
              if (a->statistics) statistics.add(sum, int(begin), p0, pixels, v0);
            });
      };
      if (a->relu)
        run(Sources<true>{sources, count, 0, s.in_channels});
      else
        run(Sources<false>{sources, count, 0, s.in_channels});
    }
    if (streamed) stream_fence();
    if (a->statistics) {
      float* to = a->statistics + task * 2 * a->y_channels + a->y_offset;
      for (int c = 0; c < a->out_channels; c += L) {
        store_partial(to + c, load(statistics.mean + c), a->out_channels - c);
        store_partial(to + a->y_channels + c, load(statistics.squares + c), a->out_channels - c);
      }
    }
  });
  return PN_OK;
}

int32_t pointwise_backward(pn_context* context, const pn_pointwise* a) {
  Geometry s;
  if (int32_t status = check("pointwise_backward", a, true, &s)) return status;
  int wanted = 0;             // channels whose gradient is asked for
  bool whole_vectors = true;  // of these: none belongs to two parts, or to one in part
  for (int i = 0; i < a->part_count; i++) {
    const pn_part& part = a->parts[i];
    if (part.dx) wanted += part.channels, whole_vectors &= part.channels % L == 0;
    PN_REQUIRE(part.x || !(a->d_weight || (part.dx && a->relu)), "pointwise_backward: part %d is null", i);
  }
  if (!wanted && !a->d_weight) return PN_OK;
  PN_REQUIRE(a->g, "pointwise_backward: g is null");
  PN_REQUIRE(!wanted || a->weight, "pointwise_backward: weight is null");
  PN_REQUIRE(!a->coefficients || a->y, "pointwise_backward: coefficients need y");

  const int out_vectors = vectors(a->out_channels), dx_vectors = vectors(wanted);
  const int64_t row = int64_t(out_vectors) * L;
  const int64_t tile = a->d_weight || !whole_vectors ? kBackwardTileFloats : kInputGradientTileFloats;
  const int64_t largest = min(s.out_pixels, max<int64_t>(1, tile / (16 * s.in_channels)) * 16);
  const int64_t plane = (largest + 16) * L;  // with what the register tiles compute beyond the last pixel
  const int64_t dy_floats = out_vectors * plane, dx_floats = dx_vectors * plane;
  const int64_t local = dy_floats + dx_floats + dx_vectors * int64_t(sizeof(Target) / 4);
  const int groups = a->d_weight ? gradient_groups(a->images, s.in_channels, a->out_channels) : a->images;
  const int64_t sums_floats = a->d_weight ? s.in_channels * row : 0;
  const int64_t transposed_floats = int64_t(a->out_channels) * dx_vectors * L;
  const int64_t shared = groups * sums_floats + transposed_floats + int64_t(wanted) * a->out_channels;
  if (!reserve(context, shared, local)) return fail(PN_OUT_OF_MEMORY, "pointwise_backward: no memory for tiles");
  float* partial = static_cast<float*>(context->shared.get(shared * 4));
  float *transposed = partial + groups * sums_floats, *wanted_weight = transposed + transposed_floats;
  const float* from = a->weight;
  float* to = wanted_weight;
  for (int i = 0; i < a->part_count; i++) {
    const int64_t floats = int64_t(a->parts[i].channels) * a->out_channels;
    if (a->parts[i].dx) {
      memcpy(to, from, size_t(floats) * 4);
      to += floats;
    }
    from += floats;
  }
  pack_pointwise(wanted_weight, a->out_channels, wanted, true, transposed);
  // Whether the pixels of dx that are not read get their zeros on the way: to each that is read belong the one
  // beside it and the two below.
  const bool between = a->stride == 2 && a->offset == 0 && a->height % 2 == 0 && s.out_width % 8 == 0 &&
                       a->width % 2 == 0 && whole_vectors;

  parallel_for(context, groups, [&](int64_t group, int thread) {
    const Tile dy{local_scratch(context, thread, local), plane}, dx{dy.memory + dy_floats, plane};
    Target* targets = reinterpret_cast<Target*>(dx.memory + dx_floats);
    float* sums = partial + group * sums_floats;
    memset(sums, 0, size_t(sums_floats) * 4);
    for (int64_t image = group * a->images / groups; image < (group + 1) * a->images / groups; image++) {
      if ((a->stride != 1 || a->offset != 0) && !between) {  // some pixels are not read
        for (int i = 0; i < a->part_count; i++) {
          const int64_t floats = s.in_pixels * a->parts[i].channels;
          if (a->parts[i].dx && !a->parts[i].accumulate) memset(a->parts[i].dx + image * floats, 0, size_t(floats) * 4);
        }
      }
      for (int64_t begin = 0; begin < s.out_pixels; begin += largest) {
        const int64_t end = min(begin + largest, s.out_pixels);
        load_gradient(a, s, image, begin, end, dy);
        for_each_run(a, s, begin, end, [&](int64_t first, int64_t source, int64_t pixels) {
          if (source < 0) return;
          const float* dy_run = dy.memory + first * L;
          float* to = sums;
          for (int i = 0; i < a->part_count && a->d_weight; i++) {
            const int channels = a->parts[i].channels;
            const int64_t ahead = s.in_ahead * channels, step = int64_t(a->stride) * channels;
            const auto add = [&](auto relu) PN_LAMBDA_INLINE {
              product_gradient<relu.value>(
                  a->parts[i].x + (image * s.in_pixels + source) * channels, step, channels,
                  [ahead, step](const float* x) PN_LAMBDA_INLINE {
#pragma GCC unroll 4
                    for (int i = 0; i < kStepPixels; i++) __builtin_prefetch(x + i * step + ahead);
                  },
                  dy_run, plane, int(pixels), out_vectors, to);
            };
            if (a->relu)
              add(Constant<true>{});
            else
              add(Constant<false>{});
            to += channels * row;
          }
          if (!wanted) return;
          const int64_t direct = whole_vectors ? pixels / 8 * 8 : 0;
          make_targets(a, s, image, source, between, targets);
          product(
              Planes{dy_run, plane, a->out_channels}, int(direct), transposed, dx_vectors, []() PN_LAMBDA_INLINE {},
              [&](const auto& sum, int p0, int v0) PN_LAMBDA_INLINE { write_gradients(sum, targets + v0, p0); });
          if (between) clear_row_below(a, s, image, source, pixels);
          if (direct == pixels) return;
          product(
              Planes{dy_run + direct * L, plane, a->out_channels}, int(pixels - direct), transposed, dx_vectors,
              []() PN_LAMBDA_INLINE {},
              [&]<int P, int V>(const vec(&sum)[P][V], int p0, int v0) PN_LAMBDA_INLINE {
                for (int p = 0; p < P; p++)
                  for (int v = 0; v < V; v++) store(dx.memory + (v0 + v) * plane + (p0 + p) * L, sum[p][v]);
              });
          write_gradients(a, s, image, source + direct * a->stride, pixels - direct, dx);
        });
      }
    }
    stream_fence();
  });
  if (a->d_weight) combine(context, partial, groups, sums_floats, s.in_channels, a->out_channels, a->d_weight);
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
