using System.Globalization;
using System.Security.Cryptography;
using PerturbNas.Networks;
using PerturbNas.Spaces;

namespace PerturbNas.Training;

/// <summary>The progress that goes into a checkpoint beside the tensors: named numbers, kept exactly.</summary>
public sealed class CheckpointState
{
    private readonly Dictionary<string, string> _values;
    private readonly string _path = "(not yet written)";

    /// <param name="kind">"search" or "selection".</param>
    /// <param name="space">The space in its JSON form.</param>
    public CheckpointState(string kind, string space) => _values = new Dictionary<string, string>
    {
        ["kind"] = kind,
        ["version"] = Checkpoint.Version,
        ["space"] = space,
    };

    internal CheckpointState(string path, IDictionary<string, string> values) => (_path, _values) = (path, new Dictionary<string, string>(values));

    internal IReadOnlyDictionary<string, string> Values => _values;

    public void Set(string name, long value) => _values[name] = value.ToString(CultureInfo.InvariantCulture);

    public void Set(string name, Totals value) =>
        _values[name] = string.Create(CultureInfo.InvariantCulture, $"{value.LossSum:R} {value.Correct} {value.Images}");

    /// <exception cref="UserException">The number is missing or not one.</exception>
    public long GetInt64(string name) => Parse(name, value => long.Parse(value, CultureInfo.InvariantCulture));

    /// <inheritdoc cref="GetInt64" path="/exception"/>
    public Totals GetTotals(string name) => Parse(name, value => value.Split(' ') is [var lossSum, var correct, var images]
        ? new Totals(double.Parse(lossSum, CultureInfo.InvariantCulture), long.Parse(correct, CultureInfo.InvariantCulture),
            long.Parse(images, CultureInfo.InvariantCulture))
        : throw new FormatException());

    internal string Get(string name) => _values.TryGetValue(name, out var value)
        ? value
        : throw new UserException($"Checkpoint '{_path}' lacks '{name}': it was not written by this program; give one that was.");

    private T Parse<T>(string name, Func<string, T> parse)
    {
        try
        {
            return parse(Get(name));
        }
        catch (Exception e) when (e is FormatException or OverflowException)
        {
            throw new UserException($"'{name}' of checkpoint '{_path}' is '{Get(name)}', which this program did not write; use an earlier checkpoint.", e);
        }
    }
}

/// <summary>
/// Checkpoints: a safetensors file with every weight, running statistic and alpha under its reference name, the state of both optimisers,
/// and the progress in the metadata. Written in one piece, with a checksum.
/// </summary>
public static class Checkpoint
{
    internal const string Version = "1";
    private const string Momentum = "optimizer.sgd.momentum";
    private const string FirstMoment = "optimizer.adam.first_moment", SecondMoment = "optimizer.adam.second_moment", AdamSteps = "adam_steps";

    public static void Write(string path, CheckpointState state, Supernet network, SupernetTrainer trainer)
    {
        var file = new SafeTensorsFile();
        foreach (var parameter in network.Parameters.Weights.Concat(network.Parameters.RunningStatistics))
            file.Add(parameter.Name, Shape(parameter), network.Parameters.GetValues(parameter));
        foreach (var type in Enum.GetValues<CellType>())
        {
            float[] values = [.. network.Alphas.Get(type).Select(value => (float)value)];
            file.Add(ArchitectureParameters.NameOf(type), [CellTopology.Edges, network.Alphas.Columns(type)], values);
        }
        foreach (var (name, address, count) in OptimiserState(network, trainer))
        {
            var values = new float[count];
            network.Backend.Read(address, values);
            file.Add(name, [count], values);
        }
        state.Set(AdamSteps, trainer.Adam.Steps);
        foreach (var (key, value) in state.Values)
            file.Metadata[key] = value;
        file.Write(path);
    }

    /// <summary>Puts a checkpoint's tensors into the network and the trainer.</summary>
    /// <exception cref="UserException">It is missing, damaged, of another kind, version or space.</exception>
    public static CheckpointState Read(string path, string kind, Supernet network, SupernetTrainer trainer)
    {
        var file = SafeTensorsFile.Read(path);
        var state = new CheckpointState(path, file.Metadata);
        if (!file.Metadata.ContainsKey("kind"))
            throw new UserException($"'{path}' is not a checkpoint of this program; use --init to start from foreign weights.");
        if (state.Get("version") != Version)
            throw new UserException($"Checkpoint '{path}' has version {state.Get("version")}, this program reads version {Version}; " +
                "use the program that wrote it.");
        if (state.Get("kind") != kind)
            throw new UserException($"'{path}' is a {state.Get("kind")} checkpoint, not a {kind} checkpoint; the run folder is mixed up.");
        if (state.Get("space") != network.Space.ToJson())
            throw new UserException($"Checkpoint '{path}' is of another search space than the run's config.json; the run folder is mixed up.");
        ReadNetwork(file, network, alphasRequired: true);
        foreach (var (name, address, count) in OptimiserState(network, trainer))
            network.Backend.Write(address, file.Float32(name, count));
        trainer.Adam.Steps = state.GetInt64(AdamSteps);
        return state;
    }

    /// <summary>
    /// Starts a network from a file with the reference's names in NCHW/OIHW order (a PyTorch state dict as safetensors). Every weight must
    /// be there; alphas and running statistics may be missing and then stay as initialised; other tensors are ignored.
    /// </summary>
    /// <exception cref="UserException">It is missing or damaged, or lacks a weight or has one of another shape.</exception>
    public static void ReadInitial(string path, Supernet network) => ReadNetwork(SafeTensorsFile.Read(path), network, alphasRequired: false);

    /// <summary>SHA-256 of a file in hex, which says in a configuration what a network was started from.</summary>
    /// <exception cref="UserException">The file cannot be read.</exception>
    public static string DigestOf(string path)
    {
        try
        {
            using var stream = File.OpenRead(path);
            return Convert.ToHexStringLower(SHA256.HashData(stream));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new UserException($"'{path}' cannot be read: {e.Message.TrimEnd('.')}; check the file and its permissions.", e);
        }
    }

    private static void ReadNetwork(SafeTensorsFile file, Supernet network, bool alphasRequired)
    {
        foreach (var parameter in network.Parameters.Weights)
            network.Parameters.SetValues(parameter, file.Float32(parameter.Name, Shape(parameter)));
        foreach (var parameter in network.Parameters.RunningStatistics)
            if (alphasRequired || file.Contains(parameter.Name))
                network.Parameters.SetValues(parameter, file.Float32(parameter.Name, Shape(parameter)));
        foreach (var type in Enum.GetValues<CellType>())
        {
            var name = ArchitectureParameters.NameOf(type);
            if (!alphasRequired && !file.Contains(name))
                continue;
            double[] values = [.. file.Float32(name, CellTopology.Edges, network.Alphas.Columns(type)).ToArray().Select(value => (double)value)];
            network.Alphas.Set(type, values);
        }
    }

    private static long[] Shape(Parameter parameter) => [.. parameter.FileShape.Select(extent => (long)extent)];

    private static IEnumerable<(string Name, nint Address, int Count)> OptimiserState(Supernet network, SupernetTrainer trainer) =>
    [
        (Momentum, trainer.Sgd.MomentumAddress, checked((int)network.Parameters.WeightCount)),
        (FirstMoment, trainer.Adam.FirstMoment, network.Alphas.Count),
        (SecondMoment, trainer.Adam.SecondMoment, network.Alphas.Count),
    ];
}
