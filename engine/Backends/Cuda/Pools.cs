namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void MaxPoolForward(in PoolArgs a) => throw NotSupported("max_pool_3x3_forward");

    public override void MaxPoolBackward(in PoolArgs a) => throw NotSupported("max_pool_3x3_backward");

    public override void AvgPoolForward(in PoolArgs a) => throw NotSupported("avg_pool_3x3_forward");

    public override void AvgPoolBackward(in PoolArgs a) => throw NotSupported("avg_pool_3x3_backward");
}
