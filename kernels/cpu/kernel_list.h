// All kernels as KERNEL(name, argument struct): the one list behind the per-ISA table and the exported functions.
KERNEL(depthwise_pointwise_forward, pn_depthwise_pointwise)
KERNEL(depthwise_pointwise_backward, pn_depthwise_pointwise)
