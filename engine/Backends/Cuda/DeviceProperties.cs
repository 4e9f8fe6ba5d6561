namespace PerturbNas.Backends.Cuda;

/// <summary>Extents of a grid or a block.</summary>
public readonly record struct Dim3(int X, int Y = 1, int Z = 1)
{
    public static implicit operator Dim3(int x) => new(x);

    public long Count => (long)X * Y * Z;
}

/// <summary>What there is to know about a device.</summary>
/// <param name="DriverVersion">The CUDA version that the driver supports: 12020 for 12.2.</param>
/// <param name="ComputeCapability">80 for 8.0.</param>
/// <param name="Limits">What it can do at most by its clocks and widths.</param>
internal sealed record DeviceProperties(string Name, int DriverVersion, int ComputeCapability, int Multiprocessors, long MemoryBytes, bool HasMemoryPools,
    MachineLimits Limits);
