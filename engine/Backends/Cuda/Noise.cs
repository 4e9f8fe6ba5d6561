namespace PerturbNas.Backends.Cuda;

public sealed partial class CudaBackend
{
    public override void NoiseNormal(in NoiseArgs a) => throw NotSupported("noise_normal");
}
