// Softmax cross-entropy with label smoothing, in double. Grid: the variants. A warp takes an image at a time.
#include "cuda/elementary.h"

namespace pn {

namespace {

constexpr int kThreads = 1024, kLanes = 32, kWarps = kThreads / kLanes;

template <class T>
PN_DEVICE T sum_lanes(T value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// A label outside the classes: the kernel refuses its arguments, which the host only sees by looking here.
struct RefusedLabel {
  int32_t image, label, classes;  // classes 0: nothing was refused
};

struct Launch {
  pn_softmax_cross_entropy a;
  RefusedLabel* refused;  // the host's memory
};

struct Outcome {
  double loss;
  int correct;
};

// The first image whose label lies outside the classes, or `images`. All lanes get it.
PN_DEVICE int first_refused(const pn_softmax_cross_entropy& a, int lane) {
  int first = a.images;
  for (int image = lane; image < a.images; image += kLanes)
    if (a.labels[image] < 0 || a.labels[image] >= a.classes) first = min(first, image);
  for (int mask = kLanes / 2; mask > 0; mask /= 2) first = min(first, shuffle_xor(first, mask));
  return first;
}

// All lanes get the outcome.
PN_DEVICE Outcome evaluate(const pn_softmax_cross_entropy& a, const float* logits, int label, float* dlogits,
                           int lane) {
  const int classes = a.classes;
  const double smoothing = double(a.smoothing);
  // The first of the largest logits, which is taken out of the exponentials, so that they cannot overflow.
  float largest = -__builtin_inff();
  int prediction = classes;
  for (int k = lane; k < classes; k += kLanes)
    if (logits[k] > largest || prediction == classes) largest = logits[k], prediction = k;
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const float other = shuffle_xor(largest, mask);
    const int other_prediction = shuffle_xor(prediction, mask);
    if (other > largest || (other == largest && other_prediction < prediction))
      largest = other, prediction = other_prediction;
  }
  double sum = 0, logit_sum = 0;
  for (int k = lane; k < classes; k += kLanes) {
    const double logit = double(logits[k]) - double(largest);
    sum += exp_negative(logit);
    logit_sum += logit;
  }
  sum = sum_lanes(sum);
  logit_sum = sum_lanes(logit_sum);
  const double log_sum = log_positive(sum);
  double loss = log_sum - (double(logits[label]) - double(largest));
  // Without smoothing an infinite logit of another class must not turn the loss into not-a-number.
  if (smoothing != 0) loss = (1 - smoothing) * loss + smoothing * (log_sum - logit_sum / classes);
  if (dlogits) {
    const double factor = double(a.scale) / a.images;
    for (int k = lane; k < classes; k += kLanes) {
      const double target = (k == label ? 1 - smoothing : 0) + smoothing / classes;
      dlogits[k] = float(factor * (exp_negative(double(logits[k]) - double(largest)) / sum - target));
    }
  }
  return {loss, loss == loss && prediction == label};
}

}  // namespace

}  // namespace pn

PN_KERNEL __launch_bounds__(pn::kThreads) softmax_cross_entropy(const pn::Launch launch) {
  __shared__ pn::Outcome outcomes[pn::kWarps];
  const pn_softmax_cross_entropy& a = launch.a;
  const int lane = pn::thread_index().x % pn::kLanes, warp = pn::thread_index().x / pn::kLanes;
  const int64_t first = int64_t(pn::block_index().x) * a.images;
  const int refused = pn::first_refused(a, lane);
  if (refused < a.images) {
    if (pn::block_index().x == 0 && pn::thread_index().x == 0)
      *launch.refused = {refused, a.labels[refused], a.classes};
    return;
  }
  pn::Outcome total{};
  for (int image = warp; image < a.images; image += pn::kWarps) {
    const int64_t row = first + image;
    const pn::Outcome outcome = pn::evaluate(a, a.logits + row * a.classes, a.labels[image],
                                             a.dlogits ? a.dlogits + row * a.classes : nullptr, lane);
    if (lane == 0 && a.image_losses) a.image_losses[row] = float(outcome.loss);
    if (lane == 0 && a.image_correct) a.image_correct[row] = outcome.correct;
    total.loss += outcome.loss;
    total.correct += outcome.correct;
  }
  if (lane == 0) outcomes[warp] = total;
  pn::barrier();
  if (warp != 0) return;
  total = outcomes[lane];
  total = {pn::sum_lanes(total.loss), pn::sum_lanes(total.correct)};
  if (lane == 0) {
    a.loss_sums[pn::block_index().x] = total.loss;
    a.correct_counts[pn::block_index().x] = total.correct;
  }
}
