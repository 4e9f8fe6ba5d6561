// Global average pooling of a concatenation, one image of one variant per task.
#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kTilePixels = 64;  // pixels summed in one float accumulator

// Checks the parts; gives the number of variants and of concatenated channels.
int32_t check(const pn_global_average_pool* a, const char* name, int& variants, int64_t& channels) {
  PN_REQUIRE(a->parts && a->part_count >= 1 && a->images >= 1 && a->pixels >= 1,
             "%s: every extent must be positive, not N %d, P %d, %d parts", name, a->images, a->pixels, a->part_count);
  variants = 1;
  channels = 0;
  for (int i = 0; i < a->part_count; i++) {
    PN_REQUIRE(a->parts[i].variants >= 1 && a->parts[i].channels >= 1, "%s: part %d has V %d, C %d", name, i,
               a->parts[i].variants, a->parts[i].channels);
    variants = max(variants, a->parts[i].variants);
    channels += a->parts[i].channels;
  }
  for (int i = 0; i < a->part_count; i++)
    PN_REQUIRE(a->parts[i].variants == 1 || a->parts[i].variants == variants,
               "%s: part %d has %d variants, which is neither 1 nor %d", name, i, a->parts[i].variants, variants);
  return PN_OK;
}

}  // namespace

int32_t global_average_pool_forward(pn_context* context, const pn_global_average_pool* a) {
  int variants = 0;
  int64_t channels = 0;
  if (const int32_t status = check(a, "global_average_pool_forward", variants, channels)) return status;
  PN_REQUIRE(a->out, "global_average_pool_forward: out is null");
  for (int i = 0; i < a->part_count; i++) PN_REQUIRE(a->parts[i].x, "global_average_pool_forward: part %d has no x", i);
  parallel_for(context, int64_t(variants) * a->images, [&](int64_t task, int) {
    const int64_t v = task / a->images, image = task % a->images;
    float* out = a->out + task * channels;
    for (int i = 0; i < a->part_count; i++) {
      const pn_part& part = a->parts[i];
      const float* x = part.x + ((part.variants == 1 ? 0 : v) * a->images + image) * a->pixels * part.channels;
      for (int c = 0; c < part.channels; c += kLanes) {
        const int lanes = min(kLanes, part.channels - c);
        vec total{};
        for (int first = 0; first < a->pixels; first += kTilePixels) {
          vec even{}, odd{};
          const int end = min(first + kTilePixels, a->pixels);
          int p = first;
          for (; p + 2 <= end; p += 2) {
            even += load_partial(x + int64_t(p) * part.channels + c, lanes);
            odd += load_partial(x + int64_t(p + 1) * part.channels + c, lanes);
          }
          if (p < end) even += load_partial(x + int64_t(p) * part.channels + c, lanes);
          total += even + odd;
        }
        store_partial(out + c, total / splat(float(a->pixels)), lanes);
      }
      out += part.channels;
    }
  });
  return PN_OK;
}

int32_t global_average_pool_backward(pn_context* context, const pn_global_average_pool* a) {
  int variants = 0;
  int64_t channels = 0;
  if (const int32_t status = check(a, "global_average_pool_backward", variants, channels)) return status;
  PN_REQUIRE(variants == 1, "global_average_pool_backward: takes one variant, not %d", variants);
  PN_REQUIRE(a->g, "global_average_pool_backward: g is null");
  parallel_for(context, a->images, [&](int64_t image, int) {
    const float* g = a->g + image * channels;
    for (int i = 0; i < a->part_count; g += a->parts[i++].channels) {
      const pn_part& part = a->parts[i];
      if (!part.dx) continue;
      float* dx = part.dx + image * a->pixels * part.channels;
      for (int c = 0; c < part.channels; c += kLanes) {
        const int lanes = min(kLanes, part.channels - c);
        const vec value = load_partial(g + c, lanes) / splat(float(a->pixels));
        for (int p = 0; p < a->pixels; p++) {
          float* to = dx + int64_t(p) * part.channels + c;
          store_partial(to, part.accumulate ? value + load_partial(to, lanes) : value, lanes);
        }
      }
    }
  });
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
