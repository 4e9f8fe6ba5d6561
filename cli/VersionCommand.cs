using System.Reflection;
using System.Runtime.InteropServices;
using CommandLine;
using PerturbNas.Backends.Cpu;

namespace PerturbNas.Cli;

/// <summary>Options of `version`.</summary>
[Verb("version", HelpText = "Show the version of the program and of what it runs on.")]
internal sealed class VersionOptions : Options
{
    public static string Examples => "perturbnas version --json";
}

/// <summary>What `version --json` prints; <paramref name="Commit"/> is null where the build did not know it.</summary>
internal sealed record VersionReport(string Version, string? Commit, string Dotnet, int KernelAbi, string Isa, string System);

/// <summary>Shows what exactly is running.</summary>
internal static class VersionCommand
{
    public static void Run(VersionOptions options)
    {
        using var backend = new CpuBackend(threads: 1);
        // "version+commit": the SDK appends the commit of the working tree.
        var version = Assembly.GetExecutingAssembly().GetCustomAttribute<AssemblyInformationalVersionAttribute>()!.InformationalVersion.Split('+');
        var report = new VersionReport(
            version[0], version.ElementAtOrDefault(1), Environment.Version.ToString(), CpuBackend.KernelAbiVersion, backend.IsaName,
            $"{RuntimeInformation.OSDescription}, {RuntimeInformation.ProcessArchitecture}");
        if (options.Json)
        {
            Terminal.WriteJson(report);
            return;
        }
        Console.WriteLine($"PerturbNas {report.Version}, commit {report.Commit ?? "unknown"}");
        Console.WriteLine($"kernels: interface {report.KernelAbi}, instruction set {report.Isa}");
        Console.WriteLine($".NET {report.Dotnet} on {report.System}");
    }
}
