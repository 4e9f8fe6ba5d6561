namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void BatchNormForward(in BatchNormForwardArgs a) => throw NotSupported("batch_norm_forward");

    public override void BatchNormBackward(in BatchNormBackwardArgs a) => throw NotSupported("batch_norm_backward");
}
