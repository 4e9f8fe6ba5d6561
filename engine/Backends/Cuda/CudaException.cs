using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>A call of the CUDA driver failed. The device cannot be trusted afterwards; nothing on the host is affected.</summary>
public sealed class CudaException : Exception
{
    internal CudaException(DriverStatus status, string call)
        : this(status, call, NameOf(status), TextOf(status))
    {
    }

    private CudaException(DriverStatus status, string call, string name, string text)
        : base($"{call} failed with {name} ({text}){(NativeDriver.IsEmulated ? $": {EmulatedDriver.LastFault}" : "")}") => (Status, Name, Text) = (status, name, text);

    /// <summary>The driver's name of the error: "CUDA_ERROR_OUT_OF_MEMORY".</summary>
    public string Name { get; }

    /// <summary>The driver's description of it.</summary>
    public string Text { get; }

    internal DriverStatus Status { get; }

    private static string NameOf(DriverStatus status) =>
        NativeDriver.GetErrorName(status, out var name) == DriverStatus.Success ? Marshal.PtrToStringUTF8(name)! : $"error {(int)status}";

    private static string TextOf(DriverStatus status) =>
        NativeDriver.GetErrorString(status, out var text) == DriverStatus.Success ? Marshal.PtrToStringUTF8(text)! : "unknown to this driver";
}
