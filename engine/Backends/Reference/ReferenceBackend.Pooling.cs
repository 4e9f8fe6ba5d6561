namespace PerturbNas.Backends.Reference;

/// <summary>Pooling: maximum and average 3x3 (with the skip connection), and the global average.</summary>
public sealed unsafe partial class ReferenceBackend
{
    public override void PoolForward(in PoolArgs a)
    {
        CheckPool(a);
        Require(a.X != 0 && a.Y[Pooling.None] == 0 && a.Statistics[Pooling.None] == 0);
        foreach (var pooling in new[] { Pooling.Max3x3, Pooling.Avg3x3 })
        {
            var (y, _) = Pool(a, pooling);
            Store(a.Y[pooling], y);
            Store(a.Statistics[pooling], Statistics(y, a.Variants * a.Images, a.Channels));
        }
    }

    public override void PoolBackward(in PoolArgs a)
    {
        CheckPool(a);
        Require(a.Variants == 1);
        Require(a.X != 0 && a.Dx != 0 && a.Gradients != 0 && a.GradientCount >= 1);
        var channels = a.Channels;
        var dx = new double[a.Images * a.Height * a.Width * channels];
        var counts = PoolCounts(a);
        var (maximum, argmax) = Pool(a, Pooling.Max3x3);
        var (average, _) = Pool(a, Pooling.Avg3x3);
        foreach (var gradient in new ReadOnlySpan<PoolGradientArgs>((void*)a.Gradients, a.GradientCount))
        {
            Require(gradient.G != 0);
            var dMaximum = Gradient(a, gradient, Pooling.Max3x3, maximum);
            var dAverage = Gradient(a, gradient, Pooling.Avg3x3, average);
            Require(dMaximum != null || dAverage != null || gradient.Coefficients[Pooling.None] != 0);
            for (var image = 0; image < a.Images; image++)
                ForPoolTaps(a, image, (tap, output, source) =>
                {
                    for (var c = 0; c < channels; c++)
                    {
                        if (dMaximum != null && argmax[output * channels + c] == tap)
                            dx[source * channels + c] += dMaximum[output * channels + c];
                        if (dAverage != null)
                            dx[source * channels + c] += dAverage[output * channels + c] / counts[output];
                    }
                });
            if (gradient.Coefficients[Pooling.None] == 0)
                continue;
            Require(a.Stride == 1);
            var dSkip = Gradient(a, gradient, Pooling.None, Load(a.X, dx.Length))!;
            for (var i = 0; i < dx.Length; i++)
                dx[i] += dSkip[i];
        }
        Store(a.Dx, dx, a.Accumulate != 0);
    }

    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a)
    {
        var (variants, channels) = CheckGlobalAveragePool(a);
        Require(a.Out != 0);
        var output = new double[variants * a.Images * channels];
        var first = 0;
        foreach (var part in new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount))
        {
            var sums = ImageSums(
                Load(part.X, (long)part.Variants * a.Images * a.Pixels * part.Channels), null, part.Variants * a.Images, part.Channels);
            for (var image = 0; image < variants * a.Images; image++)
                for (var c = 0; c < part.Channels; c++)
                    output[image * channels + first + c] =
                        sums[image % (part.Variants * a.Images) * part.Channels + c] / a.Pixels;
            first += part.Channels;
        }
        Store(a.Out, output);
    }

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a)
    {
        var (variants, channels) = CheckGlobalAveragePool(a);
        Require(variants == 1);
        Require(a.G != 0);
        var g = Load(a.G, a.Images * channels);
        var first = 0;
        foreach (var part in new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount))
        {
            var dx = new double[a.Images * a.Pixels * part.Channels];
            for (var i = 0; i < dx.Length; i++)
                dx[i] = g[i / part.Channels / a.Pixels * channels + first + i % part.Channels] / a.Pixels;
            Store(part.Dx, dx, part.Accumulate != 0);
            first += part.Channels;
        }
    }

    private static void CheckPool(in PoolArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Height > 0 && a.Width > 0 && a.Channels > 0);
        Require(a.Stride is 1 or 2);
    }

    /// <summary>A node's gradient of y; null: the node does not take it.</summary>
    private static double[]? Gradient(in PoolArgs a, PoolGradientArgs gradient, Pooling pooling, double[] y) =>
        gradient.Coefficients[pooling] == 0
            ? null
            : RawGradient(gradient.G, gradient.Coefficients[pooling], y, PoolPixels(a), a.Channels, 0, a.Channels);

    /// <summary>x pooled, and of the maximum the tap that each element was taken from.</summary>
    private static (double[] Y, byte[] Argmax) Pool(in PoolArgs a, Pooling pooling)
    {
        var channels = a.Channels;
        var x = Load(a.X, (long)a.Variants * a.Images * a.Height * a.Width * channels);
        var y = new double[PoolPixels(a) * channels];
        var argmax = new byte[y.Length];
        Array.Fill(argmax, byte.MaxValue);
        var counts = PoolCounts(a);
        for (var image = 0; image < a.Variants * a.Images; image++)
            ForPoolTaps(a, image, (tap, output, source) =>
            {
                for (var c = 0; c < channels; c++)
                {
                    var i = output * channels + c;
                    var value = x[source * channels + c];
                    if (pooling == Pooling.Avg3x3)
                        y[i] += value / counts[output];
                    else if (argmax[i] == byte.MaxValue || value > y[i] || (double.IsNaN(value) && !double.IsNaN(y[i])))
                        (y[i], argmax[i]) = (value, (byte)tap);
                }
            });
        return (y, argmax);
    }

    private static int PoolPixels(in PoolArgs a) =>
        a.Variants * a.Images * OutputExtent(a.Height, 3, a.Stride, 1) * OutputExtent(a.Width, 3, a.Stride, 1);

    /// <summary>How many input pixels the window of each output pixel has.</summary>
    private static int[] PoolCounts(in PoolArgs a)
    {
        var counts = new int[PoolPixels(a)];
        for (var image = 0; image < a.Variants * a.Images; image++)
            ForPoolTaps(a, image, (_, output, _) => counts[output]++);
        return counts;
    }

    private static void ForPoolTaps(in PoolArgs a, int image, Action<int, int, int> visit) =>
        ForTaps(image, (a.Height, a.Width), (3, 3), (a.Stride, a.Stride), (1, 1), 1, visit);

    private static (int Variants, int Channels) CheckGlobalAveragePool(in GlobalAveragePoolArgs a)
    {
        Require(a.Images > 0 && a.Pixels > 0);
        Require(a.Parts != 0 && a.PartCount is >= 1 and <= 8);
        return CheckParts(a.Parts, a.PartCount);
    }
}
