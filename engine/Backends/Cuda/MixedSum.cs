namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void MixedSumForward(in MixedSumArgs a) => throw NotSupported("mixed_sum_forward");

    public override void MixedSumBackward(in MixedSumArgs a) => throw NotSupported("mixed_sum_backward");
}
