// Compiled once per instruction set: the table of that set's kernels.
#include "cpu/context.h"

namespace pn::PN_NAMESPACE {

#define KERNEL(name, args) int32_t name(pn_context*, const args*);
#include "cpu/kernel_list.h"
#undef KERNEL
int32_t run_group(pn_context*, const pn_call*, int32_t);
int32_t measure_limits(pn_context*, pn_limits*);

extern const KernelTable table;
const KernelTable table = {
#define KERNEL(name, args) name,
#include "cpu/kernel_list.h"
#undef KERNEL
    run_group,
    measure_limits,
};

}  // namespace pn::PN_NAMESPACE
