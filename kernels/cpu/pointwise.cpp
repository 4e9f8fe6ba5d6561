// Optional ReLU - pointwise 1x1 convolution of a concatenation that never exists as a whole: every tile of pixels
// collects its channels from the parts. A task is one image of one variant (forward) or one group of images (backward).
#include <string.h>

#include "cpu/matrix.h"

namespace pn::PN_NAMESPACE {

namespace {

struct Geometry {
  int out_height, out_width, in_channels, variants;
  int64_t in_pixels, out_pixels;
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

const float* part_image(const pn_pointwise* a, const Geometry& s, const pn_part& part, int64_t variant, int64_t image) {
  return part.x + ((part.variants == 1 ? 0 : variant) * a->images + image) * s.in_pixels * part.channels;
}

// tile [end - begin][Cin] = the (rectified) pixels that the output pixels begin..end-1 of an image read.
void load_tile(const pn_pointwise* a, const Geometry& s, int64_t variant, int64_t image, int64_t begin, int64_t end,
               float* tile) {
  for_each_run(a, s, begin, end, [&](int64_t first, int64_t source, int64_t count) {
    float* dst = tile + first * s.in_channels;
    if (source < 0) {
      memset(dst, 0, size_t(count * s.in_channels) * 4);
      return;
    }
    for (int i = 0; i < a->part_count; i++) {
      const pn_part& part = a->parts[i];
      copy_pixels(dst, s.in_channels, part_image(a, s, part, variant, image) + source * part.channels,
                  int64_t(a->stride) * part.channels, part.channels, count, a->relu);
      dst += part.channels;
    }
  });
}

// Pixels per tile: `floats` are needed for each. Twice the usual tile, because long runs suit the memory, which is the
// limit here.
int64_t tile_pixels(const Geometry& s, int64_t floats) {
  const int64_t largest = max<int64_t>(16, 2 * kTileFloats / floats);
  const int64_t tiles = (s.out_pixels + largest - 1) / largest;
  return (s.out_pixels + tiles - 1) / tiles;
}

Windows tile_windows(const float* tile, int64_t pixels, int64_t step, int channels) {
  return {tile, 1, int(pixels), 0, step, 1, 0, channels};
}

}  // namespace

int32_t pointwise_forward(pn_context* context, const pn_pointwise* a) {
  Geometry s;
  if (int32_t status = check("pointwise_forward", a, false, &s)) return status;
  PN_REQUIRE(a->weight && a->y, "pointwise_forward: weight or y is null");
  for (int i = 0; i < a->part_count; i++) PN_REQUIRE(a->parts[i].x, "pointwise_forward: part %d is null", i);

  const int out_step = padded(a->out_channels);
  const int64_t largest = tile_pixels(s, s.in_channels + out_step);
  const int64_t in_floats = round_up(int(largest * s.in_channels), kLanes), out_floats = largest * out_step;
  const int64_t local = in_floats + out_floats + ImageOutput::size(a->out_channels);
  PackedMatrix weight{nullptr, s.in_channels, a->out_channels};
  if (!reserve(context, weight.size(), local)) return fail(PN_OUT_OF_MEMORY, "pointwise_forward: no memory for tiles");
  weight.data = static_cast<float*>(context->shared.get(weight.size() * 4));
  memset(weight.data, 0, size_t(weight.size()) * 4);
  pack(weight, 0, 0, s.in_channels, a->out_channels, a->weight, a->out_channels, 1);

  parallel_for(context, int64_t(s.variants) * a->images, [&](int64_t task, int thread) {
    const int64_t variant = task / a->images, image = task % a->images;
    float* tile = local_scratch(context, thread, local);
    float* out = tile + in_floats;
    ImageOutput output(out + out_floats, a->out_channels, a->statistics);
    float* y = a->y + task * s.out_pixels * a->y_channels + a->y_offset;
    for (int64_t begin = 0; begin < s.out_pixels; begin += largest) {
      const int64_t pixels = min(largest, s.out_pixels - begin);
      load_tile(a, s, variant, image, begin, begin + pixels, tile);
      multiply(tile_windows(tile, pixels, s.in_channels, s.in_channels), weight, out);
      output.write(y + begin * a->y_channels, a->y_channels, out, int(pixels));
    }
    if (a->statistics) output.finish(a->statistics + task * 2 * a->y_channels + a->y_offset, a->y_channels);
  });
  return PN_OK;
}

int32_t pointwise_backward(pn_context* context, const pn_pointwise* a) {
  Geometry s;
  if (int32_t status = check("pointwise_backward", a, true, &s)) return status;
  int wanted = 0;  // channels whose gradient is asked for
  for (int i = 0; i < a->part_count; i++) {
    const pn_part& part = a->parts[i];
    if (part.dx) wanted += part.channels;
    PN_REQUIRE(part.x || !(a->d_weight || (part.dx && a->relu)), "pointwise_backward: part %d is null", i);
  }
  if (!wanted && !a->d_weight) return PN_OK;
  PN_REQUIRE(a->g, "pointwise_backward: g is null");
  PN_REQUIRE(!wanted || a->weight, "pointwise_backward: weight is null");
  PN_REQUIRE(!a->coefficients || a->y, "pointwise_backward: coefficients need y");

  const int d_step = padded(a->out_channels), dx_step = padded(wanted);
  const int64_t largest = tile_pixels(s, (a->d_weight ? s.in_channels : 0) + d_step + dx_step);
  const int64_t in_floats = a->d_weight ? round_up(int(largest * s.in_channels), kLanes) : 0;
  const int64_t d_floats = largest * d_step, local = in_floats + d_floats + largest * dx_step;
  const int groups = a->d_weight ? gradient_groups(a->images, s.in_channels, a->out_channels) : a->images;
  const int64_t sums_floats = a->d_weight ? int64_t(s.in_channels) * d_step : 0;

  PackedMatrix transposed{nullptr, a->out_channels, wanted};
  const int64_t shared = transposed.size() + groups * sums_floats;
  if (!reserve(context, shared, local)) return fail(PN_OUT_OF_MEMORY, "pointwise_backward: no memory for tiles");
  transposed.data = static_cast<float*>(context->shared.get(shared * 4));
  float* partial = transposed.data + transposed.size();
  memset(transposed.data, 0, size_t(transposed.size()) * 4);
  for (int i = 0, row = 0, column = 0; i < a->part_count; row += a->parts[i++].channels) {
    if (!a->parts[i].dx) continue;
    pack(transposed, 0, column, a->out_channels, a->parts[i].channels, a->weight + int64_t(row) * a->out_channels, 1,
         a->out_channels);
    column += a->parts[i].channels;
  }

  parallel_for(context, groups, [&](int64_t group, int thread) {
    float* tile = local_scratch(context, thread, local);
    float *d = tile + in_floats, *dx = d + d_floats;
    float* sums = partial + group * sums_floats;
    memset(sums, 0, size_t(sums_floats) * 4);
    for (int64_t image = group * a->images / groups; image < (group + 1) * a->images / groups; image++) {
      const int64_t first = image * s.out_pixels * a->y_channels + a->y_offset;
      const Gradient gradient{a->g + first,
                              a->coefficients ? a->y + first : nullptr,
                              a->coefficients ? a->coefficients + a->y_offset : nullptr,
                              a->y_channels,
                              a->y_channels,
                              a->out_channels};
      if (a->stride != 1 || a->offset != 0) {  // some pixels are not read
        for (int i = 0; i < a->part_count; i++) {
          const int64_t floats = s.in_pixels * a->parts[i].channels;
          if (a->parts[i].dx && !a->parts[i].accumulate) memset(a->parts[i].dx + image * floats, 0, size_t(floats) * 4);
        }
      }
      for (int64_t begin = 0; begin < s.out_pixels; begin += largest) {
        const int64_t pixels = min(largest, s.out_pixels - begin);
        gradient.load_pixels(d, d_step, begin, pixels);
        if (a->d_weight) {
          load_tile(a, s, 0, image, begin, begin + pixels, tile);
          multiply_transposed(tile_windows(tile, pixels, s.in_channels, s.in_channels), d, d_step, sums);
        }
        if (!wanted) continue;
        multiply(tile_windows(d, pixels, d_step, a->out_channels), transposed, dx);
        for_each_run(a, s, begin, begin + pixels, [&](int64_t run, int64_t source, int64_t count) {
          if (source < 0) return;
          const float* src = dx + run * dx_step;
          for (int i = 0; i < a->part_count; i++) {
            const pn_part& part = a->parts[i];
            if (!part.dx) continue;
            const int64_t at = (image * s.in_pixels + source) * part.channels;
            write_gradient(part.dx + at, a->relu ? part.x + at : nullptr, int64_t(a->stride) * part.channels, src,
                           dx_step, part.channels, count, part.accumulate);
            src += part.channels;
          }
        });
      }
    }
  });
  if (a->d_weight) combine(context, partial, groups, s.in_channels, a->out_channels, a->d_weight);
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
