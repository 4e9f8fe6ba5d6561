using System.Runtime.InteropServices;
using CommandLine;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>Options of `devices`.</summary>
[Verb("devices", HelpText = "Show what this machine offers to compute with.")]
internal sealed class DevicesOptions : Options
{
    public static string Examples => """
        perturbnas devices
        perturbnas devices --measure --json
        perturbnas devices --measure --threads 1
        """;

    [Option("measure", HelpText = "Measure the float32 multiply-add rate and the memory bandwidth (a few seconds on an idle machine).")]
    public bool Measure { get; set; }

    [Option("threads", Default = 0, MetaValue = "N", HelpText = "Worker threads to measure with; 0: one per processor.")]
    public int Threads { get; set; }

    public override void Validate() => RequireThreads(Threads);
}

/// <summary>What `devices --json` prints.</summary>
internal sealed record DevicesReport(IReadOnlyList<DeviceReport> Devices);

/// <summary>A device.</summary>
/// <param name="Name">The backend's name.</param>
/// <param name="Processor">The processor's own name.</param>
/// <param name="Cores">Physical cores of the machine.</param>
/// <param name="Threads">Worker threads: those asked for, or one per processor that this process may use.</param>
/// <param name="IsaAvailable">Instruction sets that the kernels were compiled for and this processor has.</param>
/// <param name="Isa">The one in use.</param>
/// <param name="MemoryBytes">Memory that this process may use.</param>
/// <param name="MemoryAvailableBytes">Memory that is free or can be freed now.</param>
/// <param name="Gigaflops">Measured float32 multiply-adds, two operations each, in 10^9 a second; null if not measured.</param>
/// <param name="GigabytesPerSecond">Measured memory triad in 10^9 bytes a second; null if not measured.</param>
internal sealed record DeviceReport(
    string Name, string Processor, int Cores, int Threads, IReadOnlyList<string> IsaAvailable, string Isa, long MemoryBytes,
    long MemoryAvailableBytes, double? Gigaflops, double? GigabytesPerSecond);

/// <summary>Shows the backends' devices and, on demand, their measured limits.</summary>
internal static class DevicesCommand
{
    public static void Run(DevicesOptions options)
    {
        var device = Cpu(options);
        if (options.Json)
        {
            Terminal.WriteJson(new DevicesReport([device]));
            return;
        }
        const double gibibyte = 1L << 30;
        var table = new Grid().AddColumns(2);
        table.AddRow("device", device.Name);
        table.AddRow("processor", Markup.Escape(device.Processor));
        table.AddRow("cores", $"{device.Cores}");
        table.AddRow("threads", $"{device.Threads}");
        table.AddRow("instruction sets", string.Join(", ", device.IsaAvailable.Select(isa => isa == device.Isa ? $"{isa} (in use)" : isa)));
        table.AddRow("memory", $"{device.MemoryBytes / gibibyte:0.0} GiB, {device.MemoryAvailableBytes / gibibyte:0.0} GiB available");
        if (options.Measure)
        {
            table.AddRow("multiply-add", $"{device.Gigaflops:0} GFLOP/s (float32)");
            table.AddRow("memory triad", $"{device.GigabytesPerSecond:0.0} GB/s");
        }
        Terminal.Out.Write(table);
    }

    private static DeviceReport Cpu(DevicesOptions options)
    {
        using var backend = new CpuBackend(options.Threads);
        var limits = options.Measure ? backend.MeasureLimits() : (MachineLimits?)null;
        var processors = File.ReadAllText("/proc/cpuinfo").Split("\n\n", StringSplitOptions.RemoveEmptyEntries);
        var name = Field(processors[0], "model name") ?? RuntimeInformation.ProcessArchitecture.ToString();
        var cores = processors.Select(p => (Field(p, "physical id"), Field(p, "core id") ?? Field(p, "processor"))).Distinct().Count();
        var available = Field(File.ReadAllText("/proc/meminfo"), "MemAvailable")?.Split(' ')[0];
        var memory = GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        return new DeviceReport(
            backend.Name, name, cores, backend.Threads, AvailableIsas(), backend.IsaName, memory,
            available is null ? memory : Math.Min(memory, long.Parse(available) * 1024), limits?.Gigaflops, limits?.GigabytesPerSecond);
    }

    // The kernel library is the judge of what this processor has, so it is asked.
    private static List<string> AvailableIsas()
    {
        List<string> names = [];
        foreach (var isa in new[] { Isa.Portable, Isa.Avx2, Isa.Avx512 })
            try
            {
                using var backend = new CpuBackend(threads: 1, isa);
                names.Add(backend.IsaName);
            }
            catch (UserException)
            {
            }
        return names;
    }

    // The value of a "name : value" line.
    private static string? Field(string text, string name) =>
        text.Split('\n').Select(line => line.Split(':', 2)).FirstOrDefault(pair => pair.Length == 2 && pair[0].Trim() == name)?[1].Trim();
}
