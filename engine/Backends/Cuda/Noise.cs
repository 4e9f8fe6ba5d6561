namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void NoiseNormal(in NoiseArgs a) => throw NotSupported("noise_normal");
}
