namespace PerturbNas.Benchmarks;

/// <summary>Memory of this process.</summary>
internal static class Memory
{
    /// <summary>Largest resident size so far, in bytes (VmHWM).</summary>
    public static long PeakBytes() => File.Exists("/proc/self/status")
        ? 1024 * long.Parse(File.ReadLines("/proc/self/status").First(line => line.StartsWith("VmHWM:", StringComparison.Ordinal))
            .Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries)[1])
        : System.Diagnostics.Process.GetCurrentProcess().PeakWorkingSet64;
}
