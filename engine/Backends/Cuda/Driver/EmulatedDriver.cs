using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>The functions of the emulated library beside the driver's own (tests/cuda-emulator/emulator_api.h).</summary>
internal static partial class EmulatedDriver
{
    /// <summary>The sentence that says what the last failing call found wrong.</summary>
    internal static string? LastFault => Marshal.PtrToStringUTF8(NativeLastFault());

    /// <summary>What all kernels did since the last reset.</summary>
    internal static EmulatedCounters Total()
    {
        var total = default(EmulatedCounters);
        foreach (var (_, counters) in Kernels())
            total += counters;
        return total;
    }

    /// <summary>The same by kernel.</summary>
    internal static List<(string Kernel, EmulatedCounters Counters)> Kernels()
    {
        var kernels = new List<(string, EmulatedCounters)>();
        for (var i = 0; i < KernelCount(); i++)
            kernels.Add((Marshal.PtrToStringUTF8(CountersAt(i, out var counters))!, counters));
        return kernels;
    }

    /// <summary>Forgets a fault, so that the device can be used again: for tests.</summary>
    [LibraryImport(NativeDriver.Library, EntryPoint = "pnEmulatorReset")]
    internal static partial void Reset();

    [LibraryImport(NativeDriver.Library, EntryPoint = "pnEmulatorResetCounters")]
    internal static partial void ResetCounters();

    [LibraryImport(NativeDriver.Library, EntryPoint = "pnEmulatorLastFault")]
    private static partial nint NativeLastFault();

    [LibraryImport(NativeDriver.Library, EntryPoint = "pnEmulatorKernelCount")]
    private static partial int KernelCount();

    [LibraryImport(NativeDriver.Library, EntryPoint = "pnEmulatorCountersAt")]
    private static partial nint CountersAt(int index, out EmulatedCounters counters);
}
