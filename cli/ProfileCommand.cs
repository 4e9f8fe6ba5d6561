using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Reports;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>What `profile --json` prints.</summary>
/// <param name="Device">What ran.</param>
/// <param name="Description">The same in words: threads and instruction set, or the device's name.</param>
/// <param name="Gigaflops">Multiply-add rate of the device, 10^9 operations a second: measured on the CPU, by its clocks on CUDA.</param>
/// <param name="GigabytesPerSecond">Its memory bandwidth, likewise.</param>
/// <param name="ExplainedSeconds">All phases together but for data: kernels, and what is not in kernels.</param>
/// <param name="WallSeconds">The wall-clock time of as many passes that were not profiled.</param>
/// <param name="Gap"><paramref name="ExplainedSeconds"/> over <paramref name="WallSeconds"/>, less 1.</param>
internal sealed record ProfileReport(string Device, string Description, double Gigaflops, double GigabytesPerSecond, double ExplainedSeconds,
    double WallSeconds, double Gap, IReadOnlyList<ProfiledPhase> Phases);

/// <summary>A phase; seconds are of all passes together.</summary>
/// <param name="OtherSeconds">What is not in kernels: with it the kernels make up <paramref name="Seconds"/>.</param>
/// <param name="WallSeconds">The wall-clock time of as many passes that were not profiled; 0 for data.</param>
/// <param name="ProductShare">Multiply-adds of convolutions and linear layers, as a share of the machine's limit.</param>
internal sealed record ProfiledPhase(string Phase, int Passes, double Seconds, double OtherSeconds, double WallSeconds, double Gigaflops,
    double LimitShare, double ProductShare, IReadOnlyList<ProfiledKernel> Kernels);

/// <summary>A kernel in a phase.</summary>
/// <param name="Share">Share of the phase's time.</param>
/// <param name="LimitShare">Share of the roofline: the lower of multiply-add rate and bandwidth times FLOPs per byte.</param>
internal sealed record ProfiledKernel(string Kernel, int Calls, double Seconds, double Share, double Gigaflops, double GigabytesPerSecond,
    double LimitShare);

/// <summary>Shows where the time of a search goes, kernel by kernel.</summary>
internal static class ProfileCommand
{
    public static void Run(ProfileOptions options, CancellationToken cancellation)
    {
        var configuration = options.Configuration();
        var terminal = new Terminal(options);
        using var backend = options.CreateBackend(terminal);
        if (backend is CudaBackend { IsEmulated: true } emulated)
        {
            EmulatedProfileCommand.Run(configuration, emulated, options, terminal, cancellation);
            return;
        }
        Forecast.OfSearch(configuration).RequireMemory(backend);
        var before = backend.MeasureLimits();
        var profile = StepProfile.Measure(configuration, backend, options.Steps, cancellation);
        // The machine may be shared: its limits are the best that it showed.
        var after = backend.MeasureLimits();
        var limits = new MachineLimits
        {
            Gigaflops = Math.Max(before.Gigaflops, after.Gigaflops),
            GigabytesPerSecond = Math.Max(before.GigabytesPerSecond, after.GigabytesPerSecond),
        };
        if (options.Trace is not null)
            profile.WriteTrace(options.Trace);
        // Loading data is timed as a whole in any case.
        var phases = profile.Phases.Where(phase => phase.Kernels.Count > 0).ToList();
        var (explained, wall) = (phases.Sum(phase => phase.Seconds), phases.Sum(phase => phase.UnprofiledSeconds));
        var report = new ProfileReport(backend.Name, backend.Description, limits.Gigaflops, limits.GigabytesPerSecond, explained, wall,
            explained / wall - 1, [.. profile.Phases.Select(phase => Report(phase, limits))]);
        if (options.Json)
            Terminal.WriteJson(report);
        else
            Show(report);
    }

    private static ProfiledPhase Report(PhaseProfile phase, MachineLimits limits) => new(phase.Phase, phase.Passes, phase.Seconds,
        phase.OtherSeconds, phase.UnprofiledSeconds, phase.Kernels.Sum(kernel => kernel.Cost.Flops) / phase.Seconds / 1e9,
        phase.Kernels.Sum(kernel => kernel.Cost.SecondsAtLeast(limits)) / phase.Seconds,
        phase.Kernels.Sum(kernel => kernel.Cost.ProductFlops) / phase.Seconds / 1e9 / limits.Gigaflops,
        [
            .. phase.Kernels.Select(kernel => new ProfiledKernel(kernel.Kernel, kernel.Calls, kernel.Seconds, kernel.Seconds / phase.Seconds,
                kernel.Gigaflops, kernel.GigabytesPerSecond, kernel.LimitShare(limits))),
        ]);

    private static void Show(ProfileReport report)
    {
        var table = Terminal.PlainTable("", "calls", "ms", "share", "GFLOP/s", "GB/s", "of the limit");
        for (var column = 1; column < 7; column++)
            table.Columns[column].Alignment = Justify.Right;
        foreach (var phase in report.Phases)
        {
            var pass = 1e3 / phase.Passes;
            table.AddRow(phase.Phase, "", $"{phase.Seconds * pass:0.00}", "100.0 %", phase.Kernels.Count > 0 ? $"{phase.Gigaflops:0.0}" : "", "",
                phase.Kernels.Count > 0 ? $"{phase.LimitShare:P1}" : "");
            if (phase.Kernels.Count == 0)
                continue;
            foreach (var kernel in phase.Kernels)
                table.AddRow("  " + kernel.Kernel, $"{kernel.Calls / phase.Passes}", $"{kernel.Seconds * pass:0.00}", $"{kernel.Share:P1}",
                    $"{kernel.Gigaflops:0.0}", $"{kernel.GigabytesPerSecond:0.0}", $"{kernel.LimitShare:P1}");
            table.AddRow("  not in kernels", "", $"{phase.OtherSeconds * pass:0.00}", $"{phase.OtherSeconds / phase.Seconds:P1}", "", "", "");
        }
        Terminal.Out.Write(table);
        Console.WriteLine($"Per pass, {report.Description}; limits: {report.Gigaflops:0} GFLOP/s, " +
            $"{report.GigabytesPerSecond:0.0} GB/s.");
        foreach (var phase in report.Phases.Where(phase => phase.Kernels.Count > 0))
            Console.WriteLine($"{phase.Phase}: convolutions and linear layers reach {phase.ProductShare:P1} of the multiply-add limit; the lines add up to " +
                $"{1e3 * phase.Seconds / phase.Passes:0.0} ms, unprofiled passes took {1e3 * phase.WallSeconds / phase.Passes:0.0} ms " +
                $"({Math.Round(phase.Seconds / phase.WallSeconds - 1, 3):+0.0 %;-0.0 %;0.0 %}).");
        Console.WriteLine($"All phases: {report.ExplainedSeconds:0.000} s explained of {report.WallSeconds:0.000} s unprofiled ({Math.Round(report.Gap, 3):+0.0 %;-0.0 %;0.0 %}).");
    }
}
