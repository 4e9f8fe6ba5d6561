using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Reference;

/// <summary>
/// The oracle: every kernel of kernels/perturbnas_kernels.h as plain loops in double precision. Each operator loads its inputs into
/// arrays, computes one textbook step after another, and stores the results; nothing is fused and nothing is clever, so that the
/// fast backends can be checked against it, and it against finite differences. Loops run in parallel only over elements of the
/// result, so sums have one order and the bits are the same for any number of processors.
/// </summary>
public sealed unsafe partial class ReferenceBackend : Backend
{
    private const int Alignment = 64;

    public override string Name => "reference";

    public override int ElementSize => sizeof(double);

    public override nint Allocate(long bytes)
    {
        ArgumentOutOfRangeException.ThrowIfNegative(bytes);
        var size = (nuint)((bytes / Alignment + 1) * Alignment);
        var memory = NativeMemory.AlignedAlloc(size, Alignment);
        NativeMemory.Clear(memory, size);
        return (nint)memory;
    }

    public override void Free(nint address) => NativeMemory.AlignedFree((void*)address);

    public override void Write(nint address, ReadOnlySpan<float> values)
    {
        var target = (double*)address;
        for (var i = 0; i < values.Length; i++)
            target[i] = values[i];
    }

    public override void Write(nint address, ReadOnlySpan<double> values) =>
        values.CopyTo(new Span<double>((void*)address, values.Length));

    public override void Write(nint address, ReadOnlySpan<int> values) =>
        values.CopyTo(new Span<int>((void*)address, values.Length));

    public override void Read(nint address, Span<float> values)
    {
        var source = (double*)address;
        for (var i = 0; i < values.Length; i++)
            values[i] = (float)source[i];
    }

    public override void Read(nint address, Span<double> values) =>
        new ReadOnlySpan<double>((void*)address, values.Length).CopyTo(values);

    public override void ReadBytes(nint address, Span<byte> bytes) =>
        new ReadOnlySpan<byte>((void*)address, bytes.Length).CopyTo(bytes);

    public override void Zero(nint address, long bytes) => NativeMemory.Clear((void*)address, (nuint)bytes);

    protected override void Dispose(bool disposing)
    {
    }

    /// <summary>Refuses the arguments of the calling kernel unless the condition, which is also the message, holds.</summary>
    private static void Require(
        bool condition,
        [CallerArgumentExpression(nameof(condition))] string text = "",
        [CallerMemberName] string kernel = "")
    {
        if (!condition)
            throw new KernelException($"{kernel}: the arguments break {text}");
    }

    private static double[] Load(nint address, long count) => new ReadOnlySpan<double>((void*)address, checked((int)count)).ToArray();

    /// <summary>The array at an address, or null where there is none.</summary>
    private static double[]? LoadOptional(nint address, long count) => address == 0 ? null : Load(address, count);

    /// <summary>Assigns, or adds to, the array at an address; does nothing where there is none.</summary>
    private static void Store(nint address, double[] values, bool accumulate = false)
    {
        if (address == 0)
            return;
        var target = (double*)address;
        for (var i = 0; i < values.Length; i++)
            target[i] = accumulate ? target[i] + values[i] : values[i];
    }

    private static int OutputExtent(int size, int kernel, int stride, int padding, int dilation = 1) =>
        (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;

    private static double Relu(double n) => n < 0 ? 0 : n;

    /// <summary>n = scale * y + shift of every element of [variants, pixels, channels]; a copy of y where there is no normalization.</summary>
    private static double[] Normalize(double[] y, double[]? normalization, int variants, int channels)
    {
        if (normalization == null)
            return (double[])y.Clone();
        var n = new double[y.Length];
        Parallel.For(0, variants, v =>
        {
            for (var i = y.Length / variants * v; i < y.Length / variants * (v + 1); i++)
            {
                var scale = v * 4 * channels + i % channels;
                n[i] = normalization[scale] * y[i] + normalization[scale + channels];
            }
        });
        return n;
    }

    /// <summary>yhat = inverse deviation * (y - mean), for V = 1; a copy of y where there is no normalization.</summary>
    private static double[] Standardize(double[] y, double[]? normalization, int channels)
    {
        var standardized = (double[])y.Clone();
        if (normalization != null)
            for (var i = 0; i < y.Length; i++)
            {
                var c = i % channels;
                standardized[i] = normalization[2 * channels + c] * (y[i] - normalization[3 * channels + c]);
            }
        return standardized;
    }

    /// <summary>Mean and sum of squared deviations of every image and channel: [images, pixels, channels] to [images, 2, channels].</summary>
    private static double[] Statistics(double[] y, int images, int channels)
    {
        var pixels = y.Length / images / channels;
        var statistics = new double[images * 2 * channels];
        Parallel.For(0, images, image =>
        {
            for (var c = 0; c < channels; c++)
            {
                var sum = 0.0;
                for (var p = 0; p < pixels; p++)
                    sum += y[(image * pixels + p) * channels + c];
                var mean = sum / pixels;
                var squares = 0.0;
                for (var p = 0; p < pixels; p++)
                {
                    var deviation = y[(image * pixels + p) * channels + c] - mean;
                    squares += deviation * deviation;
                }
                statistics[image * 2 * channels + c] = mean;
                statistics[(image * 2 + 1) * channels + c] = squares;
            }
        });
        return statistics;
    }

    /// <summary>
    /// The gradient of a raw output, dy = a g + b y + c, of channels first..first + count of [pixels, channels]; g where there are no
    /// coefficients.
    /// </summary>
    private static double[] RawGradient(nint g, nint coefficients, nint y, long pixels, int channels, int first, int count) =>
        RawGradient(g, coefficients, coefficients == 0 ? [] : Load(y, pixels * channels), pixels, channels, first, count);

    private static double[] RawGradient(nint g, nint coefficients, double[] y, long pixels, int channels, int first, int count)
    {
        var gradient = Load(g, pixels * channels);
        var abc = LoadOptional(coefficients, 3 * channels);
        var dy = new double[pixels * count];
        for (var p = 0; p < pixels; p++)
            for (var k = 0; k < count; k++)
            {
                var c = first + k;
                var i = p * channels + c;
                dy[p * count + k] = abc == null
                    ? gradient[i]
                    : abc[c] * gradient[i] + abc[channels + c] * y[i] + abc[2 * channels + c];
            }
        return dy;
    }

    /// <summary>Per image and channel the sum over pixels of a (or of a * b): [images, pixels, channels] to [images, channels].</summary>
    private static double[] ImageSums(double[] a, double[]? b, int images, int channels)
    {
        var sums = new double[images * channels];
        var perImage = a.Length / images;
        for (var i = 0; i < a.Length; i++)
            sums[i / perImage * channels + i % channels] += b == null ? a[i] : a[i] * b[i];
        return sums;
    }

    /// <summary>Row <paramref name="row"/> of gradient_sums [images, rows, channels] is the image sums [images, channels].</summary>
    private static void PutRow(double[] gradientSums, double[] sums, int images, int rows, int row, int channels)
    {
        for (var image = 0; image < images; image++)
            Array.Copy(sums, image * channels, gradientSums, (image * rows + row) * channels, channels);
    }

    /// <summary>a [rows, inner] times b [inner, columns].</summary>
    private static double[] Product(double[] a, double[] b, int inner, int columns)
    {
        var product = new double[a.Length / inner * columns];
        Parallel.For(0, a.Length / inner, row =>
        {
            for (var k = 0; k < inner; k++)
                for (var j = 0; j < columns; j++)
                    product[row * columns + j] += a[row * inner + k] * b[k * columns + j];
        });
        return product;
    }

    /// <summary>a [rows, columns] times the transpose of b [inner, columns].</summary>
    private static double[] ProductWithTransposed(double[] a, double[] b, int inner, int columns)
    {
        var product = new double[a.Length / columns * inner];
        Parallel.For(0, a.Length / columns, row =>
        {
            for (var k = 0; k < inner; k++)
                for (var j = 0; j < columns; j++)
                    product[row * inner + k] += a[row * columns + j] * b[k * columns + j];
        });
        return product;
    }

    /// <summary>The transpose of a [rows, inner] times b [rows, columns].</summary>
    private static double[] TransposedProduct(double[] a, double[] b, int inner, int columns)
    {
        var product = new double[inner * columns];
        Parallel.For(0, inner, k =>
        {
            for (var row = 0; row < a.Length / inner; row++)
                for (var j = 0; j < columns; j++)
                    product[k * columns + j] += a[row * inner + k] * b[row * columns + j];
        });
        return product;
    }
}
