// All kernels as KERNEL(name, argument struct): the one list behind the per-ISA table and the exported functions.
KERNEL(depthwise_pointwise_forward, pn_depthwise_pointwise)
KERNEL(depthwise_pointwise_backward, pn_depthwise_pointwise)
KERNEL(pointwise_forward, pn_pointwise)
KERNEL(pointwise_backward, pn_pointwise)
KERNEL(convolution_forward, pn_convolution)
KERNEL(convolution_backward, pn_convolution)
KERNEL(linear_forward, pn_linear)
KERNEL(linear_backward, pn_linear)
