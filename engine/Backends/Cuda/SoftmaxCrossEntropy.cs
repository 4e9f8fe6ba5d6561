namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a) => throw NotSupported("softmax_cross_entropy");
}
