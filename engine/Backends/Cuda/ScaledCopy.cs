namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void ScaledCopy(in ScaledCopyArgs a)
    {
        const int threads = 256, chunk = 4096;
        Require(a.Count >= 0, $"count must not be negative: {a.Count}");
        Require((a.G != 0 && a.Dx != 0) || a.Count == 0, "g or dx is null");
        if (a.Count > 0)
            Launch("scaled_copy", ChannelBlock.Blocks(a.Count, chunk), threads, new ScaledCopyLaunch(a, ChannelBlock.UnitFor([], a.G, a.Dx)));
    }

    private readonly record struct ScaledCopyLaunch(ScaledCopyArgs Call, int Unit);
}
