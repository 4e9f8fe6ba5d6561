namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a) => throw NotSupported("depthwise_pointwise_forward");

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a) => throw NotSupported("depthwise_pointwise_backward");
}
