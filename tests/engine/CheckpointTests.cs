using PerturbNas.Backends.Cpu;
using PerturbNas.Search;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tests.Data;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>Checkpoints and run folders that cannot be used: one sentence that names the file, and nothing changed.</summary>
public sealed class CheckpointTests
{
    [Fact]
    public void TruncatedFileIsRefused() => AssertRefused(bytes => bytes[..^100], "truncated");

    [Theory]
    [InlineData(3)] // length of the header
    [InlineData(200)] // header
    [InlineData(-1)] // data
    [InlineData(-5000)]
    public void FlippedBitIsRefused(int position) => AssertRefused(bytes =>
    {
        bytes[position < 0 ? bytes.Length + position : position] ^= 4;
        return bytes;
    }, "search.safetensors");

    [Fact]
    public void OtherVersionIsRefused() => AssertEditRefused(file => file.Metadata["version"] = "2", "has version 2, this program reads version 1");

    [Fact]
    public void OtherKindIsRefused() => AssertEditRefused(file => file.Metadata["kind"] = "selection", "is a selection checkpoint, not a search");

    [Fact]
    public void OtherSpaceIsRefused() =>
        AssertEditRefused(file => file.Metadata["space"] = SearchSpace.Load("s2").ToJson(), "is of another search space");

    [Fact]
    public void ForeignFileIsRefused() => AssertEditRefused(file => file.Metadata.Remove("kind"), "--init");

    [Theory]
    [InlineData("version")]
    [InlineData("space")]
    [InlineData("step")]
    [InlineData("adam_steps")]
    [InlineData("last_train")]
    public void MissingProgressIsRefused(string key) => AssertEditRefused(file => file.Metadata.Remove(key), $"'{key}'");

    [Theory]
    [InlineData("step", "three")]
    [InlineData("metrics_bytes", "99999999999999999999")]
    [InlineData("epoch_train", "1.5 2")]
    [InlineData("last_train", "x 1 2")]
    public void UnreadableProgressIsRefused(string key, string value) => AssertEditRefused(file => file.Metadata[key] = value, $"'{key}'");

    [Theory]
    [InlineData("stem.0.weight")]
    [InlineData("cells.2._ops.13._ops.2.op.7.running_var")]
    [InlineData("alphas_reduce")]
    [InlineData("optimizer.sgd.momentum")]
    public void MissingTensorIsRefused(string name) => AssertRewriteRefused(tensor => tensor.Name == name ? null : tensor, $"no tensor '{name}'");

    [Theory]
    [InlineData("classifier.bias")]
    [InlineData("optimizer.adam.first_moment")]
    public void WrongShapeIsRefused(string name) => AssertRewriteRefused(
        tensor => tensor.Name == name ? tensor with { Shape = [tensor.Shape[0] / 2, 2] } : tensor, $"'{name}'");

    [Fact]
    public void MissingFileIsRefused()
    {
        using var run = new RunFixture();
        File.Delete(run.CheckpointPath);
        Assert.Contains(run.CheckpointPath, Assert.Throws<UserException>(() => run.Search()).Message);
    }

    [Fact]
    public void ShortMetricsAreRefused()
    {
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: 4));
        var metrics = Path.Combine(run.Folder, "metrics.jsonl");
        File.WriteAllBytes(metrics, File.ReadAllBytes(metrics)[..^1]);
        var e = Assert.Throws<UserException>(() => run.Search());
        Assert.Contains("metrics.jsonl", e.Message);
        Assert.Contains("the checkpoint knows of", e.Message);
    }

    [Fact]
    public void InitialWeightsAreTakenOver()
    {
        // A state dict of another program: weights under the reference's names, no metadata, no optimiser, here without running statistics.
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: 2));
        using var folder = new TemporaryFolder();
        Rewrite(run.CheckpointPath, folder["weights.safetensors"], tensor => tensor.Name.Contains("running") ? null : tensor, metadata: false);
        CreateFrom(folder["weights.safetensors"], folder["new"], run.Configuration with { Seed = 100 });
        var given = SafeTensorsFile.Read(folder["weights.safetensors"]);
        var made = SafeTensorsFile.Read(Path.Combine(folder["new"], "checkpoints", "search.safetensors"));
        foreach (var tensor in given.Tensors.Where(tensor => !tensor.Name.StartsWith("optimizer", StringComparison.Ordinal)))
            Assert.Equal(tensor.Bytes, made.Tensors.Single(other => other.Name == tensor.Name).Bytes);
        Assert.Equal([0, 0, 0, 0], made.Float32("cells.0.preprocess0.op.2.running_mean", 4).ToArray());
        Assert.Equal([1, 1, 1, 1], made.Float32("cells.0.preprocess0.op.2.running_var", 4).ToArray());
        Assert.Equal("0", made.Metadata["step"]);
        Assert.All(made.Tensors.Where(tensor => tensor.Name.StartsWith("optimizer", StringComparison.Ordinal)),
            tensor => Assert.All(tensor.Bytes, value => Assert.Equal(0, value)));
    }

    [Theory]
    [InlineData("classifier.weight")]
    [InlineData("cells.1._ops.6._ops.2.op.5.weight")]
    public void InitialFileWithoutAWeightMakesNoRun(string missing)
    {
        using var run = new RunFixture();
        using var folder = new TemporaryFolder();
        Rewrite(run.CheckpointPath, folder["weights.safetensors"], tensor => tensor.Name == missing ? null : tensor, metadata: false);
        var e = Assert.Throws<UserException>(() => CreateFrom(folder["weights.safetensors"], folder["new"], run.Configuration));
        Assert.Contains("weights.safetensors", e.Message);
        Assert.Contains(missing, e.Message);
        Assert.False(RunDirectory.Exists(folder["new"]));
        Assert.False(Directory.Exists(folder["new"]));

        // The folder can be used at once.
        CreateFrom(null, folder["new"], run.Configuration);
        Assert.True(RunDirectory.Exists(folder["new"]));
    }

    [Fact]
    public void RunIsNotOverwritten()
    {
        using var run = new RunFixture();
        var before = File.ReadAllBytes(run.CheckpointPath);
        var e = Assert.Throws<UserException>(() => CreateFrom(null, run.Folder, run.Configuration with { Seed = 100 }));
        Assert.Contains(run.Folder, e.Message);
        Assert.Contains("--resume", e.Message);
        Assert.Equal(before, File.ReadAllBytes(run.CheckpointPath));
    }

    [Fact]
    public void FolderIsLocked()
    {
        using var folder = new TemporaryFolder();
        using (RunDirectory.Open(folder["run"]))
        {
            var e = Assert.Throws<UserException>(() => RunDirectory.Open(folder["run"]));
            Assert.Contains(folder["run"], e.Message);
            Assert.Contains("in use", e.Message);
        }
        RunDirectory.Open(folder["run"]).Dispose();
    }

    [Fact]
    public void FolderThatIsAFileIsRefused()
    {
        using var folder = new TemporaryFolder();
        File.WriteAllText(folder["run"], "");
        Assert.Contains(folder["run"], Assert.Throws<UserException>(() => RunDirectory.Open(folder["run"])).Message);
    }

    [Theory]
    [InlineData("")]
    [InlineData("null")]
    [InlineData("{")]
    [InlineData("""{"Version": 1}""")]
    public void DamagedConfigurationIsRefused(string text)
    {
        using var run = new RunFixture();
        File.WriteAllText(Path.Combine(run.Folder, "config.json"), text);
        Assert.Contains("config.json", Assert.Throws<UserException>(() => run.Search()).Message);
    }

    [Fact]
    public void SelectionOfADamagedSearchKeepsTheEarlierOne()
    {
        using var run = new RunFixture();
        Assert.True(run.Search());
        Assert.True(run.Select(resume: false));
        var bytes = File.ReadAllBytes(run.CheckpointPath);
        File.WriteAllBytes(run.CheckpointPath, bytes[..^1]);
        var before = Contents(run.Folder);
        Assert.Contains(run.CheckpointPath, Assert.Throws<UserException>(() => run.Select(resume: false)).Message);
        Assert.Equal(before, Contents(run.Folder));

        // What the earlier selection has made of the supernet is in its own checkpoint.
        Assert.True(run.Select(resume: true));
    }

    [Fact]
    public void DamagedDecisionsAreRefused()
    {
        using var run = new RunFixture();
        Assert.True(run.Search());
        Assert.False(run.Select(resume: false, cancelAfter: 1, "tuning"));
        var decisions = Path.Combine(run.Folder, "select-perturbation", "decisions.jsonl");
        var bytes = File.ReadAllBytes(decisions);
        bytes[0] = (byte)'x';
        File.WriteAllBytes(decisions, bytes);
        Assert.Contains("decisions.jsonl", Assert.Throws<UserException>(() => run.Select(resume: true)).Message);
        File.WriteAllText(decisions, "");
        Assert.Contains("decisions.jsonl", Assert.Throws<UserException>(() => run.Select(resume: true)).Message);
    }

    private static void AssertEditRefused(Action<SafeTensorsFile> edit, string message) => AssertRefused(path =>
    {
        var file = SafeTensorsFile.Read(path);
        edit(file);
        file.Write(path);
    }, message);

    private static void AssertRewriteRefused(Func<SafeTensor, SafeTensor?> edit, string message) =>
        AssertRefused(path => Rewrite(path, path, edit, metadata: true), message);

    private static void AssertRefused(Func<byte[], byte[]> edit, string message) =>
        AssertRefused(path => File.WriteAllBytes(path, edit(File.ReadAllBytes(path))), message);

    /// <summary>A search resumed from a spoilt checkpoint says so and leaves every file of the run as it is.</summary>
    private static void AssertRefused(Action<string> spoil, string message)
    {
        using var run = new RunFixture();
        Assert.False(run.Search(cancelAfter: 4));
        spoil(run.CheckpointPath);
        var before = Contents(run.Folder);
        var e = Assert.Throws<UserException>(() => run.Search());
        Assert.Contains(run.CheckpointPath, e.Message);
        Assert.Contains(message, e.Message);
        Assert.Equal(before, Contents(run.Folder));
    }

    private static SortedDictionary<string, byte[]> Contents(string folder) =>
        new(Directory.EnumerateFiles(folder, "*", SearchOption.AllDirectories).ToDictionary(path => path, File.ReadAllBytes));

    private static void Rewrite(string source, string destination, Func<SafeTensor, SafeTensor?> edit, bool metadata)
    {
        var (old, made) = (SafeTensorsFile.Read(source), new SafeTensorsFile());
        foreach (var tensor in old.Tensors.Select(edit).OfType<SafeTensor>())
            made.Add(tensor.Name, [.. tensor.Shape], System.Runtime.InteropServices.MemoryMarshal.Cast<byte, float>(tensor.Bytes));
        if (metadata)
            foreach (var (key, value) in old.Metadata)
                made.Metadata[key] = value;
        made.Write(destination);
    }

    private static void CreateFrom(string? initialFile, string folder, SearchConfiguration configuration)
    {
        using var backend = new CpuBackend(threads: 1);
        using var run = RunDirectory.Open(folder);
        using var experiment = Experiment.Create(run, configuration, backend, initialFile);
    }
}
