using System.Runtime.InteropServices;
using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>A file of tests/fixtures: what PyTorch computed. The top of make_fixtures.py says what is in it.</summary>
internal sealed class FixtureFile
{
    private readonly Dictionary<string, SafeTensor> _tensors;
    private readonly IDictionary<string, string> _metadata;

    public FixtureFile(string name)
    {
        var file = SafeTensorsFile.Read(PathOf(name));
        _tensors = file.Tensors.ToDictionary(tensor => tensor.Name);
        _metadata = file.Metadata;
    }

    public IEnumerable<string> Names => _tensors.Keys;

    public static string PathOf(string name) => Path.Combine(Folder, name + ".safetensors");

    /// <summary>tests/fixtures of the repository that the test assembly lies in.</summary>
    private static string Folder
    {
        get
        {
            for (var folder = new DirectoryInfo(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
                if (File.Exists(Path.Combine(folder.FullName, "global.json")))
                    return Path.Combine(folder.FullName, "tests", "fixtures");
            throw new InvalidOperationException($"no global.json above {AppContext.BaseDirectory}");
        }
    }

    public string Metadata(string key) => _metadata[key];

    public bool Contains(string name) => _tensors.ContainsKey(name);

    public IReadOnlyList<int> Shape(string name) => [.. _tensors[name].Shape.Select(extent => (int)extent)];

    public bool IsDouble(string name) => _tensors[name].Type == TensorType.F64;

    /// <summary>The values of a tensor of any element type.</summary>
    public double[] Values(string name) => _tensors[name] switch
    {
        { Type: TensorType.F64 } tensor => MemoryMarshal.Cast<byte, double>(tensor.Bytes).ToArray(),
        { Type: TensorType.F32 } tensor => [.. MemoryMarshal.Cast<byte, float>(tensor.Bytes).ToArray().Select(value => (double)value)],
        var tensor => [.. MemoryMarshal.Cast<byte, int>(tensor.Bytes).ToArray().Select(value => (double)value)],
    };

    /// <summary>Values of a float32 tensor as they are stored.</summary>
    public float[] Singles(string name) => MemoryMarshal.Cast<byte, float>(_tensors[name].Bytes).ToArray();

    /// <summary>Values of a tensor [N, C, H, W] in the order [N, H, W, C].</summary>
    public float[] ChannelsLast(string name)
    {
        var (source, shape) = (Singles(name), Shape(name));
        var (channels, pixels) = (shape[1], shape[2] * shape[3]);
        var values = new float[source.Length];
        for (var i = 0; i < values.Length; i++)
            values[i] = source[i / (channels * pixels) * channels * pixels + i % channels * pixels + i / channels % pixels];
        return values;
    }
}

/// <summary>A supernet with the weights, alphas, noise and batch of a fixture.</summary>
internal sealed class SupernetFixture : IDisposable
{
    private readonly Backend _backend;
    private readonly Dictionary<string, nint> _noise = [];
    private readonly float[] _images;
    private readonly int[] _labels;

    public SupernetFixture(Backend backend, string name)
    {
        _backend = backend;
        File = new FixtureFile(name);
        var space = name != "custom"
            ? SearchSpace.Load(name)
            : SearchSpace.Parse($$"""{"operations": ["{{File.Metadata("operations").Replace(",", "\", \"", StringComparison.Ordinal)}}"]}""", name);
        var size = new SupernetSize(int.Parse(File.Metadata("channels")), int.Parse(File.Metadata("layers")), int.Parse(File.Metadata("classes")),
            File.Shape("images")[2]);
        Network = new Supernet(backend, space, size, seed: 1);
        Arena = new Arena(backend);
        foreach (var weight in Network.Parameters.Weights)
        {
            Assert.Equal(weight.FileShape, File.Shape(weight.Name));
            Network.Parameters.SetValues(weight, File.Singles(weight.Name));
        }
        foreach (var type in Enum.GetValues<CellType>())
            Network.Alphas.Set(type, File.Values(ArchitectureParameters.NameOf(type)));
        foreach (var noise in File.Names.Where(key => key.StartsWith("noise.", StringComparison.Ordinal)))
        {
            var values = File.ChannelsLast(noise);
            _noise[noise] = backend.Allocate((long)values.Length * backend.ElementSize);
            backend.Write(_noise[noise], values);
        }
        Network.NoiseOverride = (cell, edge) => new Block(_noise[$"noise.cells.{cell}.edges.{edge}"], 0);
        _images = File.ChannelsLast("images");
        _labels = [.. File.Values("labels").Select(label => (int)label)];
    }

    public FixtureFile File { get; }

    public Supernet Network { get; }

    public Arena Arena { get; }

    public int Images => _labels.Length;

    public SupernetPass Record(TapeOptions options, params IReadOnlyList<Mask> masks) =>
        Network.Record(Arena, options, Images, new EdgeStates(), masks);

    public void Forward(SupernetPass pass) => pass.Forward(_images, _labels);

    /// <summary>Loss sum and correct count of every variant after a forward pass.</summary>
    public static (double LossSum, long Correct)[] Results(SupernetPass pass)
    {
        var losses = new double[pass.Variants];
        var correct = new long[pass.Variants];
        pass.ReadResults(losses, correct);
        return [.. losses.Zip(correct)];
    }

    /// <summary>The same, of a scoring pass (batch statistics, no gradients) over the fixture's batch.</summary>
    public (double LossSum, long Correct)[] Score(params IReadOnlyList<Mask> masks)
    {
        var pass = Record(new TapeOptions(BatchNormMode.BatchStatistics), masks);
        Forward(pass);
        return Results(pass);
    }

    /// <summary>Logits [N, classes] of a pass of one variant.</summary>
    public double[] Logits(SupernetPass pass)
    {
        var logits = new double[pass.Loss.Logits.Shape.Count];
        _backend.Read(pass.Loss.Logits.Data.Address, logits);
        return logits;
    }

    public void Dispose()
    {
        Network.Dispose();
        Arena.Dispose();
        foreach (var address in _noise.Values)
            _backend.Free(address);
    }
}
