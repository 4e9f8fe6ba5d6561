// Softmax cross-entropy with label smoothing. The arrays are small (images * classes), so the arithmetic is double.
#include <math.h>

#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

struct Outcome {
  double loss;
  bool correct;
};

// The largest logit is taken out of the exponentials, so that they cannot overflow.
Outcome evaluate(const pn_softmax_cross_entropy* a, const float* logits, int label, float* dlogits) {
  const int classes = a->classes;
  const double smoothing = double(a->smoothing);
  float largest = logits[0];
  int prediction = 0;
  bool has_nan = logits[0] != logits[0];
  for (int k = 1; k < classes; k++) {
    has_nan |= logits[k] != logits[k];
    if (logits[k] > largest) largest = logits[k], prediction = k;
  }
  double sum = 0, logit_sum = 0;
  for (int k = 0; k < classes; k++) {
    sum += exp(double(logits[k]) - double(largest));
    logit_sum += double(logits[k]) - double(largest);
  }
  const double log_sum = log(sum);
  double loss = log_sum - (double(logits[label]) - double(largest));
  // Without smoothing an infinite logit of another class must not turn the loss into not-a-number.
  if (smoothing != 0) loss = (1 - smoothing) * loss + smoothing * (log_sum - logit_sum / classes);
  if (dlogits) {
    const double factor = double(a->scale) / a->images;
    for (int k = 0; k < classes; k++) {
      const double target = (k == label ? 1 - smoothing : 0) + smoothing / classes;
      dlogits[k] = float(factor * (exp(double(logits[k]) - double(largest)) / sum - target));
    }
  }
  return {loss, !has_nan && prediction == label};
}

}  // namespace

int32_t softmax_cross_entropy_run(pn_context* context, const pn_softmax_cross_entropy* a) {
  PN_REQUIRE(a->variants >= 1 && a->images >= 1 && a->classes >= 1,
             "softmax_cross_entropy_run: every extent must be positive, not V %d, N %d, %d classes", a->variants,
             a->images, a->classes);
  PN_REQUIRE(a->logits && a->labels, "softmax_cross_entropy_run: logits or labels is null");
  PN_REQUIRE(a->loss_sums && a->correct_counts, "softmax_cross_entropy_run: loss sums or correct counts is null");
  PN_REQUIRE(a->smoothing >= 0 && a->smoothing <= 1, "softmax_cross_entropy_run: smoothing must be 0 to 1, not %g",
             double(a->smoothing));
  PN_REQUIRE(!a->dlogits || a->variants == 1, "softmax_cross_entropy_run: the gradient takes one variant, not %d",
             a->variants);
  for (int image = 0; image < a->images; image++)
    PN_REQUIRE(a->labels[image] >= 0 && a->labels[image] < a->classes,
               "softmax_cross_entropy_run: image %d has label %d, outside 0..%d", image, a->labels[image],
               a->classes - 1);

  const int64_t rows = int64_t(a->variants) * a->images;
  Outcome* outcomes = static_cast<Outcome*>(context->shared.get(rows * int64_t(sizeof(Outcome))));
  if (!outcomes)
    return fail(PN_OUT_OF_MEMORY, "softmax_cross_entropy_run: no memory for the losses of %d images", a->images);
  constexpr int64_t chunk = 8;  // a row of ten classes alone is too little for a task
  parallel_for(context, (rows + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t row = task * chunk; row < min((task + 1) * chunk, rows); row++) {
      outcomes[row] = evaluate(a, a->logits + row * a->classes, a->labels[row % a->images],
                               a->dlogits ? a->dlogits + row * a->classes : nullptr);
      if (a->image_losses) a->image_losses[row] = float(outcomes[row].loss);
      if (a->image_correct) a->image_correct[row] = outcomes[row].correct;
    }
  });
  for (int v = 0; v < a->variants; v++) {
    double loss = 0;
    int64_t correct = 0;
    for (int image = 0; image < a->images; image++) {
      const Outcome& outcome = outcomes[int64_t(v) * a->images + image];
      loss += outcome.loss;
      correct += outcome.correct;
    }
    a->loss_sums[v] = loss;
    a->correct_counts[v] = correct;
  }
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
