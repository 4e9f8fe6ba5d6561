using System.Runtime.InteropServices;
using CommandLine;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;
using Spectre.Console;

namespace PerturbNas.Cli;

/// <summary>Options of `devices`.</summary>
[Verb("devices", HelpText = "Show what this machine offers to compute with: all devices, or the one that --device names.")]
internal sealed class DevicesOptions : ComputeOptions
{
    public static string Examples => """
        perturbnas devices
        perturbnas devices --measure --json
        perturbnas devices --measure --threads 1
        perturbnas devices --device cuda
        """;

    [Option("measure", HelpText = "Measure the CPU's float32 multiply-add rate and the memory bandwidth (a few seconds on an idle machine).")]
    public bool Measure { get; set; }
}

/// <summary>What `devices --json` prints.</summary>
internal sealed record DevicesReport(IReadOnlyList<DeviceReport> Devices);

/// <summary>A device; what does not apply to it, or is not known, is null.</summary>
/// <param name="Name">The backend's name.</param>
/// <param name="Available">Whether it can be used.</param>
/// <param name="Reason">Why not, and what to do about it.</param>
/// <param name="Processor">The processor's own name.</param>
/// <param name="Cores">Physical cores of the machine.</param>
/// <param name="Threads">Worker threads: those asked for, or one per processor that this process may use.</param>
/// <param name="IsaAvailable">Instruction sets that the kernels were compiled for and this processor has.</param>
/// <param name="Isa">The one in use; the PTX target of a CUDA device.</param>
/// <param name="MemoryBytes">Memory that this process may use, or the device's.</param>
/// <param name="MemoryAvailableBytes">Memory that is free or can be freed now.</param>
/// <param name="Gigaflops">Measured float32 multiply-adds, two operations each, in 10^9 a second; null if not measured.</param>
/// <param name="GigabytesPerSecond">Measured memory triad in 10^9 bytes a second; null if not measured.</param>
internal sealed record DeviceReport(string Name, bool Available, string? Reason = null, string? Processor = null, int? Cores = null,
    int? Threads = null, IReadOnlyList<string>? IsaAvailable = null, string? Isa = null, long? MemoryBytes = null,
    long? MemoryAvailableBytes = null, double? Gigaflops = null, double? GigabytesPerSecond = null);

/// <summary>Shows the backends' devices and, on demand, their measured limits.</summary>
internal static class DevicesCommand
{
    public static void Run(DevicesOptions options)
    {
        // A process has one CUDA driver: the emulated one is loaded only where it alone is asked for.
        IReadOnlyList<DeviceReport> devices = options.Device switch
        {
            "cpu" => [Cpu(options)],
            "cuda" => [Cuda(DeviceKind.Cuda)],
            "cuda-emulated" => [Cuda(DeviceKind.CudaEmulated)],
            _ => [Cpu(options), TryCuda(), Emulated()],
        };
        if (options.Json)
        {
            Terminal.WriteJson(new DevicesReport(devices));
            return;
        }
        foreach (var device in devices)
            Show(device);
    }

    private static void Show(DeviceReport device)
    {
        const double gibibyte = 1L << 30;
        var table = new Grid().AddColumns(2);
        table.AddRow("device", device.Name);
        Add("not available", device.Reason);
        Add("processor", device.Processor);
        Add("cores", device.Cores);
        Add("threads", device.Threads);
        if (device.IsaAvailable is not null)
            Add("instruction sets", string.Join(", ", device.IsaAvailable.Select(isa => isa == device.Isa ? $"{isa} (in use)" : isa)));
        if (device.MemoryBytes is not null)
            Add("memory", $"{device.MemoryBytes / gibibyte:0.0} GiB, {device.MemoryAvailableBytes / gibibyte:0.0} GiB available");
        if (device.Gigaflops is not null)
            Add("multiply-add", $"{device.Gigaflops:0} GFLOP/s (float32)");
        if (device.GigabytesPerSecond is not null)
            Add("memory triad", $"{device.GigabytesPerSecond:0.0} GB/s");
        Terminal.Out.Write(table);

        void Add(string name, object? value)
        {
            if (value is not null)
                table.AddRow(name, Markup.Escape($"{value}"));
        }
    }

    private static DeviceReport Cuda(DeviceKind kind)
    {
        using var backend = new CudaBackend(kind);
        return new DeviceReport(backend.Name, Available: true, Processor: backend.Processor, IsaAvailable: backend.Targets, Isa: backend.Target,
            MemoryBytes: backend.MemoryBytes, MemoryAvailableBytes: backend.DeviceMemoryBytes);
    }

    private static DeviceReport TryCuda()
    {
        try
        {
            return Cuda(DeviceKind.Cuda);
        }
        catch (UserException e)
        {
            return new DeviceReport(Devices.NameOf(DeviceKind.Cuda), Available: false, e.Message);
        }
    }

    private static DeviceReport Emulated()
    {
        var reason = CudaBackend.WhyNotBuilt(DeviceKind.CudaEmulated);
        return new DeviceReport(Devices.NameOf(DeviceKind.CudaEmulated), reason is null, reason);
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
            backend.Name, Available: true, Reason: null, name, cores, backend.Threads, AvailableIsas(), backend.IsaName, memory,
            available is null ? memory : Math.Min(memory, long.Parse(available) * 1024), limits?.Gigaflops, limits?.GigabytesPerSecond);
    }

    // The kernel library is the judge of what this processor has, so it is asked.
    private static List<string> AvailableIsas()
    {
        List<string> names = [];
        foreach (var (_, isa) in CpuBackend.Isas)
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
