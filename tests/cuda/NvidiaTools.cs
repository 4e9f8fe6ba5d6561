using System.Diagnostics;
using System.Text.RegularExpressions;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Cuda;

/// <summary>
/// NVIDIA's assembler and disassembler, which tell what becomes of the embedded PTX on a device, and its driver library: all without a
/// device. The script beside this file brings them.
/// </summary>
internal static partial class NvidiaTools
{
    /// <summary>What the PTX of each target is assembled for: sm_70 for itself, sm_80 for itself and for the H100.</summary>
    private static readonly (string Target, int Architecture)[] Targets = [("sm_70", 70), ("sm_80", 80), ("sm_80", 90)];

    private static readonly Lazy<(string? Folder, string? Missing)> Found = new(Find);
    private static readonly Dictionary<(string, int), AssembledModule> Assembled = [];

    /// <summary>Why there are no such tools here, or null.</summary>
    public static string? Missing => Found.Value.Missing;

    /// <summary>The folder of NVIDIA's libcuda.so.1.</summary>
    public static string LibraryFolder => Path.Combine(Found.Value.Folder!, "lib");

    /// <summary>Every embedded module with the architectures that it may run on.</summary>
    public static IEnumerable<(string Resource, int Architecture)> Modules() =>
        from resource in typeof(CudaBackend).Assembly.GetManifestResourceNames()
        where resource.EndsWith(".ptx", StringComparison.Ordinal)
        from target in Targets
        where resource.Contains($".{target.Target}.", StringComparison.Ordinal)
        select (resource, target.Architecture);

    /// <summary>The kernels of an operator's module as they are on an architecture.</summary>
    public static AssembledModule Assemble(string resource, int architecture)
    {
        lock (Assembled)
        {
            if (!Assembled.TryGetValue((resource, architecture), out var module))
                Assembled.Add((resource, architecture), module = Assemble(PtxModules.Read(resource), architecture));
            return module;
        }
    }

    /// <summary>The kernels of a module's text as they are on an architecture.</summary>
    public static AssembledModule Assemble(byte[] text, int architecture)
    {
        var folder = Directory.CreateTempSubdirectory("perturbnas-ptx");
        try
        {
            var (ptx, cubin) = (Path.Combine(folder.FullName, "module.ptx"), Path.Combine(folder.FullName, "module.cubin"));
            File.WriteAllBytes(ptx, text);
            var log = Output(Path.Combine(Found.Value.Folder!, "bin", "ptxas"), "-v", $"-arch=sm_{architecture}", ptx, "-o", cubin);
            var code = Output(Path.Combine(Found.Value.Folder!, "bin", "nvdisasm"), "-c", cubin);
            var instructions = code.Split("\t.section\t.text.")[1..].ToDictionary(section => section[..section.IndexOf(',')]);
            return new(KernelReport().Matches(log).ToDictionary(
                match => match.Groups["name"].Value,
                match => new AssembledKernel(
                    int.Parse(match.Groups["registers"].Value), int.Parse(match.Groups["stack"].Value), instructions[match.Groups["name"].Value])));
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static (string? Folder, string? Missing) Find()
    {
        if (!PtxModules.Exist)
            return (null, "This program was built without its CUDA kernels.");
        for (var folder = new DirectoryInfo(AppContext.BaseDirectory); folder != null; folder = folder.Parent)
        {
            var script = Path.Combine(folder.FullName, "tests", "cuda", "nvidia-tools");
            if (!File.Exists(script))
                continue;
            using var process = Start(script);
            var (output, error) = Read(process);
            return process.ExitCode == 0 ? (output.Trim(), null) : (null, error.Trim());
        }
        return (null, $"No folder above {AppContext.BaseDirectory} holds the tests' scripts.");
    }

    /// <summary>What a program that must succeed writes.</summary>
    public static string Output(string program, params string[] arguments)
    {
        using var process = Start(program, arguments);
        var (output, error) = Read(process);
        Assert.True(process.ExitCode == 0, $"{Path.GetFileName(program)} {string.Join(' ', arguments)}: {output}{error}");
        return output + error;
    }

    private static Process Start(string program, params string[] arguments) => Process.Start(
        new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true, RedirectStandardError = true, RedirectStandardInput = true })!;

    private static (string Output, string Error) Read(Process process)
    {
        var error = process.StandardError.ReadToEndAsync();
        var output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return (output, error.Result);
    }

    [GeneratedRegex(@"Compiling entry function '(?<name>\w+)'.*?(?<stack>\d+) bytes stack frame.*?Used (?<registers>\d+) registers", RegexOptions.Singleline)]
    private static partial Regex KernelReport();
}

/// <summary>A module that was assembled: its kernels by name.</summary>
internal sealed record AssembledModule(IReadOnlyDictionary<string, AssembledKernel> Kernels);

/// <summary>A kernel that was assembled: registers and bytes of local memory of a thread, and its instructions as text.</summary>
internal sealed partial record AssembledKernel(int Registers, int StackBytes, string Code)
{
    /// <summary>How often an instruction occurs, named up to a dot: "LDG.E.128".</summary>
    public int Count(string instruction) => Regex.Count(Code, $@"\s{Regex.Escape(instruction)}(?=[\s.;])");
}

/// <summary>A test with NVIDIA's tools; skipped, visibly, where they cannot be had.</summary>
public sealed class NvidiaToolsFactAttribute : FactAttribute
{
    public NvidiaToolsFactAttribute() => Skip = NvidiaTools.Missing;
}
