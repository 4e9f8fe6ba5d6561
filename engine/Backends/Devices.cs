using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Backends;

/// <summary>What a run computes on.</summary>
public enum DeviceKind
{
    Cpu,

    /// <summary>The NVIDIA driver's first device.</summary>
    Cuda,

    /// <summary>The same kernels, executed and checked instruction by instruction on the processor: for tests, thousands of times slower.</summary>
    CudaEmulated,
}

/// <summary>The devices by their names, and the backend of each.</summary>
public static class Devices
{
    /// <summary>The name that leaves the choice to the program.</summary>
    public const string Auto = "auto";

    private static readonly string[] KindNames = ["cpu", "cuda", "cuda-emulated"];

    /// <summary>The names that a user may give, <see cref="Auto"/> among them.</summary>
    public static IReadOnlyList<string> Names { get; } = [Auto, .. KindNames];

    public static string NameOf(DeviceKind kind) => KindNames[(int)kind];

    /// <summary>The backend of a device.</summary>
    /// <param name="name">One of <see cref="Names"/>; "auto" is CUDA where a device can be used, else the CPU.</param>
    /// <param name="threads">Worker threads of the CPU; 0: one per processor.</param>
    /// <exception cref="UserException">The device cannot be used.</exception>
    public static Backend Create(string name, int threads = 0)
    {
        if (name == Auto)
            return TryCuda() ?? new CpuBackend(threads);
        return Array.IndexOf(KindNames, name) switch
        {
            (int)DeviceKind.Cpu => new CpuBackend(threads),
            (int)DeviceKind.Cuda => new CudaBackend(DeviceKind.Cuda),
            (int)DeviceKind.CudaEmulated => new CudaBackend(DeviceKind.CudaEmulated),
            _ => throw new UserException($"There is no device '{name}'; choose {string.Join(", ", Names)}."),
        };
    }

    private static Backend? TryCuda()
    {
        if (!CudaDevice.MayExist(DeviceKind.Cuda))
            return null;
        try
        {
            return new CudaBackend(DeviceKind.Cuda);
        }
        catch (UserException)
        {
            return null;
        }
    }
}
