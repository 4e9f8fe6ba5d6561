// The node's mixed sum over all incoming edges and operations in one pass, and its backward sums.
//
// Both are bound by memory. Forward: normalisation and weight fold into one factor per (variant, term, channel) and one
// constant per (variant, channel). An image, or the part of it that is run beside a convolution, goes through a few
// terms at a time, usually those of an edge. Terms that are to be pooled are pooled in registers, never written;
// meanwhile the other terms of the pass come from memory.
#include "cpu/group.h"
#include "cpu/pooled_rows.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kTerms = 5;            // of a pass, besides pooled ones
constexpr int kRowPixels = 32;       // at least so many pixels are summed in one accumulator
constexpr int kStripFloats = 16384;  // of the sum, which stay in L2 from one pass to the next: memory likes long runs
constexpr int kAhead = 512;          // floats between reading and prefetching, for so many streams are beyond the
                                     // hardware's prefetcher

int32_t check(const pn_mixed_sum* a, const char* name) {
  PN_REQUIRE(a->term_count >= 0 && a->variants >= 1 && a->images >= 1 && a->pixels >= 1 && a->channels >= 1,
             "%s: every extent must be positive, not V %d, N %d, P %d, C %d, %d terms", name, a->variants, a->images,
             a->pixels, a->channels, a->term_count);
  PN_REQUIRE(a->terms || a->term_count == 0, "%s: terms is null", name);
  int width = 0;  // of a pooled image
  for (int t = 0; t < a->term_count; t++) {
    const pn_term& term = a->terms[t];
    PN_REQUIRE(term.variants == 1 || term.variants == a->variants,
               "%s: term %d has %d variants, which is neither 1 nor %d", name, t, term.variants, a->variants);
    PN_REQUIRE(!(a->weights || a->weight_gradients) || (term.weight_index >= 0 && term.weight_index < a->weight_stride),
               "%s: term %d has weight index %d, outside 0..%d", name, t, term.weight_index, a->weight_stride - 1);
    if (term.pooling == PN_POOL_NONE) continue;
    PN_REQUIRE(term.pooling == PN_POOL_MAX_3X3 || term.pooling == PN_POOL_AVG_3X3,
               "%s: term %d has pooling %d, which is none", name, t, term.pooling);
    PN_REQUIRE(term.height >= 1 && term.width >= 1 && (term.stride == 1 || term.stride == 2) &&
                   int64_t(out_extent(term.height, term.stride)) * out_extent(term.width, term.stride) == a->pixels,
               "%s: term %d pools H %d, W %d with stride %d, which does not give %d pixels", name, t, term.height,
               term.width, term.stride, a->pixels);
    const int own = out_extent(term.width, term.stride);
    PN_REQUIRE(width == 0 || width == own, "%s: term %d is pooled to W %d, an earlier one to W %d", name, t, own,
               width);
    width = own;
  }
  return PN_OK;
}

PN_INLINE float weight_of(const pn_mixed_sum* a, int64_t v, int t) {
  return a->weights ? a->weights[v * a->weight_stride + a->terms[t].weight_index] : 1.0f;
}

// Terms that are added in one pass: both pools of one image at most, and a few that are not pooled.
struct Pass {
  int count;      // of those that are not pooled
  int pooled[3];  // term by pooling, or -1
  int terms[kTerms];
  bool pools() const { return any_pooled() >= 0; }
  int any_pooled() const { return max(pooled[PN_POOL_MAX_3X3], pooled[PN_POOL_AVG_3X3]); }
};

constexpr Pass kEmptyPass{0, {-1, -1, -1}, {}};

// Whether two pooled terms take the same windows of the same image.
bool same_windows(const pn_term& a, const pn_term& b) {
  return a.y == b.y && a.variants == b.variants && a.stride == b.stride && a.width == b.width;
}

// The terms for which `live` holds, in passes; returns the number of these.
template <class F>
int make_passes(const pn_mixed_sum* a, Pass* passes, F live) {
  int count = 0;
  for (int t = 0; t < a->term_count; t++) {
    if (!live(t)) continue;
    const pn_term& term = a->terms[t];
    const bool is_pooled = term.pooling != PN_POOL_NONE;
    Pass* last = count ? &passes[count - 1] : nullptr;
    const bool joins = last && (is_pooled ? last->pools() && last->pooled[term.pooling] < 0 &&
                                                same_windows(a->terms[last->any_pooled()], term)
                                          : last->count < kTerms);
    if (!joins) *(last = &passes[count++]) = kEmptyPass;
    if (is_pooled)
      last->pooled[term.pooling] = t;
    else
      last->terms[last->count++] = t;
  }
  return count;
}

struct PixelRange {
  int64_t begin, end;
};

// How an image is divided: into rows of pixels, each one or several rows of the image.
struct Rows {
  int pixels;
  int count;

  explicit Rows(const pn_mixed_sum* a) {
    int width = 1;  // of a pooled image
    for (int t = 0; t < a->term_count; t++)
      if (a->terms[t].pooling != PN_POOL_NONE) width = out_extent(a->terms[t].width, a->terms[t].stride);
    pixels = min(a->pixels, round_up(kRowPixels, width));
    count = (a->pixels + pixels - 1) / pixels;
  }
  PixelRange part(const pn_mixed_sum* a, const CallImage& run) const {
    const int64_t begin = int64_t(count) * run.part / run.parts, end = int64_t(count) * (run.part + 1) / run.parts;
    return {begin * pixels, min<int64_t>(a->pixels, end * pixels)};
  }
  // Pixels of whole rows: a pass goes through them before the next one begins.
  int64_t strip(int channels) const { return max<int64_t>(1, kStripFloats / (int64_t(pixels) * channels)) * pixels; }
};

PoolShape shape_of(const pn_term& term, int channels) { return {term.height, term.width, channels, term.stride}; }

// The image of a variant of the result in the term's tensor.
PN_INLINE int64_t image_of(const pn_mixed_sum* a, const pn_term& term, int64_t v, int64_t image) {
  return (term.variants == 1 ? 0 : v) * a->images + image;
}

// Floats after which channel and vector boundaries coincide again.
int64_t period_of(int channels) {
  int64_t period = channels;
  while (period % kLanes != 0) period += channels;
  return period;
}

// Calls f with a constant: the number of the pass's terms that are not pooled.
template <int Count = 0, class F>
void with_count(const Pass& pass, F f) {
  if (pass.count == Count)
    f(Constant<Count>{});
  else if constexpr (Count < kTerms)
    with_count<Count + 1>(pass, f);
}

// For every row of the pooled image among `pixels` pixels from pixel `first` on, calls
//   f(rows, max, avg, count, shape, x, p).
// The first four are constants: how many rows the row's windows reach, whether the pass has each pool, and the number
// of its other terms. x: the first of the rows that are reached; p: the row's first pixel, counted from `first`.
template <class F>
void for_pooled_rows(const pn_mixed_sum* a, const Pass& pass, int64_t v, int64_t image, int64_t first, int64_t pixels,
                     F f) {
  const pn_term& term = a->terms[pass.any_pooled()];
  const PoolShape shape = shape_of(term, a->channels);
  const float* x = term.y + image_of(a, term, v, image) * shape.height * shape.row();
  with_count(pass, [&](auto count) {
    const auto all = [&](auto max, auto avg) {
      for (int64_t p = 0; p < pixels; p += shape.out_width())
        with_rows(shape, int((first + p) / shape.out_width()),
                  [&](auto rows, int64_t top) { f(rows, max, avg, count, shape, x + top, p); });
    };
    if (pass.pooled[PN_POOL_AVG_3X3] < 0)
      all(Constant<true>{}, Constant<false>{});
    else if (pass.pooled[PN_POOL_MAX_3X3] < 0)
      all(Constant<false>{}, Constant<true>{});
    else
      all(Constant<true>{}, Constant<true>{});
  });
}

// Of one variant: out = initial + sum over a pass's terms of factor * value; with initial null: out += the sum.
// factors: rows of one period for the maximum, the average, and the other terms; these begin `offset` floats after y.
// For one row of the pooled image; x: the first of the `kRows` rows that its windows reach.
template <int kRows, bool Max, bool Avg, int Count>
void add_pooled_row(const PoolShape& shape, const float* x, const float* const* y, int64_t offset, const float* factors,
                    int64_t period, const float* initial, float* out) {
  const float* from[Count + 1];
  for (int k = 0; k < Count; k++) from[k] = y[k] + offset;
  for_vectors(shape.channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    const vec max_factor = load_partial(factors + c, lanes), avg_factor = load_partial(factors + period + c, lanes);
    vec factor[Count + 1];
    for (int k = 0; k < Count; k++) factor[k] = load_partial(factors + (2 + k) * period + c, lanes);
    const vec constant = initial ? load_partial(initial + c, lanes) : vec{};
    pool_row<kRows, Max>(shape, x, c, lanes, [&](int ox, vec maximum, vec sum, vec share) PN_LAMBDA_INLINE {
      const int64_t i = int64_t(ox) * shape.channels + c;
      vec total = initial ? constant : load_partial(out + i, lanes);
      for (int k = 0; k < Count; k++) {
        __builtin_prefetch(from[k] + i + kAhead, 0, 2);
        total += factor[k] * load_partial(from[k] + i, lanes);
      }
      if (Max) total += max_factor * maximum;
      if (Avg) total += avg_factor * share * sum;
      store_partial(out + i, total, lanes);
    });
  });
}

// For n floats without pools. They are flat arrays in which the channel repeats with a period of whole vectors, so that
// any channel count fills these.
template <int Count>
void add_flat(const float* const* y, const float* factors, int64_t period, const float* initial, int64_t n,
              float* out) {
  for (int64_t phase = 0; phase < min(period, n); phase += kLanes) {
    vec factor[Count + 1];
    const float* from[Count + 1];
    for (int k = 0; k < Count; k++) factor[k] = load(factors + (2 + k) * period + phase), from[k] = y[k];
    const vec constant = initial ? load(initial + phase) : vec{};
    const auto add = [&](int64_t i, int lanes) PN_LAMBDA_INLINE {
      vec sum = initial ? constant : load_partial(out + i, lanes);
      for (int k = 0; k < Count; k++) {
        __builtin_prefetch(from[k] + i + kAhead, 0, 2);
        sum += factor[k] * load_partial(from[k] + i, lanes);
      }
      store_partial(out + i, sum, lanes);
    };
    int64_t i = phase;
    for (; i + kLanes <= n; i += period) add(i, kLanes);
    if (i < n) add(i, int(n - i));
  }
}
// Of every variant: its passes, their factors, and the constants.
struct Plan {
  int64_t period;
  int* counts;       // [V]
  Pass* passes;      // [V][term_count + 1]
  float* factors;    // [V][term_count + 1][2 + kTerms][period]
  float* constants;  // [V][period]
};

int64_t plan_bytes(const pn_mixed_sum* a) {
  const int64_t period = period_of(a->channels), passes = int64_t(a->variants) * (a->term_count + 1);
  return (passes * (2 + kTerms) + a->variants) * period * 4 + passes * int64_t(sizeof(Pass)) + a->variants * 4;
}

void repeat(float* row, int64_t channels, int64_t period) {
  for (int64_t i = channels; i < period; i++) row[i] = row[i - channels];
}

void make_plan(const pn_mixed_sum* a, float* memory, Plan& plan) {
  const int channels = a->channels;
  const int64_t period = plan.period = period_of(channels), places = a->term_count + 1;
  plan.factors = memory;
  plan.constants = memory + a->variants * places * (2 + kTerms) * period;
  plan.passes = reinterpret_cast<Pass*>(plan.constants + a->variants * period);
  plan.counts = reinterpret_cast<int*>(plan.passes + a->variants * places);
  for (int64_t v = 0; v < a->variants; v++) {
    Pass* passes = plan.passes + v * places;
    plan.counts[v] = make_passes(a, passes, [&](int t) { return weight_of(a, v, t) != 0; });
    if (plan.counts[v] == 0) plan.counts[v] = 1, passes[0] = kEmptyPass;  // the output is written, too
    const auto normalization = [&](int t) {
      const pn_term& term = a->terms[t];
      return term.normalization ? term.normalization + (term.variants == 1 ? 0 : v) * 4 * channels : nullptr;
    };
    float* constants = plan.constants + v * period;
    for (int c = 0; c < channels; c++) {
      double sum = 0;
      for (int t = 0; t < a->term_count; t++)
        if (weight_of(a, v, t) != 0 && a->terms[t].normalization)
          sum += double(weight_of(a, v, t)) * double(normalization(t)[channels + c]);
      constants[c] = float(sum);
    }
    repeat(constants, channels, period);
    for (int i = 0; i < plan.counts[v]; i++) {
      const Pass& pass = passes[i];
      float* factors = plan.factors + (v * places + i) * (2 + kTerms) * period;
      const auto set = [&](int place, int t) {
        if (t < 0) return;
        const float weight = weight_of(a, v, t), *scale = normalization(t);
        float* row = factors + place * period;
        for (int c = 0; c < channels; c++) row[c] = scale ? weight * scale[c] : weight;
        repeat(row, channels, period);
      };
      set(0, pass.pooled[PN_POOL_MAX_3X3]);
      set(1, pass.pooled[PN_POOL_AVG_3X3]);
      for (int k = 0; k < pass.count; k++) set(2 + k, pass.terms[k]);
    }
  }
}

// What the terms read of some pixels of an image; returns how many reads.
int reads_of(const pn_mixed_sum* a, int64_t variant, int64_t image, PixelRange part, Ahead* reads) {
  int n = 0;
  const float* before = nullptr;
  for (int t = 0; t < a->term_count && n < kPartReads; t++) {
    const pn_term& term = a->terms[t];
    if (!term.y || term.y == before || weight_of(a, variant, t) == 0) continue;
    before = term.y;
    const int64_t own = image_of(a, term, variant, image);
    if (term.pooling == PN_POOL_NONE) {
      const float* y = term.y + own * a->pixels * a->channels;
      reads[n++] = {y + part.begin * a->channels, y + part.end * a->channels};
    } else {
      const PoolShape shape = shape_of(term, a->channels);
      const float* y = term.y + own * shape.height * shape.row();
      // The part before has read the row above this one's, and one further.
      const auto row = [&](int64_t pixel) {
        return pixel == 0 ? 0 : min<int64_t>(shape.height, pixel / shape.out_width() * shape.stride + 1);
      };
      reads[n++] = {y + row(part.begin) * shape.row(), y + row(part.end) * shape.row()};
    }
  }
  return n;
}

struct ForwardCall {
  Rows rows;
  Plan plan;
};

int32_t check_forward(const char* name, const void* args, CallNeeds* needs) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->out, "%s: out is null", name);
  for (int v = 0; v < a->variants; v++)
    for (int t = 0; t < a->term_count; t++)
      PN_REQUIRE(a->terms[t].y || weight_of(a, v, t) == 0, "%s: term %d has weight %g in variant %d but no y", name, t,
                 double(weight_of(a, v, t)), v);
  *needs = {a->images, a->variants, false, kPlanBytes<ForwardCall> + plan_bytes(a), 0, 0};
  return PN_OK;
}

void prepare_forward(const void* args, void* shared) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(args);
  ForwardCall& call = *static_cast<ForwardCall*>(shared);
  call = {Rows(a), {}};
  make_plan(a, after_plan<ForwardCall>(shared), call.plan);
}

void forward_image(const CallImage& run) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(run.args);
  const ForwardCall& call = *static_cast<const ForwardCall*>(run.shared);
  const Plan& plan = call.plan;
  const Rows& rows = call.rows;
  const int channels = a->channels;
  const int64_t image = run.image % a->images, v = run.image / a->images;
  const PixelRange part = rows.part(a, run);
  const int64_t strip = rows.strip(channels);
  for (int64_t first = part.begin; first < part.end; first += strip) {
    const int64_t pixels = min(strip, part.end - first);
    const float* initial = plan.constants + v * plan.period;
    for (int i = 0; i < plan.counts[v]; i++, initial = nullptr) {
      float* out = a->out + ((v * a->images + image) * a->pixels + first) * channels;
      const int64_t place = v * (a->term_count + 1) + i;
      const Pass& pass = plan.passes[place];
      const float* factors = plan.factors + place * (2 + kTerms) * plan.period;
      const float* y[kTerms];
      for (int k = 0; k < pass.count; k++) {
        const pn_term& term = a->terms[pass.terms[k]];
        y[k] = term.y + (image_of(a, term, v, image) * a->pixels + first) * channels;
      }
      if (!pass.pools()) {
        with_count(
            pass, [&](auto count) { add_flat<count.value>(y, factors, plan.period, initial, pixels * channels, out); });
        continue;
      }
      for_pooled_rows(
          a, pass, v, image, first, pixels,
          [&](auto rows, auto max, auto avg, auto count, const PoolShape& shape, const float* x, int64_t p) {
            add_pooled_row<rows.value, max.value, avg.value, count.value>(shape, x, y, p * channels, factors,
                                                                          plan.period, initial, out + p * channels);
          });
    }
  }
}

int forward_reads_part(const CallImage& part, Ahead* reads) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(part.args);
  const Rows& rows = static_cast<const ForwardCall*>(part.shared)->rows;
  return reads_of(a, part.image / a->images, part.image % a->images, rows.part(a, part), reads);
}

// sums of a pass's terms += those of g * (value - mean) over a row of pixels. mean, sums: for the maximum, the
// average, and the other terms; a null mean is zero. What is read of y begins `offset` floats after it, as in g.
template <int kRows, bool Max, bool Avg, int Count>
void sum_pooled_row(const PoolShape& shape, const float* x, const float* const* y, int64_t offset,
                    const float* const* mean, const float* g, float* const* sums) {
  const float* from[Count + 1];
  for (int k = 0; k < Count; k++) from[k] = y[k] + offset;
  g += offset;
  for_vectors(shape.channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    vec shift[2 + Count], total[2 + Count] = {};
    for (int k = 0; k < 2 + Count; k++) shift[k] = mean[k] ? load_partial(mean[k] + c, lanes) : vec{};
    pool_row<kRows, Max>(shape, x, c, lanes, [&](int ox, vec maximum, vec sum, vec share) PN_LAMBDA_INLINE {
      const int64_t i = int64_t(ox) * shape.channels + c;
      const vec gradient = load_partial(g + i, lanes);
      if (Max) total[0] += gradient * (maximum - shift[0]);
      if (Avg) total[1] += gradient * (share * sum - shift[1]);
      for (int k = 0; k < Count; k++) {
        __builtin_prefetch(from[k] + i + kAhead, 0, 2);
        total[2 + k] += gradient * (load_partial(from[k] + i, lanes) - shift[2 + k]);
      }
    });
    for (int k = 0; k < 2 + Count; k++)
      if (k == 0 ? Max : k == 1 ? Avg : true)
        store_partial(sums[k] + c, load_partial(sums[k] + c, lanes) + total[k], lanes);
  });
}

template <int Count>
void sum_flat(int64_t pixels, int channels, const float* const* y, int64_t offset, const float* const* mean,
              const float* g, float* const* sums) {
  const float* from[Count + 1];
  for (int k = 0; k < Count; k++) from[k] = y[k] + offset;
  g += offset;
  for_vectors(channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    vec shift[Count + 1], total[Count + 1] = {};
    for (int k = 0; k < Count; k++) shift[k] = mean[2 + k] ? load_partial(mean[2 + k] + c, lanes) : vec{};
    for (int64_t p = 0; p < pixels; p++) {
      const int64_t i = p * channels + c;
      const vec gradient = load_partial(g + i, lanes);
      for (int k = 0; k < Count; k++) {
        __builtin_prefetch(from[k] + i + kAhead, 0, 2);
        total[k] += gradient * (load_partial(from[k] + i, lanes) - shift[k]);
      }
    }
    for (int k = 0; k < Count; k++)
      store_partial(sums[2 + k] + c, load_partial(sums[2 + k] + c, lanes) + total[k], lanes);
  });
}

// sums += those of g over a row of pixels.
void sum_gradient(const float* g, int64_t pixels, int channels, float* sums) {
  for_vectors(channels, [&](int64_t c, int lanes) PN_LAMBDA_INLINE {
    vec total{};
    for (int64_t p = 0; p < pixels; p++) {
      __builtin_prefetch(g + p * channels + c + kAhead);
      total += load_partial(g + p * channels + c, lanes);
    }
    store_partial(sums + c, load_partial(sums + c, lanes) + total, lanes);
  });
}

struct BackwardCall {
  Rows rows;
  float* sums;   // [N, 1 + term_count, C]
  Pass* passes;  // [term_count]
  int count;
};

int64_t sums_of(const pn_mixed_sum* a) { return int64_t(1 + a->term_count) * a->channels; }

int32_t check_backward(const char* name, const void* args, CallNeeds* needs) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(args);
  if (const int32_t status = check(a, name)) return status;
  PN_REQUIRE(a->variants == 1, "%s: takes one variant, not %d", name, a->variants);
  PN_REQUIRE(a->g, "%s: g is null", name);
  for (int t = 0; t < a->term_count; t++) PN_REQUIRE(a->terms[t].y, "%s: term %d has no y", name, t);
  const int64_t bytes = kPlanBytes<BackwardCall> + a->term_count * int64_t(sizeof(Pass)) +
                        (a->gradient_sums ? 0 : a->images * sums_of(a) * 4);
  *needs = {a->images, a->gradient_sums || a->weight_gradients ? 1 : 0, false, bytes,
            0,         a->weight_gradients ? a->term_count : 0};
  return PN_OK;
}

void prepare_backward(const void* args, void* shared) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(args);
  BackwardCall& call = *static_cast<BackwardCall*>(shared);
  Pass* passes = reinterpret_cast<Pass*>(after_plan<BackwardCall>(shared));
  float* sums = a->gradient_sums ? a->gradient_sums : reinterpret_cast<float*>(passes + a->term_count);
  call = {Rows(a), sums, passes, make_passes(a, passes, [](int) { return true; })};
}

void backward_image(const CallImage& run) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(run.args);
  const BackwardCall& call = *static_cast<const BackwardCall*>(run.shared);
  const Rows& rows = call.rows;
  const int channels = a->channels;
  float* own = call.sums + run.image * sums_of(a);
  if (run.part == 0)
    for (int64_t i = 0; i < sums_of(a); i++) own[i] = 0;
  const PixelRange part = rows.part(a, run);
  const int64_t strip = rows.strip(channels);
  for (int64_t first = part.begin; first < part.end; first += strip) {
    const int64_t pixels = min(strip, part.end - first), offset = (run.image * a->pixels + first) * channels;
    const float* g = a->g + offset;
    for (int64_t p = 0; p < pixels; p += rows.pixels)
      sum_gradient(g + p * channels, min<int64_t>(rows.pixels, pixels - p), channels, own);
    for (int i = 0; i < call.count; i++) {
      const Pass& pass = call.passes[i];
      const float *y[kTerms], *mean[2 + kTerms] = {};
      float* sums[2 + kTerms] = {};
      const auto set = [&](int place, int t) {
        if (t < 0) return;
        const float* normalization = a->terms[t].normalization;
        mean[place] = normalization ? normalization + 3 * channels : nullptr;
        sums[place] = own + int64_t(1 + t) * channels;
      };
      set(0, pass.pooled[PN_POOL_MAX_3X3]);
      set(1, pass.pooled[PN_POOL_AVG_3X3]);
      for (int k = 0; k < pass.count; k++) {
        set(2 + k, pass.terms[k]);
        y[k] = a->terms[pass.terms[k]].y + offset;
      }
      if (!pass.pools()) {
        with_count(pass, [&](auto count) {
          for (int64_t p = 0; p < pixels; p += rows.pixels)
            sum_flat<count.value>(min<int64_t>(rows.pixels, pixels - p), channels, y, p * channels, mean, g, sums);
        });
        continue;
      }
      for_pooled_rows(
          a, pass, 0, run.image, first, pixels,
          [&](auto rows, auto max, auto avg, auto count, const PoolShape& shape, const float* x, int64_t p) {
            sum_pooled_row<rows.value, max.value, avg.value, count.value>(shape, x, y, p * channels, mean, g, sums);
          });
    }
  }
  if (run.part + 1 < run.parts) return;
  for (int t = 0; t < a->term_count; t++)
    if (const float* normalization = a->terms[t].normalization)
      for (int i = 0; i < channels; i++) own[int64_t(1 + t) * channels + i] *= normalization[2 * channels + i];
}

int backward_reads_part(const CallImage& part, Ahead* reads) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(part.args);
  return reads_of(a, 0, part.image, static_cast<const BackwardCall*>(part.shared)->rows.part(a, part), reads);
}

// Adds up a weight's gradient over the images and the terms that share it; the first of these terms does it.
void finish_weight_gradient(const void* args, const void* shared, int64_t first) {
  const pn_mixed_sum* a = static_cast<const pn_mixed_sum*>(args);
  const BackwardCall& call = *static_cast<const BackwardCall*>(shared);
  const int channels = a->channels, index = a->terms[first].weight_index;
  const int64_t row = sums_of(a);
  for (int t = 0; t < a->term_count; t++) {
    if (a->terms[t].weight_index != index) continue;
    if (t < first) return;
    const float* normalization = a->terms[t].normalization;
    // n = scale * y + shift = scale / inverse_deviation * yhat + shift + scale * mean.
    double total = 0;
    for (int c = 0; c < channels; c++) {
      double g = 0, product = 0;
      for (int64_t image = 0; image < a->images; image++) {
        g += double(call.sums[image * row + c]);
        product += double(call.sums[image * row + (1 + t) * channels + c]);
      }
      if (normalization) {
        const double scale = normalization[c], shift = normalization[channels + c];
        const double inverse_deviation = normalization[2 * channels + c], mean = normalization[3 * channels + c];
        product = scale / inverse_deviation * product + (shift + scale * mean) * g;
      }
      total += product;
    }
    a->weight_gradients[index] += float(total);
  }
}

}  // namespace

const GroupKernel mixed_sum_forward_kernel = {
    "mixed_sum_forward", check_forward, prepare_forward, forward_image, nullptr, nullptr, forward_reads_part};
const GroupKernel mixed_sum_backward_kernel = {"mixed_sum_backward", check_backward, prepare_backward,
                                               backward_image,       nullptr,        finish_weight_gradient,
                                               backward_reads_part};

}  // namespace pn::PN_NAMESPACE
