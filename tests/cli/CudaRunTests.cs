using System.Diagnostics;
using System.Text.Json;
using PerturbNas.Backends.Cuda;
using PerturbNas.Reports;
using PerturbNas.Spaces;
using PerturbNas.Tests.Cuda;
using PerturbNas.Tests.Data;
using PerturbNas.Tests.Engine;
using PerturbNas.Training;

namespace PerturbNas.Tests.Cli;

/// <summary>
/// Whole runs on the emulated device: they decide as the CPU does, go on where another device stopped, and end in one sentence where the device
/// cannot be used or fails.
/// </summary>
public sealed class CudaRunTests : IDisposable
{
    private const string Emulated = "cuda-emulated";

    /// <summary>What losses may differ by, as a share; float32 sums in another order differ by some 1e-7 at each layer.</summary>
    private const double LossTolerance = 1e-4;

    private static readonly string[] Tiny = [.. TinyRuns.Tiny, "--device", Emulated];

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [EmulatedCudaOnCifar10Fact]
    public void Searches_and_selects_on_Cifar10_as_the_CPU_does()
    {
        // Every step of the tuning after a decision multiplies rounding, until a ReLU or a maximum goes the other way. Without tuning all decisions
        // can be compared, with it those before.
        const int beforeRoundingHasGrown = 10;
        var (cpu, cuda) = (Search("cpu"), Search(Emulated));
        foreach (var name in (string[])["train_loss", "validation_loss"])
            AssertSame(cpu.GetProperty(name), cuda.GetProperty(name), name);
        var (expected, actual) = (Select("cpu", "0"), Select(Emulated, "0"));
        Assert.Equal(expected.Genotype, actual.Genotype);
        Assert.Equal(expected.Decisions.Count, actual.Decisions.Count);
        Assert.True(expected.Decisions.Count > 28);
        AssertSameDecisions(expected.Decisions, actual.Decisions);
        AssertSameDecisions(Select("cpu", "1").Decisions.Take(beforeRoundingHasGrown), Select(Emulated, "1").Decisions.Take(beforeRoundingHasGrown));

        JsonElement Search(string device)
        {
            var search = CommandLine.Json("search", "--device", device, "--data", "cifar10", "--space", "s2", "--channels", "2", "--layers", "3", "--epochs", "1",
                "--batch", "8", "--train-limit", "16", "--valid-limit", "8", "--cutout", "--out", _folder[device]);
            Assert.Equal(device, Metrics(_folder[device])[0].GetProperty("device").GetString());
            return search;
        }

        (string? Genotype, List<JsonElement> Decisions) Select(string device, string tuneEpochs)
        {
            var selection = CommandLine.Json("select", "--device", device, "--run", _folder[device], "--tune-epochs", tuneEpochs, "--train-limit", "4",
                "--valid-limit", "8", "--restart");
            return (selection.GetProperty("genotype").GetString(), Lines(_folder[device], "decisions.jsonl"));
        }

        static void AssertSameDecisions(IEnumerable<JsonElement> expected, IEnumerable<JsonElement> actual)
        {
            foreach (var (a, b) in expected.Zip(actual))
            {
                foreach (var name in (string[])["phase", "cell", "edge", "chosen"])
                    Assert.Equal(a.TryGetProperty(name, out var x) ? $"{x}" : null, b.TryGetProperty(name, out var y) ? $"{y}" : null);
                var candidates = a.GetProperty("candidates").EnumerateArray().ToList();
                Assert.Equal(candidates.Count, b.GetProperty("candidates").GetArrayLength());
                foreach (var (x, y) in candidates.Zip(b.GetProperty("candidates").EnumerateArray()))
                    AssertSame(x.GetProperty("loss"), y.GetProperty("loss"), $"{a.GetProperty("cell")} {x}");
            }
        }
    }

    [EmulatedCudaFact]
    public void A_search_goes_on_on_another_device()
    {
        using var whole = new RunFixture();
        Assert.True(whole.Search());
        foreach (var (first, second) in (ReadOnlySpan<(string, string)>)[("cpu", Emulated), (Emulated, "cpu")])
        {
            using var run = new RunFixture(device: first);
            Assert.False(run.Search(cancelAfter: 4));
            run.Device = second;
            Assert.True(run.Search());
            foreach (var (a, b) in Metrics(whole.Folder).Zip(Metrics(run.Folder)))
                AssertSame(a.GetProperty("train_loss"), b.GetProperty("train_loss"), $"train loss of {first}, then {second}");
            Assert.Equal([first, second], Metrics(run.Folder).Select(line => line.GetProperty("device").GetString()));
        }
    }

    [EmulatedCudaFact]
    public void An_interrupted_search_ends_with_the_same_bytes()
    {
        using var whole = new RunFixture(device: Emulated);
        Assert.True(whole.Search());
        using var interrupted = new RunFixture(device: Emulated);
        for (var steps = 1; steps <= 3; steps++)
            Assert.False(interrupted.Search(cancelAfter: steps - 1));
        Assert.True(interrupted.Search());
        Assert.Equal(whole.Bytes("checkpoints", "search.safetensors"), interrupted.Bytes("checkpoints", "search.safetensors"));
        Assert.Equal(whole.Bytes("metrics.jsonl"), interrupted.Bytes("metrics.jsonl"));
    }

    [EmulatedCudaFact]
    public void A_killed_search_goes_on_on_the_CPU()
    {
        var run = _folder["killed"];
        using (var process = CommandLine.Start(["search", .. Tiny, "--epochs", "2", "--out", run, "--json"]))
        {
            // The checkpoint comes after the epoch's line.
            var (metrics, checkpoint) = (Path.Combine(run, "metrics.jsonl"), Path.Combine(run, "checkpoints", "search.safetensors"));
            for (var clock = Stopwatch.StartNew();
                !File.Exists(metrics) || new FileInfo(metrics).Length == 0 || File.GetLastWriteTimeUtc(checkpoint) < File.GetLastWriteTimeUtc(metrics);
                Thread.Sleep(1))
                Assert.True(!process.HasExited && clock.Elapsed < TimeSpan.FromMinutes(1), "the process ended, or took more than a minute");
            process.Kill();
            process.WaitForExit();
        }
        CommandLine.Json("search", "--out", run, "--resume", "--device", "cpu");
        Assert.Equal([Emulated, "cpu"], Metrics(run).Select(line => line.GetProperty("device").GetString()).Distinct());
        Assert.Equal(2, Metrics(run).Count);
        AssertSame(Metrics(Whole())[^1].GetProperty("train_loss"), Metrics(run)[^1].GetProperty("train_loss"), "train loss");

        string Whole()
        {
            CommandLine.Json(["search", .. TinyRuns.Tiny, "--epochs", "2", "--out", _folder["whole"]]);
            return _folder["whole"];
        }
    }

    [EmulatedCudaFact]
    public void A_device_that_is_lost_leaves_the_last_checkpoint()
    {
        var run = _folder["lost"];
        CommandLine.Json(["search", .. Tiny, "--epochs", "1", "--out", _folder["epoch"]]);
        // In the middle of the second epoch, whose steps launch what those of the first did.
        var perStep = EmulatedProfile.LaunchesPerSearchStep(new SearchConfiguration
        {
            Space = SearchSpace.Load("s2").ToJson(),
            Method = "darts",
            Data = "synthetic",
            Epochs = 2,
            Batch = 8,
            Channels = 2,
            Layers = 3,
            Seed = 0,
            TrainPortion = 0.5,
        });
        var (exitCode, output, error) = CommandLine.Run(["search", .. Tiny, "--epochs", "2", "--out", run, "--json"],
            new() { ["PERTURBNAS_EMULATOR_LOSE_AFTER"] = $"{perStep * 9 / 2}" });
        Assert.Equal((2, ""), (exitCode, output));
        Assert.Matches(@"^perturbnas: The CUDA device failed: cu\w+(\(\w+\))? failed with CUDA_ERROR_\w+ \([^\n]+\)[^\n]*; what a run had saved is intact, go on " +
            @"from there with --resume once the device works again, or with --device cpu\.\n$", error);
        Assert.Equal(File.ReadAllLines(Path.Combine(_folder["epoch"], "metrics.jsonl")), File.ReadAllLines(Path.Combine(run, "metrics.jsonl")));
        CommandLine.Json("search", "--out", run, "--resume", "--device", "cpu");
        Assert.Equal(2, Metrics(run).Count);
    }

    [EmulatedCudaFact]
    public void A_device_without_enough_memory_is_refused_with_the_forecast()
    {
        var error = UserError(["search", .. Tiny, "--epochs", "1", "--out", _folder["small"]], ("PERTURBNAS_EMULATOR_MEMORY_MIB", "4"));
        Assert.Matches(@"^perturbnas: This needs about \d+ MiB of memory on the device \(cuda-emulated\), but [34] MiB are available; take a smaller --batch", error);
        Assert.False(File.Exists(Path.Combine(_folder["small"], "config.json")));

        CommandLine.Json("search", "--data", "synthetic", "--space", "s2", "--channels", "8", "--layers", "3", "--batch", "16", "--epochs", "0",
            "--train-limit", "16", "--valid-limit", "16", "--out", _folder["run"]);
        error = UserError(["score", "--run", _folder["run"], "--device", Emulated], ("PERTURBNAS_EMULATOR_MEMORY_MIB", "4"));
        Assert.Matches(@"^perturbnas: The memory does not suffice \(cuda-emulated has no room for [\d.]+ MiB more: \d+ of 4 MiB are free\); use fewer channels", error);
    }

    [EmulatedCudaTheory]
    [InlineData("PERTURBNAS_EMULATOR_DEVICES", "0", "The NVIDIA driver finds no device (CUDA_ERROR_NO_DEVICE); check the device with nvidia-smi, or use --device cpu.")]
    [InlineData("PERTURBNAS_EMULATOR_DRIVER", "11020", "The NVIDIA driver knows CUDA 11.2 and the kernels need 11.8; update the driver to 520 or newer, or use --device cpu.")]
    public void A_driver_that_cannot_be_used_is_one_sentence(string variable, string value, string expected)
    {
        Assert.Equal($"perturbnas: {expected}", UserError(["devices", "--device", Emulated], (variable, value)));
        Assert.Equal($"perturbnas: {expected}", UserError(["search", .. Tiny, "--out", _folder["run"]], (variable, value)));
    }

    [EmulatedCudaFact]
    public void An_older_device_takes_the_older_kernels()
    {
        var (exitCode, output, _) = CommandLine.Run(["devices", "--json", "--device", Emulated], new() { ["PERTURBNAS_EMULATOR_CAPABILITY"] = "70" });
        Assert.Equal(0, exitCode);
        Assert.Equal("sm_70", JsonDocument.Parse(output).RootElement.GetProperty("devices")[0].GetProperty("isa").GetString());
    }

    [Fact]
    public void All_devices_are_listed_with_what_they_lack()
    {
        var devices = CommandLine.Json("devices").GetProperty("devices").EnumerateArray().ToList();
        Assert.Equal(["cpu", "cuda", Emulated], devices.Select(device => device.GetProperty("name").GetString()));
        foreach (var device in devices)
            Assert.Equal(device.GetProperty("available").GetBoolean() ? JsonValueKind.Null : JsonValueKind.String, device.GetProperty("reason").ValueKind);
        Assert.True(devices[0].GetProperty("available").GetBoolean());
        Assert.Equal(CudaEmulator.Missing is null, devices[2].GetProperty("available").GetBoolean());
    }

    [Fact]
    public void Where_there_is_no_driver_the_program_says_so_or_takes_the_CPU()
    {
        if (CudaDevice.MayExist)
            return;
        Assert.Matches("^perturbnas: (There is no NVIDIA driver on this machine|The NVIDIA driver finds no device|This program was built without its CUDA kernels)", CommandLine.UserError("devices", "--device", "cuda"));
        var (exitCode, _, error) = CommandLine.Run(["plan", "--channels", "2", "--layers", "2", "--batch", "2"], new() { ["PERTURBNAS_DEVICE"] = "auto" });
        Assert.Equal(0, exitCode);
        Assert.Matches(@"^device: cpu \(\d+ threads?, \w+\)\n$", error);
    }

    [EmulatedCudaFact]
    public void Profile_shows_what_the_emulated_device_counted()
    {
        var report = CommandLine.Json("profile", "--device", Emulated, "--space", "s5", "--channels", "2", "--layers", "3", "--batch", "1");
        var phases = report.GetProperty("phases").EnumerateArray().ToList();
        Assert.Equal(["alpha step", "weight step", "scoring"], phases.Select(phase => phase.GetProperty("phase").GetString()));
        foreach (var phase in phases)
        {
            var kernels = phase.GetProperty("kernels").EnumerateArray().ToList();
            Assert.Contains("depthwise_pointwise_forward", kernels.Select(kernel => kernel.GetProperty("kernel").GetString()));
            Assert.Equal(phase.GetProperty("launches").GetInt64(),
                phase.GetProperty("launches_by_kernel").EnumerateObject().Sum(kernel => kernel.Value.GetInt64()));
            Assert.Equal(phase.GetProperty("predicted_seconds").GetDouble(), kernels.Sum(kernel => kernel.GetProperty("predicted_seconds").GetDouble()), 1e-9);
            foreach (var kernel in kernels)
            {
                Assert.True(kernel.GetProperty("warp_instructions").GetInt64() > 0, $"{kernel}");
                Assert.True(kernel.GetProperty("calls").GetInt64() >= 1, $"{kernel}");
                Assert.True(kernel.GetProperty("predicted_seconds").GetDouble() > 0, $"{kernel}");
            }
        }
    }

    private static List<JsonElement> Metrics(string run) => Lines(run, "metrics.jsonl");

    private static List<JsonElement> Lines(string run, string file) =>
        [.. File.ReadAllLines(Path.Combine(run, file)).Select(line => JsonDocument.Parse(line).RootElement)];

    private static void AssertSame(JsonElement expected, JsonElement actual, string what)
    {
        var (a, b) = (expected.GetDouble(), actual.GetDouble());
        Assert.True(Math.Abs(a - b) <= LossTolerance * Math.Abs(a), $"{what}: {b}, not {a}");
    }

    private static string UserError(string[] arguments, (string Name, string Value) variable)
    {
        var (exitCode, output, error) = CommandLine.Run(arguments, new() { [variable.Name] = variable.Value });
        Assert.Equal((2, ""), (exitCode, output));
        Assert.Matches(@"^perturbnas: [^\n]*\.\n$", error);
        return error.TrimEnd();
    }
}
