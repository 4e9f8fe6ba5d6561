// Batch norm on per-channel numbers only: merges the statistics and the gradient sums of the images. The activations
// themselves are normalised by whoever loads them next.
#include <math.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kBlock = 64;  // channels per task

struct Merged {
  double mean[kBlock], variance[kBlock], squares[kBlock];
};

// Merges the images of one variant in order: the mean of the means (all images have the same number of pixels), then
// the squares about it: sum of M2_n + pixels * (mean_n - mean)^2 (Chan et al. 1983).
void merge(const float* statistics, int images, int pixels, int channels, int first, int count, Merged& merged) {
  for (int c = 0; c < kBlock; c++) merged.mean[c] = merged.squares[c] = 0;
  for (int64_t image = 0; image < images; image++) {
    const float* mean = statistics + image * 2 * channels + first;
    for (int c = 0; c < count; c++) merged.mean[c] += double(mean[c]);
  }
  for (int c = 0; c < count; c++) merged.mean[c] /= images;
  for (int64_t image = 0; image < images; image++) {
    const float* mean = statistics + image * 2 * channels + first;
    const float* squares = mean + channels;
    for (int c = 0; c < count; c++) {
      const double distance = double(mean[c]) - merged.mean[c];
      merged.squares[c] += double(squares[c]) + pixels * (distance * distance);
    }
  }
  for (int c = 0; c < count; c++) merged.variance[c] = merged.squares[c] / (double(images) * pixels);
}

}  // namespace

int32_t batch_norm_forward(pn_context* context, const pn_batch_norm_forward_args* a) {
  PN_REQUIRE(a->variants >= 1 && a->channels >= 1, "batch_norm_forward: every extent must be positive, not V %d, C %d",
             a->variants, a->channels);
  PN_REQUIRE(a->normalization, "batch_norm_forward: normalization is null");
  PN_REQUIRE(!a->running_mean == !a->running_variance,
             "batch_norm_forward: only one of running mean and running variance is given");
  if (a->statistics) {
    PN_REQUIRE(a->images >= 1 && a->pixels >= 1, "batch_norm_forward: every extent must be positive, not N %d, P %d",
               a->images, a->pixels);
    PN_REQUIRE(a->images > 1 || a->pixels > 1,
               "batch_norm_forward: training needs more than one value per channel, not V %d, N %d, P %d, C %d",
               a->variants, a->images, a->pixels, a->channels);
    PN_REQUIRE(!a->running_mean || a->variants == 1,
               "batch_norm_forward: running statistics are updated with one variant only, not %d", a->variants);
  } else {
    PN_REQUIRE(a->running_mean, "batch_norm_forward: evaluation needs running mean and variance");
  }

  const int channels = a->channels, blocks = (channels + kBlock - 1) / kBlock;
  parallel_for(context, int64_t(a->variants) * blocks, [&](int64_t task, int) {
    const int64_t v = task / blocks;
    const int first = int(task % blocks) * kBlock, count = min(kBlock, channels - first);
    Merged merged;
    if (a->statistics) {
      merge(a->statistics + v * a->images * 2 * channels, a->images, a->pixels, channels, first, count, merged);
    } else {
      for (int c = 0; c < count; c++) {
        merged.mean[c] = double(a->running_mean[first + c]);
        merged.variance[c] = double(a->running_variance[first + c]);
      }
    }
    float* normalization = a->normalization + v * 4 * channels + first;
    for (int c = 0; c < count; c++) {
      const double inverse_deviation = 1 / sqrt(merged.variance[c] + double(a->epsilon));
      const double scale = a->gamma ? double(a->gamma[first + c]) * inverse_deviation : inverse_deviation;
      normalization[c] = float(scale);
      normalization[channels + c] = float((a->beta ? double(a->beta[first + c]) : 0) - merged.mean[c] * scale);
      normalization[2 * channels + c] = float(inverse_deviation);
      normalization[3 * channels + c] = float(merged.mean[c]);
    }
    if (a->statistics && a->running_mean) {
      const double momentum = double(a->momentum), unbiased = double(a->images) * a->pixels - 1;
      for (int c = 0; c < count; c++) {
        float& mean = a->running_mean[first + c];
        float& variance = a->running_variance[first + c];
        mean = float((1 - momentum) * double(mean) + momentum * merged.mean[c]);
        variance = float((1 - momentum) * double(variance) + momentum * (merged.squares[c] / unbiased));
      }
    }
  });
  return PN_OK;
}

int32_t batch_norm_backward(pn_context* context, const pn_batch_norm_backward_args* a) {
  PN_REQUIRE(a->channels >= 1, "batch_norm_backward: C must be positive, not %d", a->channels);
  const bool needs_sums = a->d_gamma || a->d_beta || (a->coefficients && a->normalization && a->training);
  if (needs_sums) {
    PN_REQUIRE(a->gradient_sums, "batch_norm_backward: gradient sums are null");
    PN_REQUIRE(a->images >= 1 && a->pixels >= 1, "batch_norm_backward: every extent must be positive, not N %d, P %d",
               a->images, a->pixels);
    PN_REQUIRE(a->row >= 1 && a->row < a->rows, "batch_norm_backward: row %d is outside 1..%d", a->row, a->rows - 1);
  }

  const int channels = a->channels, blocks = (channels + kBlock - 1) / kBlock;
  const double weight = a->weight ? double(*a->weight) : 1;
  parallel_for(context, blocks, [&](int64_t task, int) {
    const int first = int(task) * kBlock, count = min(kBlock, channels - first);
    double sum_g[kBlock]{}, sum_product[kBlock]{};  // of w g, and of w g yhat
    if (needs_sums) {
      for (int64_t image = 0; image < a->images; image++) {
        const float* g = a->gradient_sums + image * a->rows * channels + first;
        const float* product = g + int64_t(a->row) * channels;
        for (int c = 0; c < count; c++) sum_g[c] += double(g[c]), sum_product[c] += double(product[c]);
      }
      for (int c = 0; c < count; c++) sum_g[c] *= weight, sum_product[c] *= weight;
    }
    if (float* coefficients = a->coefficients ? a->coefficients + first : nullptr) {
      const double values = double(a->images) * a->pixels;
      for (int c = 0; c < count; c++) {
        double factor = weight, slope = 0, constant = 0;
        if (a->normalization) {
          const float* normalization = a->normalization + first + c;
          const double scale = double(normalization[0]), inverse_deviation = double(normalization[2 * channels]);
          factor = weight * scale;
          if (a->training) {
            slope = -scale * inverse_deviation * (sum_product[c] / values);
            constant = -scale * (sum_g[c] / values) - slope * double(normalization[3 * channels]);
          }
        }
        coefficients[c] = float(factor);
        coefficients[channels + c] = float(slope);
        coefficients[2 * channels + c] = float(constant);
      }
    }
    for (int c = 0; c < count; c++) {
      if (a->d_gamma) a->d_gamma[first + c] = float(sum_product[c]);
      if (a->d_beta) a->d_beta[first + c] = float(sum_g[c]);
    }
  });
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
