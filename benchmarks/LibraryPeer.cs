using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Benchmarks;

/// <summary>
/// cuBLAS and cuDNN at the work of our kernels, on the same device, in the same stream, with the same values: products by cuBLAS, ReLU, other
/// convolutions, pools and batch norm by cuDNN, one call after another. Batch norm is whole, as in the PyTorch peer. Without cuDNN there are
/// the products of pointwise convolutions alone, whose inputs are rectified and whose gradients are normalised beforehand.
/// </summary>
internal sealed class LibraryPeer(Backend backend, IGemm? gemm, ILayers? layers) : IDisposable
{
    public const string Name = "cuBLAS/cuDNN";

    /// <summary>The libraries that are installed, of which a note tells; null: none is.</summary>
    /// <exception cref="CudaLibraryException">One is installed, but cannot be used.</exception>
    public static LibraryPeer? Open(CudaBackend backend, Action<string> note)
    {
        var (blas, dnn) = (CuBlas.Open(backend), CuDnn.Open(backend));
        foreach (var found in new[] { blas?.Description, dnn?.Description }.OfType<string>())
            note($"{found} is timed beside our kernels");
        if (blas is null)
            note($"cuBLAS is not installed ({CudaLibrary.WhyMissing(CudaLibrary.Blas)}): nothing with pointwise products is compared with it");
        if (dnn is null)
            note($"cuDNN is not installed ({CudaLibrary.WhyMissing(CudaLibrary.Dnn)}): " +
                (blas is null ? "nothing is compared with it" : "of pointwise convolutions the products are compared, without ReLU and batch norm, and nothing else"));
        return blas is null && dnn is null ? null : new(backend, blas, dnn);
    }

    /// <summary>Gets an operator ready; null: these libraries have nothing for it.</summary>
    /// <param name="kernelCase">Our kernel's buffers.</param>
    /// <param name="ours">
    /// Where they lie. The forward pass has been run; the coefficients of the pending gradient are replaced by those of a batch norm behind it.
    /// </param>
    public LibraryWork? Prepare(PeerOperator work, KernelCase kernelCase, KernelAddresses ours)
    {
        var input = new ImageShape(work.Batch, work.Side, work.Side, work.Channels);
        var output = input with
        {
            Height = (work.Side - 1) / work.Stride + 1,
            Width = (work.Side - 1) / work.Stride + 1,
            Channels = work.Out > 0 ? work.Out : work.Channels,
        };
        var depthwise = output with { Channels = work.Channels };
        List<Layer> first = [];
        Layer? second = null;
        switch (work.Operator)
        {
            case "depthwise_pointwise" when gemm is not null && layers is not null:
                first.Add(new Convolution(layers, new(input, depthwise, work.Kernel, work.Stride, work.Dilation, work.Channels)));
                second = new Product(gemm, output.Pixels, work.Channels, output.Channels);
                break;
            case "pointwise" when work.Stride == 1 && gemm is not null:
                first.AddRange(Enumerable.Range(0, work.Parts).Select(_ => new Product(gemm, output.Pixels, work.Channels, output.Channels)));
                break;
            case "pointwise" when work.Stride > 1 && layers is not null:
                first.AddRange(Enumerable.Range(0, work.Parts).Select(_ => new Convolution(layers, new(input, output, 1, work.Stride, 1, 1))));
                break;
            case "convolution" when layers is not null:
                first.Add(new Convolution(layers, new(input, output, work.Kernel, work.Stride, work.Dilation, 1)));
                break;
            case "max_pool_3x3" or "avg_pool_3x3" when layers is not null:
                first.Add(new Pool(layers, new(input, output, work.Stride, work.Operator == "max_pool_3x3")));
                break;
            default:
                return null;
        }
        var rectifies = work.Relu && first[0] is not Pool;
        return new LibraryWork(backend, layers, kernelCase, ours, input, output, rectifies, first, second);
    }

    public void Dispose()
    {
        gemm?.Dispose();
        layers?.Dispose();
    }

    /// <summary>What a library does with activations and weights; the weights are [Rows][Columns] here, [inputs of a sum][outputs].</summary>
    internal abstract class Layer(int rows, int columns)
    {
        public int Rows => rows;

        public int Columns => columns;

        /// <summary>Whether the library wants the weights transposed.</summary>
        public virtual bool TransposesWeights => true;

        /// <summary>Weights and their gradient on the device, as the library wants them.</summary>
        public nint Weights { get; set; }

        public nint WeightGradient { get; set; }

        /// <summary>y (+)= the layer's value.</summary>
        public abstract void Forward(nint x, nint y, bool accumulate);

        /// <param name="x">The layer's input and</param>
        /// <param name="y">its value.</param>
        public abstract void BackwardData(nint x, nint y, nint dy, nint dx);

        public abstract void BackwardWeights(nint x, nint dy);
    }

    /// <summary>
    /// y [pixels][outputs] = x [pixels][inputs] * weights [inputs][outputs]. What is a row here is a column to cuBLAS, so that every matrix is its
    /// own transpose there: y' = weights' x'.
    /// </summary>
    internal sealed class Product(IGemm gemm, int pixels, int inputs, int outputs) : Layer(inputs, outputs)
    {
        public override bool TransposesWeights => false;

        public override void Forward(nint x, nint y, bool accumulate) =>
            gemm.Multiply(new(false, false, Columns, pixels, Rows, Weights, Columns, x, Rows, accumulate ? 1 : 0, y, Columns));

        public override void BackwardData(nint x, nint y, nint dy, nint dx) =>
            gemm.Multiply(new(true, false, Rows, pixels, Columns, Weights, Columns, dy, Columns, 0, dx, Rows));

        public override void BackwardWeights(nint x, nint dy) =>
            gemm.Multiply(new(false, true, Columns, Rows, pixels, dy, Columns, x, Rows, 0, WeightGradient, Columns));
    }

    internal sealed class Convolution(ILayers layers, ConvolutionShape shape)
        : Layer(shape.Size * shape.Size * shape.In.Channels / shape.Groups, shape.Out.Channels)
    {
        public override void Forward(nint x, nint y, bool accumulate) => layers.Convolve(shape, x, Weights, accumulate ? 1 : 0, y);

        public override void BackwardData(nint x, nint y, nint dy, nint dx) => layers.ConvolveBackwardData(shape, Weights, dy, dx);

        public override void BackwardWeights(nint x, nint dy) => layers.ConvolveBackwardWeights(shape, x, dy, WeightGradient);
    }

    internal sealed class Pool(ILayers layers, PoolShape shape) : Layer(0, 0)
    {
        public override void Forward(nint x, nint y, bool accumulate) => layers.Pool(shape, x, y);

        public override void BackwardData(nint x, nint y, nint dy, nint dx) => layers.PoolBackward(shape, y, dy, x, dx);

        public override void BackwardWeights(nint x, nint dy)
        {
        }
    }
}

/// <summary>An operator that is ready to run through the libraries, with buffers of its own.</summary>
internal sealed class LibraryWork : IDisposable
{
    // Sums of some ten thousand products in float32, in another order or by another algorithm; with factors rounded by 2^-12 of themselves. A sum
    // of L products that lacks one is off by 1 / sqrt(L): 4e-3 for a weight's gradient over 64 images of 32x32 pixels.
    private const double Tolerance = 1e-4, Tf32Tolerance = 2e-3;

    private readonly Backend _backend;
    private readonly ILayers? _layers;
    private readonly KernelCase _case;
    private readonly KernelAddresses _ours;
    private readonly ImageShape _input, _output, _middleShape;
    private readonly bool _rectifies, _wantsData, _wantsWeights;
    private readonly IReadOnlyList<LibraryPeer.Layer> _first;
    private readonly LibraryPeer.Layer? _second;
    private readonly Source[] _sources;
    private readonly List<nint> _blocks = [];

    // Channels of our output, of which this operator's are the first.
    private readonly int _yChannels;

    // The output of the first layers; raw and normalised output; gradients of the normalised, the raw and the first layers' output.
    private readonly nint _middle, _y, _normalised, _g, _dy, _dMiddle;
    private readonly nint _scale, _shift, _mean, _inverse, _dScale, _dShift;

    /// <summary>An input: as it is, rectified, and the gradients of both.</summary>
    private sealed record Source(float[] Values, nint X, nint Rectified, nint DRectified, nint Dx);

    internal LibraryWork(Backend backend, ILayers? layers, KernelCase kernelCase, KernelAddresses ours, ImageShape input, ImageShape output, bool rectifies,
        IReadOnlyList<LibraryPeer.Layer> first, LibraryPeer.Layer? second)
    {
        (_backend, _layers, _case, _ours) = (backend, layers, kernelCase, ours);
        (_input, _output, _rectifies, _first, _second) = (input, output, rectifies, first, second);
        _middleShape = second is null ? output : output with { Channels = second.Rows };
        _yChannels = kernelCase.Buffers.Single(buffer => buffer.Name == "y").Count / output.Pixels;
        _wantsData = ours[DxOf(0)] != 0;
        _wantsWeights = _case.Buffers.Any(buffer => buffer.Name.StartsWith("d_", StringComparison.Ordinal));

        _sources = [.. first.Select((_, p) => NewSource(InputOf(p)))];
        WriteWeights();
        (_y, _normalised, _g, _dy) = (New(output.Count), New(output.Count), New(output.Count), New(output.Count));
        (_middle, _dMiddle) = second is null ? (_y, _dy) : (New(_middleShape.Count), New(_middleShape.Count));
        var c = output.Channels;
        (_scale, _shift, _mean, _inverse, _dScale, _dShift) = (New(c), New(c), New(c), New(c), New(c), New(c));
        var ones = new float[c];
        Array.Fill(ones, 1);
        backend.Write(_scale, ones);
        WriteGradient();
    }

    /// <summary>Issues the forward pass.</summary>
    public void Forward()
    {
        for (var p = 0; p < _sources.Length; p++)
        {
            var source = _sources[p];
            if (_rectifies)
                _layers?.Relu(_input, source.X, source.Rectified);
            _first[p].Forward(source.Rectified, _middle, accumulate: p > 0);
        }
        _second?.Forward(_middle, _y, accumulate: false);
        _layers?.BatchNorm(_output, _y, _normalised, _scale, _shift, _mean, _inverse);
    }

    /// <summary>Issues the backward pass for the gradients that our kernel is asked for.</summary>
    public void Backward()
    {
        _layers?.BatchNormBackward(_output, _y, _g, _dy, _scale, _dScale, _dShift, _mean, _inverse);
        if (_second is not null)
        {
            _second.BackwardData(_middle, _y, _dy, _dMiddle);
            if (_wantsWeights)
                _second.BackwardWeights(_middle, _dy);
        }
        for (var p = 0; p < _sources.Length; p++)
        {
            var source = _sources[p];
            if (_wantsWeights)
                _first[p].BackwardWeights(source.Rectified, _dMiddle);
            if (!_wantsData)
                continue;
            _first[p].BackwardData(source.Rectified, _middle, _dMiddle, source.DRectified);
            if (_rectifies)
                _layers?.ReluBackward(_input, source.Rectified, source.DRectified, source.X, source.Dx);
        }
    }

    /// <summary>Issues a pass; the backward pass needs what the last forward pass left.</summary>
    public void Run(KernelPass pass)
    {
        if (pass == KernelPass.Forward)
            Forward();
        else
            Backward();
    }

    /// <summary>Compares the results of a pass, which we and the libraries have just run.</summary>
    /// <exception cref="UserException">They are not the same.</exception>
    public void RequireSame(KernelPass pass, bool tf32)
    {
        var most = tf32 ? Tf32Tolerance : Tolerance;
        foreach (var (name, difference) in Differences(pass))
            if (!(difference <= most))
                throw new UserException($"{_case.Name}, {pass}: the {name} of NVIDIA's libraries is {difference:0.0e0} of its norm away from ours, more than " +
                    $"{most:0.0e0}, which is not the same work; run the tests, one of the two is wrong.");
    }

    /// <summary>The 2-norm of the libraries' results less ours over that of ours, by what it is of.</summary>
    internal Dictionary<string, double> Differences(KernelPass pass)
    {
        var differences = new Dictionary<string, double>();
        if (pass == KernelPass.Forward)
        {
            differences["y"] = Difference(OurOutput(), Read(_y, _output.Count));
            if (_layers is not null)
            {
                var (mean, inverse) = Statistics();
                differences["mean"] = Difference(mean, Read(_mean, _output.Channels));
                differences["inverse deviation"] = Difference(inverse, Read(_inverse, _output.Channels));
            }
            return differences;
        }
        for (var p = 0; _wantsData && p < _sources.Length; p++)
            differences[DxOf(p)] = Difference(Ours(DxOf(p), _input.Count), Gradient(_sources[p]));
        if (_wantsWeights)
            foreach (var (layer, name, offset) in Weights())
                differences[$"d_{name}{(offset > 0 ? $" from {offset} on" : "")}"] =
                    Difference(Ours($"d_{name}", offset + layer.Rows * layer.Columns)[offset..], ReadWeights(layer, layer.WeightGradient));
        return differences;
    }

    public void Dispose()
    {
        foreach (var block in _blocks)
            _backend.Free(block);
    }

    private static double Difference(IReadOnlyList<float> ours, IReadOnlyList<float> theirs)
    {
        double difference = 0, norm = 0;
        for (var i = 0; i < ours.Count; i++)
        {
            difference += ((double)ours[i] - theirs[i]) * ((double)ours[i] - theirs[i]);
            norm += (double)ours[i] * ours[i];
        }
        return Math.Sqrt(difference / norm);
    }

    private string InputOf(int part) => _case.Operator == "pointwise" ? $"x{part}" : "x";

    private string DxOf(int part) => $"d{InputOf(part)}";

    /// <summary>Every layer with weights, their name in our case, and where in that buffer they begin.</summary>
    private IEnumerable<(LibraryPeer.Layer Layer, string Name, int Offset)> Weights()
    {
        var name = _second is null ? "weight" : "depthwise";
        for (var p = 0; p < _first.Count; p++)
            if (_first[p].Rows > 0)
                yield return (_first[p], name, p * _first[p].Rows * _first[p].Columns);
        if (_second is not null)
            yield return (_second, "pointwise", 0);
    }

    private Source NewSource(string name)
    {
        var values = Ours(name, _input.Count);
        if (_ours["x_normalization"] != 0)
        {
            var normalization = Ours("x_normalization", 4 * _input.Channels);
            for (var i = 0; i < values.Length; i++)
                values[i] = MathF.FusedMultiplyAdd(normalization[i % _input.Channels], values[i], normalization[_input.Channels + i % _input.Channels]);
        }
        var x = New(_input.Count);
        _backend.Write(x, values);
        var dRectified = _wantsData ? New(_input.Count) : 0;
        if (!_rectifies)
            return new(values, x, x, dRectified, dRectified);
        var rectified = New(_input.Count);
        _backend.Write(rectified, Array.ConvertAll(values, value => value < 0 ? 0 : value));
        return new(values, x, rectified, dRectified, _wantsData ? New(_input.Count) : 0);
    }

    private void WriteWeights()
    {
        foreach (var (layer, name, offset) in Weights())
        {
            var count = layer.Rows * layer.Columns;
            var weights = Ours(name, offset + count)[offset..];
            (layer.Weights, layer.WeightGradient) = (New(count), New(count));
            _backend.Write(layer.Weights, layer.TransposesWeights ? Transpose(weights, layer.Rows, layer.Columns) : weights);
        }
    }

    /// <summary>
    /// Writes g for the libraries, and dy, the gradient of the raw output that a batch norm makes of it: dy = a g + b y + c, of which our kernel
    /// gets the coefficients.
    /// </summary>
    private void WriteGradient()
    {
        var (y, g, channels) = (OurOutput(), Slice(Ours("g", _output.Pixels * _yChannels)), _output.Channels);
        var (mean, inverse) = Statistics();
        var (sum, product) = (new double[channels], new double[channels]);
        for (var i = 0; i < y.Length; i++)
        {
            sum[i % channels] += g[i];
            product[i % channels] += (double)g[i] * (y[i] - mean[i % channels]) * inverse[i % channels];
        }
        var coefficients = new float[3 * _yChannels];
        for (var c = 0; c < channels; c++)
        {
            var slope = -(double)inverse[c] * inverse[c] * product[c] / _output.Pixels;
            coefficients[c] = inverse[c];
            coefficients[_yChannels + c] = (float)slope;
            coefficients[2 * _yChannels + c] = (float)(-inverse[c] * sum[c] / _output.Pixels - slope * mean[c]);
        }
        _backend.Write(_ours["coefficients"], coefficients);
        _backend.Write(_g, g);
        var dy = new float[y.Length];
        for (var i = 0; i < y.Length; i++)
            dy[i] = coefficients[i % channels] * g[i] + coefficients[_yChannels + i % channels] * y[i] + coefficients[2 * _yChannels + i % channels];
        _backend.Write(_dy, dy);
    }

    /// <summary>The libraries' gradient of an input; without cuDNN it has yet to pass the ReLU.</summary>
    private float[] Gradient(Source source)
    {
        if (_layers is not null || !_rectifies)
            return Read(source.Dx, _input.Count);
        var gradient = Read(source.DRectified, _input.Count);
        for (var i = 0; i < gradient.Length; i++)
            if (source.Values[i] <= 0)
                gradient[i] = 0;
        return gradient;
    }

    /// <summary>Mean and 1 / sqrt(biased variance + epsilon) of every channel of our output, from the statistics of its images that we kept.</summary>
    private (float[] Mean, float[] Inverse) Statistics()
    {
        var statistics = Ours("statistics", _output.Images * 2 * _yChannels);
        var (mean, inverse) = (new float[_output.Channels], new float[_output.Channels]);
        for (var c = 0; c < mean.Length; c++)
        {
            // Of each image: its mean, and the sum of squared deviations from that.
            var images = Enumerable.Range(0, _output.Images)
                .Select(n => (Mean: (double)statistics[2 * n * _yChannels + c], Squares: (double)statistics[(2 * n + 1) * _yChannels + c])).ToList();
            var average = images.Average(image => image.Mean);
            var variance = images.Sum(image => image.Squares) / _output.Pixels + images.Average(image => (image.Mean - average) * (image.Mean - average));
            (mean[c], inverse[c]) = ((float)average, (float)(1 / Math.Sqrt(variance + CuDnn.Epsilon)));
        }
        return (mean, inverse);
    }

    private float[] OurOutput() => Slice(Ours("y", _output.Pixels * _yChannels));

    private float[] Slice(float[] values)
    {
        var slice = new float[_output.Count];
        for (var pixel = 0; pixel < _output.Pixels; pixel++)
            values.AsSpan(pixel * _yChannels, _output.Channels).CopyTo(slice.AsSpan(pixel * _output.Channels));
        return slice;
    }

    private float[] Ours(string name, int count) => Read(_ours[name], count);

    private float[] ReadWeights(LibraryPeer.Layer layer, nint address)
    {
        var weights = Read(address, layer.Rows * layer.Columns);
        return layer.TransposesWeights ? Transpose(weights, layer.Columns, layer.Rows) : weights;
    }

    private static float[] Transpose(float[] matrix, int rows, int columns)
    {
        var transposed = new float[matrix.Length];
        for (var row = 0; row < rows; row++)
            for (var column = 0; column < columns; column++)
                transposed[column * rows + row] = matrix[row * columns + column];
        return transposed;
    }

    private float[] Read(nint address, int count)
    {
        var values = new float[count];
        _backend.Read(address, values.AsSpan());
        return values;
    }

    private nint New(int count)
    {
        var address = _backend.Allocate(sizeof(float) * (long)count);
        _blocks.Add(address);
        return address;
    }
}
