using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

/// <summary>
/// What the emulated device saw a kernel do (pnEmulatorCounters): a warp instruction counts once for its 32 lanes; requests are warp instructions
/// that access memory, sectors have 32 bytes, and bytes are what active lanes asked for.
/// </summary>
[StructLayout(LayoutKind.Sequential)]
public struct EmulatedCounters
{
    public ulong Launches, Blocks, Threads;
    public ulong WarpInstructions, LaneInstructions;

    /// <summary>Float32 operations of lanes: a multiply-add is two.</summary>
    public ulong FloatOperations;

    /// <summary>Tensor-core products of warps.</summary>
    public ulong MatrixInstructions;

    public ulong GlobalLoadRequests, GlobalLoadSectors, GlobalLoadBytes;
    public ulong GlobalStoreRequests, GlobalStoreSectors, GlobalStoreBytes;

    /// <summary>Wavefronts are passes over the 32 banks of shared memory; conflicts are those beyond the least that a request needs.</summary>
    public ulong SharedRequests, SharedWavefronts, SharedConflicts;
    public ulong Barriers, DivergentBranches, Atomics;

    private const int SectorBytes = 32;

    /// <summary>Bytes that were moved between global memory and the multiprocessors.</summary>
    public readonly ulong TransferredBytes => SectorBytes * (GlobalLoadSectors + GlobalStoreSectors);

    /// <summary>Bytes that lanes asked for over bytes moved: 1 where every access is coalesced. Lanes that ask for the same bytes count each.</summary>
    public readonly double GlobalEfficiency => (double)(GlobalLoadBytes + GlobalStoreBytes) / TransferredBytes;

    /// <summary>Passes over the banks of shared memory that conflicts made necessary, of all.</summary>
    public readonly double ConflictShare => SharedWavefronts == 0 ? 0 : (double)SharedConflicts / SharedWavefronts;

    public static EmulatedCounters operator +(EmulatedCounters a, EmulatedCounters b) => Combine(a, b, static (x, y) => x + y);

    public static EmulatedCounters operator -(EmulatedCounters a, EmulatedCounters b) => Combine(a, b, static (x, y) => x - y);

    private static EmulatedCounters Combine(EmulatedCounters a, EmulatedCounters b, Func<ulong, ulong, ulong> combine)
    {
        var result = default(EmulatedCounters);
        var left = Values(ref a);
        var right = Values(ref b);
        var values = Values(ref result);
        for (var i = 0; i < values.Length; i++)
            values[i] = combine(left[i], right[i]);
        return result;
    }

    private static Span<ulong> Values(ref EmulatedCounters counters) =>
        MemoryMarshal.Cast<EmulatedCounters, ulong>(MemoryMarshal.CreateSpan(ref counters, 1));
}
