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
    /// <summary>The name that leaves the choice to the program: CUDA where a device can be used, else the CPU.</summary>
    public const string Auto = "auto";

    /// <summary>Environment variable that replaces <see cref="Auto"/>.</summary>
    public const string Variable = "PERTURBNAS_DEVICE";

    private static readonly string[] KindNames = ["cpu", "cuda", "cuda-emulated"];

    /// <summary>The names that a user may give, <see cref="Auto"/> among them.</summary>
    public static IReadOnlyList<string> Names { get; } = [Auto, .. KindNames];

    public static string NameOf(DeviceKind kind) => KindNames[(int)kind];

    /// <summary>The backend of a device.</summary>
    /// <param name="name">One of <see cref="Names"/>.</param>
    /// <param name="threads">Worker threads of the CPU; 0: one per processor.</param>
    /// <param name="tf32">Multiply with the tensor cores of a CUDA device, in less than float32.</param>
    /// <param name="note">Is told in a line what was chosen where the choice was left to the program.</param>
    /// <exception cref="UserException">The device cannot be used.</exception>
    public static Backend Create(string name, int threads = 0, bool tf32 = false, Action<string>? note = null)
    {
        if (name == Auto && Environment.GetEnvironmentVariable(Variable) is { Length: > 0 } replacement)
            name = replacement;
        if (name == Auto)
            return Choose(threads, tf32, note);
        return Array.IndexOf(KindNames, name) switch
        {
            (int)DeviceKind.Cpu => new CpuBackend(threads),
            (int)DeviceKind.Cuda => Cuda(DeviceKind.Cuda, tf32),
            (int)DeviceKind.CudaEmulated => Cuda(DeviceKind.CudaEmulated, tf32),
            _ => throw new UserException($"There is no device '{name}'; choose {string.Join(", ", Names)}."),
        };
    }

    private static CudaBackend Cuda(DeviceKind kind, bool tf32)
    {
        var backend = new CudaBackend(kind);
        try
        {
            backend.Tf32 = tf32;
            return backend;
        }
        catch
        {
            backend.Dispose();
            throw;
        }
    }

    private static Backend Choose(int threads, bool tf32, Action<string>? note)
    {
        Backend backend;
        var reason = "";
        try
        {
            // Without a device file there is no driver to ask.
            backend = CudaDevice.MayExist ? Cuda(DeviceKind.Cuda, tf32) : new CpuBackend(threads);
        }
        catch (UserException e)
        {
            backend = new CpuBackend(threads);
            reason = $"; not cuda: {e.Message.TrimEnd('.')}";
        }
        if (tf32 && backend is CpuBackend)
            reason += "; --tf32 is for CUDA, this is float32";
        note?.Invoke($"device: {backend.Description}{reason}");
        return backend;
    }
}
