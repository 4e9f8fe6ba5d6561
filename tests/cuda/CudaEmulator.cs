using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Cuda;

/// <summary>Tests on the emulated device; skipped, visibly, where it was not built.</summary>
public sealed class EmulatedCudaTheoryAttribute : TheoryAttribute
{
    public EmulatedCudaTheoryAttribute() => Skip = CudaDevice.WhyNotBuilt(DeviceKind.CudaEmulated);
}

internal static class CudaEmulator
{
    /// <summary>What was launched by an action, by kernel.</summary>
    public static Dictionary<string, EmulatedCounters> Count(Action action)
    {
        EmulatedDriver.ResetCounters();
        action();
        return EmulatedDriver.Kernels().ToDictionary(pair => pair.Kernel, pair => pair.Counters);
    }

    /// <summary>Passes over the banks of shared memory that conflicts made necessary, of all.</summary>
    public static double ConflictShare(this in EmulatedCounters counters) =>
        counters.SharedWavefronts == 0 ? 0 : (double)counters.SharedConflicts / counters.SharedWavefronts;
}
