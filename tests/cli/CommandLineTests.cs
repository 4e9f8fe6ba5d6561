using System.Reflection;
using System.Text.Json;
using CommandLine;
using PerturbNas.Cli;

namespace PerturbNas.Tests.Cli;

/// <summary>What every verb has in common: help, versions, and one sentence for whatever is wrong with the arguments.</summary>
public class CommandLineTests
{
    [Theory]
    [InlineData("--help")]
    [InlineData("-h")]
    [InlineData("help")]
    public void HelpListsTheVerbs(string argument)
    {
        var (exitCode, output, error) = CommandLine.Run(argument);
        Assert.Equal((0, ""), (exitCode, error));
        Assert.Contains("devices", output, StringComparison.Ordinal);
        Assert.Contains("version", output, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("devices", "--help")]
    [InlineData("help", "devices")]
    public void HelpOfAVerbShowsOptionsDefaultsAndExamples(params string[] arguments)
    {
        var (exitCode, output, error) = CommandLine.Run(arguments);
        Assert.Equal((0, ""), (exitCode, error));
        Assert.Contains("--threads=N", output, StringComparison.Ordinal);
        Assert.Contains("(Default: 0)", output, StringComparison.Ordinal);
        Assert.Contains("perturbnas devices --measure", output, StringComparison.Ordinal);
    }

    [Fact]
    public void VersionSaysWhatRuns()
    {
        var (exitCode, output, error) = CommandLine.Run("version", "--json");
        Assert.Equal((0, ""), (exitCode, error));
        var version = JsonDocument.Parse(output).RootElement;
        Assert.Matches(@"^\d+\.\d+\.\d+", version.GetProperty("version").GetString());
        Assert.True(version.GetProperty("kernel_abi").GetInt32() >= 1);
        Assert.Contains(version.GetProperty("isa").GetString(), new[] { "portable", "avx2", "avx512", "avx512-zen" });
        Assert.Contains($"PerturbNas {version.GetProperty("version")}", CommandLine.Run("--version").Out, StringComparison.Ordinal);
    }

    [Fact]
    public void DevicesDescribesTheProcessor()
    {
        var (exitCode, output, error) = CommandLine.Run("devices", "--json", "--threads", "1");
        Assert.Equal((0, ""), (exitCode, error));
        var device = JsonDocument.Parse(output).RootElement.GetProperty("devices")[0];
        Assert.Equal("cpu", device.GetProperty("name").GetString());
        Assert.Equal(1, device.GetProperty("threads").GetInt32());
        Assert.True(device.GetProperty("cores").GetInt32() >= 1);
        Assert.True(device.GetProperty("memory_bytes").GetInt64() > 1 << 20);
        Assert.Contains("portable", device.GetProperty("isa_available").EnumerateArray().Select(isa => isa.GetString()));
        Assert.Equal(JsonValueKind.Null, device.GetProperty("gigaflops").ValueKind);
    }

    [Fact]
    public void TheInstructionSetCanBeNarrowed()
    {
        var (_, output, _) = CommandLine.Run(["version", "--json"], new() { ["PERTURBNAS_ISA"] = "portable" });
        Assert.Equal("portable", JsonDocument.Parse(output).RootElement.GetProperty("isa").GetString());
        var (exitCode, _, error) = CommandLine.Run(["version"], new() { ["PERTURBNAS_ISA"] = "sse9" });
        Assert.Equal(2, exitCode);
        Assert.Contains("sse9", error, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("No verb is given")]
    [InlineData("There is no verb 'fly'", "fly")]
    [InlineData("There is no verb 'fly'", "help", "fly")]
    [InlineData("'devices' has no option '--colour'", "devices", "--colour", "red")]
    [InlineData("'devices' has no option '-x'", "devices", "-x")]
    [InlineData("--threads takes a whole number up to 2147483647, not 'many'", "devices", "--threads", "many")]
    [InlineData("--threads takes a whole number up to 2147483647, not '1.5'", "devices", "--threads=1.5")]
    [InlineData("--threads is 257; give a number from 0 to 256.", "devices", "--threads", "257")]
    [InlineData("--threads is -1; give a number from 0 to 256.", "devices", "--threads", "-1")]
    [InlineData("--threads needs a value after it", "devices", "--threads")]
    [InlineData("--threads needs a value after it", "devices", "--threads", "--json")]
    [InlineData("--threads is given twice", "devices", "--threads", "1", "--threads", "2")]
    [InlineData("'devices' has no use for 'all'", "devices", "all")]
    public void WrongArgumentsAreOneSentence(string expected, params string[] arguments) =>
        Assert.StartsWith($"perturbnas: {expected}", CommandLine.UserError(arguments), StringComparison.Ordinal);

    public static TheoryData<string> Verbs =>
        [.. typeof(Options).Assembly.GetTypes().Select(type => type.GetCustomAttribute<VerbAttribute>()?.Name).OfType<string>()];

    [Theory]
    [MemberData(nameof(Verbs))]
    public void HelpNamesEveryOptionWithItsDefault(string name)
    {
        var (exitCode, output, error) = CommandLine.Run(name, "--help");
        Assert.Equal((0, ""), (exitCode, error));
        var verb = typeof(Options).Assembly.GetTypes().Single(type => type.GetCustomAttribute<VerbAttribute>()?.Name == name);
        // Help breaks lines; an entry goes from its option, indented by two, to the next one.
        var entries = output.Split("Examples:")[0].Split("\n  --")
            .Select(entry => string.Join(' ', entry.Split((char[]?)null, StringSplitOptions.RemoveEmptyEntries))).ToList();
        foreach (var property in verb.GetProperties())
        {
            if (property.GetCustomAttribute<OptionAttribute>() is not { } option)
                continue;
            var entry = Assert.Single(entries, entry => System.Text.RegularExpressions.Regex.IsMatch(entry, $"^{option.LongName}(=| )"));
            if (option.Required)
                Assert.Contains("Required.", entry, StringComparison.Ordinal);
            else if (option.Default is not null)
                Assert.Contains($"(Default: {option.Default})", entry, StringComparison.Ordinal);
            else if (property.PropertyType != typeof(bool))
                Assert.Contains("default", entry, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void EveryVerbExplainsEveryOption()
    {
        foreach (var verb in typeof(Options).Assembly.GetTypes().Where(type => type.GetCustomAttribute<VerbAttribute>() is not null))
        {
            var name = verb.GetCustomAttribute<VerbAttribute>()!.Name;
            Assert.Contains($"perturbnas {name}", (string)verb.GetProperty("Examples")!.GetValue(null)!, StringComparison.Ordinal);
            foreach (var option in verb.GetProperties().Select(property => property.GetCustomAttribute<BaseAttribute>()))
                Assert.True(option is null || option.HelpText.EndsWith('.'), $"{name}: {option?.HelpText}");
        }
    }
}
