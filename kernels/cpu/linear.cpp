// Linear layer with bias. A task is a block of rows (outputs, input gradients) or a block of input channels (weight
// gradients, whose sums then run over all rows in their order).
#include <string.h>

#include "cpu/matrix.h"

namespace pn::PN_NAMESPACE {

namespace {

// Rows (or input channels) per task when each takes `products` multiplications: a task must be worth waking a thread
// for.
int task_size(int64_t products, int count) {
  constexpr int64_t kProducts = 1 << 18;
  return int(min<int64_t>(count, max<int64_t>(16, kProducts / products)));
}

int32_t check(const char* name, const pn_linear* a) {
  PN_REQUIRE(a->rows > 0 && a->in_channels > 0 && a->out_channels > 0,
             "%s: rows %d, in_channels %d and out_channels %d must be positive", name, a->rows, a->in_channels,
             a->out_channels);
  return PN_OK;
}

int64_t blocks(int count, int size) { return (count + size - 1) / size; }

}  // namespace

int32_t linear_forward(pn_context* context, const pn_linear* a) {
  if (int32_t status = check("linear_forward", a)) return status;
  PN_REQUIRE(a->x && a->weight && a->bias && a->out, "linear_forward: x, weight, bias or out is null");
  const int step = padded(a->out_channels);
  PackedMatrix weight{nullptr, a->in_channels, a->out_channels};
  const int block = task_size(int64_t(a->in_channels) * step, a->rows);
  const int64_t local = int64_t(block) * step;
  if (!reserve(context, weight.size(), local)) return fail(PN_OUT_OF_MEMORY, "linear_forward: no memory for weights");
  weight.data = static_cast<float*>(context->shared.get(weight.size() * 4));
  memset(weight.data, 0, size_t(weight.size()) * 4);
  pack(weight, 0, 0, a->in_channels, a->out_channels, a->weight, a->out_channels, 1);

  parallel_for(context, blocks(a->rows, block), [&](int64_t task, int thread) {
    float* out = local_scratch(context, thread, local);
    const int64_t begin = task * block;
    const int rows = int(min<int64_t>(block, a->rows - begin));
    multiply({a->x + begin * a->in_channels, 1, rows, 0, a->in_channels, 1, 0, a->in_channels}, weight, out);
    for (int row = 0; row < rows; row++)
      for (int c = 0; c < a->out_channels; c += kLanes)
        store_partial(a->out + (begin + row) * a->out_channels + c,
                      load(out + row * step + c) + load_partial(a->bias + c, a->out_channels - c), a->out_channels - c);
  });
  return PN_OK;
}

int32_t linear_backward(pn_context* context, const pn_linear* a) {
  if (int32_t status = check("linear_backward", a)) return status;
  if (!a->dx && !a->d_weight && !a->d_bias) return PN_OK;
  PN_REQUIRE(a->g, "linear_backward: g is null");
  PN_REQUIRE(!a->dx || a->weight, "linear_backward: weight is null");
  PN_REQUIRE(!a->d_weight || a->x, "linear_backward: x is null");
  const int step = padded(a->out_channels), dx_step = padded(a->in_channels);
  const int row_block = task_size(int64_t(a->out_channels) * dx_step, a->rows);
  const int channel_block = task_size(int64_t(a->rows) * step, a->in_channels);
  const int64_t row_tasks = a->dx ? blocks(a->rows, row_block) : 0;
  const int64_t channel_tasks = a->d_weight ? blocks(a->in_channels, channel_block) : 0;
  PackedMatrix transposed{nullptr, a->out_channels, a->dx ? a->in_channels : 0};
  const int64_t d_floats = a->d_weight ? int64_t(a->rows) * step : 0, shared = transposed.size() + d_floats;
  const int64_t local = max(a->dx ? int64_t(row_block) * dx_step : 0, a->d_weight ? int64_t(channel_block) * step : 0);
  if (!reserve(context, shared, local)) return fail(PN_OUT_OF_MEMORY, "linear_backward: no memory for weights");
  transposed.data = static_cast<float*>(context->shared.get(shared * 4));
  float* d = transposed.data + transposed.size();
  if (a->dx) {
    memset(transposed.data, 0, size_t(transposed.size()) * 4);
    pack(transposed, 0, 0, a->out_channels, a->in_channels, a->weight, 1, a->out_channels);
  }
  const Gradient gradient{a->g, nullptr, nullptr, a->out_channels, 0, a->out_channels};
  if (a->d_weight) gradient.load_pixels(d, step, 0, a->rows);

  parallel_for(context, row_tasks + channel_tasks, [&](int64_t task, int thread) {
    float* tile = local_scratch(context, thread, local);
    if (task < row_tasks) {
      const int64_t begin = task * row_block;
      const int rows = int(min<int64_t>(row_block, a->rows - begin));
      multiply({a->g + begin * a->out_channels, 1, rows, 0, a->out_channels, 1, 0, a->out_channels}, transposed, tile);
      copy_pixels(a->dx + begin * a->in_channels, a->in_channels, tile, dx_step, a->in_channels, rows, false);
    } else {
      const int begin = int(task - row_tasks) * channel_block;
      const int channels = min(channel_block, a->in_channels - begin);
      memset(tile, 0, size_t(channels) * step * 4);
      multiply_transposed({a->x + begin, 1, a->rows, 0, a->in_channels, 1, 0, channels}, d, step, tile);
      copy_pixels(a->d_weight + int64_t(begin) * a->out_channels, a->out_channels, tile, step, a->out_channels,
                  channels, false);
    }
  });
  if (a->d_bias) {
    for (int c = 0; c < a->out_channels; c += kLanes) {
      vec sum{};
      for (int64_t row = 0; row < a->rows; row++)
        sum += load_partial(a->g + row * a->out_channels + c, a->out_channels - c);
      store_partial(a->d_bias + c, sum, a->out_channels - c);
    }
  }
  return PN_OK;
}

}  // namespace pn::PN_NAMESPACE
