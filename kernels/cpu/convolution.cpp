// Optional ReLU - dense convolution. A tile is a few output rows: the input rows that they read are copied once, padded
// and rectified, and every output pixel's window is then KH contiguous runs of KW * Cin floats. The input gradient is
// the same product with the flipped kernel over padded rows of the output gradient, separately for each residue of the
// input position modulo the stride, so that no product with an inserted zero is computed.
#include <string.h>

#include "cpu/matrix.h"

namespace pn::PN_NAMESPACE {

namespace {

int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// One axis of the convolution.
struct Axis {
  int size, kernel, stride, padding;

  int out() const { return (size + 2 * padding - kernel) / stride + 1; }
  // Input positions that `outputs` neighbouring outputs read.
  int extent(int outputs) const { return (outputs - 1) * stride + kernel; }
};

// The input positions of an axis that are congruent modulo the stride: position phase + stride * i is read by the
// outputs first_output + i + t, t < taps, through kernel position first_tap + stride * (taps - 1 - t).
struct Phase {
  int count, taps, first_tap, first_output;

  Phase(const Axis& axis, int phase) {
    count = (axis.size - phase + axis.stride - 1) / axis.stride;
    first_tap = (phase + axis.padding) % axis.stride;
    taps = first_tap < axis.kernel ? (axis.kernel - first_tap + axis.stride - 1) / axis.stride : 0;
    first_output = (phase + axis.padding) / axis.stride - taps + 1;
  }
};

struct Geometry {
  Axis h, w;
  int64_t in_pixels, out_pixels, depth;
};

int32_t check(const char* name, const pn_convolution* a, Geometry* s) {
  PN_REQUIRE(
      a->variants > 0 && a->images > 0 && a->height > 0 && a->width > 0 && a->in_channels > 0 && a->out_channels > 0,
      "%s: variants %d, images %d, height %d, width %d, in_channels %d and out_channels %d must be positive", name,
      a->variants, a->images, a->height, a->width, a->in_channels, a->out_channels);
  PN_REQUIRE(a->kernel_h > 0 && a->kernel_w > 0 && a->stride_h > 0 && a->stride_w > 0 && a->padding_h >= 0 &&
                 a->padding_w >= 0,
             "%s: kernel %d x %d, stride %d x %d, padding %d x %d is not possible", name, a->kernel_h, a->kernel_w,
             a->stride_h, a->stride_w, a->padding_h, a->padding_w);
  PN_REQUIRE(
      a->height + 2 * int64_t(a->padding_h) >= a->kernel_h && a->width + 2 * int64_t(a->padding_w) >= a->kernel_w,
      "%s: the kernel %d x %d is larger than the padded image", name, a->kernel_h, a->kernel_w);
  constexpr int64_t kLargest = 1 << 30;
  PN_REQUIRE(a->height + 2 * int64_t(a->padding_h) <= kLargest && a->width + 2 * int64_t(a->padding_w) <= kLargest &&
                 double(a->kernel_h) * a->kernel_w * a->in_channels <= kLargest,
             "%s: kernel %d x %d with padding %d x %d is too large", name, a->kernel_h, a->kernel_w, a->padding_h,
             a->padding_w);
  s->h = {a->height, a->kernel_h, a->stride_h, a->padding_h};
  s->w = {a->width, a->kernel_w, a->stride_w, a->padding_w};
  s->in_pixels = int64_t(a->height) * a->width;
  s->out_pixels = int64_t(s->h.out()) * s->w.out();
  s->depth = int64_t(a->kernel_h) * a->kernel_w * a->in_channels;
  return PN_OK;
}

// tile [rows][columns][channels] = the window of an image [height][width] that starts at (row0, column0), zero outside
// of it. load(dst, pixel, count) copies pixels.
template <class F>
PN_INLINE void load_window(float* tile, int row0, int column0, int rows, int columns, int height, int width,
                           int channels, F load) {
  const int left = min(columns, max(0, -column0)), inside = max(0, min(columns, width - column0) - left);
  for (int r = 0; r < rows; r++, tile += int64_t(columns) * channels) {
    const int row = row0 + r;
    if (row < 0 || row >= height || inside == 0) {
      memset(tile, 0, size_t(columns) * channels * 4);
      continue;
    }
    memset(tile, 0, size_t(left) * channels * 4);
    load(tile + int64_t(left) * channels, int64_t(row) * width + column0 + left, inside);
    memset(tile + int64_t(left + inside) * channels, 0, size_t(columns - left - inside) * channels * 4);
  }
}

// The padded input rows that the output rows row0..row0+rows-1 of an image read.
void load_input(const pn_convolution* a, const Geometry& s, const float* image, int row0, int rows, float* tile) {
  load_window(tile, row0 * s.h.stride - s.h.padding, -s.w.padding, s.h.extent(rows), s.w.extent(s.w.out()), a->height,
              a->width, a->in_channels, [&](float* dst, int64_t pixel, int count) {
                copy_pixels(dst, a->in_channels, image + pixel * a->in_channels, a->in_channels, a->in_channels, count,
                            a->relu);
              });
}

Windows input_windows(const pn_convolution* a, const Geometry& s, const float* tile, int rows) {
  const int64_t row_floats = int64_t(s.w.extent(s.w.out())) * a->in_channels;
  return {tile,
          rows,
          s.w.out(),
          s.h.stride * row_floats,
          int64_t(s.w.stride) * a->in_channels,
          s.h.kernel,
          row_floats,
          s.w.kernel * a->in_channels};
}

// Output rows per tile where `outputs` rows need fixed + outputs * per_row floats.
int tile_rows(int outputs, int64_t fixed, int64_t per_row) {
  const int largest = int(min<int64_t>(outputs, max<int64_t>(1, (kTileFloats - fixed) / per_row)));
  const int tiles = (outputs + largest - 1) / largest;
  return (outputs + tiles - 1) / tiles;
}

int input_tile_rows(const pn_convolution* a, const Geometry& s) {
  const int64_t row_floats = int64_t(s.w.extent(s.w.out())) * a->in_channels;
  return tile_rows(s.h.out(), (s.h.kernel - s.h.stride) * row_floats,
                   s.h.stride * row_floats + int64_t(s.w.out()) * padded(a->out_channels));
}

int64_t input_tile_floats(const pn_convolution* a, const Geometry& s, int rows) {
  return aligned(int64_t(s.h.extent(rows)) * s.w.extent(s.w.out()) * a->in_channels);
}

// The input gradient's work for one pair of residues.
struct PhaseProduct {
  Phase h, w;
  PackedMatrix weight;
  int rows;  // per tile

  int columns() const { return w.count + w.taps - 1; }
  int64_t tile_floats(int out_channels) const {
    return weight.depth == 0 ? 0 : aligned(int64_t(rows + h.taps - 1) * columns() * out_channels);
  }
};

PhaseProduct phase_product(const pn_convolution* a, const Geometry& s, int phase_h, int phase_w) {
  PhaseProduct p{Phase(s.h, phase_h), Phase(s.w, phase_w), {}, 1};
  p.weight = {nullptr, int64_t(p.h.taps) * p.w.taps * a->out_channels, a->in_channels};
  const int64_t row_floats = int64_t(p.columns()) * a->out_channels;
  if (p.h.count > 0)
    p.rows =
        tile_rows(p.h.count, (p.h.taps - 1) * row_floats, row_floats + int64_t(p.w.count) * padded(a->in_channels));
  return p;
}

// Calls f(phase_h, phase_w, product) for all pairs of residues, with the packed weights' memory from `weights` on.
template <class F>
PN_INLINE void for_each_phase(const pn_convolution* a, const Geometry& s, float* weights, F f) {
  for (int phase_h = 0; phase_h < min(s.h.stride, s.h.size); phase_h++) {
    for (int phase_w = 0; phase_w < min(s.w.stride, s.w.size); phase_w++) {
      PhaseProduct p = phase_product(a, s, phase_h, phase_w);
      p.weight.data = weights;
      f(phase_h, phase_w, p);
      if (weights) weights += p.weight.size();
    }
  }
}

void pack_phase(const pn_convolution* a, const PhaseProduct& p) {
  if (p.weight.size() == 0) return;
  memset(p.weight.data, 0, size_t(p.weight.size()) * 4);
  for (int t = 0; t < p.h.taps; t++) {
    for (int u = 0; u < p.w.taps; u++) {
      const int64_t kernel_row = p.h.first_tap + int64_t(a->stride_h) * (p.h.taps - 1 - t);
      const int64_t kernel_column = p.w.first_tap + int64_t(a->stride_w) * (p.w.taps - 1 - u);
      pack(p.weight, (int64_t(t) * p.w.taps + u) * a->out_channels, 0, a->out_channels, a->in_channels,
           a->weight + (kernel_row * a->kernel_w + kernel_column) * a->in_channels * a->out_channels, 1,
           a->out_channels);
    }
  }
}

void input_gradient(const pn_convolution* a, const Geometry& s, const Gradient& gradient, int phase_h, int phase_w,
                    const PhaseProduct& p, const float* x, float* dx, float* tile) {
  float* out = tile + p.tile_floats(a->out_channels);
  const int out_step = padded(a->in_channels);
  const int64_t row_floats = int64_t(p.columns()) * a->out_channels;
  for (int row0 = 0; row0 < p.h.count; row0 += p.rows) {
    const int rows = min(p.rows, p.h.count - row0);
    if (p.weight.depth > 0) {
      load_window(tile, p.h.first_output + row0, p.w.first_output, rows + p.h.taps - 1, p.columns(), s.h.out(),
                  s.w.out(), a->out_channels, [&](float* dst, int64_t pixel, int count) {
                    gradient.load_pixels(dst, a->out_channels, pixel, count);
                  });
    }
    multiply({tile, rows, p.w.count, row_floats, a->out_channels, p.h.taps, row_floats, p.w.taps * a->out_channels},
             p.weight, out);
    for (int r = 0; r < rows; r++) {
      const int64_t at = ((phase_h + int64_t(row0 + r) * a->stride_h) * a->width + phase_w) * a->in_channels;
      write_gradient(dx + at, a->relu ? x + at : nullptr, int64_t(a->stride_w) * a->in_channels,
                     out + int64_t(r) * p.w.count * out_step, out_step, a->in_channels, p.w.count, a->accumulate);
    }
  }
}

}  // namespace

int32_t convolution_forward(pn_context* context, const pn_convolution* a) {
  Geometry s;
  if (int32_t status = check("convolution_forward", a, &s)) return status;
  PN_REQUIRE(a->x && a->weight && a->y, "convolution_forward: x, weight or y is null");
  const int out_step = padded(a->out_channels), out_width = s.w.out(), out_height = s.h.out();
  const int largest = input_tile_rows(a, s);
  const int64_t in_floats = input_tile_floats(a, s, largest), out_floats = int64_t(largest) * out_width * out_step;
  const int64_t local = in_floats + out_floats + ImageOutput::size(a->out_channels);
  PackedMatrix weight{nullptr, s.depth, a->out_channels};
  if (!reserve(context, weight.size(), local))
    return fail(PN_OUT_OF_MEMORY, "convolution_forward: no memory for tiles");
  weight.data = static_cast<float*>(context->shared.get(weight.size() * 4));
  memset(weight.data, 0, size_t(weight.size()) * 4);
  pack(weight, 0, 0, s.depth, a->out_channels, a->weight, a->out_channels, 1);

  const int64_t out_row = int64_t(out_width) * a->out_channels;
  parallel_for(context, int64_t(a->variants) * a->images, [&](int64_t task, int thread) {
    float* tile = local_scratch(context, thread, local);
    float* out = tile + in_floats;
    ImageOutput output(out + out_floats, a->out_channels, a->statistics);
    const float* x = a->x + task * s.in_pixels * a->in_channels;
    float* y = a->y + task * s.out_pixels * a->out_channels;
    for (int row0 = 0; row0 < out_height; row0 += largest) {
      const int rows = min(largest, out_height - row0);
      load_input(a, s, x, row0, rows, tile);
      multiply(input_windows(a, s, tile, rows), weight, out);
      output.write(y + row0 * out_row, a->out_channels, out, rows * out_width);
    }
    if (a->statistics) output.finish(a->statistics + task * 2 * a->out_channels, a->out_channels);
  });
  return PN_OK;
}

int32_t convolution_backward(pn_context* context, const pn_convolution* a) {
  Geometry s;
  if (int32_t status = check("convolution_backward", a, &s)) return status;
  PN_REQUIRE(a->variants == 1, "convolution_backward: takes one variant, not %d", a->variants);
  if (!a->dx && !a->d_weight) return PN_OK;
  PN_REQUIRE(a->g, "convolution_backward: g is null");
  PN_REQUIRE(!a->coefficients || a->y, "convolution_backward: coefficients need y");
  PN_REQUIRE(!a->dx || a->weight, "convolution_backward: weight is null");
  PN_REQUIRE(a->x || !(a->d_weight || a->relu), "convolution_backward: x is null");

  const int d_step = padded(a->out_channels), out_width = s.w.out(), out_height = s.h.out();
  int64_t weight_floats = 0, local = 0, in_floats = 0, sums_floats = 0;
  int largest = 0, groups = a->images;
  if (a->dx) {
    for_each_phase(a, s, nullptr, [&](int, int, const PhaseProduct& p) {
      weight_floats += p.weight.size();
      local = max(local, p.tile_floats(a->out_channels) + int64_t(p.rows) * p.w.count * padded(a->in_channels));
    });
  }
  if (a->d_weight) {
    largest = input_tile_rows(a, s);
    in_floats = input_tile_floats(a, s, largest);
    local = max(local, in_floats + int64_t(largest) * out_width * d_step);
    groups = gradient_groups(a->images, s.depth, a->out_channels);
    sums_floats = s.depth * d_step;
  }
  const int64_t shared = weight_floats + groups * sums_floats;
  if (!reserve(context, shared, local)) return fail(PN_OUT_OF_MEMORY, "convolution_backward: no memory for tiles");
  float* weights = static_cast<float*>(context->shared.get(shared * 4));
  float* partial = weights + weight_floats;
  if (a->dx) for_each_phase(a, s, weights, [&](int, int, const PhaseProduct& p) { pack_phase(a, p); });

  parallel_for(context, groups, [&](int64_t group, int thread) {
    float* tile = local_scratch(context, thread, local);
    float* sums = partial + group * sums_floats;
    memset(sums, 0, size_t(sums_floats) * 4);
    for (int64_t image = group * a->images / groups; image < (group + 1) * a->images / groups; image++) {
      const int64_t first = image * s.out_pixels * a->out_channels, in_first = image * s.in_pixels * a->in_channels;
      const Gradient gradient{a->g + first,    a->coefficients ? a->y + first : nullptr,
                              a->coefficients, a->out_channels,
                              a->out_channels, a->out_channels};
      if (a->d_weight) {
        for (int row0 = 0; row0 < out_height; row0 += largest) {
          const int rows = min(largest, out_height - row0);
          load_input(a, s, a->x + in_first, row0, rows, tile);
          gradient.load_pixels(tile + in_floats, d_step, int64_t(row0) * out_width, int64_t(rows) * out_width);
          multiply_transposed(input_windows(a, s, tile, rows), tile + in_floats, d_step, sums);
        }
      }
      if (a->dx) {
        for_each_phase(a, s, weights, [&](int phase_h, int phase_w, const PhaseProduct& p) {
          input_gradient(a, s, gradient, phase_h, phase_w, p, a->relu ? a->x + in_first : nullptr, a->dx + in_first,
                         tile);
        });
      }
    }
  });
  if (a->d_weight) combine(context, partial, groups, sums_floats, s.depth, a->out_channels, a->d_weight);
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
