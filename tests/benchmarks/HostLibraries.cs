using PerturbNas.Benchmarks;

namespace PerturbNas.Tests.Benchmarks;

/// <summary>
/// cublasSgemm on the processor, as the library's documentation has it: column-major, and with its checks of leading dimensions. Sums in double.
/// </summary>
internal sealed unsafe class HostGemm : IGemm
{
    /// <summary>The products that were asked for.</summary>
    public List<Gemm> Calls { get; } = [];

    /// <summary>How many terms of every sum to leave out: a planted error.</summary>
    public int Omitted { get; init; }

    public void Multiply(in Gemm g)
    {
        Calls.Add(g);
        Assert.True(g.LeadingA >= (g.TransposeA ? g.K : g.M) && g.LeadingB >= (g.TransposeB ? g.N : g.K) && g.LeadingC >= g.M, $"cuBLAS refuses {g}");
        float* a = (float*)g.A, b = (float*)g.B, c = (float*)g.C;
        for (var j = 0; j < g.N; j++)
            for (var i = 0; i < g.M; i++)
            {
                double sum = 0;
                for (var k = 0; k < g.K - Omitted; k++)
                    sum += (double)a[g.TransposeA ? k + (long)i * g.LeadingA : i + (long)k * g.LeadingA] *
                        b[g.TransposeB ? j + (long)k * g.LeadingB : k + (long)j * g.LeadingB];
                // With beta 0 the library does not read C, which may hold not-a-number.
                c[i + (long)j * g.LeadingC] = (float)(g.Beta == 0 ? sum : sum + g.Beta * c[i + (long)j * g.LeadingC]);
            }
    }

    public void Dispose()
    {
    }
}

/// <summary>
/// The layers of cuDNN on the processor, as its documentation defines them: images NHWC, filters [outputs][height][width][inputs of a group],
/// cross-correlation. Sums in double.
/// </summary>
internal sealed unsafe class HostLayers : ILayers
{
    public void Relu(ImageShape shape, nint x, nint y)
    {
        for (var i = 0; i < shape.Count; i++)
            ((float*)y)[i] = Math.Max(((float*)x)[i], 0);
    }

    public void ReluBackward(ImageShape shape, nint y, nint dy, nint x, nint dx)
    {
        for (var i = 0; i < shape.Count; i++)
            ((float*)dx)[i] = ((float*)x)[i] > 0 ? ((float*)dy)[i] : 0;
    }

    public void Convolve(ConvolutionShape shape, nint x, nint weights, float beta, nint y)
    {
        var sums = new double[shape.Out.Count];
        ForEachProduct(shape, (input, weight, output) => sums[output] += (double)((float*)x)[input] * ((float*)weights)[weight]);
        for (var i = 0; i < sums.Length; i++)
            ((float*)y)[i] = (float)(beta == 0 ? sums[i] : sums[i] + beta * ((float*)y)[i]);
    }

    public void ConvolveBackwardData(ConvolutionShape shape, nint weights, nint dy, nint dx)
    {
        var sums = new double[shape.In.Count];
        ForEachProduct(shape, (input, weight, output) => sums[input] += (double)((float*)dy)[output] * ((float*)weights)[weight]);
        Write(sums, dx);
    }

    public void ConvolveBackwardWeights(ConvolutionShape shape, nint x, nint dy, nint dWeights)
    {
        var sums = new double[shape.Out.Channels * shape.Size * shape.Size * shape.In.Channels / shape.Groups];
        ForEachProduct(shape, (input, weight, output) => sums[weight] += (double)((float*)x)[input] * ((float*)dy)[output]);
        Write(sums, dWeights);
    }

    public void Pool(PoolShape shape, nint x, nint y) => ForEachWindow(shape, (output, window) =>
        ((float*)y)[output] = shape.Maximum ? window.Max(i => ((float*)x)[i]) : (float)window.Average(i => (double)((float*)x)[i]));

    public void PoolBackward(PoolShape shape, nint y, nint dy, nint x, nint dx)
    {
        var sums = new double[shape.In.Count];
        ForEachWindow(shape, (output, window) =>
        {
            var gradient = (double)((float*)dy)[output];
            if (shape.Maximum)
                sums[window.First(i => ((float*)x)[i] == ((float*)y)[output])] += gradient;
            else
                window.ForEach(i => sums[i] += gradient / window.Count);
        });
        Write(sums, dx);
    }

    public void BatchNorm(ImageShape shape, nint x, nint y, nint scale, nint shift, nint mean, nint inverse)
    {
        for (var c = 0; c < shape.Channels; c++)
        {
            var values = Channel(shape, x, c);
            var average = values.Average();
            var deviation = Math.Sqrt(values.Average(value => (value - average) * (value - average)) + CuDnn.Epsilon);
            (((float*)mean)[c], ((float*)inverse)[c]) = ((float)average, (float)(1 / deviation));
            for (var p = 0; p < shape.Pixels; p++)
                ((float*)y)[p * shape.Channels + c] = (float)(((float*)scale)[c] * (values[p] - average) / deviation + ((float*)shift)[c]);
        }
    }

    public void BatchNormBackward(ImageShape shape, nint x, nint dy, nint dx, nint scale, nint dScale, nint dShift, nint mean, nint inverse)
    {
        for (var c = 0; c < shape.Channels; c++)
        {
            var gradients = Channel(shape, dy, c);
            var standardised = Channel(shape, x, c).ConvertAll(value => (value - ((float*)mean)[c]) * ((float*)inverse)[c]);
            var (sum, product) = (gradients.Sum(), gradients.Zip(standardised, (g, v) => g * v).Sum());
            (((float*)dShift)[c], ((float*)dScale)[c]) = ((float)sum, (float)product);
            for (var p = 0; p < shape.Pixels; p++)
                ((float*)dx)[p * shape.Channels + c] =
                    (float)(((float*)scale)[c] * ((float*)inverse)[c] * (gradients[p] - sum / shape.Pixels - standardised[p] * product / shape.Pixels));
        }
    }

    public void Dispose()
    {
    }

    private static List<double> Channel(ImageShape shape, nint x, int channel) =>
        [.. Enumerable.Range(0, shape.Pixels).Select(pixel => (double)((float*)x)[pixel * shape.Channels + channel])];

    private static void Write(double[] sums, nint to)
    {
        for (var i = 0; i < sums.Length; i++)
            ((float*)to)[i] = (float)sums[i];
    }

    private static int At(ImageShape shape, int image, int row, int column, int channel) =>
        ((image * shape.Height + row) * shape.Width + column) * shape.Channels + channel;

    /// <summary>Every product of a convolution: the elements of the input, the filters and the output that meet.</summary>
    private static void ForEachProduct(ConvolutionShape shape, Action<int, int, int> product)
    {
        var (inputs, outputs) = (shape.In.Channels / shape.Groups, shape.Out.Channels / shape.Groups);
        for (var n = 0; n < shape.Out.Images; n++)
            for (var row = 0; row < shape.Out.Height; row++)
                for (var column = 0; column < shape.Out.Width; column++)
                    for (var k = 0; k < shape.Out.Channels; k++)
                        for (var r = 0; r < shape.Size; r++)
                            for (var s = 0; s < shape.Size; s++)
                            {
                                var (y, x) = (row * shape.Stride + r * shape.Dilation - shape.Padding, column * shape.Stride + s * shape.Dilation - shape.Padding);
                                if (y < 0 || y >= shape.In.Height || x < 0 || x >= shape.In.Width)
                                    continue;
                                for (var c = 0; c < inputs; c++)
                                    product(At(shape.In, n, y, x, k / outputs * inputs + c), ((k * shape.Size + r) * shape.Size + s) * inputs + c,
                                        At(shape.Out, n, row, column, k));
                            }
    }

    /// <summary>Every output of a pool with the inputs that lie in its window, row by row.</summary>
    private static void ForEachWindow(PoolShape shape, Action<int, List<int>> window)
    {
        for (var n = 0; n < shape.Out.Images; n++)
            for (var row = 0; row < shape.Out.Height; row++)
                for (var column = 0; column < shape.Out.Width; column++)
                    for (var c = 0; c < shape.Out.Channels; c++)
                    {
                        var inside = from y in Enumerable.Range(row * shape.Stride - 1, 3)
                                     from x in Enumerable.Range(column * shape.Stride - 1, 3)
                                     where y >= 0 && y < shape.In.Height && x >= 0 && x < shape.In.Width
                                     select At(shape.In, n, y, x, c);
                        window(At(shape.Out, n, row, column, c), [.. inside]);
                    }
    }
}
