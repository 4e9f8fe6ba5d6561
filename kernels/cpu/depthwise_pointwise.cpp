#include "cpu/context.h"
#include "cpu/simd.h"

namespace pn::PN_NAMESPACE {
int32_t depthwise_pointwise_forward(pn_context*, const pn_depthwise_pointwise*) { return fail(PN_NOT_SUPPORTED, "not yet"); }
int32_t depthwise_pointwise_backward(pn_context*, const pn_depthwise_pointwise*) { return fail(PN_NOT_SUPPORTED, "not yet"); }
}  // namespace pn::PN_NAMESPACE
