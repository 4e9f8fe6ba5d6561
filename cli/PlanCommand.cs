using PerturbNas.Backends;
using PerturbNas.Reports;
using PerturbNas.Selection;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>What `plan --json` prints.</summary>
/// <param name="Device">What it would run on.</param>
/// <param name="Gigaflops">Multiply-add rate of the device, 10^9 operations a second: measured on the CPU, by its clocks on CUDA.</param>
/// <param name="GigabytesPerSecond">Its memory bandwidth, likewise.</param>
/// <param name="Efficiency">Share of these limits that the times assume.</param>
/// <param name="MemoryAvailableBytes">Memory that this process can get on the device; null: the system does not say.</param>
internal sealed record PlanReport(string Device, double Gigaflops, double GigabytesPerSecond, double Efficiency, long? MemoryAvailableBytes, PlanPart Search,
    PlanPart Selection);

/// <summary>Forecast of a search or a selection.</summary>
/// <param name="Fits">Whether the memory is there.</param>
internal sealed record PlanPart(PlanMemory Memory, bool Fits, IReadOnlyList<PlanPhase> Phases);

/// <summary>Peak memory by what takes it.</summary>
internal sealed record PlanMemory(long TotalBytes, long TapesBytes, long ParametersBytes, long DataBytes, long CheckpointBytes, long ProgramBytes);

/// <summary>A step, a pass, or the whole.</summary>
/// <param name="Bytes">The least to be moved.</param>
/// <param name="Seconds">An estimate: every kernel at the machine's limit, divided by the efficiency.</param>
internal sealed record PlanPhase(string Phase, long Flops, long Bytes, double Seconds);

/// <summary>Forecasts a search and its selection by perturbation.</summary>
internal static class PlanCommand
{
    public static void Run(PlanOptions options)
    {
        var report = Report(options);
        if (options.Json)
        {
            Terminal.WriteJson(report);
            return;
        }
        var table = Terminal.PlainTable("", "work", "memory traffic", "time");
        for (var column = 1; column < 4; column++)
            table.Columns[column].Alignment = Justify.Right;
        foreach (var part in (ReadOnlySpan<PlanPart>)[report.Search, report.Selection])
            foreach (var phase in part.Phases)
                table.AddRow(phase.Phase, Forecast.Amount(phase.Flops, "FLOP"), Forecast.Amount(phase.Bytes, "B"), Time(phase.Seconds));
        Terminal.Out.Write(table);
        var available = report.MemoryAvailableBytes is { } bytes ? $" of {Forecast.Size(bytes)} available" : "";
        foreach (var (name, part) in (ReadOnlySpan<(string, PlanPart)>)[("search", report.Search), ("selection", report.Selection)])
            Console.WriteLine($"memory of the {name}: {Forecast.Size(part.Memory.TotalBytes)}{available} (activations and gradients " +
                $"{Forecast.Size(part.Memory.TapesBytes)}, parameters {Forecast.Size(part.Memory.ParametersBytes)}, data " +
                $"{Forecast.Size(part.Memory.DataBytes)}, checkpoint {Forecast.Size(part.Memory.CheckpointBytes)}, program " +
                $"{Forecast.Size(part.Memory.ProgramBytes)}){(part.Fits ? "" : ": DOES NOT FIT")}");
        Console.WriteLine($"Times are estimates: {100 * report.Efficiency:0} % of the limits of {report.Device}, {report.Gigaflops:0} GFLOP/s and " +
            $"{report.GigabytesPerSecond:0} GB/s.");
    }

    private static PlanReport Report(PlanOptions options)
    {
        var configuration = options.Configuration();
        var search = Forecast.OfSearch(configuration);
        var selection = Forecast.OfSelection(configuration, new SelectionConfiguration
        {
            By = "perturbation",
            TuneEpochs = options.TuneEpochs,
            TrainLimit = configuration.TrainLimit,
            ValidLimit = configuration.ValidLimit,
            Batch = configuration.Batch,
            Seed = configuration.Seed,
        });
        using var backend = options.CreateBackend(new Terminal(options));
        var available = backend.DeviceMemoryBytes ?? MachineMemory.Available() + Environment.WorkingSet;
        var limits = backend.MeasureLimits();
        return new PlanReport(backend.Name, limits.Gigaflops, limits.GigabytesPerSecond, Forecast.Efficiency, available, Part(search), Part(selection));

        PlanPart Part(Forecast forecast)
        {
            var memory = forecast.Memory;
            return new PlanPart(
                new PlanMemory(memory.Total, memory.Tapes, memory.Parameters, memory.Data, memory.Checkpoint, memory.Program),
                forecast.Fits(backend),
                [.. forecast.Phases.Select(phase => Phase(phase, limits))]);
        }
    }

    private static PlanPhase Phase(PhaseForecast phase, MachineLimits limits)
    {
        var total = phase.Work.Total;
        return new PlanPhase(phase.Name, total.Flops, total.Bytes, phase.Work.SecondsAtLeast(limits) / Forecast.Efficiency);
    }

    private static string Time(double seconds) => seconds switch
    {
        < 1 => $"{1000 * seconds:0} ms",
        < 120 => $"{seconds:0.0} s",
        < 7200 => $"{seconds / 60:0} min",
        < 172800 => $"{seconds / 3600:0.0} h",
        _ => $"{seconds / 86400:0.0} days",
    };
}
