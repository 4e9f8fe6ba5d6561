namespace PerturbNas.Backends.Cuda;

/// <summary>CUresult: the ones that are told apart here.</summary>
internal enum DriverStatus
{
    Success = 0,
    InvalidValue = 1,
    OutOfMemory = 2,
    NoDevice = 100,
    NoBinaryForDevice = 209,
    InvalidPtx = 218,
    UnsupportedPtxVersion = 222,
    DriverMismatch = 803,
}

/// <summary>A call of the CUDA driver failed. The device cannot be trusted afterwards; nothing on the host is affected.</summary>
public sealed class CudaException : Exception
{
    /// <param name="call">The driver's function, and what it was about.</param>
    /// <param name="name">The driver's name of the error.</param>
    /// <param name="text">The driver's description of it.</param>
    /// <param name="fault">What exactly was wrong, where the driver says so; else null.</param>
    internal CudaException(DriverStatus status, string call, string name, string text, string? fault)
        : base($"{call} failed with {name} ({text}){(fault is null ? "" : $": {fault}")}") => (Status, Name, Text) = (status, name, text);

    /// <summary>The driver's name of the error: "CUDA_ERROR_OUT_OF_MEMORY".</summary>
    public string Name { get; }

    /// <summary>The driver's description of it.</summary>
    public string Text { get; }

    internal DriverStatus Status { get; }
}
