using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Data;

namespace PerturbNas.Tests.Cuda;

/// <summary>The emulated device's own functions, which a real driver does not have.</summary>
internal static class CudaEmulator
{
    /// <summary>Why there are no tests on the emulated device, or null.</summary>
    public static string? Missing => CudaBackend.WhyNotBuilt(DeviceKind.CudaEmulated);

    /// <summary>The sentence about what the last failing call did wrong.</summary>
    public static string LastFault => EmulatedDriver.LastFault ?? "";

    /// <summary>Forgets a fault.</summary>
    public static void Reset() => EmulatedDriver.Reset();

    /// <summary>What was launched by an action, by kernel.</summary>
    public static Dictionary<string, EmulatedCounters> Count(Action action)
    {
        EmulatedDriver.ResetCounters();
        action();
        return EmulatedDriver.Kernels().ToDictionary(kernel => kernel.Kernel, kernel => kernel.Counters);
    }
}

/// <summary>A test on the emulated device; skipped, visibly, where it was not built.</summary>
public sealed class EmulatedCudaFactAttribute : FactAttribute
{
    public EmulatedCudaFactAttribute() => Skip = CudaEmulator.Missing;
}

/// <summary>A test on the emulated device and on CIFAR-10; skipped, visibly, where one of them is not there.</summary>
public sealed class EmulatedCudaOnCifar10FactAttribute : FactAttribute
{
    public EmulatedCudaOnCifar10FactAttribute() => Skip = CudaEmulator.Missing ?? new RealFilesFactAttribute("cifar10").Skip;
}

/// <summary>Cases on the emulated device; skipped, visibly, where it was not built.</summary>
public sealed class EmulatedCudaTheoryAttribute : TheoryAttribute
{
    public EmulatedCudaTheoryAttribute() => Skip = CudaEmulator.Missing;
}
