using System.Diagnostics;
using System.Security.Cryptography;
using System.Text.Json;

namespace PerturbNas.Tests.Cli;

/// <summary>Runs the program as its users do, in a process of its own.</summary>
internal static class CommandLine
{
    /// <summary>The program is copied beside the tests, as one of their references.</summary>
    public static readonly string Program = Path.Combine(AppContext.BaseDirectory, "perturbnas.dll");

    /// <summary>Runs the program to its end, which must come within two minutes.</summary>
    public static (int ExitCode, string Out, string Error) Run(params string[] arguments) => Run(arguments, []);

    /// <param name="arguments">The program's arguments.</param>
    /// <param name="environment">Environment variables to set on top of this process's.</param>
    public static (int ExitCode, string Out, string Error) Run(string[] arguments, Dictionary<string, string> environment)
    {
        using var process = Start(arguments, environment);
        var error = process.StandardError.ReadToEndAsync();
        var output = process.StandardOutput.ReadToEndAsync();
        if (!process.WaitForExit(120_000))
        {
            process.Kill();
            Assert.Fail($"'perturbnas {string.Join(' ', arguments)}' did not end within two minutes.");
        }
        return (process.ExitCode, output.Result, error.Result);
    }

    /// <summary>The program must end with exit code 2, nothing on stdout and one sentence on stderr, which is returned.</summary>
    public static string UserError(params string[] arguments)
    {
        var (exitCode, output, error) = Run(arguments);
        Assert.Equal("", output);
        Assert.Matches(@"^perturbnas: [^\n]*\.\n$", error);
        Assert.DoesNotMatch(@"\. [A-Z]", error);
        Assert.Equal(2, exitCode);
        return error.TrimEnd();
    }

    /// <summary>As <see cref="UserError"/>, and every file and folder below <paramref name="folder"/> must stay as it is.</summary>
    public static string HarmlessUserError(string folder, params string[] arguments)
    {
        var before = Contents(folder);
        var error = UserError(arguments);
        Assert.Equal(before, Contents(folder));
        return error;
    }

    /// <summary>The program must end with exit code 0, nothing on stderr, and one JSON object on stdout, which is returned.</summary>
    public static JsonElement Json(params string[] arguments)
    {
        var (exitCode, output, error) = Run([.. arguments, "--json"]);
        Assert.Equal((0, ""), (exitCode, error));
        return JsonDocument.Parse(output).RootElement;
    }

    /// <summary>Every file below a folder with its checksum, and every folder; the lock files, which say nothing, left out.</summary>
    public static SortedDictionary<string, string> Contents(string folder)
    {
        var contents = new SortedDictionary<string, string>(StringComparer.Ordinal);
        foreach (var path in Directory.EnumerateFileSystemEntries(folder, "*", SearchOption.AllDirectories))
            if (Directory.Exists(path))
                contents[path[folder.Length..] + "/"] = "";
            else if (Path.GetFileName(path) != "lock")
                contents[path[folder.Length..]] = Convert.ToHexString(SHA256.HashData(File.ReadAllBytes(path)));
        return contents;
    }

    /// <summary>Starts the program and leaves it running.</summary>
    public static Process Start(string[] arguments, Dictionary<string, string>? environment = null)
    {
        var start = new ProcessStartInfo("dotnet", [Program, .. arguments])
        {
            RedirectStandardError = true,
            RedirectStandardOutput = true,
            RedirectStandardInput = true,
        };
        // What the tests expect does not depend on whether this machine has a GPU.
        start.Environment[PerturbNas.Backends.Devices.Variable] = "cpu";
        foreach (var (name, value) in environment ?? [])
            start.Environment[name] = value;
        return Process.Start(start)!;
    }
}
