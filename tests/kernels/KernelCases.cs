using PerturbNas.Backends;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>Which gradients a case asks for.</summary>
[Flags]
public enum Wanted
{
    Input = 1,
    Weights = 2,
    All = 3,
}

/// <summary>Inputs with a purpose of their own.</summary>
public enum Special
{
    None,

    /// <summary>One input element is not-a-number and must stay one.</summary>
    NotANumber,

    /// <summary>
    /// The mean is some hundred deviations from zero and every output exact in float32, so that what is judged is how the statistics
    /// are summed.
    /// </summary>
    LargeMean,
}

/// <summary>The optional arguments of a convolution or pool.</summary>
public sealed record Options(
    int Variants = 1,
    int Images = 2,
    bool Normalization = false,
    bool Statistics = true,
    bool Coefficients = true,
    bool Accumulate = false,
    Wanted Wanted = Wanted.All,
    Special Special = Special.None)
{
    public override string ToString() => $"v{Variants} n{Images}" + (Normalization ? " norm" : "") + (Statistics ? "" : " nostats") +
        (Coefficients ? "" : " nocoef") + (Accumulate ? " acc" : "") + (Wanted == Wanted.All ? "" : $" only{Wanted}") +
        (Special == Special.None ? "" : $" {Special}");
}

/// <summary>A channel part of a concatenation and the number of its variants.</summary>
public sealed record Part(int Channels, int Variants = 1, bool Accumulate = false, bool Gradient = true);

/// <summary>
/// The case table: every kernel with the shapes and options that can go wrong (strides, dilations, odd sizes, images smaller than the
/// window, channels that no vector width divides, variants, one image, one pixel, each optional argument present and absent). The
/// parity, gradient, support and performance runs all use it; the builders are public so that a benchmark can add its own shapes.
/// </summary>
public static class KernelCases
{
    private static readonly Lazy<IReadOnlyList<KernelCase>> Table = new(() => [.. Build()]);

    public static IReadOnlyList<KernelCase> All => Table.Value;

    public static KernelCase DepthwisePointwise(
        int height, int width, int inChannels, int outChannels, int kernel, int stride, int dilation, Options options)
    {
        var padding = dilation * (kernel / 2);
        var (oh, ow) = (Extent(height, kernel, stride, padding, dilation), Extent(width, kernel, stride, padding, dilation));
        var images = options.Variants * options.Images;
        var (inputs, outputs) = (images * height * width * inChannels, images * oh * ow * outChannels);
        void Set(KernelAddresses at, out DepthwisePointwiseArgs a) => a = new()
        {
            X = at["x"],
            XNormalization = at["x_normalization"],
            Depthwise = at["depthwise"],
            Pointwise = at["pointwise"],
            Y = at["y"],
            Statistics = at["statistics"],
            G = at["g"],
            Coefficients = at["coefficients"],
            Dx = at["dx"],
            GradientSums = at["gradient_sums"],
            DDepthwise = at["d_depthwise"],
            DPointwise = at["d_pointwise"],
            Variants = options.Variants,
            Images = options.Images,
            Height = height,
            Width = width,
            InChannels = inChannels,
            OutChannels = outChannels,
            Kernel = kernel,
            Stride = stride,
            Dilation = dilation,
            Accumulate = options.Accumulate ? 1 : 0,
        };
        var kernelCase = new KernelCase(
            "depthwise_pointwise", $"{height}x{width}x{inChannels}>{outChannels} k{kernel} s{stride} d{dilation} {options}")
        {
            Differentiable = options.Special == Special.None,
            Forward = (backend, at) =>
            {
                Set(at, out var a);
                backend.DepthwisePointwiseForward(a);
            },
            Backward = options.Variants > 1 ? null : (backend, at) =>
            {
                Set(at, out var a);
                backend.DepthwisePointwiseBackward(a);
            },
        };
        AddInput(kernelCase, "x", inputs, options.Special);
        if (options.Normalization)
            AddNormalization(kernelCase, "x_normalization", options.Variants, inChannels);
        AddWeight(kernelCase, "depthwise", kernel * kernel * inChannels, kernel * kernel, options.Special);
        AddWeight(kernelCase, "pointwise", inChannels * outChannels, inChannels, options.Special);
        AddOutput(kernelCase, images, oh * ow, outChannels, 0, outChannels, options);
        if (options.Variants > 1)
            return kernelCase;
        AddGradient(kernelCase, outputs, outChannels, options);
        if (options.Wanted.HasFlag(Wanted.Input))
        {
            kernelCase.Gradient("dx", inputs, options.Accumulate);
            if (options.Normalization)
                kernelCase.Output(
                    "gradient_sums", options.Images * 2 * inChannels, BufferRole.BackwardOutput, rowLength: inChannels, rows: 2);
        }
        if (options.Wanted.HasFlag(Wanted.Weights))
        {
            kernelCase.Gradient("d_depthwise", kernel * kernel * inChannels);
            kernelCase.Gradient("d_pointwise", inChannels * outChannels);
        }
        return kernelCase;
    }

    public static KernelCase Pointwise(
        int height,
        int width,
        Part[] parts,
        int outChannels,
        Options options,
        bool relu = true,
        int stride = 1,
        int offset = 0,
        int yChannels = 0,
        int yOffset = 0)
    {
        yChannels = yChannels == 0 ? outChannels : yChannels;
        var variants = parts.Max(part => part.Variants);
        var inChannels = parts.Sum(part => part.Channels);
        var pixels = Extent(height, 1, stride, 0) * Extent(width, 1, stride, 0);
        var images = variants * options.Images;
        unsafe void Call(KernelAddresses at, Action<PointwiseArgs> kernel)
        {
            var memory = PartsOf(at, parts);
            fixed (PartArgs* first = memory)
                kernel(new()
                {
                    Parts = (nint)first,
                    Weight = at["weight"],
                    Y = at["y"],
                    Statistics = at["statistics"],
                    G = at["g"],
                    Coefficients = at["coefficients"],
                    DWeight = at["d_weight"],
                    PartCount = parts.Length,
                    Relu = relu ? 1 : 0,
                    Images = options.Images,
                    Height = height,
                    Width = width,
                    OutChannels = outChannels,
                    Stride = stride,
                    Offset = offset,
                    YChannels = yChannels,
                    YOffset = yOffset,
                });
        }
        var shape = $"{height}x{width}x{DescribeParts(parts)}>{outChannels} s{stride}+{offset} of {yChannels}+{yOffset}" +
            $"{(relu ? " relu" : "")} {options with { Variants = variants }}";
        var kernelCase = new KernelCase("pointwise", shape)
        {
            Differentiable = options.Special == Special.None,
            Forward = (backend, at) => Call(at, a => backend.PointwiseForward(a)),
            Backward = variants > 1 ? null : (backend, at) => Call(at, a => backend.PointwiseBackward(a)),
        };
        AddParts(kernelCase, parts, options.Images * height * width, options.Special);
        AddWeight(kernelCase, "weight", inChannels * outChannels, inChannels, options.Special);
        AddOutput(kernelCase, images, pixels, yChannels, yOffset, outChannels, options);
        if (variants > 1)
            return kernelCase;
        AddGradient(kernelCase, images * pixels * yChannels, yChannels, options);
        if (options.Wanted.HasFlag(Wanted.Input))
            AddPartGradients(kernelCase, parts, options.Images * height * width);
        if (options.Wanted.HasFlag(Wanted.Weights))
            kernelCase.Gradient("d_weight", inChannels * outChannels);
        return kernelCase;
    }

    public static KernelCase Convolution(
        int height,
        int width,
        int inChannels,
        int outChannels,
        (int Height, int Width) kernel,
        (int Height, int Width) stride,
        (int Height, int Width) padding,
        Options options,
        bool relu = true)
    {
        var oh = Extent(height, kernel.Height, stride.Height, padding.Height);
        var ow = Extent(width, kernel.Width, stride.Width, padding.Width);
        var images = options.Variants * options.Images;
        var inputs = images * height * width * inChannels;
        var weights = kernel.Height * kernel.Width * inChannels * outChannels;
        void Set(KernelAddresses at, out ConvolutionArgs a) => a = new()
        {
            X = at["x"],
            Weight = at["weight"],
            Y = at["y"],
            Statistics = at["statistics"],
            G = at["g"],
            Coefficients = at["coefficients"],
            Dx = at["dx"],
            DWeight = at["d_weight"],
            Variants = options.Variants,
            Images = options.Images,
            Height = height,
            Width = width,
            InChannels = inChannels,
            OutChannels = outChannels,
            KernelH = kernel.Height,
            KernelW = kernel.Width,
            StrideH = stride.Height,
            StrideW = stride.Width,
            PaddingH = padding.Height,
            PaddingW = padding.Width,
            Relu = relu ? 1 : 0,
            Accumulate = options.Accumulate ? 1 : 0,
        };
        var shape = $"{height}x{width}x{inChannels}>{outChannels} k{kernel.Height}x{kernel.Width} s{stride.Height}x{stride.Width} " +
            $"p{padding.Height}x{padding.Width}{(relu ? " relu" : "")} {options}";
        var kernelCase = new KernelCase("convolution", shape)
        {
            Differentiable = options.Special == Special.None,
            Forward = (backend, at) =>
            {
                Set(at, out var a);
                backend.ConvolutionForward(a);
            },
            Backward = options.Variants > 1 ? null : (backend, at) =>
            {
                Set(at, out var a);
                backend.ConvolutionBackward(a);
            },
        };
        AddInput(kernelCase, "x", inputs, options.Special);
        AddWeight(kernelCase, "weight", weights, weights / outChannels, options.Special);
        AddOutput(kernelCase, images, oh * ow, outChannels, 0, outChannels, options);
        if (options.Variants > 1)
            return kernelCase;
        AddGradient(kernelCase, images * oh * ow * outChannels, outChannels, options);
        if (options.Wanted.HasFlag(Wanted.Input))
            kernelCase.Gradient("dx", inputs, options.Accumulate);
        if (options.Wanted.HasFlag(Wanted.Weights))
            kernelCase.Gradient("d_weight", weights);
        return kernelCase;
    }

    /// <summary>What is asked for of pool_3x3, and for how many nodes.</summary>
    /// <param name="pools">Every value that is taken. Where it is one alone, its buffers have the names that they have elsewhere.</param>
    /// <param name="gradients">Nodes. With several values, each but the first takes all but one of them.</param>
    /// <param name="output">Whether y is wanted, and not only its statistics.</param>
    public static KernelCase Pool(
        Pooling[] pools, int height, int width, int channels, int stride, Options options, int gradients = 1, bool output = true)
    {
        var pixels = Extent(height, 3, stride, 1) * Extent(width, 3, stride, 1);
        var images = options.Variants * options.Images;
        var inputs = images * height * width * channels;
        var pooled = pools.Where(pooling => pooling != Pooling.None).ToArray();
        void Set(KernelAddresses at, out PoolArgs a)
        {
            a = new()
            {
                X = at["x"],
                Dx = at["dx"],
                Variants = options.Variants,
                Images = options.Images,
                Height = height,
                Width = width,
                Channels = channels,
                Stride = stride,
                Accumulate = options.Accumulate ? 1 : 0,
            };
            foreach (var pooling in pooled)
            {
                a.Y[pooling] = at[Named("y", pooling)];
                a.Statistics[pooling] = at[Named("statistics", pooling)];
            }
        }
        var kernelCase = new KernelCase(
            "pool_3x3",
            $"{string.Join('+', pools)} {height}x{width}x{channels} s{stride} {options}{(gradients > 1 ? $" gradients{gradients}" : "")}{(output ? "" : " noy")}")
        {
            Differentiable = options.Special == Special.None && gradients == 1 && output && pools.Length == 1 && pooled.Length == 1,
            Forward = (backend, at) =>
            {
                Set(at, out var a);
                backend.PoolForward(a);
            },
            Backward = options.Variants > 1 ? null : (backend, at) => Backward(backend, at),
        };
        unsafe void Backward(Backend backend, KernelAddresses at)
        {
            var pending = stackalloc PoolGradientArgs[gradients];
            for (var i = 0; i < gradients; i++)
            {
                pending[i] = new() { G = at[Numbered("g", i)] };
                foreach (var pooling in TakenBy(i))
                    pending[i].Coefficients[pooling] = at[Numbered(Named("coefficients", pooling), i)];
            }
            Set(at, out var a);
            a.Gradients = (nint)pending;
            a.GradientCount = gradients;
            backend.PoolBackward(a);
        }
        static string Numbered(string name, int i) => i == 0 ? name : $"{name}{i}";
        string Named(string name, Pooling pooling) => pools.Length == 1 ? name : $"{pooling}_{name}";
        IEnumerable<Pooling> TakenBy(int i) => pools.Where((_, k) => pools.Length == 1 || i == 0 || k != i % pools.Length);
        AddInput(kernelCase, "x", inputs, options.Special);
        foreach (var pooling in pooled)
        {
            if (output)
                kernelCase.Output(Named("y", pooling), images * pixels * channels);
            if (options.Statistics)
                kernelCase.Output(Named("statistics", pooling), images * 2 * channels, rowLength: channels, rows: 2);
        }
        if (options.Variants > 1)
            return kernelCase;
        for (var i = 0; i < gradients; i++)
        {
            kernelCase.Input(Numbered("g", i), images * pixels * channels);
            foreach (var pooling in TakenBy(i))
                kernelCase.Input(Numbered(Named("coefficients", pooling), i), 3 * channels, 0.5, 0.25);
        }
        return kernelCase.Gradient("dx", inputs, options.Accumulate);
    }

    public static KernelCase BatchNormForward(
        int variants, int images, int pixels, int channels, bool training, bool affine, bool running, double mean = 0.5)
    {
        var kernelCase = new KernelCase(
            "batch_norm_forward",
            $"v{variants} n{images} p{pixels} c{channels}{(training ? " training" : " evaluation")}{(affine ? " affine" : "")}" +
            $"{(running ? " running" : "")} mean{mean}")
        {
            Forward = (backend, at) => backend.BatchNormForward(new()
            {
                Statistics = at["statistics"],
                Gamma = at["gamma"],
                Beta = at["beta"],
                RunningMean = at["running_mean"],
                RunningVariance = at["running_variance"],
                Normalization = at["normalization"],
                Variants = variants,
                Images = images,
                Pixels = pixels,
                Channels = channels,
                Epsilon = 1e-5f,
                Momentum = 0.1f,
            }),
        };
        if (training)
            kernelCase.Input("statistics", BufferKind.Real, variants * images * 2 * channels, (stream, _) =>
            {
                var statistics = new double[variants * images * 2 * channels];
                for (var i = 0; i < statistics.Length; i++)
                    statistics[i] = i / channels % 2 == 0
                        ? mean + 0.25 * stream.NextNormal()
                        : pixels * (0.5 + stream.NextSingle()) * (pixels > 1 ? 1 : 0);
                return statistics;
            });
        if (affine)
            kernelCase.Input("gamma", channels, 0.25, 1).Input("beta", channels);
        if (running)
        {
            var role = training ? BufferRole.ForwardOutput : BufferRole.Input;
            kernelCase.Output("running_mean", channels, role, initial: KernelCase.Normal(channels, 1, 0, 0));
            kernelCase.Output("running_variance", channels, role, initial: Positive(channels));
        }
        return kernelCase.Output("normalization", variants * 4 * channels, rowLength: channels, rows: 4);
    }

    public static KernelCase BatchNormBackward(
        int images, int pixels, int channels, int rows, int row, bool training, bool normalization, bool weight, bool affine, bool sums = true)
    {
        var kernelCase = new KernelCase(
            "batch_norm_backward",
            $"n{images} p{pixels} c{channels} row{row}of{rows}{(training ? " training" : " evaluation")}{(normalization ? " norm" : "")}" +
            $"{(weight ? " weight" : "")}{(affine ? " affine" : "")}{(sums ? "" : " nosums")}")
        {
            Forward = (backend, at) => backend.BatchNormBackward(new()
            {
                GradientSums = at["gradient_sums"],
                Normalization = at["normalization"],
                Weight = at["weight"],
                Coefficients = at["coefficients"],
                DGamma = at["d_gamma"],
                DBeta = at["d_beta"],
                Images = images,
                Pixels = pixels,
                Channels = channels,
                Rows = rows,
                Row = row,
                Training = training ? 1 : 0,
            }),
        };
        if (sums)
            kernelCase.Input("gradient_sums", images * rows * channels, Math.Sqrt(pixels));
        if (normalization)
            AddNormalization(kernelCase, "normalization", 1, channels);
        if (weight)
            kernelCase.Input("weight", 1, 0.25, 0.5);
        kernelCase.Output("coefficients", 3 * channels, rowLength: channels, rows: 3);
        if (affine)
            kernelCase.Output("d_gamma", channels).Output("d_beta", channels);
        return kernelCase;
    }

    /// <param name="terms">Per term: its variants, whether it is normalised, and the column of its weight.</param>
    /// <param name="pools">Per term: how it is pooled, from which extent; the terms beyond the last are not.</param>
    /// <param name="pair">A term that pools what the one before it pools, as the second pool of an edge does.</param>
    /// <param name="absent">A term whose operation did not run (forward only): its weights are zero and it has no y.</param>
    public static KernelCase MixedSum(
        int variants,
        int images,
        int pixels,
        int channels,
        (int Variants, bool Normalization, int Index)[] terms,
        int weightStride,
        bool weights = true,
        bool weightGradients = true,
        int absent = -1,
        (Pooling Pooling, int Height, int Width, int Stride)[]? pools = null,
        int pair = -1)
    {
        var hasBackward = variants == 1 && absent < 0;
        (Pooling Pooling, int Height, int Width, int Stride) PoolOf(int t) => t < pools?.Length ? pools[t] : default;
        unsafe void Call(KernelAddresses at, Action<MixedSumArgs> kernel)
        {
            var memory = terms.Select((term, t) => new TermArgs
            {
                Y = at[$"y{(t == pair ? t - 1 : t)}"],
                Normalization = at[$"normalization{t}"],
                Variants = term.Variants,
                WeightIndex = term.Index,
                Pooling = PoolOf(t).Pooling,
                Height = PoolOf(t).Height,
                Width = PoolOf(t).Width,
                Stride = PoolOf(t).Stride,
            }).ToArray();
            fixed (TermArgs* first = memory)
                kernel(new()
                {
                    Terms = (nint)first,
                    Weights = at["weights"],
                    Out = at["out"],
                    G = at["g"],
                    GradientSums = at["gradient_sums"],
                    WeightGradients = at["d_weights"],
                    TermCount = terms.Length,
                    Variants = variants,
                    Images = images,
                    Pixels = pixels,
                    Channels = channels,
                    WeightStride = weightStride,
                });
        }
        var count = variants * images * pixels * channels;
        var shape = $"v{variants} n{images} p{pixels} c{channels} terms[" +
            string.Join(' ', terms.Select(term => $"v{term.Variants}{(term.Normalization ? "n" : "")}@{term.Index}")) +
            $"]of{weightStride}{(weights ? "" : " noweights")}{(weightGradients ? "" : " noweightgradients")}" +
            (absent < 0 ? "" : $" without{absent}") +
            string.Concat((pools ?? []).Select(pool => $" {pool.Pooling}{pool.Height}x{pool.Width}s{pool.Stride}")) +
            (pair < 0 ? "" : $" pair{pair}");
        var kernelCase = new KernelCase("mixed_sum", shape)
        {
            Forward = (backend, at) => Call(at, a => backend.MixedSumForward(a)),
            Backward = !hasBackward ? null : (backend, at) => Call(at, a => backend.MixedSumBackward(a)),
        };
        for (var t = 0; t < terms.Length; t++)
        {
            if (t == absent)
                continue;
            var read = PoolOf(t).Pooling == Pooling.None ? pixels : PoolOf(t).Height * PoolOf(t).Width;
            if (t != pair)
                kernelCase.Input($"y{t}", terms[t].Variants * images * read * channels);
            if (terms[t].Normalization)
                AddNormalization(kernelCase, $"normalization{t}", terms[t].Variants, channels);
        }
        if (weights)
            kernelCase.Input("weights", BufferKind.Real, variants * weightStride, (stream, continuous) =>
            {
                var values = KernelCase.Normal(variants * weightStride, 0.25, 0.5, 0)(stream, continuous);
                for (var v = 0; absent >= 0 && v < variants; v++)
                    values[v * weightStride + terms[absent].Index] = 0;
                return values;
            });
        kernelCase.Output("out", count);
        if (!hasBackward)
            return kernelCase;
        kernelCase.Input("g", count);
        var rows = 1 + terms.Length;
        kernelCase.Output("gradient_sums", images * rows * channels, BufferRole.BackwardOutput, rowLength: channels, rows: rows);
        return weightGradients ? kernelCase.Gradient("d_weights", weightStride, accumulate: true) : kernelCase;
    }

    public static KernelCase GlobalAveragePool(int images, int pixels, Part[] parts)
    {
        var variants = parts.Max(part => part.Variants);
        var channels = parts.Sum(part => part.Channels);
        unsafe void Call(KernelAddresses at, Action<GlobalAveragePoolArgs> kernel)
        {
            var memory = PartsOf(at, parts);
            fixed (PartArgs* first = memory)
                kernel(new()
                {
                    Parts = (nint)first,
                    Out = at["out"],
                    G = at["g"],
                    PartCount = parts.Length,
                    Images = images,
                    Pixels = pixels,
                });
        }
        var kernelCase = new KernelCase("global_average_pool", $"n{images} p{pixels} c{DescribeParts(parts)}")
        {
            Forward = (backend, at) => Call(at, a => backend.GlobalAveragePoolForward(a)),
            Backward = variants > 1 ? null : (backend, at) => Call(at, a => backend.GlobalAveragePoolBackward(a)),
        };
        AddParts(kernelCase, parts, images * pixels, Special.None);
        kernelCase.Output("out", variants * images * channels);
        if (variants > 1)
            return kernelCase;
        kernelCase.Input("g", images * channels);
        AddPartGradients(kernelCase, parts, images * pixels);
        return kernelCase;
    }

    public static KernelCase Linear(int rows, int inChannels, int outChannels, Wanted wanted = Wanted.All)
    {
        void Set(KernelAddresses at, out LinearArgs a) => a = new()
        {
            X = at["x"],
            Weight = at["weight"],
            Bias = at["bias"],
            Out = at["out"],
            G = at["g"],
            Dx = at["dx"],
            DWeight = at["d_weight"],
            DBias = at["d_bias"],
            Rows = rows,
            InChannels = inChannels,
            OutChannels = outChannels,
        };
        var kernelCase = new KernelCase("linear", $"{rows}x{inChannels}>{outChannels}{(wanted == Wanted.All ? "" : $" only{wanted}")}")
        {
            Forward = (backend, at) =>
            {
                Set(at, out var a);
                backend.LinearForward(a);
            },
            Backward = (backend, at) =>
            {
                Set(at, out var a);
                backend.LinearBackward(a);
            },
        };
        kernelCase.Input("x", rows * inChannels);
        AddWeight(kernelCase, "weight", inChannels * outChannels, inChannels, Special.None);
        kernelCase.Input("bias", outChannels).Output("out", rows * outChannels).Input("g", rows * outChannels);
        if (wanted.HasFlag(Wanted.Input))
            kernelCase.Gradient("dx", rows * inChannels);
        if (wanted.HasFlag(Wanted.Weights))
            kernelCase.Gradient("d_weight", inChannels * outChannels).Gradient("d_bias", outChannels);
        return kernelCase;
    }

    public static KernelCase SoftmaxCrossEntropy(
        int variants, int images, int classes, float smoothing = 0, float scale = 1, bool perImage = true, double deviation = 2)
    {
        var kernelCase = new KernelCase(
            "softmax_cross_entropy",
            $"v{variants} n{images} classes{classes} smoothing{smoothing} scale{scale}{(perImage ? " perimage" : "")} deviation{deviation}")
        {
            Forward = (backend, at) => backend.SoftmaxCrossEntropy(new()
            {
                Logits = at["logits"],
                Labels = at["labels"],
                ImageLosses = at["image_losses"],
                ImageCorrect = at["image_correct"],
                LossSums = at["loss_sums"],
                CorrectCounts = at["correct_counts"],
                Dlogits = at["dlogits"],
                Variants = variants,
                Images = images,
                Classes = classes,
                Smoothing = smoothing,
                Scale = scale,
            }),
        };
        // A coarse grid makes ties, where the lowest class is the prediction.
        kernelCase.Input("logits", variants * images * classes, deviation, step: 0.5);
        kernelCase.Input("labels", BufferKind.Int32, images, (stream, _) =>
        {
            var labels = new double[images];
            for (var i = 0; i < images; i++)
                labels[i] = stream.NextInt(classes);
            return labels;
        });
        kernelCase.Output("loss_sums", variants, kind: BufferKind.Double);
        kernelCase.Output("correct_counts", variants, kind: BufferKind.Int64);
        if (perImage)
            kernelCase.Output("image_losses", variants * images)
                .Output("image_correct", variants * images, kind: BufferKind.Int32);
        return variants == 1 ? kernelCase.Output("dlogits", images * classes) : kernelCase;
    }

    public static KernelCase Sgd(int count, float maxNorm, float momentum = 0.9f, float weightDecay = 3e-4f) =>
        new KernelCase("sgd", $"{count} clip{maxNorm} momentum{momentum} decay{weightDecay}")
        {
            Forward = (backend, at) => backend.SgdStep(new()
            {
                Parameters = at["parameters"],
                Gradients = at["gradients"],
                MomentumBuffer = at["momentum_buffer"],
                Norm = at["norm"],
                Count = count,
                Rate = 0.025f,
                Momentum = momentum,
                WeightDecay = weightDecay,
                MaxNorm = maxNorm,
            }),
        }
            .Input("gradients", count)
            .Output("parameters", count, initial: KernelCase.Normal(count, 0.2, 0, 0))
            .Output("momentum_buffer", count, initial: KernelCase.Normal(count, 1, 0, 0))
            .Output("norm", 1, kind: BufferKind.Double);

    public static KernelCase Adam(int count, long step, float weightDecay = 1e-3f) =>
        new KernelCase("adam", $"{count} step{step} decay{weightDecay}")
        {
            Forward = (backend, at) => backend.AdamStep(new()
            {
                Parameters = at["parameters"],
                Gradients = at["gradients"],
                FirstMoment = at["first_moment"],
                SecondMoment = at["second_moment"],
                Count = count,
                Step = step,
                Rate = 3e-4f,
                Beta1 = 0.5f,
                Beta2 = 0.999f,
                Epsilon = 1e-8f,
                WeightDecay = weightDecay,
            }),
        }
            .Input("gradients", count)
            .Output("parameters", count, initial: KernelCase.Normal(count, 1e-3, 0, 0))
            .Output("first_moment", count, initial: KernelCase.Normal(count, 1, 0, 0))
            .Output("second_moment", count, initial: Positive(count));

    public static KernelCase Noise(int count, ulong key, ulong position) =>
        new KernelCase("noise_normal", $"{count} key{key} position{position}")
        {
            Forward = (backend, at) => backend.NoiseNormal(new() { Out = at["out"], Count = count, Key = key, Position = position }),
        }.Output("out", count);

    private static IEnumerable<KernelCase> Build()
    {
        foreach (var kernel in new[] { 3, 5, 7 })
            foreach (var stride in new[] { 1, 2 })
                foreach (var dilation in new[] { 1, 2 })
                    yield return DepthwisePointwise(9, 10, 16, 16, kernel, stride, dilation, new(Normalization: stride == 1));
        // Rows of whole register tiles, whose dx is finished while it is in registers; and more images than there are partial sums.
        foreach (var kernel in new[] { 3, 5 })
            foreach (var dilation in new[] { 1, 2 })
                foreach (var normalization in new[] { false, true })
                    yield return DepthwisePointwise(6, 16, 20, 16, kernel, 1, dilation, new(Normalization: normalization, Images: 3));
        yield return DepthwisePointwise(8, 8, 16, 16, 5, 1, 2, new(Accumulate: true));
        yield return DepthwisePointwise(4, 8, 20, 16, 3, 1, 1, new(Images: 37));
        yield return DepthwisePointwise(5, 3, 16, 20, 5, 2, 1, new(Images: 19, Normalization: true));
        yield return DepthwisePointwise(8, 8, 3, 5, 3, 1, 1, new());
        yield return DepthwisePointwise(7, 5, 12, 20, 5, 1, 1, new(Normalization: true, Images: 1));
        yield return DepthwisePointwise(6, 9, 33, 18, 3, 1, 2, new(Normalization: true, Images: 3));
        yield return DepthwisePointwise(5, 6, 64, 64, 5, 2, 1, new());
        yield return DepthwisePointwise(1, 1, 16, 16, 5, 1, 1, new(Normalization: true));
        yield return DepthwisePointwise(2, 3, 16, 24, 5, 1, 2, new());
        yield return DepthwisePointwise(3, 1, 7, 9, 3, 2, 1, new(Images: 1));
        yield return DepthwisePointwise(32, 32, 16, 16, 3, 1, 1, new(Images: 3));
        yield return DepthwisePointwise(16, 17, 36, 36, 5, 1, 1, new(Normalization: true));
        yield return DepthwisePointwise(8, 8, 16, 16, 3, 1, 1, new(Variants: 3));
        yield return DepthwisePointwise(7, 8, 20, 20, 5, 1, 2, new(Variants: 4, Images: 1, Normalization: true));
        yield return DepthwisePointwise(9, 7, 16, 32, 3, 2, 1, new(Variants: 2, Statistics: false));
        yield return DepthwisePointwise(8, 8, 16, 16, 3, 1, 1, new(Statistics: false, Coefficients: false));
        yield return DepthwisePointwise(8, 8, 16, 16, 3, 1, 1, new(Accumulate: true));
        yield return DepthwisePointwise(8, 7, 20, 16, 3, 1, 1, new(Accumulate: true, Normalization: true));
        yield return DepthwisePointwise(9, 8, 20, 12, 5, 2, 2, new(Accumulate: true, Coefficients: false));
        yield return DepthwisePointwise(8, 8, 16, 16, 5, 1, 1, new(Normalization: true, Wanted: Wanted.Input));
        yield return DepthwisePointwise(8, 8, 16, 16, 5, 1, 1, new(Normalization: true, Wanted: Wanted.Weights));
        yield return DepthwisePointwise(8, 8, 16, 16, 3, 1, 1, new(Special: Special.NotANumber));
        yield return DepthwisePointwise(16, 16, 16, 16, 3, 1, 1, new(Special: Special.LargeMean));

        yield return Pointwise(8, 8, [new(16)], 16, new());
        yield return Pointwise(7, 9, [new(16), new(16), new(16), new(16)], 16, new());
        yield return Pointwise(5, 6, [new(3), new(20), new(7)], 13, new(Images: 1));
        yield return Pointwise(32, 32, [new(48)], 16, new(Images: 3));
        yield return Pointwise(1, 1, [new(12)], 24, new());
        yield return Pointwise(6, 6, [new(64), new(64)], 32, new(), relu: false);
        yield return Pointwise(8, 8, [new(16)], 8, new(), stride: 2, offset: 0, yChannels: 16);
        yield return Pointwise(8, 8, [new(16)], 8, new(), stride: 2, offset: 1, yChannels: 16, yOffset: 8);
        yield return Pointwise(7, 9, [new(12), new(5)], 6, new(), stride: 2, offset: 1, yChannels: 13, yOffset: 7);
        yield return Pointwise(9, 7, [new(20)], 10, new(), stride: 2, offset: 0, yChannels: 20);
        yield return Pointwise(1, 1, [new(16)], 8, new(), stride: 2, offset: 1, yChannels: 16, yOffset: 8);
        yield return Pointwise(8, 7, [new(16, Accumulate: true)], 8, new(), stride: 2, offset: 1, yChannels: 16, yOffset: 8);
        yield return Pointwise(5, 5, [new(16, Accumulate: true), new(9), new(4, Gradient: false)], 16, new());
        yield return Pointwise(6, 6, [new(16, 3), new(16), new(16, 3)], 16, new());
        yield return Pointwise(6, 5, [new(16), new(12, 2)], 10, new(Images: 1, Statistics: false), stride: 2);
        yield return Pointwise(8, 8, [new(16)], 16, new(Statistics: false, Coefficients: false));
        yield return Pointwise(8, 8, [new(32)], 16, new(Wanted: Wanted.Input));
        yield return Pointwise(8, 8, [new(32)], 16, new(Wanted: Wanted.Weights));
        yield return Pointwise(6, 6, [new(16)], 16, new(Special: Special.NotANumber));
        yield return Pointwise(16, 16, [new(16)], 16, new(Special: Special.LargeMean));

        (int, int) one = (1, 1), two = (2, 2);
        yield return Convolution(8, 8, 3, 16, (3, 3), one, one, new(), relu: false);
        yield return Convolution(9, 7, 3, 48, (3, 3), one, one, new(Wanted: Wanted.Weights), relu: false);
        yield return Convolution(8, 8, 16, 16, (3, 3), one, one, new());
        yield return Convolution(7, 9, 16, 32, (3, 3), two, one, new());
        yield return Convolution(5, 6, 13, 10, (3, 3), one, one, new(Images: 1, Accumulate: true));
        yield return Convolution(8, 8, 16, 16, (1, 7), (1, 2), (0, 3), new());
        yield return Convolution(9, 5, 16, 16, (7, 1), (2, 1), (3, 0), new(), relu: false);
        yield return Convolution(6, 6, 20, 12, (1, 1), one, (0, 0), new());
        yield return Convolution(7, 7, 16, 8, (1, 1), two, (0, 0), new(Coefficients: false));
        yield return Convolution(5, 5, 12, 20, (5, 5), one, (0, 0), new());
        yield return Convolution(1, 1, 16, 16, (3, 3), one, one, new());
        yield return Convolution(2, 2, 32, 24, (2, 2), one, (0, 0), new(Statistics: false));
        yield return Convolution(6, 7, 64, 64, (3, 3), one, one, new());
        yield return Convolution(7, 6, 16, 16, (3, 3), one, one, new(Variants: 3));
        yield return Convolution(7, 6, 9, 17, (3, 3), two, one, new(Variants: 2, Images: 1));
        yield return Convolution(3, 600, 5, 4, (3, 3), one, one, new(Images: 1), relu: false);
        yield return Convolution(2, 3, 3, 8, (1, 1), one, (2, 1), new());
        yield return Convolution(8, 8, 16, 16, (3, 3), one, one, new(Wanted: Wanted.Input, Accumulate: true));
        yield return Convolution(6, 6, 8, 16, (3, 3), one, one, new(Special: Special.NotANumber));
        yield return Convolution(16, 16, 4, 16, (3, 3), one, one, new(Special: Special.LargeMean));

        const Pooling Max = Pooling.Max3x3, Avg = Pooling.Avg3x3, No = Pooling.None;
        foreach (var pools in new Pooling[][] { [Max], [Avg] })
        {
            yield return Pool(pools, 8, 8, 16, 1, new());
            yield return Pool(pools, 8, 8, 16, 2, new());
            yield return Pool(pools, 7, 9, 20, 1, new(Images: 1));
            yield return Pool(pools, 9, 7, 13, 2, new(Images: 3));
            yield return Pool(pools, 1, 1, 16, 1, new());
            yield return Pool(pools, 1, 4, 5, 2, new());
            yield return Pool(pools, 2, 2, 33, 2, new());
            yield return Pool(pools, 32, 32, 16, 1, new());
            yield return Pool(pools, 6, 6, 16, 1, new(Variants: 3));
            yield return Pool(pools, 7, 6, 12, 2, new(Variants: 2, Images: 1, Statistics: false));
            yield return Pool(pools, 8, 8, 16, 1, new(Accumulate: true));
            yield return Pool(pools, 7, 7, 36, 2, new(Accumulate: true));
            yield return Pool(pools, 6, 6, 16, 1, new(Statistics: false));
            yield return Pool(pools, 6, 6, 16, 1, new(Special: Special.NotANumber));
            yield return Pool(pools, 8, 7, 16, 1, new(), gradients: 4);
            yield return Pool(pools, 7, 8, 20, 2, new(Accumulate: true), gradients: 3);
            yield return Pool(pools, 10, 35, 20, 1, new(Images: 1));
            yield return Pool(pools, 17, 67, 5, 2, new(), gradients: 2);
            yield return Pool(pools, 9, 7, 16, 1, new(), output: false);
        }
        yield return Pool([Max], 16, 16, 16, 2, new(Special: Special.LargeMean));
        yield return Pool([No], 5, 7, 13, 1, new());
        yield return Pool([No], 4, 9, 16, 1, new(Accumulate: true), gradients: 4);
        yield return Pool([Max, Avg, No], 8, 8, 16, 1, new());
        yield return Pool([Max, Avg, No], 9, 7, 13, 1, new(Accumulate: true), gradients: 4);
        yield return Pool([Max, Avg, No], 32, 32, 16, 1, new(Accumulate: true), gradients: 3);
        yield return Pool([Max, Avg, No], 6, 6, 16, 1, new(Special: Special.NotANumber));
        yield return Pool([Max, No], 1, 2, 20, 1, new(), gradients: 2);
        yield return Pool([Avg, No], 3, 1, 36, 1, new(), gradients: 2);
        yield return Pool([Max, Avg], 8, 6, 20, 2, new(), gradients: 4);
        yield return Pool([Max, Avg], 17, 67, 5, 2, new(Accumulate: true));
        yield return Pool([Max, Avg], 5, 6, 12, 1, new(Variants: 3), output: false);

        yield return BatchNormForward(1, 4, 64, 16, training: true, affine: false, running: true);
        yield return BatchNormForward(1, 1, 9, 13, training: true, affine: true, running: true);
        yield return BatchNormForward(1, 64, 1, 20, training: true, affine: true, running: false);
        yield return BatchNormForward(1, 8, 100, 16, training: true, affine: false, running: true, mean: 1000);
        yield return BatchNormForward(5, 3, 16, 17, training: true, affine: false, running: false);
        yield return BatchNormForward(1, 4, 64, 16, training: false, affine: false, running: true);
        yield return BatchNormForward(3, 2, 9, 7, training: false, affine: true, running: true);

        yield return BatchNormBackward(4, 64, 16, 2, 1, training: true, normalization: true, weight: false, affine: false);
        yield return BatchNormBackward(1, 9, 13, 8, 5, training: true, normalization: true, weight: true, affine: false);
        yield return BatchNormBackward(3, 16, 20, 4, 3, training: true, normalization: true, weight: true, affine: true);
        yield return BatchNormBackward(64, 4, 16, 2, 1, training: false, normalization: true, weight: true, affine: true);
        yield return BatchNormBackward(2, 9, 5, 2, 1, training: false, normalization: true, weight: true, affine: false, sums: false);
        yield return BatchNormBackward(2, 9, 17, 2, 1, training: true, normalization: false, weight: true, affine: false, sums: false);

        yield return MixedSum(1, 2, 64, 16, [(1, true, 0), (1, true, 1), (1, false, 2), (1, true, 3)], 8);
        yield return MixedSum(1, 3, 49, 20, [(1, true, 5), (1, false, 0)], 7);
        yield return MixedSum(1, 1, 9, 13, [(1, true, 2)], 3, weightGradients: false);
        yield return MixedSum(1, 2, 16, 16, [(1, true, 0)], 1, weights: false, weightGradients: false);
        yield return MixedSum(1, 2, 16, 7, [(1, false, 0), (1, true, 0), (1, true, 0)], 1);
        yield return MixedSum(1, 2, 1, 5, [(1, true, 1), (1, true, 0)], 2);
        yield return MixedSum(1, 2, 256, 16, [.. Enumerable.Range(0, 20).Select(t => (1, t % 3 != 0, 19 - t))], 20);
        yield return MixedSum(1, 2, 16, 16, [], 4, weightGradients: false);
        yield return MixedSum(4, 2, 25, 16, [(1, true, 0), (4, true, 1), (1, false, 2), (4, false, 3)], 5);
        yield return MixedSum(3, 1, 9, 11, [(1, true, 2), (1, true, 1)], 3);
        yield return MixedSum(3, 2, 9, 16, [(3, true, 0)], 1, weights: false);
        yield return MixedSum(1, 2, 9, 16, [(1, true, 0), (1, true, 1), (1, false, 2)], 3, absent: 1);
        yield return MixedSum(2, 2, 9, 20, [(1, false, 0), (2, true, 1)], 2, absent: 0);
        yield return MixedSum(1, 2, 64, 16, [(1, true, 0), (1, true, 1), (1, false, 2)], 3, pools: [(Max, 8, 8, 1), (Avg, 8, 8, 1)]);
        yield return MixedSum(1, 3, 12, 20, [(1, true, 0), (1, false, 1), (1, true, 2), (1, true, 3), (1, true, 4)], 5,
            pools: [(Avg, 7, 6, 2), (No, 0, 0, 0), (Max, 7, 6, 2), (Avg, 4, 3, 1), (Max, 4, 3, 1)]);
        yield return MixedSum(1, 1, 1024, 16, [(1, true, 0), (1, true, 1), (1, true, 2)], 3, pools: [(Max, 32, 32, 1), (No, 0, 0, 0), (Avg, 32, 32, 1)]);
        yield return MixedSum(3, 2, 30, 13, [(1, true, 0), (3, true, 1), (3, true, 2), (1, false, 3)], 4,
            pools: [(Max, 6, 5, 1), (Max, 6, 5, 1), (Avg, 12, 10, 2), (Avg, 11, 9, 2)]);
        yield return MixedSum(2, 2, 9, 16, [(1, true, 0), (2, true, 1)], 2, absent: 0, pools: [(Max, 3, 3, 1), (Max, 3, 3, 1)]);
        yield return MixedSum(1, 2, 30, 16, [(1, true, 0), (1, true, 1), (1, false, 2)], 3, pools: [(Max, 6, 5, 1), (Avg, 6, 5, 1)], pair: 1);
        yield return MixedSum(1, 2, 12, 20, [(1, true, 0), (1, false, 1), (1, true, 2), (1, true, 3), (1, true, 4)], 5,
            pools: [(No, 0, 0, 0), (No, 0, 0, 0), (No, 0, 0, 0), (Max, 7, 6, 2), (Avg, 7, 6, 2)], pair: 4);
        yield return MixedSum(3, 2, 12, 13, [(3, true, 0), (3, false, 1), (1, true, 2)], 3, pools: [(Max, 7, 6, 2), (Avg, 7, 6, 2)], pair: 1);
        yield return MixedSum(9, 1, 9, 16, [(1, true, 0), (1, true, 1), (9, true, 2), (9, true, 3)], 4,
            pools: [(Avg, 3, 3, 1), (Max, 3, 3, 1), (Max, 6, 5, 2), (Avg, 6, 5, 2)], pair: 3);
        yield return MixedSum(2, 2, 9, 16, [(2, true, 0), (2, true, 1)], 2, absent: 1, pools: [(Max, 3, 3, 1), (Avg, 3, 3, 1)], pair: 1);

        yield return GlobalAveragePool(3, 64, [new(16), new(16), new(16), new(16)]);
        yield return GlobalAveragePool(1, 49, [new(13), new(4, Accumulate: true), new(20, Gradient: false)]);
        yield return GlobalAveragePool(2, 1, [new(8)]);
        yield return GlobalAveragePool(2, 16, [new(16), new(12, 3)]);

        yield return Linear(8, 64, 10);
        yield return Linear(1, 13, 3);
        yield return Linear(5, 33, 100);
        yield return Linear(7, 256, 10, Wanted.Input);
        yield return Linear(7, 20, 17, Wanted.Weights);

        yield return SoftmaxCrossEntropy(1, 16, 10);
        yield return SoftmaxCrossEntropy(1, 5, 100, smoothing: 0.1f, scale: 0.4f);
        yield return SoftmaxCrossEntropy(1, 3, 17, smoothing: 0.1f, perImage: false);
        yield return SoftmaxCrossEntropy(1, 1, 2, deviation: 40);
        yield return SoftmaxCrossEntropy(1, 4, 1);
        yield return SoftmaxCrossEntropy(4, 9, 10);
        yield return SoftmaxCrossEntropy(3, 2, 7, perImage: false);

        yield return Sgd(1, maxNorm: 5);
        yield return Sgd(1003, maxNorm: 5);
        yield return Sgd(100_001, maxNorm: 5);
        yield return Sgd(517, maxNorm: 0);
        yield return Sgd(33, maxNorm: 1000, momentum: 0, weightDecay: 0);

        yield return Adam(1, 1);
        yield return Adam(98, 1);
        yield return Adam(1003, 1000, weightDecay: 0);
        yield return Adam(70_001, 3);

        yield return Noise(1, 1, 0);
        yield return Noise(4099, 0x0123456789ABCDEF, 3);
        yield return Noise(70_002, ulong.MaxValue, ulong.MaxValue - 1);
    }

    private static int Extent(int size, int kernel, int stride, int padding, int dilation = 1) =>
        (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;

    // Multiples of 1/64 make zeros (the kink of ReLU) and ties (pooling) that occur in both precisions alike; a normalised value,
    // 1/64 times 1/16, is exact in float32 as well, so no sign depends on rounding.
    private static void AddInput(KernelCase kernelCase, string name, int count, Special special)
    {
        if (special == Special.LargeMean)
            kernelCase.Input(name, count, mean: 256, step: 0.25);
        else if (special == Special.NotANumber)
            kernelCase.Input(name, BufferKind.Real, count, (stream, continuous) =>
            {
                var values = KernelCase.Normal(count, 1, 0, 1.0 / 64)(stream, continuous);
                values[count / 3] = double.NaN;
                return values;
            });
        else
            kernelCase.Input(name, count);
    }

    private static void AddWeight(KernelCase kernelCase, string name, int count, int fanIn, Special special) =>
        kernelCase.Input(name, count, 1 / Math.Sqrt(fanIn), step: special == Special.LargeMean ? 0.25 : 0);

    private static void AddNormalization(KernelCase kernelCase, string name, int variants, int channels) =>
        kernelCase.Input(name, BufferKind.Real, variants * 4 * channels, (stream, _) =>
        {
            var rows = new double[variants * 4 * channels];
            for (var i = 0; i < rows.Length; i++)
                rows[i] = (i / channels % 4) switch
                {
                    0 => Math.Round(16 * (1 + 0.25 * stream.NextNormal())) / 16,
                    1 => Math.Round(64 * 0.5 * stream.NextNormal()) / 64,
                    2 => 0.5 + stream.NextSingle(),
                    _ => 0.5 * stream.NextNormal(),
                };
            return rows;
        });

    /// <summary>The raw output, of whose channels the kernel owns some, and its statistics.</summary>
    private static void AddOutput(
        KernelCase kernelCase, int images, int pixels, int channels, int first, int owned, Options options, bool y = true)
    {
        Func<RandomStream, bool, double[]>? Initial(int count) =>
            first == 0 && owned == channels ? null : KernelCase.Normal(count, 1, 0, 0);
        if (y)
            kernelCase.Output("y", images * pixels * channels, initial: Initial(images * pixels * channels));
        if (options.Statistics)
            kernelCase.Output(
                "statistics", images * 2 * channels, rowLength: channels, rows: 2, initial: Initial(images * 2 * channels));
    }

    private static void AddGradient(KernelCase kernelCase, int outputs, int channels, Options options)
    {
        kernelCase.Input("g", outputs);
        if (options.Coefficients)
            kernelCase.Input("coefficients", 3 * channels, 0.5, 0.25);
    }

    private static void AddParts(KernelCase kernelCase, Part[] parts, int pixels, Special special)
    {
        for (var i = 0; i < parts.Length; i++)
            AddInput(kernelCase, $"x{i}", parts[i].Variants * pixels * parts[i].Channels, special);
    }

    private static void AddPartGradients(KernelCase kernelCase, Part[] parts, int pixels)
    {
        for (var i = 0; i < parts.Length; i++)
            if (parts[i].Gradient)
                kernelCase.Gradient($"dx{i}", pixels * parts[i].Channels, parts[i].Accumulate);
    }

    private static PartArgs[] PartsOf(KernelAddresses at, Part[] parts) => [.. parts.Select((part, i) => new PartArgs
    {
        X = at[$"x{i}"],
        Dx = at[$"dx{i}"],
        Variants = part.Variants,
        Channels = part.Channels,
        Accumulate = part.Accumulate ? 1 : 0,
    })];

    private static string DescribeParts(Part[] parts) => string.Join('+', parts.Select(part =>
        $"{part.Channels}{(part.Variants > 1 ? $"v{part.Variants}" : "")}{(part.Accumulate ? "a" : "")}{(part.Gradient ? "" : "-")}"));

    private static Func<RandomStream, bool, double[]> Positive(int count) => (stream, _) =>
    {
        var values = new double[count];
        for (var i = 0; i < count; i++)
            values[i] = 0.5 + stream.NextSingle();
        return values;
    };
}
