using PerturbNas.Backends;
using PerturbNas.Backends.Planning;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>Element type of a kernel's buffer; reals are float32 or double, as the backend has them.</summary>
public enum BufferKind
{
    Real,
    Int32,
    Int64,
    Double,
}

/// <summary>What a pass of a kernel does with a buffer.</summary>
public enum BufferRole
{
    /// <summary>Read by both passes.</summary>
    Input,

    /// <summary>Written by the forward pass, read by the backward pass.</summary>
    ForwardOutput,

    /// <summary>Written by the backward pass.</summary>
    BackwardOutput,
}

/// <summary>The two passes of an operator.</summary>
public enum KernelPass
{
    Forward,
    Backward,
}

/// <summary>
/// One argument of a kernel. <paramref name="Fill"/> makes its contents from a random stream; with `continuous` it must not round to
/// a grid (ties and zeros would put finite differences on a kink). An output without one is poisoned before it is written; with
/// one it is added to, or keeps the elements that the kernel does not own. The error of an output is judged against the root mean
/// square of its row: element i lies in row i / RowLength % Rows.
/// </summary>
public sealed record KernelBuffer(
    string Name, BufferRole Role, BufferKind Kind, int Count, Func<RandomStream, bool, double[]>? Fill, int RowLength, int Rows)
{
    /// <summary>The contents, the same for the same case and buffer name, exactly representable in float32.</summary>
    public double[]? Values(string caseName, bool continuous)
    {
        var values = Fill?.Invoke(new RandomStream(1, $"{caseName}/{Name}"), continuous);
        return values == null ? null : Array.ConvertAll(values, value => (double)(float)value);
    }

    /// <summary>Does the pass write to it?</summary>
    public bool IsOutput(KernelPass pass) =>
        Role == (pass == KernelPass.Forward ? BufferRole.ForwardOutput : BufferRole.BackwardOutput);

    public int ElementSize(int real) => Kind switch
    {
        BufferKind.Real => real,
        BufferKind.Int32 => 4,
        _ => 8,
    };
}

/// <summary>Addresses of a case's buffers by name; a buffer that the case (or the pass) lacks is a null pointer.</summary>
public sealed class KernelAddresses(IReadOnlyDictionary<string, nint> addresses)
{
    public nint this[string name] => addresses.GetValueOrDefault(name);
}

/// <summary>
/// One row of the case table: an operator, a shape with its options, the buffers, and how to call the kernels.
/// </summary>
public sealed class KernelCase(string operatorName, string shape)
{
    private readonly List<KernelBuffer> _buffers = [];

    /// <summary>The operator, as the kernels are named: "depthwise_pointwise".</summary>
    public string Operator { get; } = operatorName;

    /// <summary>Operator, shape and options; unique in the table.</summary>
    public string Name { get; } = $"{operatorName} {shape}";

    public IReadOnlyList<KernelBuffer> Buffers => _buffers;

    public Action<Backend, KernelAddresses>? Forward { get; init; }

    public Action<Backend, KernelAddresses>? Backward { get; init; }

    /// <summary>May finite differences check it? Not where inputs are made for rounding or not-a-number.</summary>
    public bool Differentiable { get; init; } = true;

    public override string ToString() => Name;

    /// <summary>The least that a pass has to do on a float32 backend.</summary>
    public Cost Cost(KernelPass pass)
    {
        // The forward pass is asked for no gradients.
        var addresses = _buffers.Where(buffer => pass == KernelPass.Backward || buffer.Role != BufferRole.BackwardOutput)
            .Select((buffer, i) => (buffer.Name, Address: (nint)(i + 1))).ToDictionary(buffer => buffer.Name, buffer => buffer.Address);
        return MeteredBackend.CostOf(backend => Call(pass)(backend, new KernelAddresses(addresses)));
    }

    public IEnumerable<KernelPass> Passes()
    {
        if (Forward != null)
            yield return KernelPass.Forward;
        if (Backward != null)
            yield return KernelPass.Backward;
    }

    public Action<Backend, KernelAddresses> Call(KernelPass pass) => (pass == KernelPass.Forward ? Forward : Backward)!;

    /// <summary>Adds an input: normal with this mean and deviation, rounded to multiples of <paramref name="step"/>.</summary>
    public KernelCase Input(string name, int count, double deviation = 1, double mean = 0, double step = 1.0 / 64) =>
        Add(name, BufferRole.Input, BufferKind.Real, count, Normal(count, deviation, mean, step));

    /// <summary>Adds an input with contents of its own.</summary>
    public KernelCase Input(string name, BufferKind kind, int count, Func<RandomStream, bool, double[]> fill) =>
        Add(name, BufferRole.Input, kind, count, fill);

    /// <summary>Adds an output; see <see cref="KernelBuffer"/> for rows and initial contents.</summary>
    public KernelCase Output(
        string name,
        int count,
        BufferRole role = BufferRole.ForwardOutput,
        BufferKind kind = BufferKind.Real,
        int rowLength = 1,
        int rows = 1,
        Func<RandomStream, bool, double[]>? initial = null) => Add(name, role, kind, count, initial, rowLength, rows);

    /// <summary>Adds the gradient of an activation, added to or assigned.</summary>
    public KernelCase Gradient(string name, int count, bool accumulate = false) =>
        Add(name, BufferRole.BackwardOutput, BufferKind.Real, count, accumulate ? Normal(count, 1, 0, 0) : null);

    public static Func<RandomStream, bool, double[]> Normal(int count, double deviation, double mean, double step) =>
        (stream, continuous) =>
        {
            var values = new double[count];
            for (var i = 0; i < count; i++)
            {
                var value = mean + deviation * stream.NextNormal();
                values[i] = continuous || step == 0 ? value : Math.Round(value / step) * step;
            }
            return values;
        };

    private KernelCase Add(
        string name,
        BufferRole role,
        BufferKind kind,
        int count,
        Func<RandomStream, bool, double[]>? fill,
        int rowLength = 1,
        int rows = 1)
    {
        _buffers.Add(new(name, role, kind, count, fill, rowLength, rows));
        return this;
    }
}
