using System.Diagnostics;
using PerturbNas.Data;
using PerturbNas.Tests.Data;
using PerturbNas.Tests.Engine;
using PerturbNas.Training;

namespace PerturbNas.Tests.Cli;

/// <summary>Whatever is wrong with the input: one sentence, exit code 2, and nothing lost, changed or half-written.</summary>
public sealed class BadInputTests(TinyRuns runs) : IClassFixture<TinyRuns>
{
    [Fact]
    public void UnusableDataFiles()
    {
        var folder = runs.NewPath("data");
        Directory.CreateDirectory(folder);
        Fails("The data folder '", "nowhere' does not exist", "--data-dir", Path.Combine(folder, "nowhere"));
        Fails("has no cifar100 files such as train.bin", "--data-dir", folder);

        CifarFiles.WriteCifar100(folder, 20, 2);
        var train = Path.Combine(folder, "train.bin");
        Fails("The limit of 11 training (weights) records is more than the 10 of cifar100", "--train-limit", "11");
        Fails("The limit of 11 validation (alpha) records is more than the 10 of cifar100", "--valid-limit", "11");
        Fails("leaves one part empty", "--train-portion", "0.01");

        var sound = File.ReadAllBytes(train);
        File.WriteAllBytes(train, sound[..^1]);
        Fails("train.bin' has 61479 bytes, which is not a whole number of records of 3074 bytes");
        var wrong = (byte[])sound.Clone();
        wrong[12 * CifarLayout.Cifar100.RecordBytes + 1] = 100;
        File.WriteAllBytes(train, wrong);
        Fails("Record 12 of '", "train.bin' has label 100, but cifar100 has labels 0..99");
        // The folder above already holds a run: it must stay as it is, too.
        using (var stream = File.OpenWrite(train))
            stream.SetLength(50_001L * CifarLayout.Cifar100.RecordBytes);
        Fails("more than the 153700000 of the official file");
        File.Delete(train);
        Fails("train.bin' is missing");

        void Fails(string expected, params string[] more)
        {
            var (second, options) = more.Length == 1 ? (more[0], []) : more.Length == 3 ? (more[0], more[1..]) : ("", more);
            string[] place = options.Contains("--data-dir") ? [] : ["--data-dir", folder];
            var error = CommandLine.HarmlessUserError(folder, ["search", "--data", "cifar100", "--channels", "2", "--layers", "2", "--epochs", "1",
                "--out", Path.Combine(folder, "new", "run"), .. place, .. options]);
            Assert.Contains(expected, error, StringComparison.Ordinal);
            Assert.Contains(second, error, StringComparison.Ordinal);
        }
    }

    [Theory]
    [InlineData("{", "it is not valid JSON in line 1, byte 2")]
    [InlineData("{\n\"operations\": [skip_connect]}", "it is not valid JSON in line 2, byte 16")]
    [InlineData("[]", "must be a JSON object")]
    [InlineData("{\"name\": 5, \"operations\": [\"none\"]}", "'name'")]
    [InlineData("{\"operations\": [\"skip_connect\", \"conv_9x9\"]}", "unknown operation 'conv_9x9' in 'operations'")]
    [InlineData("{\"normal\": [[\"none\"]], \"reduction\": [[\"none\"]]}", "'normal' has 1 edges, not 14")]
    public void UnusableSpaceFiles(string json, string expected)
    {
        var folder = runs.NewPath("space");
        Directory.CreateDirectory(folder);
        var file = Path.Combine(folder, "space.json");
        File.WriteAllText(file, json);
        var error = CommandLine.HarmlessUserError(folder, "search", "--data", "synthetic", "--space", file, "--out", Path.Combine(folder, "run"));
        Assert.StartsWith($"perturbnas: Space file '{file}': ", error, StringComparison.Ordinal);
        Assert.Contains(expected, error, StringComparison.Ordinal);
    }

    [Fact]
    public void UnusableCheckpoints()
    {
        var run = runs.Copy(runs.Searched);
        var path = Path.Combine(run, "checkpoints", "search.safetensors");
        var sound = File.ReadAllBytes(path);
        File.WriteAllBytes(path, sound[..^1000]);
        Fails("is truncated");
        File.WriteAllBytes(path, []);
        Fails("it has only 0 bytes");
        foreach (var place in (int[])[3, 20, sound.Length / 2, sound.Length - 1])
        {
            var flipped = (byte[])sound.Clone();
            flipped[place] ^= 4;
            File.WriteAllBytes(path, flipped);
            Fails("is damaged or not a safetensors file");
        }

        Rewrite("version", "2");
        Fails("has version 2, this program reads version 1");
        Rewrite("kind", "selection");
        Fails("is a selection checkpoint, not a search checkpoint");
        Rewrite("space", "{}");
        Fails("is of another search space");
        File.Copy(FixtureFile.PathOf("s2"), path, overwrite: true);
        Fails("is not a checkpoint of this program");
        File.Delete(path);
        Fails("does not exist");

        void Rewrite(string key, string value)
        {
            File.WriteAllBytes(path, sound);
            var file = SafeTensorsFile.Read(path);
            file.Metadata[key] = value;
            file.Write(path);
        }

        // Any of the three commands reads the checkpoint in the same way; they take turns.
        void Fails(string expected)
        {
            string[][] commands = [["score", "--run", run], ["search", "--out", run, "--resume"], ["select", "--run", run, "--by", "magnitude"]];
            var error = CommandLine.HarmlessUserError(run, commands[expected.Length % 3]);
            Assert.Contains(path, error, StringComparison.Ordinal);
            Assert.Contains(expected, error, StringComparison.Ordinal);
        }
    }

    [Fact]
    public void UnusableRunFolders()
    {
        var folder = runs.NewPath("folders");
        Directory.CreateDirectory(Path.Combine(folder, "empty"));
        var file = Path.Combine(folder, "file");
        File.WriteAllText(file, "");
        foreach (var verb in (string[])["select", "score"])
        {
            Fails("nowhere' does not exist; give the folder that 'search --out' made", verb, "--run", Path.Combine(folder, "nowhere"));
            Fails("empty' is not a run folder, it has no config.json", verb, "--run", Path.Combine(folder, "empty"));
        }
        Fails("file' cannot be created", "search", "--data", "synthetic", "--out", file);
        Fails("run' cannot be created", "search", "--data", "synthetic", "--out", Path.Combine(file, "run"));

        var damaged = runs.Copy(runs.Searched);
        File.WriteAllText(Path.Combine(damaged, "config.json"), "{\n\"version\": 1,\n");
        Assert.Contains("config.json' is damaged in line 3, byte 1", CommandLine.HarmlessUserError(damaged, "score", "--run", damaged), StringComparison.Ordinal);
        File.WriteAllText(Path.Combine(damaged, "config.json"),
            File.ReadAllText(Path.Combine(runs.Searched, "config.json")).Replace("\"version\": 1", "\"version\": 7", StringComparison.Ordinal));
        Assert.Contains("has version 7", CommandLine.HarmlessUserError(damaged, "search", "--out", damaged, "--resume"), StringComparison.Ordinal);

        Assert.Contains("already holds a run; give --resume",
            CommandLine.HarmlessUserError(runs.Searched, ["search", .. TinyRuns.Tiny, "--out", runs.Searched]), StringComparison.Ordinal);

        void Fails(string expected, params string[] arguments) =>
            Assert.Contains(expected, CommandLine.HarmlessUserError(folder, arguments), StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("batch", "0", "; give 1 or more.")]
    [InlineData("channels", "-3", "; give a number from 1 to 512.")]
    [InlineData("layers", "101", "; give a number from 1 to 100.")]
    [InlineData("epochs", "-1", "; give 0 or more.")]
    [InlineData("valid_limit", "0", "; give 1 or more.")]
    [InlineData("train_portion", "1", "; it must lie between 0 and 1.")]
    [InlineData("method", "sgas", "; choose darts or blank.")]
    [InlineData("data", null, "; choose cifar10, cifar100 or synthetic.")]
    [InlineData("space", null, "; it must be a space in its JSON form.")]
    public void NonsenseInTheConfigurationOfARun(string name, string? value, string expected)
    {
        var run = runs.Copy(runs.Searched);
        Edit(Path.Combine(run, "config.json"), name, value);
        foreach (var command in (string[][])[["search", "--out", run, "--resume"], ["select", "--run", run], ["score", "--run", run],
            ["plan", "--run", run]])
        {
            var error = CommandLine.HarmlessUserError(run, command);
            Assert.StartsWith($"perturbnas: '{Path.Combine(run, "config.json")}' has {name} ", error, StringComparison.Ordinal);
            Assert.EndsWith(expected, error.TrimEnd(), StringComparison.Ordinal);
        }
    }

    [Theory]
    [InlineData("batch", "0", "config.json' has batch 0; give 1 or more.")]
    [InlineData("by", "luck", "config.json' has by 'luck'; choose magnitude or perturbation.")]
    [InlineData("tune_epochs", "-1", "config.json' has tune_epochs -1; give 0 or more.")]
    [InlineData("racing", "2", "config.json' is '2'; choose off, exact, or an error probability")]
    public void NonsenseInTheConfigurationOfASelection(string name, string value, string expected)
    {
        var run = runs.Copy(runs.Searched);
        CommandLine.Json("select", "--run", run, "--by", "magnitude");
        Edit(Path.Combine(run, "select-magnitude", "config.json"), name, value);
        Assert.Contains(expected, CommandLine.HarmlessUserError(run, "select", "--run", run, "--by", "magnitude", "--resume"), StringComparison.Ordinal);
    }

    [Fact]
    public void AnUnfinishedSelectionIsNotReplacedUnasked()
    {
        var run = runs.Copy(runs.Searched);
        string[] select = ["select", "--run", run, "--tune-epochs", "0", "--threads", "1"];
        CommandLine.Json(select);
        // A finished one is.
        CommandLine.Json(select);
        var whole = CommandLine.Contents(run);
        File.Delete(Path.Combine(run, "select-perturbation", "result.json"));
        Assert.Contains("holds an unfinished selection by perturbation; give --resume to go on with it, or --restart to begin anew",
            CommandLine.HarmlessUserError(run, select), StringComparison.Ordinal);
        Assert.Contains("--resume and --restart contradict each other", CommandLine.HarmlessUserError(run, [.. select, "--resume", "--restart"]),
            StringComparison.Ordinal);
        CommandLine.Json([.. select, "--restart"]);
        Assert.Equal(whole, CommandLine.Contents(run));
    }

    // Gives a value in a JSON file another one.
    private static void Edit(string file, string name, string? value)
    {
        var root = System.Text.Json.Nodes.JsonNode.Parse(File.ReadAllText(file))!.AsObject();
        Assert.True(root.ContainsKey(name));
        root[name] = double.TryParse(value, out var number) && name != "racing" ? System.Text.Json.Nodes.JsonValue.Create((decimal)number) : value;
        File.WriteAllText(file, root.ToJsonString());
    }

    [Theory]
    [InlineData("--space is 's9'; choose s1, s2", "search", "--out", "x", "--space", "s9")]
    [InlineData("--method is 'sgas'; choose darts or blank.", "search", "--out", "x", "--method", "sgas")]
    [InlineData("--data is 'svhn'; choose", "search", "--out", "x", "--data", "svhn")]
    [InlineData("--by is 'luck'; choose magnitude or perturbation.", "select", "--run", "x", "--by", "luck")]
    [InlineData("--edge is 14; give a number from 0 to 13.", "score", "--run", "x", "--edge", "14")]
    [InlineData("--cell is 'both'; choose normal or reduction.", "score", "--run", "x", "--cell", "both")]
    [InlineData("--channels is 5000; give a number from 1 to 512.", "search", "--out", "x", "--channels", "5000")]
    public void UnknownNames(string expected, params string[] arguments) =>
        Assert.Contains(expected, CommandLine.UserError(arguments), StringComparison.Ordinal);

    [Fact]
    public void OptionsThatContradictTheRunThatIsResumed()
    {
        string[] resume = ["search", "--out", runs.Searched, "--resume"];
        Fails(resume, "--epochs is 2 but was 1 when the run in", "--epochs", "2");
        Fails(resume, "--seed is 1 but was 0 and --train-limit is 19 but was 20 when", "--seed=1", "--train-limit", "19");
        Fails(resume, "--space is s3 but was another space, 's2', when", "--space", "s3");
        Fails(resume, "--cutout is on but was off when", "--cutout", "--epochs", "1");
        Fails(resume, "but was not given when", "--init", FixtureFile.PathOf("s2"));
        // What agrees, and what decides nothing, may be given.
        CommandLine.Json([.. resume, .. TinyRuns.Tiny, "--epochs", "1", "--seed", "0", "--data-dir", "nowhere"]);

        var run = runs.Copy(runs.Untrained);
        string[] select = ["select", "--run", run, "--by", "magnitude", "--threads", "1"];
        CommandLine.Json([.. select, "--batch", "4", "--resume"]);
        Fails([.. select, "--resume"], "--criterion is loss but was acc and --batch is 5 but was 4 when the selection by magnitude in", "--batch", "5",
            "--criterion", "loss");
        Fails([.. select, "--resume"], "--valid-limit is 3 but was 12 when", "--valid-limit", "3");
        CommandLine.Json([.. select, "--resume", "--batch", "4"]);

        void Fails(string[] command, string expected, params string[] options) =>
            Assert.Contains(expected, CommandLine.HarmlessUserError(command[2], [.. command, .. options]), StringComparison.Ordinal);
    }

    [Fact]
    public void WeightsThatDoNotFitOrAreNoNumbers()
    {
        var folder = runs.NewPath("init");
        Directory.CreateDirectory(folder);
        string[] search = ["search", .. TinyRuns.Tiny, "--epochs", "2", "--out", Path.Combine(folder, "run"), "--init"];
        Assert.Contains("is F32 [12, 3, 3, 3], but F32 [6, 3, 3, 3] is needed",
            CommandLine.HarmlessUserError(folder, [.. search, FixtureFile.PathOf("s2")]), StringComparison.Ordinal);

        // A whole network with one weight that is no number.
        var good = SafeTensorsFile.Read(Path.Combine(runs.Untrained, "checkpoints", "search.safetensors"));
        var bad = new SafeTensorsFile();
        foreach (var tensor in good.Tensors)
        {
            var values = good.Float32(tensor.Name, [.. tensor.Shape]).ToArray();
            if (tensor.Name == "classifier.weight")
                values[0] = float.NaN;
            bad.Add(tensor.Name, [.. tensor.Shape], values);
        }
        bad.Write(Path.Combine(folder, "nan.safetensors"));
        Assert.Contains("Training stopped in epoch 1, step 1 of 3: the validation loss became NaN; the last checkpoint is kept",
            CommandLine.UserError([.. search, Path.Combine(folder, "nan.safetensors"), "--quiet"]), StringComparison.Ordinal);
        var kept = SafeTensorsFile.Read(Path.Combine(folder, "run", "checkpoints", "search.safetensors"));
        Assert.Equal("0", kept.Metadata["step"]);
        Assert.Equal(good.Float32("stem.0.weight", 6, 3, 3, 3).ToArray(), kept.Float32("stem.0.weight", 6, 3, 3, 3).ToArray());
        Assert.Contains("Scoring stopped at batch 0",
            CommandLine.HarmlessUserError(folder, "score", "--run", Path.Combine(folder, "run"), "--quiet"), StringComparison.Ordinal);
    }

    [PrivateMountFact]
    public void AFullDiskStopsASearchWhichGoesOnWhenThereIsRoom()
    {
        var (whole, disk, copy) = (runs.NewPath("whole"), runs.NewPath("disk"), runs.NewPath("copy"));
        string[] search = ["search", .. TinyRuns.Tiny, "--epochs", "2", "--json", "--out"];
        CommandLine.Json([.. search[..^2], "--out", whole]);
        Directory.CreateDirectory(disk);
        // A checkpoint has 112,320 bytes: there is room for one, but not for the next one beside it.
        const string script = """
            disk=$1 copy=$2; shift 2
            mount -t tmpfs -o size=160k tmpfs "$disk" && cd "$disk" || exit 99
            "$@" run; echo "exit code $?" >&2
            dotnet "$2" score --run run --edge 0 --json >score.json 2>/dev/null; echo "exit code $?" >&2
            mount -o remount,size=1m "$disk" && "$@" run --resume >/dev/null; echo "exit code $?" >&2
            ls run/checkpoints >&2
            cp -r run "$copy"
            """;
        using var process = Process.Start(new ProcessStartInfo("unshare",
            ["--user", "--map-root-user", "--mount", "bash", "-c", script, "-", disk, copy, "dotnet", CommandLine.Program, .. search])
        {
            RedirectStandardError = true,
        })!;
        Assert.Matches(@"^perturbnas: '[^\n]*search\.safetensors' cannot be written: No space left on device[^\n]*\.\n" +
            @"exit code 2\nexit code 0\nexit code 0\nsearch\.safetensors\n$", process.StandardError.ReadToEnd());
        Assert.Equal(CommandLine.Contents(whole), CommandLine.Contents(copy));
    }

    [Fact]
    public void AResultThatCannotBePrinted()
    {
        if (!File.Exists("/dev/full"))
            return;
        using var process = Process.Start(new ProcessStartInfo("bash", ["-c", "exec dotnet \"$0\" version --json >/dev/full", CommandLine.Program])
        {
            RedirectStandardError = true,
        })!;
        Assert.Matches(@"^perturbnas: No space left on device[^\n]*\.\n$", process.StandardError.ReadToEnd());
        process.WaitForExit();
        Assert.Equal(2, process.ExitCode);
    }

    /// <summary>A test that mounts a file system for its own processes only; skipped, visibly, where that is not allowed.</summary>
    private sealed class PrivateMountFactAttribute : FactAttribute
    {
        public PrivateMountFactAttribute()
        {
            try
            {
                using var process = Process.Start(new ProcessStartInfo("unshare",
                    ["--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", Path.GetTempPath()])
                { RedirectStandardError = true })!;
                process.StandardError.ReadToEnd();
                process.WaitForExit();
                if (process.ExitCode != 0)
                    Skip = "no file system can be mounted here, not even in a namespace of its own";
            }
            catch (System.ComponentModel.Win32Exception e)
            {
                Skip = $"'unshare' is missing: {e.Message}";
            }
        }
    }
}
