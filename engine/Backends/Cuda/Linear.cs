namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void LinearForward(in LinearArgs a) => throw NotSupported("linear_forward");

    public override void LinearBackward(in LinearArgs a) => throw NotSupported("linear_backward");
}
