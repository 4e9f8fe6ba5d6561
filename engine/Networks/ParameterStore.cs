using PerturbNas.Backends;
using PerturbNas.Training;

namespace PerturbNas.Networks;

/// <summary>
/// A weight of a network. Its name and shape are those of files (OIHW); in backend memory the order is HWIO, which gives every kernel its
/// layout: depthwise [K*K][C], pointwise [Cin][Cout], dense [KH*KW*Cin][Cout], linear [Cin][Cout].
/// </summary>
public sealed class Parameter
{
    private readonly ParameterStore _store;
    private readonly ParameterKind _kind;

    internal Parameter(ParameterStore store, ParameterKind kind, string name, int[] fileShape, double initialBound, float initialValue)
    {
        (_store, _kind, Name, FileShape, InitialBound, InitialValue) = (store, kind, name, fileShape, initialBound, initialValue);
        Count = fileShape.Aggregate(1, (product, extent) => product * extent);
    }

    public string Name { get; }

    /// <summary>OIHW for convolutions, [out, in] for the linear layer, [C] for vectors.</summary>
    public IReadOnlyList<int> FileShape { get; }

    public int Count { get; }

    public nint Address => _store.AddressOf(_kind, Offset);

    /// <summary>Address of the gradient.</summary>
    public nint Gradient => _store.GradientOf(Offset);

    internal long Offset { get; init; }

    /// <summary>Initial values are uniform in +-bound; 0: they are <see cref="InitialValue"/>.</summary>
    internal double InitialBound { get; }

    internal float InitialValue { get; }

    /// <summary>Copies between file order and kernel order.</summary>
    internal void Reorder(ReadOnlySpan<float> source, Span<float> destination, bool toKernel)
    {
        int o = FileShape[0], i = FileShape.Count > 1 ? FileShape[1] : 1;
        var pixels = Count / (o * i);
        for (var a = 0; a < o; a++)
            for (var b = 0; b < i; b++)
                for (var p = 0; p < pixels; p++)
                {
                    var file = (a * i + b) * pixels + p;
                    var kernel = (p * i + b) * o + a;
                    destination[toKernel ? kernel : file] = source[toKernel ? file : kernel];
                }
    }
}

internal enum ParameterKind
{
    Weight,
    Running,
}

/// <summary>The parameters and running statistics of one batch norm.</summary>
public sealed record BatchNormParameters(Parameter? Gamma, Parameter? Beta, Parameter RunningMean, Parameter RunningVariance);

/// <summary>
/// All weights of a network in one flat array, their gradients in another of the same layout, and the running statistics of batch norm in
/// a third, so that an optimiser step or a copy is one pass. Every parameter starts at a 64-byte boundary; the gaps stay zero.
/// </summary>
public sealed class ParameterStore(Backend backend) : IDisposable
{
    private readonly List<Parameter> _weights = [], _running = [];
    private readonly HashSet<string> _names = [];
    private nint _weightsAddress, _gradientsAddress, _runningAddress;
    private bool _sealed;

    public IReadOnlyList<Parameter> Weights => _weights;

    /// <summary>running_mean and running_var of every batch norm.</summary>
    public IReadOnlyList<Parameter> RunningStatistics => _running;

    /// <summary>Elements of the flat weight array, gaps included.</summary>
    public long WeightCount { get; private set; }

    public long RunningCount { get; private set; }

    /// <summary>Address of the flat weight array.</summary>
    public nint WeightsAddress => _weightsAddress;

    public nint GradientsAddress => _gradientsAddress;

    /// <summary>A convolution or linear weight, initially uniform in +-1/sqrt(fan-in).</summary>
    internal Parameter AddWeight(string name, params int[] fileShape)
    {
        var fanIn = fileShape.Skip(1).Aggregate(1, (product, extent) => product * extent);
        return Add(ParameterKind.Weight, name, fileShape, 1 / Math.Sqrt(fanIn), 0);
    }

    internal Parameter AddBias(string name, int count, int fanIn) => Add(ParameterKind.Weight, name, [count], 1 / Math.Sqrt(fanIn), 0);

    internal BatchNormParameters AddBatchNorm(string name, int channels, bool affine) => new(
        affine ? Add(ParameterKind.Weight, name + ".weight", [channels], 0, 1) : null,
        affine ? Add(ParameterKind.Weight, name + ".bias", [channels], 0, 0) : null,
        Add(ParameterKind.Running, name + ".running_mean", [channels], 0, 0),
        Add(ParameterKind.Running, name + ".running_var", [channels], 0, 1));

    /// <summary>Takes the memory and initialises every parameter from its own stream, so that one layer's draw does not shift another's.</summary>
    internal void Seal(long seed)
    {
        _sealed = true;
        _weightsAddress = backend.Allocate(WeightCount * backend.ElementSize);
        _gradientsAddress = backend.Allocate(WeightCount * backend.ElementSize);
        _runningAddress = backend.Allocate(RunningCount * backend.ElementSize);
        foreach (var parameter in _weights.Concat(_running))
        {
            var values = new float[parameter.Count];
            if (parameter.InitialBound > 0)
            {
                var stream = new RandomStream(seed, "initialisation/" + parameter.Name);
                for (var i = 0; i < values.Length; i++)
                    values[i] = (float)((2.0 * stream.NextSingle() - 1) * parameter.InitialBound);
            }
            else
            {
                Array.Fill(values, parameter.InitialValue);
            }
            SetValues(parameter, values);
        }
    }

    /// <summary>Sets all gradients to zero: those of operations that a new tape no longer runs must not stay behind.</summary>
    public void ZeroGradients() => backend.Zero(_gradientsAddress, WeightCount * backend.ElementSize);

    /// <summary>A parameter's values in file order.</summary>
    public float[] GetValues(Parameter parameter) => Get(parameter, parameter.Address);

    /// <summary>A weight's gradient in file order.</summary>
    public float[] GetGradient(Parameter parameter) => Get(parameter, parameter.Gradient);

    /// <summary>Sets a parameter from values in file order.</summary>
    public void SetValues(Parameter parameter, ReadOnlySpan<float> values)
    {
        if (values.Length != parameter.Count)
            throw new ArgumentException($"{parameter.Name} has {parameter.Count} values, not {values.Length}", nameof(values));
        var kernel = new float[parameter.Count];
        parameter.Reorder(values, kernel, toKernel: true);
        backend.Write(parameter.Address, kernel);
    }

    public void Dispose()
    {
        foreach (var address in (ReadOnlySpan<nint>)[_weightsAddress, _gradientsAddress, _runningAddress])
            if (address != 0)
                backend.Free(address);
        _weightsAddress = _gradientsAddress = _runningAddress = 0;
    }

    internal nint AddressOf(ParameterKind kind, long offset) =>
        (kind == ParameterKind.Weight ? _weightsAddress : _runningAddress) + (nint)(offset * backend.ElementSize);

    internal nint GradientOf(long offset) => _gradientsAddress + (nint)(offset * backend.ElementSize);

    private float[] Get(Parameter parameter, nint address)
    {
        var kernel = new float[parameter.Count];
        backend.Read(address, kernel);
        var file = new float[parameter.Count];
        parameter.Reorder(kernel, file, toKernel: false);
        return file;
    }

    private Parameter Add(ParameterKind kind, string name, int[] fileShape, double bound, float value)
    {
        if (_sealed || !_names.Add(name))
            throw new InvalidOperationException($"parameter {name} is defined twice or too late");
        var parameter = new Parameter(this, kind, name, fileShape, bound, value)
        {
            Offset = kind == ParameterKind.Weight ? WeightCount : RunningCount,
        };
        var end = (parameter.Offset + parameter.Count + 15) / 16 * 16;
        if (kind == ParameterKind.Weight)
        {
            _weights.Add(parameter);
            WeightCount = end;
        }
        else
        {
            _running.Add(parameter);
            RunningCount = end;
        }
        return parameter;
    }
}
