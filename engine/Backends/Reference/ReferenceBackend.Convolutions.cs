namespace PerturbNas.Backends.Reference;

/// <summary>Convolutions: depthwise separable, pointwise and dense.</summary>
public sealed unsafe partial class ReferenceBackend
{
    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a)
    {
        CheckDepthwisePointwise(a);
        Require(a.X != 0 && a.Depthwise != 0 && a.Pointwise != 0 && a.Y != 0);
        var (rectified, _) = RectifiedInput(a);
        var middle = Depthwise(a, rectified, Load(a.Depthwise, a.Kernel * a.Kernel * a.InChannels));
        var y = Product(middle, Load(a.Pointwise, a.InChannels * a.OutChannels), a.InChannels, a.OutChannels);
        Store(a.Y, y);
        if (a.Statistics != 0)
            Store(a.Statistics, Statistics(y, a.Variants * a.Images, a.OutChannels));
    }

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a)
    {
        CheckDepthwisePointwise(a);
        Require(a.Variants == 1);
        Require(a.X != 0 && a.Depthwise != 0 && a.Pointwise != 0 && a.G != 0);
        Require(a.Coefficients == 0 || a.Y != 0);
        Require(a.GradientSums == 0 || a.XNormalization != 0);
        Require((a.DDepthwise == 0) == (a.DPointwise == 0));
        var (oh, ow) = DepthwiseExtents(a);
        var depthwise = Load(a.Depthwise, a.Kernel * a.Kernel * a.InChannels);
        var pointwise = Load(a.Pointwise, a.InChannels * a.OutChannels);
        var (rectified, normalized) = RectifiedInput(a);
        var dy = RawGradient(a.G, a.Coefficients, a.Y, (long)a.Images * oh * ow, a.OutChannels, 0, a.OutChannels);
        if (a.DPointwise != 0)
            Store(a.DPointwise, TransposedProduct(Depthwise(a, rectified, depthwise), dy, a.InChannels, a.OutChannels));
        var middleGradient = ProductWithTransposed(dy, pointwise, a.InChannels, a.OutChannels);
        if (a.DDepthwise != 0)
            Store(a.DDepthwise, DepthwiseWeightGradient(a, rectified, middleGradient));
        if (a.Dx == 0 && a.GradientSums == 0)
            return;
        var dx = DepthwiseInputGradient(a, middleGradient, depthwise);
        for (var i = 0; i < dx.Length; i++)
            if (!(normalized[i] > 0))
                dx[i] = 0;
        if (a.Dx != 0)
        {
            Store(a.Dx, dx, a.Accumulate != 0);
            dx = Load(a.Dx, dx.Length);
        }
        if (a.GradientSums != 0)
        {
            var normalization = Load(a.XNormalization, 4 * a.InChannels);
            var xhat = Standardize(Load(a.X, dx.Length), normalization, a.InChannels);
            var sums = new double[a.Images * 2 * a.InChannels];
            PutRow(sums, ImageSums(dx, null, a.Images, a.InChannels), a.Images, 2, 0, a.InChannels);
            PutRow(sums, ImageSums(dx, xhat, a.Images, a.InChannels), a.Images, 2, 1, a.InChannels);
            Store(a.GradientSums, sums);
        }
    }

    public override void PointwiseForward(in PointwiseArgs a)
    {
        var shape = CheckPointwise(a);
        Require(a.Weight != 0 && a.Y != 0);
        var (rectified, _) = GatheredInput(a, shape);
        var product = Product(rectified, Load(a.Weight, shape.InChannels * a.OutChannels), shape.InChannels, a.OutChannels);
        StoreSlice(a.Y, product, a.OutChannels, a.YChannels, a.YOffset);
        if (a.Statistics != 0)
            StoreSlice(a.Statistics, Statistics(product, shape.Variants * a.Images, a.OutChannels), a.OutChannels, a.YChannels, a.YOffset);
    }

    public override void PointwiseBackward(in PointwiseArgs a)
    {
        var shape = CheckPointwise(a);
        Require(shape.Variants == 1);
        Require(a.Weight != 0 && a.G != 0);
        Require(a.Coefficients == 0 || a.Y != 0);
        var (rectified, input) = GatheredInput(a, shape);
        var pixels = (long)a.Images * shape.OutHeight * shape.OutWidth;
        var dy = RawGradient(a.G, a.Coefficients, a.Y, pixels, a.YChannels, a.YOffset, a.OutChannels);
        if (a.DWeight != 0)
            Store(a.DWeight, TransposedProduct(rectified, dy, shape.InChannels, a.OutChannels));
        var gathered = ProductWithTransposed(dy, Load(a.Weight, shape.InChannels * a.OutChannels), shape.InChannels, a.OutChannels);
        if (a.Relu != 0)
            for (var i = 0; i < gathered.Length; i++)
                if (!(input[i] > 0))
                    gathered[i] = 0;
        var first = 0;
        foreach (var part in new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount))
        {
            if (part.Dx != 0)
            {
                var dx = new double[a.Images * a.Height * a.Width * part.Channels];
                ForGatheredPixels(a, shape, 1, (pixel, source) =>
                {
                    for (var c = 0; source >= 0 && c < part.Channels; c++)
                        dx[source * part.Channels + c] = gathered[pixel * shape.InChannels + first + c];
                });
                Store(part.Dx, dx, part.Accumulate != 0);
            }
            first += part.Channels;
        }
    }

    public override void ConvolutionForward(in ConvolutionArgs a)
    {
        CheckConvolution(a);
        Require(a.X != 0 && a.Weight != 0 && a.Y != 0);
        var (shape, inChannels, outChannels) = (a, a.InChannels, a.OutChannels);
        var (oh, ow) = ConvolutionExtents(a);
        var weight = Load(a.Weight, a.KernelH * a.KernelW * inChannels * outChannels);
        var input = ConvolutionInput(a);
        var y = new double[a.Variants * a.Images * oh * ow * outChannels];
        Parallel.For(0, a.Variants * a.Images, image => ForConvolutionTaps(shape, image, (tap, output, source) =>
        {
            for (var ci = 0; ci < inChannels; ci++)
                for (var co = 0; co < outChannels; co++)
                    y[output * outChannels + co] +=
                        input[source * inChannels + ci] * weight[(tap * inChannels + ci) * outChannels + co];
        }));
        Store(a.Y, y);
        if (a.Statistics != 0)
            Store(a.Statistics, Statistics(y, a.Variants * a.Images, outChannels));
    }

    public override void ConvolutionBackward(in ConvolutionArgs a)
    {
        CheckConvolution(a);
        Require(a.Variants == 1);
        Require(a.X != 0 && a.Weight != 0 && a.G != 0);
        Require(a.Coefficients == 0 || a.Y != 0);
        var (shape, inChannels, outChannels) = (a, a.InChannels, a.OutChannels);
        var (oh, ow) = ConvolutionExtents(a);
        var input = ConvolutionInput(a);
        var dy = RawGradient(a.G, a.Coefficients, a.Y, (long)a.Images * oh * ow, outChannels, 0, outChannels);
        if (a.Dx != 0)
        {
            var weight = Load(a.Weight, a.KernelH * a.KernelW * inChannels * outChannels);
            var dx = new double[input.Length];
            Parallel.For(0, a.Images, image => ForConvolutionTaps(shape, image, (tap, output, source) =>
            {
                for (var ci = 0; ci < inChannels; ci++)
                    for (var co = 0; co < outChannels; co++)
                        dx[source * inChannels + ci] +=
                            dy[output * outChannels + co] * weight[(tap * inChannels + ci) * outChannels + co];
            }));
            if (a.Relu != 0)
                for (var i = 0; i < dx.Length; i++)
                    if (!(input[i] > 0))
                        dx[i] = 0;
            Store(a.Dx, dx, a.Accumulate != 0);
        }
        if (a.DWeight != 0)
        {
            var dWeight = new double[a.KernelH * a.KernelW * inChannels * outChannels];
            for (var image = 0; image < a.Images; image++)
                ForConvolutionTaps(shape, image, (tap, output, source) =>
                {
                    for (var ci = 0; ci < inChannels; ci++)
                        for (var co = 0; co < outChannels; co++)
                            dWeight[(tap * inChannels + ci) * outChannels + co] +=
                                input[source * inChannels + ci] * dy[output * outChannels + co];
                });
            Store(a.DWeight, dWeight);
        }
    }

    private static void CheckDepthwisePointwise(in DepthwisePointwiseArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Height > 0 && a.Width > 0 && a.InChannels > 0 && a.OutChannels > 0);
        Require(a.Kernel is 3 or 5 or 7);
        Require(a.Stride is 1 or 2);
        Require(a.Dilation is 1 or 2);
    }

    private static (int Height, int Width) DepthwiseExtents(in DepthwisePointwiseArgs a)
    {
        var padding = a.Dilation * (a.Kernel / 2);
        return (OutputExtent(a.Height, a.Kernel, a.Stride, padding, a.Dilation),
            OutputExtent(a.Width, a.Kernel, a.Stride, padding, a.Dilation));
    }

    private static (double[] Rectified, double[] Normalized) RectifiedInput(in DepthwisePointwiseArgs a)
    {
        var x = Load(a.X, (long)a.Variants * a.Images * a.Height * a.Width * a.InChannels);
        var normalization = LoadOptional(a.XNormalization, a.Variants * 4 * a.InChannels);
        var normalized = Normalize(x, normalization, a.Variants, a.InChannels);
        return (Array.ConvertAll(normalized, Relu), normalized);
    }

    private static double[] Depthwise(in DepthwisePointwiseArgs args, double[] input, double[] weight)
    {
        var (a, channels) = (args, args.InChannels);
        var (oh, ow) = DepthwiseExtents(a);
        var output = new double[a.Variants * a.Images * oh * ow * channels];
        Parallel.For(0, a.Variants * a.Images, image => ForDepthwiseTaps(a, image, (tap, target, source) =>
        {
            for (var c = 0; c < channels; c++)
                output[target * channels + c] += input[source * channels + c] * weight[tap * channels + c];
        }));
        return output;
    }

    private static double[] DepthwiseInputGradient(in DepthwisePointwiseArgs args, double[] gradient, double[] weight)
    {
        var (a, channels) = (args, args.InChannels);
        var inputGradient = new double[a.Images * a.Height * a.Width * channels];
        Parallel.For(0, a.Images, image => ForDepthwiseTaps(a, image, (tap, target, source) =>
        {
            for (var c = 0; c < channels; c++)
                inputGradient[source * channels + c] += gradient[target * channels + c] * weight[tap * channels + c];
        }));
        return inputGradient;
    }

    private static double[] DepthwiseWeightGradient(in DepthwisePointwiseArgs a, double[] input, double[] gradient)
    {
        var channels = a.InChannels;
        var weightGradient = new double[a.Kernel * a.Kernel * channels];
        for (var image = 0; image < a.Images; image++)
            ForDepthwiseTaps(a, image, (tap, target, source) =>
            {
                for (var c = 0; c < channels; c++)
                    weightGradient[tap * channels + c] += gradient[target * channels + c] * input[source * channels + c];
            });
        return weightGradient;
    }

    private static void ForDepthwiseTaps(in DepthwisePointwiseArgs a, int image, Action<int, int, int> visit)
    {
        var padding = a.Dilation * (a.Kernel / 2);
        ForTaps(image, (a.Height, a.Width), (a.Kernel, a.Kernel), (a.Stride, a.Stride), (padding, padding), a.Dilation, visit);
    }

    private static void ForConvolutionTaps(in ConvolutionArgs a, int image, Action<int, int, int> visit) => ForTaps(
        image, (a.Height, a.Width), (a.KernelH, a.KernelW), (a.StrideH, a.StrideW), (a.PaddingH, a.PaddingW), 1, visit);

    /// <summary>
    /// Visits (tap, output pixel, input pixel) for every output pixel of one image and every tap of the window that lies inside the
    /// image; pixels are numbered through all images, taps row by row.
    /// </summary>
    private static void ForTaps(
        int image,
        (int Height, int Width) input,
        (int Height, int Width) kernel,
        (int Height, int Width) stride,
        (int Height, int Width) padding,
        int dilation,
        Action<int, int, int> visit)
    {
        var height = OutputExtent(input.Height, kernel.Height, stride.Height, padding.Height, dilation);
        var width = OutputExtent(input.Width, kernel.Width, stride.Width, padding.Width, dilation);
        for (var i = 0; i < height; i++)
            for (var j = 0; j < width; j++)
                for (var tap = 0; tap < kernel.Height * kernel.Width; tap++)
                {
                    var row = i * stride.Height + tap / kernel.Width * dilation - padding.Height;
                    var column = j * stride.Width + tap % kernel.Width * dilation - padding.Width;
                    if (row >= 0 && row < input.Height && column >= 0 && column < input.Width)
                        visit(tap, (image * height + i) * width + j, (image * input.Height + row) * input.Width + column);
                }
    }

    private readonly record struct PointwiseShape(int Variants, int InChannels, int OutHeight, int OutWidth);

    private static PointwiseShape CheckPointwise(in PointwiseArgs a)
    {
        Require(a.Images > 0 && a.Height > 0 && a.Width > 0 && a.OutChannels > 0);
        Require(a.Parts != 0 && a.PartCount is >= 1 and <= 8);
        Require(a.Stride is 1 or 2);
        Require(a.Offset is 0 or 1);
        Require(a.YOffset >= 0 && a.YOffset + a.OutChannels <= a.YChannels);
        var (variants, channels) = CheckParts(a.Parts, a.PartCount);
        return new(variants, channels, (a.Height + a.Stride - 1) / a.Stride, (a.Width + a.Stride - 1) / a.Stride);
    }

    /// <summary>The variants and the channels of a concatenation.</summary>
    private static (int Variants, int Channels) CheckParts(nint parts, int count)
    {
        var span = new ReadOnlySpan<PartArgs>((void*)parts, count);
        var (variants, channels) = (1, 0);
        foreach (var part in span)
        {
            Require(part.X != 0 && part.Channels > 0 && part.Variants > 0);
            variants = Math.Max(variants, part.Variants);
            channels += part.Channels;
        }
        foreach (var part in span)
            Require(part.Variants == 1 || part.Variants == variants);
        return (variants, channels);
    }

    /// <summary>
    /// Visits (output pixel, the input pixel that it reads or -1 outside the image) of all variants and images.
    /// </summary>
    private static void ForGatheredPixels(in PointwiseArgs a, PointwiseShape shape, int variants, Action<int, int> visit)
    {
        for (var image = 0; image < variants * a.Images; image++)
            for (var i = 0; i < shape.OutHeight; i++)
                for (var j = 0; j < shape.OutWidth; j++)
                {
                    var (row, column) = (i * a.Stride + a.Offset, j * a.Stride + a.Offset);
                    var inside = row < a.Height && column < a.Width;
                    visit((image * shape.OutHeight + i) * shape.OutWidth + j,
                        inside ? (image * a.Height + row) * a.Width + column : -1);
                }
    }

    /// <summary>The pixels read, concatenated: [V, N, OH, OW, Cin], after ReLU where there is one, and as they are.</summary>
    private static (double[] Rectified, double[] Input) GatheredInput(in PointwiseArgs a, PointwiseShape shape)
    {
        var input = new double[shape.Variants * a.Images * shape.OutHeight * shape.OutWidth * shape.InChannels];
        var first = 0;
        var pixels = a.Images * a.Height * a.Width;
        foreach (var part in new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount))
        {
            var x = Load(part.X, (long)part.Variants * pixels * part.Channels);
            ForGatheredPixels(a, shape, shape.Variants, (pixel, source) =>
            {
                for (var c = 0; source >= 0 && c < part.Channels; c++)
                    input[pixel * shape.InChannels + first + c] = x[source % (part.Variants * pixels) * part.Channels + c];
            });
            first += part.Channels;
        }
        return (a.Relu != 0 ? Array.ConvertAll(input, Relu) : input, input);
    }

    /// <summary>Writes rows of <paramref name="count"/> values into the channels offset..offset + count of rows of <paramref name="channels"/>.</summary>
    private static void StoreSlice(nint address, double[] values, int count, int channels, int offset)
    {
        for (var i = 0; i < values.Length; i++)
            ((double*)address)[(long)(i / count) * channels + offset + i % count] = values[i];
    }

    private static void CheckConvolution(in ConvolutionArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Height > 0 && a.Width > 0 && a.InChannels > 0 && a.OutChannels > 0);
        Require(a.KernelH > 0 && a.KernelW > 0 && a.StrideH > 0 && a.StrideW > 0 && a.PaddingH >= 0 && a.PaddingW >= 0);
        Require(a.Height + 2 * a.PaddingH >= a.KernelH && a.Width + 2 * a.PaddingW >= a.KernelW);
    }

    private static (int Height, int Width) ConvolutionExtents(in ConvolutionArgs a) =>
        (OutputExtent(a.Height, a.KernelH, a.StrideH, a.PaddingH), OutputExtent(a.Width, a.KernelW, a.StrideW, a.PaddingW));

    private static double[] ConvolutionInput(in ConvolutionArgs a)
    {
        var x = Load(a.X, (long)a.Variants * a.Images * a.Height * a.Width * a.InChannels);
        return a.Relu != 0 ? Array.ConvertAll(x, Relu) : x;
    }
}
