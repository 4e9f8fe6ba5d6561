using PerturbNas.Backends;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// The chain through which every gradient of a search flows, on the oracle, against finite differences: operator (with its
/// statistics, pending normalisations and pending gradients) - batch norm - mixed sum with a skip connection - global average pool -
/// linear - cross-entropy, in training mode and in evaluation mode.
/// </summary>
public sealed class BatchNormChainTests : IDisposable
{
    private const double Step = 1e-6;

    // Central differences of a loss near 1 are off by roundoff of some 1e-16 / Step = 1e-10; gradients here are 1e-3 and more.
    private const double Tolerance = 1e-6;

    private const int Images = 3, Height = 5, Width = 6, Channels = 4, Classes = 5;

    private readonly Backend _backend = TestBackends.Reference;
    private RandomStream _stream = new(1, "chain"); // a mutable struct
    private readonly Dictionary<string, (nint Address, int Count)> _memory = [];
    private readonly List<string> _parameters = [];
    private bool _training;

    public static TheoryData<string, bool> Operators()
    {
        var data = new TheoryData<string, bool>();
        foreach (var name in new[]
                 {
                     "dil_conv", "sep_conv", "pointwise", "factorized_reduction", "convolution", "preprocess", "max_pool", "avg_pool",
                 })
        {
            data.Add(name, true);
            data.Add(name, false);
        }
        return data;
    }

    [Theory]
    [MemberData(nameof(Operators))]
    public void Gradients_equal_finite_differences(string name, bool training)
    {
        _training = training;
        var (forward, backward, pixels) = name switch
        {
            "dil_conv" => DilatedConvolution(),
            "sep_conv" => SeparableConvolution(),
            "pointwise" => Pointwise(),
            "factorized_reduction" => FactorizedReduction(),
            "convolution" => Convolution(),
            "preprocess" => Preprocess(),
            _ => Pool(name == "max_pool" ? Pooling.Max3x3 : Pooling.Avg3x3),
        };
        var tail = new Tail(this, pixels);
        double Loss()
        {
            forward();
            return tail.Forward();
        }
        _ = Loss();
        tail.Backward();
        backward();
        foreach (var parameter in _parameters)
            Check(parameter, Loss);
    }

    public void Dispose()
    {
        foreach (var (address, _) in _memory.Values)
            _backend.Free(address);
    }

    private (Action, Action, int) DilatedConvolution()
    {
        Parameter("x", Images * Height * Width * 3);
        Parameter("depthwise", 9 * 3);
        Parameter("pointwise", 3 * Channels);
        const int pixels = 3 * 3; // stride 2 of 5x6
        DepthwisePointwiseArgs Args() => new()
        {
            X = At("x"),
            Depthwise = At("depthwise"),
            Pointwise = At("pointwise"),
            Y = At("y", Images * pixels * Channels),
            Statistics = At("statistics", Images * 2 * Channels),
            G = At("g", Images * pixels * Channels),
            Coefficients = At("coefficients", 3 * Channels),
            Dx = Gradient("x"),
            DDepthwise = Gradient("depthwise"),
            DPointwise = Gradient("pointwise"),
            Variants = 1,
            Images = Images,
            Height = Height,
            Width = Width,
            InChannels = 3,
            OutChannels = Channels,
            Kernel = 3,
            Stride = 2,
            Dilation = 2,
        };
        return (() => _backend.DepthwisePointwiseForward(Args()), () => _backend.DepthwisePointwiseBackward(Args()), pixels);
    }

    private (Action, Action, int) SeparableConvolution()
    {
        const int middle = 3, pixels = Height * Width;
        Parameter("x", Images * pixels * Channels);
        Parameter("depthwise1", 25 * Channels);
        Parameter("pointwise1", Channels * middle);
        Parameter("depthwise2", 25 * middle);
        Parameter("pointwise2", middle * Channels);
        var norm = new Normalization(this, "1", pixels, middle);
        DepthwisePointwiseArgs First() => new()
        {
            X = At("x"),
            Depthwise = At("depthwise1"),
            Pointwise = At("pointwise1"),
            Y = At("y1", Images * pixels * middle),
            Statistics = norm.Statistics,
            G = At("g1", Images * pixels * middle),
            Coefficients = norm.Coefficients,
            Dx = Gradient("x"),
            DDepthwise = Gradient("depthwise1"),
            DPointwise = Gradient("pointwise1"),
            Variants = 1,
            Images = Images,
            Height = Height,
            Width = Width,
            InChannels = Channels,
            OutChannels = middle,
            Kernel = 5,
            Stride = 1,
            Dilation = 1,
        };
        DepthwisePointwiseArgs Second() => First() with
        {
            X = At("y1"),
            XNormalization = norm.Result,
            Depthwise = At("depthwise2"),
            Pointwise = At("pointwise2"),
            Y = At("y", Images * pixels * Channels),
            Statistics = At("statistics", Images * 2 * Channels),
            G = At("g", Images * pixels * Channels),
            Coefficients = At("coefficients", 3 * Channels),
            Dx = At("g1"),
            GradientSums = At("sums1", Images * 2 * middle),
            DDepthwise = Gradient("depthwise2"),
            DPointwise = Gradient("pointwise2"),
            InChannels = middle,
            OutChannels = Channels,
        };
        void Forward()
        {
            _backend.DepthwisePointwiseForward(First());
            norm.Forward();
            _backend.DepthwisePointwiseForward(Second());
        }
        void Backward()
        {
            _backend.DepthwisePointwiseBackward(Second());
            norm.Backward(At("sums1"), rows: 2, row: 1, weight: 0);
            _backend.DepthwisePointwiseBackward(First());
        }
        return (Forward, Backward, pixels);
    }

    private (Action, Action, int) Pointwise()
    {
        Parameter("x0", Images * Height * Width * 2);
        Parameter("x1", Images * Height * Width * 3);
        Parameter("weight", 5 * Channels);
        var parts = new[] { Part("x0", 2), Part("x1", 3) };
        PointwiseArgs Args() => PointwiseArgs("weight", "y", "statistics", "g", "coefficients", Channels, relu: true);
        return (() => WithParts(parts, Args(), _backend.PointwiseForward), () => WithParts(parts, Args(), _backend.PointwiseBackward),
            Height * Width);
    }

    private (Action, Action, int) FactorizedReduction()
    {
        Parameter("x", Images * Height * Width * 3);
        Parameter("weight0", 3 * Channels / 2);
        Parameter("weight1", 3 * Channels / 2);
        PointwiseArgs Args(int half) => PointwiseArgs($"weight{half}", "y", "statistics", "g", "coefficients", Channels, relu: true) with
        {
            OutChannels = Channels / 2,
            Stride = 2,
            Offset = half,
            YOffset = half * Channels / 2,
        };
        void Forward()
        {
            for (var half = 0; half < 2; half++)
                WithParts([Part("x", 3)], Args(half), _backend.PointwiseForward);
        }
        void Backward()
        {
            for (var half = 0; half < 2; half++)
                WithParts([Part("x", 3) with { Accumulate = half }], Args(half), _backend.PointwiseBackward);
        }
        return (Forward, Backward, 3 * 3);
    }

    private (Action, Action, int) Convolution()
    {
        Parameter("x", Images * Height * Width * 3);
        Parameter("weight", 9 * 3 * Channels);
        ConvolutionArgs Args() => ConvolutionArgs("x", 3, Gradient("x"), stride: 2);
        return (() => _backend.ConvolutionForward(Args()), () => _backend.ConvolutionBackward(Args()), 3 * 3);
    }

    /// <summary>Pointwise - batch norm - materialised by a mixed sum of one term - convolution.</summary>
    private (Action, Action, int) Preprocess()
    {
        const int middle = 3, pixels = Height * Width;
        Parameter("x", Images * pixels * 2);
        Parameter("weight1", 2 * middle);
        Parameter("weight", 9 * middle * Channels);
        var norm = new Normalization(this, "1", pixels, middle);
        PointwiseArgs First() => PointwiseArgs("weight1", "y1", "statistics1", "g1", "coefficients1", middle, relu: false);
        ConvolutionArgs Second() => ConvolutionArgs("n1", middle, At("g1"), stride: 1);
        void MaterialiseForward() => WithTerms([new() { Y = At("y1"), Normalization = norm.Result, Variants = 1 }], Materialise(),
            _backend.MixedSumForward);
        MixedSumArgs Materialise() => new()
        {
            Out = At("n1", Images * pixels * middle),
            G = At("g1", Images * pixels * middle),
            GradientSums = At("sums1", Images * 2 * middle),
            Variants = 1,
            Images = Images,
            Pixels = pixels,
            Channels = middle,
        };
        void Forward()
        {
            WithParts([Part("x", 2)], First(), _backend.PointwiseForward);
            norm.Forward();
            MaterialiseForward();
            _backend.ConvolutionForward(Second());
        }
        void Backward()
        {
            _backend.ConvolutionBackward(Second());
            WithTerms([new() { Y = At("y1"), Normalization = norm.Result, Variants = 1 }], Materialise(), _backend.MixedSumBackward);
            norm.Backward(At("sums1"), rows: 2, row: 1, weight: 0);
            WithParts([Part("x", 2)], First(), _backend.PointwiseBackward);
        }
        return (Forward, Backward, pixels);
    }

    private (Action, Action, int) Pool(Pooling pooling)
    {
        Parameter("x", Images * Height * Width * Channels);
        const int pixels = 3 * 3;
        PoolArgs Args() => new()
        {
            X = At("x"),
            Y = new() { [pooling] = At("y", Images * pixels * Channels) },
            Statistics = new() { [pooling] = At("statistics", Images * 2 * Channels) },
            Dx = Gradient("x"),
            Variants = 1,
            Images = Images,
            Height = Height,
            Width = Width,
            Channels = Channels,
            Stride = 2,
        };
        unsafe void Backward()
        {
            PoolGradientArgs gradient = new()
            {
                G = At("g", Images * pixels * Channels),
                Coefficients = new() { [pooling] = At("coefficients", 3 * Channels) },
            };
            _backend.PoolBackward(Args() with { Gradients = (nint)(&gradient), GradientCount = 1 });
        }
        return (() => _backend.PoolForward(Args()), Backward, pixels);
    }

    private PointwiseArgs PointwiseArgs(
        string weight, string y, string statistics, string g, string coefficients, int channels, bool relu) => new()
        {
            Weight = At(weight),
            Y = At(y, Images * Height * Width * channels),
            Statistics = At(statistics, Images * 2 * channels),
            G = At(g, Images * Height * Width * channels),
            Coefficients = At(coefficients, 3 * channels),
            DWeight = Gradient(weight),
            Relu = relu ? 1 : 0,
            Images = Images,
            Height = Height,
            Width = Width,
            OutChannels = channels,
            Stride = 1,
            YChannels = channels,
        };

    private ConvolutionArgs ConvolutionArgs(string x, int inChannels, nint dx, int stride)
    {
        var count = Images * ((Height - 1) / stride + 1) * ((Width - 1) / stride + 1) * Channels;
        return new()
        {
            X = At(x),
            Weight = At("weight"),
            Y = At("y", count),
            Statistics = At("statistics", Images * 2 * Channels),
            G = At("g", count),
            Coefficients = At("coefficients", 3 * Channels),
            Dx = dx,
            DWeight = Gradient("weight"),
            Variants = 1,
            Images = Images,
            Height = Height,
            Width = Width,
            InChannels = inChannels,
            OutChannels = Channels,
            KernelH = 3,
            KernelW = 3,
            StrideH = stride,
            StrideW = stride,
            PaddingH = 1,
            PaddingW = 1,
            Relu = 1,
        };
    }

    private PartArgs Part(string name, int channels) => new() { X = At(name), Dx = Gradient(name), Variants = 1, Channels = channels };

    private delegate void PointwiseKernel(in PointwiseArgs a);

    private static unsafe void WithParts(PartArgs[] parts, PointwiseArgs a, PointwiseKernel kernel)
    {
        fixed (PartArgs* first = parts)
            kernel(a with { Parts = (nint)first, PartCount = parts.Length });
    }

    private delegate void MixedSumKernel(in MixedSumArgs a);

    private static unsafe void WithTerms(TermArgs[] terms, MixedSumArgs a, MixedSumKernel kernel)
    {
        fixed (TermArgs* first = terms)
            kernel(a with { Terms = (nint)first, TermCount = terms.Length });
    }

    /// <summary>The buffer of this name, made (zeroed) at its first use.</summary>
    private nint At(string name, int count = 0)
    {
        if (!_memory.TryGetValue(name, out var entry))
            _memory[name] = entry = (_backend.Allocate((long)count * sizeof(double)), count);
        return entry.Address;
    }

    /// <summary>Makes a random value that gradients are checked for.</summary>
    private nint Parameter(string name, int count, double mean = 0)
    {
        var values = new double[count];
        for (var i = 0; i < count; i++)
            values[i] = mean + 0.5 * _stream.NextNormal();
        _backend.Write(At(name, count), values);
        _parameters.Add(name);
        return At(name);
    }

    private nint Gradient(string parameter) => At($"gradient of {parameter}", _memory[parameter].Count);

    private double[] Read(string name)
    {
        var values = new double[_memory[name].Count];
        _backend.Read(At(name), values);
        return values;
    }

    private void Check(string parameter, Func<double> loss)
    {
        var values = Read(parameter);
        var gradient = Read($"gradient of {parameter}");
        for (var trial = 0; trial < 8; trial++)
        {
            var direction = new double[values.Length];
            if (trial < 4)
                direction[_stream.NextInt(values.Length)] = 1;
            else
                for (var i = 0; i < values.Length; i++)
                    direction[i] = _stream.NextNormal();
            var expected = (LossAt(1) - LossAt(-1)) / (2 * Step);
            var actual = gradient.Zip(direction, (g, d) => g * d).Sum();
            var scale = Math.Sqrt(gradient.Sum(g => g * g) * direction.Sum(d => d * d) / values.Length);
            Assert.True(
                Math.Abs(expected - actual) <= Tolerance * scale,
                $"the gradient of {parameter} in direction {trial} is {actual:g10}, finite differences say {expected:g10}; scale {scale:g3}");

            double LossAt(int sign)
            {
                _backend.Write(At(parameter), values.Zip(direction, (value, d) => value + sign * Step * d).ToArray());
                var result = loss();
                _backend.Write(At(parameter), values);
                return result;
            }
        }
    }

    /// <summary>An affine batch norm of a raw output, with batch or running statistics as the chain's mode says.</summary>
    private sealed class Normalization
    {
        private readonly BatchNormChainTests _chain;
        private readonly string _id;
        private readonly int _pixels, _channels;

        public Normalization(BatchNormChainTests chain, string id, int pixels, int channels)
        {
            (_chain, _id, _pixels, _channels) = (chain, id, pixels, channels);
            chain.Parameter($"gamma{id}", channels, mean: 1);
            chain.Parameter($"beta{id}", channels);
            var running = new double[channels];
            Array.Fill(running, 0.7);
            chain._backend.Write(chain.At($"running mean{id}", channels), running);
            chain._backend.Write(chain.At($"running variance{id}", channels), running);
        }

        public nint Statistics => _chain.At($"statistics{_id}", Images * 2 * _channels);

        public nint Result => _chain.At($"normalization{_id}", 4 * _channels);

        public nint Coefficients => _chain.At($"coefficients{_id}", 3 * _channels);

        public void Forward() => _chain._backend.BatchNormForward(new()
        {
            Statistics = _chain._training ? Statistics : 0,
            Gamma = _chain.At($"gamma{_id}"),
            Beta = _chain.At($"beta{_id}"),
            RunningMean = _chain._training ? 0 : _chain.At($"running mean{_id}"),
            RunningVariance = _chain._training ? 0 : _chain.At($"running variance{_id}"),
            Normalization = Result,
            Variants = 1,
            Images = Images,
            Pixels = _pixels,
            Channels = _channels,
            Epsilon = 1e-5f,
            Momentum = 0.1f,
        });

        public void Backward(nint sums, int rows, int row, nint weight) => _chain._backend.BatchNormBackward(new()
        {
            GradientSums = sums,
            Normalization = Result,
            Weight = weight,
            Coefficients = Coefficients,
            DGamma = _chain.Gradient($"gamma{_id}"),
            DBeta = _chain.Gradient($"beta{_id}"),
            Images = Images,
            Pixels = _pixels,
            Channels = _channels,
            Rows = rows,
            Row = row,
            Training = _chain._training ? 1 : 0,
        });
    }

    /// <summary>From the raw output "y" to the loss, and back to "g" and the pending "coefficients".</summary>
    private sealed class Tail
    {
        private readonly BatchNormChainTests _chain;
        private readonly Normalization _norm;
        private readonly int _pixels;

        public Tail(BatchNormChainTests chain, int pixels)
        {
            (_chain, _pixels) = (chain, pixels);
            _norm = new(chain, "", pixels, Channels);
            chain.Parameter("skip", Images * pixels * Channels);
            chain.Parameter("weights", 2, mean: 1);
            chain.Parameter("classifier", Channels * Classes, mean: 1);
            chain.Parameter("bias", Classes);
            chain._backend.Write(chain.At("labels", Images), new[] { 4, 0, 2 });
            chain.At("y", Images * pixels * Channels);
        }

        public double Forward()
        {
            var backend = _chain._backend;
            _norm.Forward();
            WithTerms(Terms(), MixedSum(), backend.MixedSumForward);
            WithPool(backend.GlobalAveragePoolForward);
            backend.LinearForward(Linear());
            backend.SoftmaxCrossEntropy(new()
            {
                Logits = _chain.At("logits"),
                Labels = _chain.At("labels"),
                LossSums = _chain.At("loss", 1),
                CorrectCounts = _chain.At("correct", 1),
                Dlogits = _chain.At("dlogits", Images * Classes),
                Variants = 1,
                Images = Images,
                Classes = Classes,
                Smoothing = 0.125f,
                Scale = 2,
            });
            return 2 * _chain.Read("loss")[0] / Images;
        }

        public unsafe void Backward()
        {
            var backend = _chain._backend;
            backend.LinearBackward(Linear());
            WithPool(backend.GlobalAveragePoolBackward);
            WithTerms(Terms(), MixedSum(), backend.MixedSumBackward);
            var weights = _chain.At("weights");
            _norm.Backward(_chain.At("sums"), rows: 3, row: 2, weight: weights + sizeof(double));
            backend.BatchNormBackward(new()
            {
                Weight = weights,
                Coefficients = _chain.At("skip coefficients", 3 * Channels),
                Images = Images,
                Pixels = _pixels,
                Channels = Channels,
                Rows = 3,
                Row = 1,
            });
            PoolGradientArgs skip = new() { G = _chain.At("g"), Coefficients = new() { [Pooling.None] = _chain.At("skip coefficients") } };
            backend.PoolBackward(new()
            {
                X = _chain.At("skip"),
                Gradients = (nint)(&skip),
                Dx = _chain.Gradient("skip"),
                Variants = 1,
                Images = Images,
                Height = _pixels,
                Width = 1,
                Channels = Channels,
                Stride = 1,
                GradientCount = 1,
            });
        }

        private TermArgs[] Terms() =>
        [
            new() { Y = _chain.At("skip"), Variants = 1, WeightIndex = 0 },
            new() { Y = _chain.At("y"), Normalization = _norm.Result, Variants = 1, WeightIndex = 1 },
        ];

        private MixedSumArgs MixedSum() => new()
        {
            Weights = _chain.At("weights"),
            Out = _chain.At("out", Images * _pixels * Channels),
            G = _chain.At("g", Images * _pixels * Channels),
            GradientSums = _chain.At("sums", Images * 3 * Channels),
            WeightGradients = _chain.Gradient("weights"),
            Variants = 1,
            Images = Images,
            Pixels = _pixels,
            Channels = Channels,
            WeightStride = 2,
        };

        private LinearArgs Linear() => new()
        {
            X = _chain.At("features", Images * Channels),
            Weight = _chain.At("classifier"),
            Bias = _chain.At("bias"),
            Out = _chain.At("logits", Images * Classes),
            G = _chain.At("dlogits", Images * Classes),
            Dx = _chain.At("dfeatures", Images * Channels),
            DWeight = _chain.Gradient("classifier"),
            DBias = _chain.Gradient("bias"),
            Rows = Images,
            InChannels = Channels,
            OutChannels = Classes,
        };

        private delegate void PoolKernel(in GlobalAveragePoolArgs a);

        private unsafe void WithPool(PoolKernel kernel)
        {
            var part = new PartArgs { X = _chain.At("out"), Dx = _chain.At("g"), Variants = 1, Channels = Channels };
            kernel(new()
            {
                Parts = (nint)(&part),
                Out = _chain.At("features", Images * Channels),
                G = _chain.At("dfeatures", Images * Channels),
                PartCount = 1,
                Images = Images,
                Pixels = _pixels,
            });
        }
    }
}
