namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void NoiseNormal(in NoiseArgs a)
    {
        const int threads = 256, elementsPerThread = 4;
        Require(a.Count >= 0, $"count must not be negative: {a.Count}");
        Require(a.Out != 0 || a.Count == 0, "out is null");
        if (a.Count > 0)
            Launch("noise_normal", ChannelBlock.Blocks(a.Count, threads * elementsPerThread), threads,
                new NoiseLaunch(a, ChannelBlock.UnitFor([], a.Out)));
    }

    private readonly record struct NoiseLaunch(NoiseArgs Call, int Unit);
}
