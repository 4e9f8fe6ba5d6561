namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a) => throw NotSupported("global_average_pool_forward");

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a) => throw NotSupported("global_average_pool_backward");
}
