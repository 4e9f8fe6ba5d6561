namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void ScaledCopy(in ScaledCopyArgs a)
    {
        const int threads = 256, elementsPerThread = 4;
        Require(a.Count >= 0, $"count must not be negative: {a.Count}");
        Require((a.G != 0 && a.Dx != 0) || a.Count == 0, "g or dx is null");
        if (a.Count == 0)
            return;
        Launch("scaled_copy", GridFor(a.Count, threads * elementsPerThread), threads, a);
    }
}
