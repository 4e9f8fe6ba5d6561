/*
 * The kernel contract: one function per kernel, the same on every backend.
 *
 * Vocabulary and rules, valid for all kernels:
 *
 *  - Activations are float32, channels last and contiguous: [V, N, H, W, C]. V is the variant axis
 *    (1 = common to all candidates), N the images of the batch. Convolutions and pools treat V*N as the batch.
 *  - Weights have kernel layout (files keep OIHW; conversion happens at the file's door):
 *    depthwise [K*K][C], pointwise [Cin][Cout], dense convolution [KH*KW*Cin][Cout], linear [Cin][Cout].
 *  - statistics [V, N, 2, C]: of every image and channel of a raw (not yet normalised) output the mean over the image's
 *    pixels and the sum of squared deviations from that mean. pn_batch_norm_forward merges them in image order.
 *  - normalization [V, 4, C]: rows scale, shift, inverse deviation, mean. A "pending" normalisation is applied by the
 *    consumer while loading: n = scale * y + shift; the standardised value is yhat = inverse_deviation * (y - mean).
 *    A null pointer means that there is none: n = yhat = y.
 *  - gradient_sums [N, rows, C] (V = 1): per image, row 0 the sum over pixels of g, row r >= 1 the sum of g * yhat of
 * the r-th term. pn_batch_norm_backward merges one row in image order.
 *  - gradient coefficients [3, C]: a "pending" gradient of a raw output y, applied while loading:
 *    dy = a * g + b * y + c. A null pointer means dy = g.
 *  - Backward kernels take V = 1 (training has no variants); a null output pointer means "not asked for" and costs
 * nothing. Parameter gradients are assigned. Activation gradients are assigned, or added to where `accumulate` is set.
 *  - ReLU is n < 0 ? 0 : n (not-a-number passes through); its derivative is 1 for n > 0 and 0 elsewhere.
 *  - Output extents are (H + 2 * padding - dilation * (K - 1) - 1) / stride + 1, integer division.
 *  - Results do not depend on the number of threads: work and partial sums are divided by shape alone.
 *  - Every function returns PN_OK or an error code and leaves a message that pn_last_error() gives to the same thread.
 *    Nothing is written when the arguments are rejected.
 */
#ifndef PERTURBNAS_KERNELS_H
#define PERTURBNAS_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PN_API __attribute__((visibility("default")))
#define PN_ABI_VERSION 4

enum pn_status { PN_OK = 0, PN_INVALID_ARGUMENT = 1, PN_OUT_OF_MEMORY = 2, PN_NOT_SUPPORTED = 3 };

/*
 * What the CPU kernels are compiled for: instruction sets, and AVX-512 once more for processors (AMD Zen 4 and later)
 * where additions and moves between lanes do not take the place of multiply-adds. PN_ISA_BEST asks for the widest that
 * this CPU has, and of the two the one made for it; either runs on both.
 */
enum pn_isa { PN_ISA_BEST = 0, PN_ISA_PORTABLE = 1, PN_ISA_AVX2 = 2, PN_ISA_AVX512 = 3, PN_ISA_AVX512_ZEN = 4 };

/* A context owns the worker threads and the scratch memory. One kernel runs in it at a time. */
typedef struct pn_context pn_context;

PN_API int32_t pn_abi_version(void);
PN_API const char* pn_last_error(void);
/* threads: 1..256, or 0 for one per processor that this process may use. */
PN_API int32_t pn_context_create(int32_t threads, int32_t isa, pn_context** context);
PN_API void pn_context_destroy(pn_context* context);
PN_API int32_t pn_context_threads(const pn_context* context);
PN_API const char* pn_context_isa(const pn_context* context); /* "portable", "avx2", "avx512", "avx512-zen" */

/* A contiguous activation that is one of several making up a concatenation along C. */
typedef struct {
  const float* x; /* [variants, N, H, W, channels] */
  float* dx;      /* backward: gradient of x, or null */
  int32_t variants;
  int32_t channels;
  int32_t accumulate; /* backward: add to dx instead of assigning */
  int32_t reserved;
} pn_part;

/*
 * Depthwise separable and dilated convolution: ReLU - depthwise KxK - pointwise 1x1, with statistics.
 * x [V, N, H, W, Cin] with optional pending normalisation; y [V, N, OH, OW, Cout].
 * Padding is dilation * (K / 2); K is 3, 5 or 7; stride 1 or 2; dilation 1 or 2.
 */
typedef struct {
  const float* x;
  const float* x_normalization; /* [V, 4, Cin] or null */
  const float* depthwise;       /* [K*K][Cin] */
  const float* pointwise;       /* [Cin][Cout] */
  float* y;                     /* forward: output; backward: input (needed where coefficients are given) */
  float* statistics;            /* forward: [V, N, 2, Cout] or null */
  const float* g;               /* backward: [N, OH, OW, Cout] */
  const float* coefficients;    /* backward: [3, Cout] or null */
  float* dx;            /* backward: [N, H, W, Cin] gradient with respect to n (x after x_normalization), or null */
  float* gradient_sums; /* backward: [N, 2, Cin] of dx and xhat; only with x_normalization, or null */
  float* d_depthwise;   /* backward: [K*K][Cin], or null with d_pointwise */
  float* d_pointwise;   /* backward: [Cin][Cout], or null with d_depthwise */
  int32_t variants, images, height, width, in_channels, out_channels;
  int32_t kernel, stride, dilation;
  int32_t accumulate; /* backward: add to dx */
} pn_depthwise_pointwise;

PN_API int32_t pn_depthwise_pointwise_forward(pn_context* context, const pn_depthwise_pointwise* a);
PN_API int32_t pn_depthwise_pointwise_backward(pn_context* context, const pn_depthwise_pointwise* a);

/*
 * Optional ReLU - pointwise 1x1 convolution of a concatenation, with statistics. Pixel (i, j) of the output reads input
 * pixel (i * stride + offset, j * stride + offset); an input pixel outside the image counts as zero. OH = ceil(H /
 * stride). The output is the channel slice [y_offset, y_offset + out_channels) of y [V, N, OH, OW, y_channels];
 * statistics, coefficients are indexed by the channels of y as well. A factorized reduction is two calls with stride 2,
 * offsets 0 and 1. V is the largest of the parts' variants; every part has V or 1.
 */
typedef struct {
  const pn_part* parts; /* part_count of them, at most 8; Cin is the sum of their channels */
  const float* weight;  /* [Cin][out_channels] */
  float* y;
  float* statistics;         /* [V, N, 2, y_channels] or null */
  const float* g;            /* backward: [N, OH, OW, y_channels] */
  const float* coefficients; /* backward: [3, y_channels] or null */
  float* d_weight;           /* backward: [Cin][out_channels] or null */
  int32_t part_count, relu, images, height, width, out_channels;
  int32_t stride, offset; /* stride 1 or 2; offset 0 or 1. In backward only the pixels read are added to; with
                             accumulate = 0 all other pixels of dx are set to zero */
  int32_t y_channels, y_offset;
} pn_pointwise;

PN_API int32_t pn_pointwise_forward(pn_context* context, const pn_pointwise* a);
PN_API int32_t pn_pointwise_backward(pn_context* context, const pn_pointwise* a);

/* Optional ReLU - dense KHxKW convolution, with statistics; any channel counts. Used by the stem, by nor_conv_3x3 and
 * by conv_7x1_1x7. */
typedef struct {
  const float* x;            /* [V, N, H, W, Cin] */
  const float* weight;       /* [KH*KW*Cin][Cout] */
  float* y;                  /* [V, N, OH, OW, Cout] */
  float* statistics;         /* [V, N, 2, Cout] or null */
  const float* g;            /* backward: [N, OH, OW, Cout] */
  const float* coefficients; /* backward: [3, Cout] or null */
  float* dx;                 /* backward: [N, H, W, Cin] or null */
  float* d_weight;           /* backward: [KH*KW*Cin][Cout] or null */
  int32_t variants, images, height, width, in_channels, out_channels;
  int32_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int32_t relu, accumulate;
} pn_convolution;

PN_API int32_t pn_convolution_forward(pn_context* context, const pn_convolution* a);
PN_API int32_t pn_convolution_backward(pn_context* context, const pn_convolution* a);

/*
 * The operations without weights, for all nodes that take the same x through some of them: pooling 3x3 with padding 1,
 * with statistics (no ReLU before it), and with stride 1 the skip connection, which is x itself. The average excludes
 * padding. The maximum is the first one in row-major order of the window (not-a-number wins). A pool is cheaper to
 * compute again than to keep: the mixed sum pools x itself (pn_term), so the forward pass need not write y, and
 * backward takes x.
 */
typedef enum { PN_POOL_NONE /* the skip connection */, PN_POOL_MAX_3X3, PN_POOL_AVG_3X3 } pn_pooling;

/* Of one node: of every y that it takes, by pn_pooling, the gradient is a * g + b * y + c. */
typedef struct {
  const float* g;               /* [N, OH, OW, C] */
  const float* coefficients[3]; /* [3, C], null: the node does not take this y */
} pn_pool_gradient;

typedef struct {
  const float* x;                    /* [V, N, H, W, C] */
  float* y[3];                       /* forward, by pn_pooling: [V, N, OH, OW, C] or null; of none: null */
  float* statistics[3];              /* forward, by pn_pooling: [V, N, 2, C] or null; of none: null */
  const pn_pool_gradient* gradients; /* backward: gradient_count of them */
  float* dx;                         /* backward: [N, H, W, C] */
  int32_t variants, images, height, width, channels, stride, gradient_count, accumulate;
} pn_pool;

PN_API int32_t pn_pool_3x3_forward(pn_context* context, const pn_pool* a);
PN_API int32_t pn_pool_3x3_backward(pn_context* context, const pn_pool* a);

/*
 * Batch norm (Ioffe & Szegedy 2015). Forward turns statistics (training) or running statistics (evaluation) into a
 * normalization; variance is biased for normalising and unbiased for the running variance, momentum is the weight of
 * the new value.
 */
typedef struct {
  const float* statistics; /* training: [V, N, 2, C]; null: evaluation mode, running statistics are used */
  const float* gamma;      /* [C] or null (no affine parameters) */
  const float* beta;       /* [C] or null */
  float* running_mean;     /* [C]; training: updated where not null (V = 1 only); evaluation: required */
  float* running_variance; /* [C] */
  float* normalization;    /* out: [V, 4, C] */
  int32_t variants, images, pixels /* OH*OW */, channels;
  float epsilon, momentum;
} pn_batch_norm_forward_args;

/*
 * Backward turns sums into the coefficients of the pending gradient of the raw output, with g scaled by `weight`:
 * training:   a = w * scale, b and c such that dy = scale * (w g - mean(w g) - yhat * mean(w g yhat));
 * evaluation: a = w * scale, b = c = 0;   no normalization: a = w, b = c = 0.
 */
typedef struct {
  const float* gradient_sums; /* [N, rows, C] or null (evaluation mode without affine gradients, or no normalization) */
  const float* normalization; /* [1, 4, C] or null */
  const float* weight;        /* one value, or null for 1 */
  float* coefficients;        /* out: [3, C] or null */
  float* d_gamma;             /* out: [C] or null */
  float* d_beta;              /* out: [C] or null */
  int32_t images, pixels, channels, rows, row /* >= 1 */, training;
} pn_batch_norm_backward_args;

PN_API int32_t pn_batch_norm_forward(pn_context* context, const pn_batch_norm_forward_args* a);
PN_API int32_t pn_batch_norm_backward(pn_context* context, const pn_batch_norm_backward_args* a);

/*
 * The node's mixed sum: out[v] = sum over terms t of weights[v, index_t] * n_t[v or 0], n_t the term's (normalised)
 * value. With one term and weights null (= 1) it materialises a normalised activation.
 */
typedef struct {
  const float* y;             /* [variants, N, P, C]; pooled: what is to be pooled, [variants, N, H, W, C] */
  const float* normalization; /* [variants, 4, C] or null */
  int32_t variants;           /* V or 1 */
  int32_t weight_index;
  int32_t pooling;               /* pn_pooling: the value is y, or y pooled (see pn_pool) to P pixels */
  int32_t height, width, stride; /* of the pooling; all pooled terms have the same OH and OW */
} pn_term;

typedef struct {
  const pn_term* terms;
  const float* weights;    /* [V, weight_stride], or null: all weights are 1 */
  float* out;              /* forward: [V, N, P, C]; no terms: zeros */
  const float* g;          /* backward: [N, P, C] */
  float* gradient_sums;    /* backward: [N, 1 + term_count, C] */
  float* weight_gradients; /* backward: [weight_stride]; element index_t gets sum(g * n_t) ADDED (several nodes share
                              the table), or null */
  int32_t term_count, variants, images, pixels, channels, weight_stride;
} pn_mixed_sum;

PN_API int32_t pn_mixed_sum_forward(pn_context* context, const pn_mixed_sum* a);
PN_API int32_t pn_mixed_sum_backward(pn_context* context, const pn_mixed_sum* a);

/* Global average pooling of a concatenation: out [V, N, Cin]; backward spreads g [N, Cin] / pixels over the parts' dx.
 */
typedef struct {
  const pn_part* parts;
  float* out;
  const float* g;
  int32_t part_count, images, pixels, reserved;
} pn_global_average_pool;

PN_API int32_t pn_global_average_pool_forward(pn_context* context, const pn_global_average_pool* a);
PN_API int32_t pn_global_average_pool_backward(pn_context* context, const pn_global_average_pool* a);

/* out [rows, Cout] = x [rows, Cin] * weight + bias; rows = V * N. */
typedef struct {
  const float* x;
  const float* weight; /* [Cin][Cout] */
  const float* bias;   /* [Cout] */
  float* out;
  const float* g;  /* backward: [rows, Cout] */
  float* dx;       /* backward: [rows, Cin] or null */
  float* d_weight; /* backward: or null */
  float* d_bias;   /* backward: or null */
  int32_t rows, in_channels, out_channels, reserved;
} pn_linear;

PN_API int32_t pn_linear_forward(pn_context* context, const pn_linear* a);
PN_API int32_t pn_linear_backward(pn_context* context, const pn_linear* a);

/*
 * Softmax cross-entropy. Per variant: the sum of the losses over the images (natural logarithm) and the number of
 * images whose largest logit is the label's (ties: the lowest class index is the prediction). dlogits is the gradient
 * of scale * mean loss.
 */
typedef struct {
  const float* logits;     /* [V, N, classes] */
  const int32_t* labels;   /* [N], 0..classes-1 */
  float* image_losses;     /* out: [V, N] or null */
  int32_t* image_correct;  /* out: [V, N], 0 or 1, or null */
  double* loss_sums;       /* out: [V] */
  int64_t* correct_counts; /* out: [V] */
  float* dlogits;          /* out: [N, classes] (V = 1) or null */
  int32_t variants, images, classes;
  float smoothing; /* label smoothing 0..1 */
  float scale;
  int32_t reserved;
} pn_softmax_cross_entropy;

PN_API int32_t pn_softmax_cross_entropy_run(pn_context* context, const pn_softmax_cross_entropy* a);

/*
 * One SGD step over a flat parameter array: d = clip * gradient + weight_decay * p; m = momentum * m + d; p -= rate * m
 * (first step: m starts at zero, which gives m = d). clip = min(1, max_norm / (norm + 1e-6)) with norm the 2-norm of
 * all gradients, summed in double over fixed chunks; max_norm <= 0: no clipping. norm is written out.
 */
typedef struct {
  float* parameters;
  const float* gradients;
  float* momentum_buffer;
  double* norm; /* out */
  int64_t count;
  float rate, momentum, weight_decay, max_norm;
} pn_sgd;

PN_API int32_t pn_sgd_step(pn_context* context, const pn_sgd* a);

/* One Adam step (Kingma & Ba 2015), weight decay added to the gradient (L2); step counts from 1. */
typedef struct {
  float* parameters;
  const float* gradients;
  float* first_moment;
  float* second_moment;
  int64_t count, step;
  float rate, beta1, beta2, epsilon, weight_decay;
  int32_t reserved;
} pn_adam;

PN_API int32_t pn_adam_step(pn_context* context, const pn_adam* a);

/*
 * N(0,1) noise from the counter-based stream (key, position): elements 4i..4i+3 come from Philox4x32-10 (Salmon et al.
 * 2011) with key = (low, high word of key) and counter = (low, high word of i, low, high word of position), by
 * Box-Muller: u = (x0 + 0.5) / 2^32, v = x1 / 2^32: sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v); the second pair from x2,
 * x3.
 */
typedef struct {
  float* out;
  int64_t count;
  uint64_t key, position;
} pn_noise;

PN_API int32_t pn_noise_normal(pn_context* context, const pn_noise* a);

/*
 * Several calls of the kernels below in one pass over the images: the result is that of the calls one after another,
 * bit for bit, but a few images go through all calls before the next ones are begun, so that an input that calls share,
 * or a gradient that they add to, stays in the cache. A mixed sum runs beside the calls that follow it, in parts,
 * because it waits for memory while they compute. All calls have the same `images`; each may have its own variants and
 * extents. No call may need what another call of the group gives for other images (batch norm ends a group), nor what a
 * mixed sum of the group gives. Arguments are checked before anything is written.
 */
enum pn_kernel {
  PN_KERNEL_DEPTHWISE_POINTWISE_FORWARD = 0,
  PN_KERNEL_DEPTHWISE_POINTWISE_BACKWARD = 1,
  PN_KERNEL_POOL_3X3_FORWARD = 2,
  PN_KERNEL_POOL_3X3_BACKWARD = 3,
  PN_KERNEL_MIXED_SUM_FORWARD = 4,
  PN_KERNEL_MIXED_SUM_BACKWARD = 5
};

typedef struct {
  const void* args; /* the kernel's argument struct */
  int32_t kernel;   /* enum pn_kernel */
  int32_t reserved;
} pn_call;

PN_API int32_t pn_run_group(pn_context* context, const pn_call* calls, int32_t count);

/* Measured limits of this machine with the context's threads: float32 FMA in GFLOP/s and memory triad in GB/s. */
typedef struct {
  double gigaflops, gigabytes_per_second;
} pn_limits;

PN_API int32_t pn_measure_limits(pn_context* context, pn_limits* limits);

#ifdef __cplusplus
}
#endif

#endif
