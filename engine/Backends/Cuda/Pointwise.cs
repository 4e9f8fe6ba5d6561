namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void PointwiseForward(in PointwiseArgs a) => throw NotSupported("pointwise_forward");

    public override void PointwiseBackward(in PointwiseArgs a) => throw NotSupported("pointwise_backward");
}
