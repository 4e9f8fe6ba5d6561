// The node's mixed sum over all incoming edges and operations in one pass, and its backward sums.
//
// Both are bound by memory. Forward: normalisation and weight fold into one factor per (variant, term, channel) and one
// constant per (variant, channel). The tensors of a variant are flat arrays in which the channel repeats with a period
// of whole vectors, so any channel count fills them. A task is a short chunk of all variants: terms that are common to
// the variants come from main memory once and from the cache for the other variants.
#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {

namespace {

constexpr int kChunk = 2048;     // floats: a chunk's output stays in L1 and 100 terms of it in L2
constexpr int kGroup = 4;        // terms added per pass over a chunk
constexpr int kTilePixels = 64;  // pixels summed in one float accumulator

// Floats after which channel and vector boundaries coincide again, and at least 64 so that the inner loop is not
// trivially short.
int64_t period_of(int channels) {
  int64_t period = channels;
  while (period % kLanes != 0) period += channels;
  return period * max<int64_t>(1, 64 / period);
}

// out = initial + sum over `Count` terms of factor * y, or with initial null: out += the sum. factors: rows of one
// period.
template <int Count>
void add_terms(const float* const* y, const float* factors, const float* initial, int64_t period, int64_t n,
               float* out) {
  const float* f[Count > 0 ? Count : 1];
  const float* from[Count > 0 ? Count : 1];
  for (int k = 0; k < Count; k++) f[k] = factors + k * period, from[k] = y[k];
  for (int64_t start = 0; start < n; start += period) {
    const int64_t end = min(period, n - start);
    for (int64_t i = 0; i < end; i += kLanes) {
      const int lanes = int(min<int64_t>(kLanes, end - i));
      vec sum = initial ? load(initial + i) : load_partial(out + start + i, lanes);
      for (int k = 0; k < Count; k++) sum += load(f[k] + i) * load_partial(from[k] + start + i, lanes);
      store_partial(out + start + i, sum, lanes);
    }
  }
}

// The terms of one variant whose weight is not zero.
struct Active {
  int64_t count;
  const float** y;  // [count]
  float* factors;   // [count][period]
  float* constant;  // [period]
};

int32_t check(const pn_mixed_sum* a, const char* name) {
  PN_REQUIRE(a->term_count >= 0 && a->variants >= 1 && a->images >= 1 && a->pixels >= 1 && a->channels >= 1,
             "%s: every extent must be positive, not V %d, N %d, P %d, C %d, %d terms", name, a->variants, a->images,
             a->pixels, a->channels, a->term_count);
  PN_REQUIRE(a->terms || a->term_count == 0, "%s: terms is null", name);
  for (int t = 0; t < a->term_count; t++) {
    const pn_term& term = a->terms[t];
    PN_REQUIRE(term.variants == 1 || term.variants == a->variants,
               "%s: term %d has %d variants, which is neither 1 nor %d", name, t, term.variants, a->variants);
    PN_REQUIRE(!(a->weights || a->weight_gradients) || (term.weight_index >= 0 && term.weight_index < a->weight_stride),
               "%s: term %d has weight index %d, outside 0..%d", name, t, term.weight_index, a->weight_stride - 1);
  }
  return PN_OK;
}

PN_INLINE float weight_of(const pn_mixed_sum* a, int v, int t) {
  return a->weights ? a->weights[int64_t(v) * a->weight_stride + a->terms[t].weight_index] : 1.0f;
}

void prepare(const pn_mixed_sum* a, int v, int64_t period, int64_t elements, Active& active) {
  const int channels = a->channels;
  active.count = 0;
  for (int t = 0; t < a->term_count; t++) {
    const float weight = weight_of(a, v, t);
    if (weight == 0) continue;
    const pn_term& term = a->terms[t];
    const int own = term.variants == 1 ? 0 : v;
    const float* scale = term.normalization ? term.normalization + int64_t(own) * 4 * channels : nullptr;
    float* factors = active.factors + active.count * period;
    for (int c = 0; c < channels; c++) factors[c] = scale ? weight * scale[c] : weight;
    for (int64_t i = channels; i < period; i++) factors[i] = factors[i - channels];
    active.y[active.count++] = term.y + own * elements;
  }
  for (int c = 0; c < channels; c++) {
    double sum = 0;
    for (int t = 0; t < a->term_count; t++) {
      const pn_term& term = a->terms[t];
      const float weight = weight_of(a, v, t);
      if (weight == 0 || !term.normalization) continue;
      const int own = term.variants == 1 ? 0 : v;
      sum += double(weight) * double(term.normalization[(int64_t(own) * 4 + 1) * channels + c]);
    }
    active.constant[c] = float(sum);
  }
  for (int64_t i = channels; i < period; i++) active.constant[i] = active.constant[i - channels];
}

// Sums g * (y - mean) over the pixels of one image for `Terms` terms and `Blocks` vectors of channels; with y null: g.
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
    for (int b = 0; b < Blocks; b++) store_partial(sums[t] + b * kLanes, total[t][b], width(b));
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

template <int Terms, int Blocks>
void image_sums(const pn_mixed_sum* a, int64_t image, float* sums, int first_block_channel) {
  const int64_t offset = image * a->pixels * a->channels;
  const int channels = a->channels, c = first_block_channel;
  int t = 0;
  const auto run = [&](auto function, int count) {
    const float* y[Terms];
    const float* mean[Terms];
    float* rows[Terms];
    for (int k = 0; k < count; k++) {
      const pn_term& term = a->terms[t + k];
      y[k] = term.y + offset + c;
      mean[k] = term.normalization ? term.normalization + 3 * channels + c : nullptr;
      rows[k] = sums + int64_t(1 + t + k) * channels + c;
    }
    function(a->g + offset + c, y, mean, a->pixels, channels, channels - c, rows);
    t += count;
  };
  while (t + Terms <= a->term_count) run(sum_products<Terms, Blocks>, Terms);
  while (t < a->term_count) run(sum_products<1, Blocks>, 1);
}

}  // namespace

int32_t mixed_sum_forward(pn_context* context, const pn_mixed_sum* a) {
  if (const int32_t status = check(a, "mixed_sum_forward")) return status;
  PN_REQUIRE(a->out, "mixed_sum_forward: out is null");
  for (int v = 0; v < a->variants; v++)
    for (int t = 0; t < a->term_count; t++)
      PN_REQUIRE(a->terms[t].y || weight_of(a, v, t) == 0,
                 "mixed_sum_forward: term %d has weight %g in variant %d but no y", t, double(weight_of(a, v, t)), v);
  const int64_t elements = int64_t(a->images) * a->pixels * a->channels;
  const int64_t period = period_of(a->channels);
  const int64_t chunk = period * max<int64_t>(1, kChunk / period), chunks = (elements + chunk - 1) / chunk;

  const int64_t floats = (a->term_count + 1) * period;
  const int64_t bytes_per_variant = int64_t(sizeof(Active)) + floats * 4 + a->term_count * int64_t(sizeof(float*));
  char* memory = static_cast<char*>(context->shared.get(a->variants * bytes_per_variant));
  if (!memory) return fail(PN_OUT_OF_MEMORY, "mixed_sum_forward: no memory for the factors of %d terms", a->term_count);
  float* factors = reinterpret_cast<float*>(memory);
  Active* active = reinterpret_cast<Active*>(factors + a->variants * floats);
  const float** pointers = reinterpret_cast<const float**>(active + a->variants);
  for (int v = 0; v < a->variants; v++) {
    active[v] = {0, pointers + int64_t(v) * a->term_count, factors + v * floats,
                 factors + v * floats + a->term_count * period};
    prepare(a, v, period, elements, active[v]);
  }

  parallel_for(context, chunks, [&](int64_t task, int) {
    const int64_t first = task * chunk, n = min(chunk, elements - first);
    for (int v = 0; v < a->variants; v++) {
      const Active& terms = active[v];
      float* out = a->out + v * elements + first;
      int64_t t = 0;
      do {
        const float* y[kGroup];
        const int count = int(min<int64_t>(kGroup, terms.count - t));
        for (int k = 0; k < count; k++) y[k] = terms.y[t + k] + first;
        const auto add = count == 4   ? add_terms<4>
                         : count == 3 ? add_terms<3>
                         : count == 2 ? add_terms<2>
                         : count == 1 ? add_terms<1>
                                      : add_terms<0>;
        add(y, terms.factors + t * period, t == 0 ? terms.constant : nullptr, period, n, out);
        t += kGroup;
      } while (t < terms.count);
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
  const int64_t rows = int64_t(1 + a->term_count) * channels;
  float* sums = a->gradient_sums;
  double* term_gradients = nullptr;
  {
    const int64_t doubles = (a->term_count + 1) / 2 * 2 * 8;
    char* memory = static_cast<char*>(context->shared.get(doubles + (sums ? 0 : a->images * rows * 4)));
    if (!memory) return fail(PN_OUT_OF_MEMORY, "mixed_sum_backward: no memory for the sums of %d images", a->images);
    term_gradients = reinterpret_cast<double*>(memory);
    if (!sums) sums = reinterpret_cast<float*>(memory + doubles);
  }

  parallel_for(context, a->images, [&](int64_t image, int) {
    float* own = sums + image * rows;
    for (int c = 0; c < channels; c += kLanes)
      sum_gradient(a->g + image * a->pixels * channels + c, a->pixels, channels, min(kLanes, channels - c), own + c);
    // Eight accumulators hide the latency of the multiply-adds.
    int c = 0;
    for (; c + 3 * kLanes < channels; c += 4 * kLanes) image_sums<2, 4>(a, image, own, c);
    for (; c + kLanes < channels; c += 2 * kLanes) image_sums<4, 2>(a, image, own, c);
    for (; c < channels; c += kLanes) image_sums<8, 1>(a, image, own, c);
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
