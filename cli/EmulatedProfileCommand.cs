using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Reports;
using PerturbNas.Training;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>What `profile --device cuda-emulated --json` prints.</summary>
/// <param name="Images">Images of the steps that were counted; <paramref name="Layers"/> their cells.</param>
/// <param name="Gigaflops">Limits of the device that times are predicted for.</param>
internal sealed record EmulatedReport(string Device, int Images, int Layers, double Gigaflops, double GigabytesPerSecond,
    IReadOnlyList<EmulatedReportPhase> Phases);

/// <summary>A phase at full size.</summary>
internal sealed record EmulatedReportPhase(string Phase, long Launches, IReadOnlyDictionary<string, long> LaunchesByKernel, double PredictedSeconds,
    IReadOnlyList<EmulatedReportKernel> Kernels);

/// <summary>A kernel in a phase: calls and predicted time at full size; all else as counted in the smaller steps.</summary>
internal sealed record EmulatedReportKernel(string Kernel, int Calls, double PredictedSeconds, ulong WarpInstructions,
    ulong FloatOperations, ulong MatrixInstructions, ulong GlobalSectors, double FlopFactor, double ByteFactor, double? MemoryEfficiency,
    ulong SharedConflicts, double ConflictShare, ulong DivergentBranches);

/// <summary>Shows what the emulated device counted, kernel by kernel, and what a real one would take.</summary>
internal static class EmulatedProfileCommand
{
    public static void Run(SearchConfiguration configuration, CudaBackend backend, ProfileOptions options, Terminal terminal,
        CancellationToken cancellation)
    {
        if (options.Trace is not null)
            throw new UserException("--trace shows times, which an emulated device has none of; leave it out, or use --device cpu or cuda.");
        terminal.Note("emulating an alpha step, a weight step and a scoring pass, which takes some minutes...");
        var limits = backend.MeasureLimits();
        var phases = EmulatedProfile.Measure(configuration, backend, cancellation);
        if (options.Json)
        {
            Terminal.WriteJson(new EmulatedReport(backend.Name, Math.Min(configuration.Batch, EmulatedProfile.SampleImages),
                Math.Min(configuration.Layers, EmulatedProfile.SampleLayers), limits.Gigaflops, limits.GigabytesPerSecond,
                [.. phases.Select(phase => Report(phase, limits))]));
            return;
        }
        var table = Terminal.PlainTable("", "calls", "predicted ms", "M instructions", "FLOP factor", "byte factor", "bytes used", "conflicts");
        for (var column = 1; column < table.Columns.Count; column++)
            table.Columns[column].Alignment = Justify.Right;
        foreach (var phase in phases)
        {
            table.AddRow(phase.Phase, "", $"{1e3 * phase.SecondsAtLeast(limits):0.000}", "", "", "", "", "");
            foreach (var kernel in phase.Kernels)
                table.AddRow("  " + kernel.Kernel, $"{kernel.Calls}", $"{1e3 * kernel.SecondsAtLeast(limits):0.000}",
                    $"{kernel.Sample.WarpInstructions / 1e6:0.00}", $"{kernel.FlopFactor:0.00}", $"{kernel.ByteFactor:0.00}",
                    $"{kernel.Sample.GlobalEfficiency:P0}", $"{kernel.Sample.ConflictShare:P0}");
        }
        Terminal.Out.Write(table);
        Console.WriteLine($"Launches: {string.Join(", ", phases.Select(phase => $"{phase.Phase} {phase.LaunchCount}"))}; as CUDA graphs, forward and backward " +
            "are one launch each.");
        Console.WriteLine($"Calls, launches and times are those of one pass of {configuration.Batch} images and {configuration.Layers} cells. Times are the roofline of " +
            $"{limits.Gigaflops / 1e3:0} TFLOP/s and {limits.GigabytesPerSecond / 1e3:0.00} TB/s (an H100) for the operations executed and the bytes moved.");
        Console.WriteLine($"Counted in a pass of at most {EmulatedProfile.SampleImages} images and {EmulatedProfile.SampleLayers} cells: warp instructions; operations " +
            "executed and bytes moved over the least; bytes used of those moved; passes over shared memory that are due to bank conflicts.");
    }

    private static EmulatedReportPhase Report(EmulatedPhase phase, MachineLimits limits) => new(phase.Phase, phase.LaunchCount, phase.Launches,
        phase.SecondsAtLeast(limits),
        [
            .. phase.Kernels.Select(kernel => new EmulatedReportKernel(kernel.Kernel, kernel.Calls, kernel.SecondsAtLeast(limits),
                kernel.Sample.WarpInstructions, kernel.Sample.FloatOperations, kernel.Sample.MatrixInstructions,
                kernel.Sample.GlobalLoadSectors + kernel.Sample.GlobalStoreSectors, kernel.FlopFactor, kernel.ByteFactor,
                double.IsFinite(kernel.Sample.GlobalEfficiency) ? kernel.Sample.GlobalEfficiency : null, kernel.Sample.SharedConflicts,
                kernel.Sample.ConflictShare, kernel.Sample.DivergentBranches)),
        ]);
}
