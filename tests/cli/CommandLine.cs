using System.Diagnostics;

namespace PerturbNas.Tests.Cli;

/// <summary>Runs the program as its users do, in a process of its own.</summary>
internal static class CommandLine
{
    /// <summary>The program is copied beside the tests, as one of their references.</summary>
    private static readonly string Program = Path.Combine(AppContext.BaseDirectory, "perturbnas.dll");

    /// <summary>Runs the program to its end, which must come within a minute.</summary>
    public static (int ExitCode, string Out, string Error) Run(params string[] arguments) => Run(arguments, []);

    /// <param name="arguments">The program's arguments.</param>
    /// <param name="environment">Environment variables to set on top of this process's.</param>
    public static (int ExitCode, string Out, string Error) Run(string[] arguments, Dictionary<string, string> environment)
    {
        using var process = Start(arguments, environment);
        var error = process.StandardError.ReadToEndAsync();
        var output = process.StandardOutput.ReadToEndAsync();
        if (!process.WaitForExit(60_000))
        {
            process.Kill();
            Assert.Fail($"'perturbnas {string.Join(' ', arguments)}' did not end within a minute.");
        }
        return (process.ExitCode, output.Result, error.Result);
    }

    /// <summary>The program must end with exit code 2, nothing on stdout and one sentence on stderr, which is returned.</summary>
    public static string UserError(params string[] arguments)
    {
        var (exitCode, output, error) = Run(arguments);
        Assert.Equal("", output);
        Assert.Matches(@"^perturbnas: [^\n]*\.\n$", error);
        Assert.Equal(2, exitCode);
        return error.TrimEnd();
    }

    public static Process Start(string[] arguments, Dictionary<string, string>? environment = null)
    {
        var start = new ProcessStartInfo("dotnet", [Program, .. arguments])
        {
            RedirectStandardError = true,
            RedirectStandardOutput = true,
            RedirectStandardInput = true,
        };
        foreach (var (name, value) in environment ?? [])
            start.Environment[name] = value;
        return Process.Start(start)!;
    }
}
