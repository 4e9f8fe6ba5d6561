using System.Reflection;
using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Cuda;

/// <summary>What a kernel did on the emulated device: pnEmulatorCounters of tests/cuda-emulator/emulator_api.h, field for field.</summary>
[StructLayout(LayoutKind.Sequential)]
public struct EmulatorCounters
{
    public ulong Launches, Blocks, Threads, WarpInstructions, LaneInstructions, FloatOperations, MmaInstructions;
    public ulong GlobalLoadRequests, GlobalLoadSectors, GlobalLoadBytes, GlobalStoreRequests, GlobalStoreSectors, GlobalStoreBytes;
    public ulong SharedRequests, SharedWavefronts, SharedConflicts, Barriers, DivergentBranches, Atomics;

    private const int SectorBytes = 32;

    /// <summary>Bytes that lanes asked for, of those that were moved for them. Lanes that ask for the same bytes count each.</summary>
    public readonly double GlobalEfficiency => (double)(GlobalLoadBytes + GlobalStoreBytes) / TransferredBytes;

    public readonly ulong TransferredBytes => SectorBytes * (GlobalLoadSectors + GlobalStoreSectors);

    /// <summary>Passes over the banks of shared memory that conflicts made necessary, of all.</summary>
    public readonly double ConflictShare => SharedWavefronts == 0 ? 0 : (double)SharedConflicts / SharedWavefronts;
}

/// <summary>The emulated device's own functions, which a real driver does not have.</summary>
internal static unsafe partial class CudaEmulator
{
    private const string Library = "cuda-emulator";

    static CudaEmulator() => NativeLibrary.SetDllImportResolver(
        Assembly.GetExecutingAssembly(), (name, _, _) => name == Library ? NativeLibrary.Load(CudaDevice.EmulatedLibrary) : 0);

    /// <summary>Why there are no tests on the emulated device, or null.</summary>
    public static string? Missing =>
        !CudaDevice.MayExist(DeviceKind.CudaEmulated) ? "the emulated CUDA driver was not built"
        : !PtxModules.Exist ? "there was no compiler for the CUDA kernels"
        : null;

    /// <summary>The sentence about what the last failing call did wrong.</summary>
    public static string LastFault => Marshal.PtrToStringUTF8(pnEmulatorLastFault()) ?? "";

    /// <summary>Forgets a fault.</summary>
    public static void Reset() => pnEmulatorReset();

    /// <summary>What was launched by an action, by kernel.</summary>
    public static Dictionary<string, EmulatorCounters> Count(Action action)
    {
        pnEmulatorResetCounters();
        action();
        var counters = new Dictionary<string, EmulatorCounters>();
        for (var i = 0; i < pnEmulatorKernelCount(); i++)
            counters.Add(Marshal.PtrToStringUTF8(pnEmulatorCountersAt(i, out var kernel))!, kernel);
        return counters;
    }

    [LibraryImport(Library)]
    private static partial nint pnEmulatorLastFault();

    [LibraryImport(Library)]
    private static partial void pnEmulatorReset();

    [LibraryImport(Library)]
    private static partial int pnEmulatorKernelCount();

    [LibraryImport(Library)]
    private static partial nint pnEmulatorCountersAt(int index, out EmulatorCounters counters);

    [LibraryImport(Library)]
    private static partial void pnEmulatorResetCounters();
}

/// <summary>Cases on the emulated device; skipped, visibly, where it was not built.</summary>
public sealed class EmulatedCudaTheoryAttribute : TheoryAttribute
{
    public EmulatedCudaTheoryAttribute() => Skip = CudaEmulator.Missing;
}
