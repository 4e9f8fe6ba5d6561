// The node's mixed sum over all incoming edges and operations in one pass, and its backward sums.
//
// Both are bound by memory. Forward: normalisation and weight fold into one factor per (variant, term, channel) and one
// constant per (variant, channel). The tensors of a variant are flat arrays in which the channel repeats with a period
// of whole vectors, so any channel count fills them. A task is a part of an image in all variants, a few terms at a
// time: long enough that each term is read in long runs, with all variants taking their share of a strip of terms while
// it is in L2. Terms that are to be pooled are pooled strip by strip, and never written to memory.
#include "cpu/context.h"
#include "cpu/pooled_rows.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kTasks = 64;          // at least so many, if there are as many strips
constexpr int kStripFloats = 8192;  // that all variants add before the next ones are read: with its terms it fits L2
constexpr int kGroup = 4;           // terms added per pass over a strip
constexpr int kAhead =
    512;  // floats between reading and prefetching, for so many streams are beyond the hardware's prefetcher
constexpr int kTilePixels = 64;  // pixels summed in one float accumulator

// Floats after which channel and vector boundaries coincide again.
int64_t period_of(int channels) {
  int64_t period = channels;
  while (period % kLanes != 0) period += channels;
  return period;
}

// out = initial + sum over `Count` terms of factor * y, or with initial null: out += the sum. factors: rows of one
// period.
template <int Count, bool Ahead>
void add_terms(const float* const* y, const float* factors, const float* initial, int64_t period, int64_t n,
               float* out) {
  for (int64_t phase = 0; phase < min(period, n); phase += kLanes) {
    vec factor[Count + 1];
    const float* from[Count + 1];
    for (int k = 0; k < Count; k++) factor[k] = load(factors + k * period + phase), from[k] = y[k];
    const vec constant = initial ? load(initial + phase) : vec{};
    const auto add = [&](int64_t i, int lanes) {
      vec sum = initial ? constant : load_partial(out + i, lanes);
      for (int k = 0; k < Count; k++) {
        if (Ahead) __builtin_prefetch(from[k] + i + kAhead, 0, 2);
        sum += factor[k] * load_partial(from[k] + i, lanes);
      }
      store_partial(out + i, sum, lanes);
    };
    int64_t i = phase;
    for (; i + kLanes <= n; i += period) add(i, kLanes);
    if (i < n) add(i, int(n - i));
  }
}

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

// Whole rows of a pooled image, or any pixels if nothing is pooled, that are worked on at a time.
struct Strips {
  int64_t pixels;        // of a strip; the last one of an image may be shorter
  int64_t pooled_bytes;  // memory that pool_rows needs
  int64_t floats;        // of a strip, in whole cache lines

  explicit Strips(const pn_mixed_sum* a) : pixels(1), pooled_bytes(0) {
    for (int t = 0; t < a->term_count; t++) {
      const pn_term& term = a->terms[t];
      if (term.pooling == PN_POOL_NONE) continue;
      const PoolShape shape = shape_of(term, a->channels);
      pixels = shape.out_width();
      pooled_bytes = max(pooled_bytes, MaximumRows<false>::bytes(shape));
    }
    pixels = min<int64_t>(a->pixels, pixels * max<int64_t>(1, kStripFloats / (pixels * a->channels)));
    floats = (pixels * a->channels + 15) / 16 * 16;
  }

  static PoolShape shape_of(const pn_term& term, int channels) {
    return {term.height, term.width, channels, term.stride};
  }
};

// The values of a group's pooled terms in a strip. Where an edge has both pools, they are pooled together.
class PooledStrip {
 public:
  PooledStrip(const pn_mixed_sum* a, const Strips& strips, char* memory)
      : a_(a), strips_(strips), memory_(memory), values_(reinterpret_cast<float*>(memory + strips.pooled_bytes)) {}
  static int64_t bytes(const Strips& strips) { return strips.pooled_bytes + kGroup * strips.floats * 4; }

  // Goes to another strip, of the group that consists of the terms at `terms`.
  void begin(const int32_t* terms, int count, int64_t image, int64_t first, int64_t pixels) {
    terms_ = terms, count_ = count, image_ = image, first_ = first, pixels_ = pixels;
    for (int64_t& variant : variants_) variant = -1;
  }

  // Of the group's term `slot`, in a variant of the result.
  const float* get(int slot, int64_t variant) {
    const pn_term& term = a_->terms[terms_[slot]];
    const int64_t own = term.variants == 1 ? 0 : variant;
    if (variants_[slot] == own) return values_ + slot * strips_.floats;
    int slots[3] = {-1, -1, -1};  // by pooling
    slots[term.pooling] = slot;
    for (int i = slot + 1; i < count_; i++) {
      const pn_term& other = a_->terms[terms_[i]];
      if (other.pooling != PN_POOL_NONE && slots[other.pooling] < 0 && other.y == term.y &&
          other.variants == term.variants && other.stride == term.stride && other.width == term.width)
        slots[other.pooling] = i;
    }
    const auto values = [&](int pooling) {
      if (slots[pooling] < 0) return static_cast<float*>(nullptr);
      variants_[slots[pooling]] = own;
      return values_ + slots[pooling] * strips_.floats;
    };
    const PoolShape shape = Strips::shape_of(term, a_->channels);
    pool_rows(shape, term.y + (own * a_->images + image_) * term.height * shape.row(), int(first_ / shape.out_width()),
              int(pixels_ / shape.out_width()), memory_, values(PN_POOL_MAX_3X3), values(PN_POOL_AVG_3X3));
    return values_ + slot * strips_.floats;
  }

 private:
  const pn_mixed_sum* a_;
  const Strips& strips_;
  char* memory_;
  float* values_;
  const int32_t* terms_ = nullptr;
  int count_ = 0;
  int64_t image_ = 0, first_ = 0, pixels_ = 0;
  int64_t variants_[kGroup];  // whose values there are
};

PN_INLINE float weight_of(const pn_mixed_sum* a, int v, int t) {
  return a->weights ? a->weights[int64_t(v) * a->weight_stride + a->terms[t].weight_index] : 1.0f;
}

template <bool Ahead>
constexpr decltype(&add_terms<0, Ahead>) add_functions[kGroup + 1] = {
    add_terms<0, Ahead>, add_terms<1, Ahead>, add_terms<2, Ahead>, add_terms<3, Ahead>, add_terms<4, Ahead>};

// The terms whose weight is not zero in some variant, in groups of kGroup. Of a group, a variant has the terms whose
// weight is not zero for itself: the first counts[v][group] of the group's places.
struct Plan {
  int64_t period;
  int live, groups;
  int32_t* terms;    // [live]
  int32_t* places;   // [V][groups * kGroup]: index in `terms`
  float* factors;    // [V][groups * kGroup][period]
  float* constants;  // [V][period]
  int32_t* counts;   // [V][groups]
  bool* shared;      // [groups]: all of the group's terms have one variant
};

void repeat(float* row, int64_t channels, int64_t period) {
  for (int64_t i = channels; i < period; i++) row[i] = row[i - channels];
}

// Returns false if there is no memory.
bool make_plan(pn_context* context, const pn_mixed_sum* a, Plan& plan) {
  const int channels = a->channels;
  const int64_t period = plan.period = period_of(channels);
  const int64_t places = max(kGroup, round_up(a->term_count, kGroup)), variants = a->variants;
  const int64_t floats = variants * (places + 1) * period;
  const int64_t bytes = (floats + places + 2 * variants * places) * 4 + places;
  float* memory = static_cast<float*>(context->shared.get(bytes));
  if (!memory) return false;
  plan.factors = memory;
  plan.constants = memory + variants * places * period;
  plan.terms = reinterpret_cast<int32_t*>(memory + floats);
  plan.places = plan.terms + places;
  plan.counts = plan.places + variants * places;
  plan.shared = reinterpret_cast<bool*>(plan.counts + variants * places);

  plan.live = 0;
  for (int t = 0; t < a->term_count; t++) {
    bool live = false;
    for (int v = 0; v < variants; v++) live |= weight_of(a, v, t) != 0;
    if (live) plan.terms[plan.live++] = t;
  }
  plan.groups = max(1, (plan.live + kGroup - 1) / kGroup);  // of none, too, the outputs are written
  for (int group = 0; group < plan.groups; group++) {
    plan.shared[group] = true;
    for (int i = group * kGroup; i < min(plan.live, (group + 1) * kGroup); i++)
      plan.shared[group] &= a->terms[plan.terms[i]].variants == 1;
  }
  for (int64_t v = 0; v < variants; v++) {
    float* constants = plan.constants + v * period;
    for (int c = 0; c < channels; c++) {
      double sum = 0;
      for (int i = 0; i < plan.live; i++) {
        const pn_term& term = a->terms[plan.terms[i]];
        const float weight = weight_of(a, int(v), plan.terms[i]);
        if (weight == 0 || !term.normalization) continue;
        sum += double(weight) * double(term.normalization[((term.variants == 1 ? 0 : v) * 4 + 1) * channels + c]);
      }
      constants[c] = float(sum);
    }
    repeat(constants, channels, period);
    for (int group = 0; group < plan.groups; group++) {
      int32_t& count = plan.counts[v * plan.groups + group] = 0;
      for (int i = group * kGroup; i < min(plan.live, (group + 1) * kGroup); i++) {
        const pn_term& term = a->terms[plan.terms[i]];
        const float weight = weight_of(a, int(v), plan.terms[i]);
        if (weight == 0) continue;
        const int64_t own = term.variants == 1 ? 0 : v;
        const int64_t place = (v * plan.groups + group) * kGroup + count++;
        const float* scale = term.normalization ? term.normalization + own * 4 * channels : nullptr;
        float* factors = plan.factors + place * period;
        for (int c = 0; c < channels; c++) factors[c] = scale ? weight * scale[c] : weight;
        repeat(factors, channels, period);
        plan.places[place] = i;
      }
    }
  }
  return true;
}

// Adds to the sums of g * (y - mean) over `pixels` pixels for `Terms` terms and `Blocks` vectors of channels.
template <int Terms, int Blocks>
void sum_products(const float* g, const float* const* y, const float* const* mean, int64_t pixels, int channels,
                  int remaining, float* const* sums) {
  // All but the last block are whole vectors.
  const int last = min(kLanes, remaining - (Blocks - 1) * kLanes);
  const auto width = [&](int b) { return b + 1 < Blocks ? kLanes : last; };
  vec shift[Terms][Blocks], total[Terms][Blocks];
  for (int t = 0; t < Terms; t++)
    for (int b = 0; b < Blocks; b++) {
      shift[t][b] = mean[t] ? load_partial(mean[t] + b * kLanes, width(b)) : vec{};
      total[t][b] = vec{};
    }
  for (int64_t first = 0; first < pixels; first += kTilePixels) {
    vec sum[Terms][Blocks]{};
    const int64_t end = min(first + kTilePixels, pixels);
    for (int64_t p = first; p < end; p++)
      for (int b = 0; b < Blocks; b++) {
        const vec gradient = load_partial(g + p * channels + b * kLanes, width(b));
        for (int t = 0; t < Terms; t++)
          sum[t][b] += gradient * (load_partial(y[t] + p * channels + b * kLanes, width(b)) - shift[t][b]);
      }
    for (int t = 0; t < Terms; t++)
      for (int b = 0; b < Blocks; b++) total[t][b] += sum[t][b];
  }
  for (int t = 0; t < Terms; t++)
    for (int b = 0; b < Blocks; b++)
      store_partial(sums[t] + b * kLanes, load_partial(sums[t] + b * kLanes, width(b)) + total[t][b], width(b));
}

// The sum of g over the pixels of one image, `lanes` channels from channel 0 of g on.
void sum_gradient(const float* g, int64_t pixels, int channels, int lanes, float* sums) {
  vec total{};
  for (int64_t first = 0; first < pixels; first += kTilePixels) {
    vec sum{};
    const int64_t end = min(first + kTilePixels, pixels);
    for (int64_t p = first; p < end; p++) sum += load_partial(g + p * channels, lanes);
    total += sum;
  }
  store_partial(sums, total, lanes);
}

// The products of one image: all channels of a few terms, then of the next few, so that each is read from main memory
// once.
template <int Terms>
void add_products(const pn_mixed_sum* a, const Strips& strips, int64_t image, int t, PooledStrip& pooled, float* sums) {
  const int channels = a->channels;
  int32_t terms[Terms];
  for (int k = 0; k < Terms; k++) terms[k] = t + k;
  for (int64_t first = 0; first < a->pixels; first += strips.pixels) {
    const int64_t count = min(strips.pixels, a->pixels - first), offset = (image * a->pixels + first) * channels;
    pooled.begin(terms, Terms, image, first, count);
    const float* values[Terms];
    for (int k = 0; k < Terms; k++)
      values[k] = a->terms[t + k].pooling == PN_POOL_NONE ? a->terms[t + k].y + offset : pooled.get(k, 0);
    for (int c = 0; c < channels; c += 2 * kLanes) {
      const float* y[Terms];
      const float* mean[Terms];
      float* rows[Terms];
      for (int k = 0; k < Terms; k++) {
        const pn_term& term = a->terms[t + k];
        y[k] = values[k] + c;
        mean[k] = term.normalization ? term.normalization + 3 * channels + c : nullptr;
        rows[k] = sums + int64_t(1 + t + k) * channels + c;
      }
      const auto sum = c + kLanes < channels ? sum_products<Terms, 2> : sum_products<Terms, 1>;
      sum(a->g + offset + c, y, mean, count, channels, channels - c, rows);
    }
  }
}

}  // namespace

int32_t mixed_sum_forward(pn_context* context, const pn_mixed_sum* a) {
  if (const int32_t status = check(a, "mixed_sum_forward")) return status;
  PN_REQUIRE(a->out, "mixed_sum_forward: out is null");
  for (int v = 0; v < a->variants; v++)
    for (int t = 0; t < a->term_count; t++)
      PN_REQUIRE(a->terms[t].y || weight_of(a, v, t) == 0,
                 "mixed_sum_forward: term %d has weight %g in variant %d but no y", t, double(weight_of(a, v, t)), v);
  Plan plan;
  const Strips strips(a);
  const int64_t image_floats = int64_t(a->pixels) * a->channels, elements = a->images * image_floats;
  const int64_t local_bytes = PooledStrip::bytes(strips);
  bool memory = make_plan(context, a, plan);
  for (int thread = 0; thread < context->pool.threads(); thread++)
    memory = memory && context->local[thread].get(local_bytes);
  if (!memory) return fail(PN_OUT_OF_MEMORY, "mixed_sum_forward: no memory for the factors of %d terms", a->term_count);

  // A few images are cut into parts, so that there is a task for every thread.
  const int64_t strip_count = (a->pixels + strips.pixels - 1) / strips.pixels;
  const int64_t parts = min<int64_t>(strip_count, (kTasks + a->images - 1) / a->images);
  parallel_for(context, a->images * parts, [&](int64_t task, int thread) {
    const int64_t image = task / parts, part = task % parts;
    const int64_t begin = strip_count * part / parts * strips.pixels;
    const int64_t end = min<int64_t>(a->pixels, strip_count * (part + 1) / parts * strips.pixels);
    PooledStrip pooled(a, strips, static_cast<char*>(context->local[thread].get(local_bytes)));
    for (int group = 0; group < plan.groups; group++)
      for (int64_t first = begin; first < end; first += strips.pixels) {
        const int64_t count = min(strips.pixels, end - first);
        const int64_t offset = image * image_floats + first * a->channels;
        pooled.begin(plan.terms + group * kGroup, min(kGroup, plan.live - group * kGroup), image, first, count);
        for (int64_t v = 0; v < a->variants; v++) {
          const int64_t index = v * plan.groups + group;
          const int terms = plan.counts[index];
          const float* y[kGroup];
          for (int k = 0; k < terms; k++) {
            const int place = plan.places[index * kGroup + k];
            const pn_term& term = a->terms[plan.terms[place]];
            y[k] = term.pooling == PN_POOL_NONE ? term.y + (term.variants == 1 ? 0 : v) * elements + offset
                                                : pooled.get(place % kGroup, v);
          }
          // A term that all variants share is prefetched by the first.
          const auto add = v == 0 || !plan.shared[group] ? add_functions<true>[terms] : add_functions<false>[terms];
          add(y, plan.factors + index * kGroup * plan.period, group == 0 ? plan.constants + v * plan.period : nullptr,
              plan.period, count * a->channels, a->out + v * elements + offset);
        }
      }
  });
  return PN_OK;
}

int32_t mixed_sum_backward(pn_context* context, const pn_mixed_sum* a) {
  if (const int32_t status = check(a, "mixed_sum_backward")) return status;
  PN_REQUIRE(a->variants == 1, "mixed_sum_backward: takes one variant, not %d", a->variants);
  PN_REQUIRE(a->g, "mixed_sum_backward: g is null");
  for (int t = 0; t < a->term_count; t++) PN_REQUIRE(a->terms[t].y, "mixed_sum_backward: term %d has no y", t);
  if (!a->gradient_sums && !a->weight_gradients) return PN_OK;

  const int channels = a->channels;
  const Strips strips(a);
  const int64_t rows = int64_t(1 + a->term_count) * channels;
  const int64_t local_bytes = PooledStrip::bytes(strips);
  float* sums = a->gradient_sums;
  double* term_gradients = nullptr;
  {
    const int64_t doubles = (a->term_count + 1) / 2 * 2 * 8;
    char* memory = static_cast<char*>(context->shared.get(doubles + (sums ? 0 : a->images * rows * 4)));
    bool all = memory != nullptr;
    for (int thread = 0; thread < context->pool.threads(); thread++)
      all = all && context->local[thread].get(local_bytes);
    if (!all) return fail(PN_OUT_OF_MEMORY, "mixed_sum_backward: no memory for the sums of %d images", a->images);
    term_gradients = reinterpret_cast<double*>(memory);
    if (!sums) sums = reinterpret_cast<float*>(memory + doubles);
  }

  parallel_for(context, a->images, [&](int64_t image, int thread) {
    PooledStrip pooled(a, strips, static_cast<char*>(context->local[thread].get(local_bytes)));
    float* own = sums + image * rows;
    for (int64_t i = channels; i < rows; i++) own[i] = 0;
    for (int c = 0; c < channels; c += kLanes)
      sum_gradient(a->g + image * a->pixels * channels + c, a->pixels, channels, min(kLanes, channels - c), own + c);
    int t = 0;
    for (; t + kGroup <= a->term_count; t += kGroup) add_products<kGroup>(a, strips, image, t, pooled, own);
    for (; t < a->term_count; t++) add_products<1>(a, strips, image, t, pooled, own);
    for (int t = 0; t < a->term_count; t++)
      if (const float* normalization = a->terms[t].normalization)
        for (int i = 0; i < channels; i++) own[int64_t(1 + t) * channels + i] *= normalization[2 * channels + i];
  });

  if (!a->weight_gradients) return PN_OK;
  // n = scale * y + shift = scale / inverse_deviation * yhat + shift + scale * mean.
  parallel_for(context, a->term_count, [&](int64_t t, int) {
    const float* normalization = a->terms[t].normalization;
    double total = 0;
    for (int c = 0; c < channels; c++) {
      double g = 0, product = 0;
      for (int64_t image = 0; image < a->images; image++) {
        g += double(sums[image * rows + c]);
        product += double(sums[image * rows + (1 + t) * channels + c]);
      }
      if (normalization) {
        const double scale = normalization[c], shift = normalization[channels + c];
        const double inverse_deviation = normalization[2 * channels + c], mean = normalization[3 * channels + c];
        product = scale / inverse_deviation * product + (shift + scale * mean) * g;
      }
      total += product;
    }
    term_gradients[t] = total;
  });
  for (int t = 0; t < a->term_count; t++) a->weight_gradients[a->terms[t].weight_index] += float(term_gradients[t]);
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
