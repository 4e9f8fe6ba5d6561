using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// Arguments that break the contract are refused with a message before anything is written. Each entry is a call that would be right
/// but for the one argument named; all its pointers lie in one block, which must come back as it was.
/// </summary>
public sealed unsafe class BadArgumentTests : IDisposable
{
    private const int BlockBytes = 1 << 16;

    private static readonly Dictionary<string, Action<Backend, Block>> Calls = new()
    {
        ["depthwise_pointwise_forward: no x"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { X = 0 }),
        ["depthwise_pointwise_forward: no y"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Y = 0 }),
        ["depthwise_pointwise_forward: kernel 4"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Kernel = 4 }),
        ["depthwise_pointwise_forward: stride 3"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Stride = 3 }),
        ["depthwise_pointwise_forward: dilation 0"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Dilation = 0 }),
        ["depthwise_pointwise_forward: no images"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Images = 0 }),
        ["depthwise_pointwise_forward: height -1"] = (b, m) => b.DepthwisePointwiseForward(m.DepthwisePointwise() with { Height = -1 }),
        ["depthwise_pointwise_backward: no g"] = (b, m) => b.DepthwisePointwiseBackward(m.DepthwisePointwise() with { G = 0 }),
        ["depthwise_pointwise_backward: two variants"] =
            (b, m) => b.DepthwisePointwiseBackward(m.DepthwisePointwise() with { Variants = 2 }),
        ["depthwise_pointwise_backward: coefficients without y"] =
            (b, m) => b.DepthwisePointwiseBackward(m.DepthwisePointwise() with { Y = 0 }),
        ["depthwise_pointwise_backward: only one of the weights' gradients"] =
            (b, m) => b.DepthwisePointwiseBackward(m.DepthwisePointwise() with { DPointwise = 0 }),
        ["depthwise_pointwise_backward: sums without normalization"] =
            (b, m) => b.DepthwisePointwiseBackward(m.DepthwisePointwise() with { XNormalization = 0 }),

        ["pointwise_forward: no parts"] = (b, m) => b.PointwiseForward(m.Pointwise() with { PartCount = 0 }),
        ["pointwise_forward: nine parts"] = (b, m) => b.PointwiseForward(m.Pointwise() with { PartCount = 9 }),
        ["pointwise_forward: a part without x"] = (b, m) => b.PointwiseForward(m.Pointwise(part => part with { X = 0 })),
        ["pointwise_forward: a part without channels"] = (b, m) => b.PointwiseForward(m.Pointwise(part => part with { Channels = 0 })),
        ["pointwise_forward: two and three variants"] =
            (b, m) => b.PointwiseForward(m.Pointwise(part => part with { Variants = 2 }, part => part with { Variants = 3 })),
        ["pointwise_forward: stride 3"] = (b, m) => b.PointwiseForward(m.Pointwise() with { Stride = 3 }),
        ["pointwise_forward: offset 2"] = (b, m) => b.PointwiseForward(m.Pointwise() with { Offset = 2 }),
        ["pointwise_forward: slice outside y"] = (b, m) => b.PointwiseForward(m.Pointwise() with { YOffset = 5 }),
        ["pointwise_backward: two variants"] = (b, m) => b.PointwiseBackward(m.Pointwise(part => part with { Variants = 2 })),
        ["pointwise_backward: no g"] = (b, m) => b.PointwiseBackward(m.Pointwise() with { G = 0 }),
        ["pointwise_backward: coefficients without y"] = (b, m) => b.PointwiseBackward(m.Pointwise() with { Y = 0 }),

        ["convolution_forward: no weight"] = (b, m) => b.ConvolutionForward(m.Convolution() with { Weight = 0 }),
        ["convolution_forward: no width"] = (b, m) => b.ConvolutionForward(m.Convolution() with { Width = 0 }),
        ["convolution_forward: stride 0"] = (b, m) => b.ConvolutionForward(m.Convolution() with { StrideW = 0 }),
        ["convolution_forward: padding -1"] = (b, m) => b.ConvolutionForward(m.Convolution() with { PaddingH = -1 }),
        ["convolution_forward: kernel larger than the image"] =
            (b, m) => b.ConvolutionForward(m.Convolution() with { KernelH = 7, PaddingH = 0 }),
        ["convolution_backward: two variants"] = (b, m) => b.ConvolutionBackward(m.Convolution() with { Variants = 2 }),
        ["convolution_backward: no g"] = (b, m) => b.ConvolutionBackward(m.Convolution() with { G = 0 }),
        ["convolution_backward: coefficients without y"] = (b, m) => b.ConvolutionBackward(m.Convolution() with { Y = 0 }),

        ["pool_3x3_forward: no x"] = (b, m) => b.PoolForward(m.Pool() with { X = 0 }),
        ["pool_3x3_forward: stride 3"] = (b, m) => b.PoolForward(m.Pool() with { Stride = 3 }),
        ["pool_3x3_forward: no channels"] = (b, m) => b.PoolForward(m.Pool() with { Channels = 0 }),
        ["pool_3x3_forward: statistics of what is not pooled"] = (b, m) => b.PoolForward(m.Pool() with { Statistics = m.For(Pooling.None, 2) }),
        ["pool_3x3_backward: no x"] = (b, m) => b.PoolBackward(m.Pool() with { X = 0 }),
        ["pool_3x3_backward: no gradients"] = (b, m) => b.PoolBackward(m.Pool() with { GradientCount = 0 }),
        ["pool_3x3_backward: two variants"] = (b, m) => b.PoolBackward(m.Pool() with { Variants = 2 }),
        ["pool_3x3_backward: no g"] = (b, m) => b.PoolBackward(m.Pool(gradient => gradient with { G = 0 })),
        ["pool_3x3_backward: no coefficients"] = (b, m) => b.PoolBackward(m.Pool(gradient => gradient with { Coefficients = default })),
        ["pool_3x3_backward: skip connection with stride 2"] = (b, m) =>
            b.PoolBackward(m.Pool(gradient => gradient with { Coefficients = m.For(Pooling.None, 4) }) with { Stride = 2 }),

        ["batch_norm_forward: no normalization"] = (b, m) => b.BatchNormForward(m.BatchNormForward() with { Normalization = 0 }),
        ["batch_norm_forward: evaluation without running statistics"] = (b, m) =>
            b.BatchNormForward(m.BatchNormForward() with { Statistics = 0, RunningMean = 0, RunningVariance = 0 }),
        ["batch_norm_forward: running mean without variance"] =
            (b, m) => b.BatchNormForward(m.BatchNormForward() with { RunningVariance = 0 }),
        ["batch_norm_forward: running update of two variants"] = (b, m) => b.BatchNormForward(m.BatchNormForward() with { Variants = 2 }),
        ["batch_norm_forward: variance of one value"] =
            (b, m) => b.BatchNormForward(m.BatchNormForward() with { Images = 1, Pixels = 1 }),
        ["batch_norm_backward: row 0"] = (b, m) => b.BatchNormBackward(m.BatchNormBackward() with { Row = 0 }),
        ["batch_norm_backward: row of rows"] = (b, m) => b.BatchNormBackward(m.BatchNormBackward() with { Row = 2 }),
        ["batch_norm_backward: training without sums"] = (b, m) => b.BatchNormBackward(m.BatchNormBackward() with { GradientSums = 0 }),

        ["mixed_sum_forward: no out"] = (b, m) => b.MixedSumForward(m.MixedSum() with { Out = 0 }),
        ["mixed_sum_forward: weight outside the row"] = (b, m) => b.MixedSumForward(m.MixedSum(term => term with { WeightIndex = 2 })),
        ["mixed_sum_forward: a term of three variants"] = (b, m) => b.MixedSumForward(m.MixedSum(term => term with { Variants = 3 })),
        ["mixed_sum_forward: no pixels"] = (b, m) => b.MixedSumForward(m.MixedSum() with { Pixels = 0 }),
        ["mixed_sum_forward: a pooling that does not give its pixels"] = (b, m) =>
            b.MixedSumForward(m.MixedSum(term => term with { Pooling = Pooling.Max3x3, Height = 4, Width = 3, Stride = 1 })),
        ["mixed_sum_forward: poolings to different widths"] = (b, m) => b.MixedSumForward(m.MixedSum(
            term => term with { Pooling = Pooling.Max3x3, Height = 4, Width = 4, Stride = 1 },
            term => term with { Pooling = Pooling.Max3x3, Height = 2, Width = 8, Stride = 1 })),
        ["mixed_sum_backward: pooled with stride 3"] = (b, m) =>
            b.MixedSumBackward(m.MixedSum(term => term with { Pooling = Pooling.Avg3x3, Height = 4, Width = 4, Stride = 3 })),
        ["mixed_sum_backward: no g"] = (b, m) => b.MixedSumBackward(m.MixedSum() with { G = 0 }),
        ["mixed_sum_backward: a term without y"] = (b, m) => b.MixedSumBackward(m.MixedSum(term => term with { Y = 0 })),
        ["mixed_sum_backward: two variants"] = (b, m) => b.MixedSumBackward(m.MixedSum() with { Variants = 2 }),

        ["global_average_pool_forward: no parts"] = (b, m) => b.GlobalAveragePoolForward(m.GlobalAveragePool() with { PartCount = 0 }),
        ["global_average_pool_forward: no out"] = (b, m) => b.GlobalAveragePoolForward(m.GlobalAveragePool() with { Out = 0 }),
        ["global_average_pool_backward: no g"] = (b, m) => b.GlobalAveragePoolBackward(m.GlobalAveragePool() with { G = 0 }),
        ["global_average_pool_backward: no pixels"] = (b, m) => b.GlobalAveragePoolBackward(m.GlobalAveragePool() with { Pixels = 0 }),

        ["linear_forward: no bias"] = (b, m) => b.LinearForward(m.Linear() with { Bias = 0 }),
        ["linear_forward: no rows"] = (b, m) => b.LinearForward(m.Linear() with { Rows = 0 }),
        ["linear_backward: no g"] = (b, m) => b.LinearBackward(m.Linear() with { G = 0 }),
        ["linear_backward: dx without weight"] = (b, m) => b.LinearBackward(m.Linear() with { Weight = 0 }),

        ["softmax_cross_entropy: label outside the classes"] =
            (b, m) => b.SoftmaxCrossEntropy(m.CrossEntropy() with { Labels = m.Labels(7) }),
        ["softmax_cross_entropy: label -1"] = (b, m) => b.SoftmaxCrossEntropy(m.CrossEntropy() with { Labels = m.Labels(-1) }),
        ["softmax_cross_entropy: smoothing 2"] = (b, m) => b.SoftmaxCrossEntropy(m.CrossEntropy() with { Smoothing = 2 }),
        ["softmax_cross_entropy: gradient of two variants"] = (b, m) => b.SoftmaxCrossEntropy(m.CrossEntropy() with { Variants = 2 }),
        ["softmax_cross_entropy: no loss sums"] = (b, m) => b.SoftmaxCrossEntropy(m.CrossEntropy() with { LossSums = 0 }),

        ["sgd_step: no gradients"] = (b, m) => b.SgdStep(m.Sgd() with { Gradients = 0 }),
        ["sgd_step: no norm"] = (b, m) => b.SgdStep(m.Sgd() with { Norm = 0 }),
        ["sgd_step: count -1"] = (b, m) => b.SgdStep(m.Sgd() with { Count = -1 }),
        ["adam_step: step 0"] = (b, m) => b.AdamStep(m.Adam() with { Step = 0 }),
        ["adam_step: no second moment"] = (b, m) => b.AdamStep(m.Adam() with { SecondMoment = 0 }),
        ["noise_normal: no out"] = (b, m) => b.NoiseNormal(new() { Count = 4 }),
        ["noise_normal: count -1"] = (b, m) => b.NoiseNormal(new() { Out = m[0], Count = -1 }),
    };

    private readonly Block _block = new();

    public static TheoryData<string> Names() => [.. Calls.Keys];

    [Theory]
    [MemberData(nameof(Names))]
    public void Are_refused_and_nothing_is_written(string name)
    {
        using var cuda = new CudaLaunchCounter();
        var backends = new List<Backend> { TestBackends.Reference, TestBackends.Cpu(Isa.Best, 1) };
        // Labels are in the device's memory, where only a kernel sees them: see LabelTests.
        if (!name.Contains("label", StringComparison.Ordinal))
            backends.Add(cuda);
        foreach (var backend in backends)
        {
            _block.Reset();
            var exception = Assert.Throws<KernelException>(() => Calls[name](backend, _block));
            Assert.Equal(KernelStatus.InvalidArgument, exception.Status);
            Assert.NotEqual("", exception.Message);
            Assert.True(_block.IsUntouched, $"{backend.Name} wrote something before it refused {name}");
        }
    }

    public void Dispose() => _block.Dispose();

    /// <summary>Memory that is large enough for every pointer of the calls, and those calls when they are right.</summary>
    private sealed class Block : IDisposable
    {
        private const int Slot = 4096;
        private const byte Fill = 0x11;

        private readonly nint _memory = TestBackends.Reference.Allocate(BlockBytes);

        // Labels, parts and terms are inputs of their own, outside the block.
        private readonly nint _inputs = TestBackends.Reference.Allocate(Slot);

        public nint this[int slot] => _memory + slot * Slot;

        public bool IsUntouched => !new ReadOnlySpan<byte>((void*)_memory, BlockBytes).ContainsAnyExcept(Fill);

        public void Reset() => new Span<byte>((void*)_memory, BlockBytes).Fill(Fill);

        public void Dispose()
        {
            TestBackends.Reference.Free(_memory);
            TestBackends.Reference.Free(_inputs);
        }

        public nint Labels(int last)
        {
            new[] { 0, last }.CopyTo(new Span<int>((void*)_inputs, 2));
            return _inputs;
        }

        public DepthwisePointwiseArgs DepthwisePointwise() => new()
        {
            X = this[0],
            XNormalization = this[1],
            Depthwise = this[2],
            Pointwise = this[3],
            Y = this[4],
            Statistics = this[5],
            G = this[6],
            Coefficients = this[7],
            Dx = this[8],
            GradientSums = this[9],
            DDepthwise = this[10],
            DPointwise = this[11],
            Variants = 1,
            Images = 2,
            Height = 4,
            Width = 4,
            InChannels = 4,
            OutChannels = 4,
            Kernel = 3,
            Stride = 1,
            Dilation = 1,
        };

        public PointwiseArgs Pointwise(Func<PartArgs, PartArgs>? first = null, Func<PartArgs, PartArgs>? second = null) => new()
        {
            Parts = Parts(first, second),
            Weight = this[4],
            Y = this[5],
            Statistics = this[6],
            G = this[7],
            Coefficients = this[8],
            DWeight = this[9],
            PartCount = 2,
            Relu = 1,
            Images = 2,
            Height = 4,
            Width = 4,
            OutChannels = 4,
            Stride = 1,
            YChannels = 8,
            YOffset = 4,
        };

        public ConvolutionArgs Convolution() => new()
        {
            X = this[0],
            Weight = this[1],
            Y = this[2],
            Statistics = this[3],
            G = this[4],
            Coefficients = this[5],
            Dx = this[6],
            DWeight = this[7],
            Variants = 1,
            Images = 2,
            Height = 4,
            Width = 4,
            InChannels = 4,
            OutChannels = 4,
            KernelH = 3,
            KernelW = 3,
            StrideH = 1,
            StrideW = 1,
            PaddingH = 1,
            PaddingW = 1,
        };

        public PoolingAddresses For(Pooling pooling, int input) => new() { [pooling] = this[input] };

        public PoolArgs Pool(Func<PoolGradientArgs, PoolGradientArgs>? change = null)
        {
            var gradient = new PoolGradientArgs { G = this[3], Coefficients = For(Pooling.Max3x3, 4) };
            *(PoolGradientArgs*)_inputs = change == null ? gradient : change(gradient);
            return new()
            {
                X = this[0],
                Y = For(Pooling.Max3x3, 1),
                Statistics = For(Pooling.Max3x3, 2),
                Gradients = _inputs,
                Dx = this[5],
                Variants = 1,
                Images = 2,
                Height = 4,
                Width = 4,
                Channels = 4,
                Stride = 1,
                GradientCount = 1,
            };
        }

        public BatchNormForwardArgs BatchNormForward() => new()
        {
            Statistics = this[0],
            RunningMean = this[1],
            RunningVariance = this[2],
            Normalization = this[3],
            Variants = 1,
            Images = 2,
            Pixels = 16,
            Channels = 4,
            Epsilon = 1e-5f,
            Momentum = 0.1f,
        };

        public BatchNormBackwardArgs BatchNormBackward() => new()
        {
            GradientSums = this[0],
            Normalization = this[1],
            Coefficients = this[2],
            Images = 2,
            Pixels = 16,
            Channels = 4,
            Rows = 2,
            Row = 1,
            Training = 1,
        };

        public MixedSumArgs MixedSum(params Func<TermArgs, TermArgs>[] changes)
        {
            var term = new TermArgs { Y = this[0], Normalization = this[1], Variants = 1, WeightIndex = 1 };
            *(TermArgs*)_inputs = term;
            for (var t = 0; t < changes.Length; t++)
                ((TermArgs*)_inputs)[t] = changes[t](term);
            return new()
            {
                Terms = _inputs,
                Weights = this[2],
                Out = this[3],
                G = this[4],
                GradientSums = this[5],
                WeightGradients = this[6],
                TermCount = Math.Max(1, changes.Length),
                Variants = 1,
                Images = 2,
                Pixels = 16,
                Channels = 4,
                WeightStride = 2,
            };
        }

        public GlobalAveragePoolArgs GlobalAveragePool() => new()
        {
            Parts = Parts(null, null),
            Out = this[4],
            G = this[5],
            PartCount = 2,
            Images = 2,
            Pixels = 16,
        };

        public LinearArgs Linear() => new()
        {
            X = this[0],
            Weight = this[1],
            Bias = this[2],
            Out = this[3],
            G = this[4],
            Dx = this[5],
            DWeight = this[6],
            DBias = this[7],
            Rows = 2,
            InChannels = 4,
            OutChannels = 4,
        };

        public SoftmaxCrossEntropyArgs CrossEntropy() => new()
        {
            Logits = this[0],
            Labels = Labels(1),
            LossSums = this[1],
            CorrectCounts = this[2],
            Dlogits = this[3],
            Variants = 1,
            Images = 2,
            Classes = 4,
            Scale = 1,
        };

        public SgdArgs Sgd() => new()
        {
            Parameters = this[0],
            Gradients = this[1],
            MomentumBuffer = this[2],
            Norm = this[3],
            Count = 8,
            Rate = 0.1f,
        };

        public AdamArgs Adam() => new()
        {
            Parameters = this[0],
            Gradients = this[1],
            FirstMoment = this[2],
            SecondMoment = this[3],
            Count = 8,
            Step = 1,
            Rate = 0.1f,
            Beta1 = 0.5f,
            Beta2 = 0.999f,
            Epsilon = 1e-8f,
        };

        private nint Parts(Func<PartArgs, PartArgs>? first, Func<PartArgs, PartArgs>? second)
        {
            var parts = new Span<PartArgs>((void*)_inputs, 2);
            parts[0] = new() { X = this[0], Dx = this[1], Variants = 1, Channels = 4 };
            parts[1] = new() { X = this[2], Dx = this[3], Variants = 1, Channels = 4 };
            parts[0] = first == null ? parts[0] : first(parts[0]);
            parts[1] = second == null ? parts[1] : second(parts[1]);
            return _inputs;
        }
    }
}
