using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// Calls of a group share an input (convolutions of several kernels, dilations and strides pad it once), add to the same gradient, and run a
/// mixed sum in parts beside the others: every bit must be that of the calls one after another.
/// </summary>
public class GroupTests
{
    /// <summary>
    /// Instruction set, extent, channels, variants, images, threads. More images than there are partial sums of a gradient make tasks of several
    /// images, which a call treats one after the other: all of them, or as many as their inputs fit the cache (17 x 17: three of four).
    /// </summary>
    public static TheoryData<Isa, int, int, int, int, int> Cases()
    {
        var data = new TheoryData<Isa, int, int, int, int, int>();
        foreach (var isa in TestBackends.InstructionSets)
            foreach (var (extent, channels, variants, images) in new[]
                { (16, 16, 1, 3), (9, 20, 3, 3), (8, 7, 2, 35), (5, 64, 1, 35), (17, 16, 1, 52), (1, 4, 2, 3) })
                for (var threads = 1; threads <= 2; threads++)
                    data.Add(isa, extent, channels, variants, images, threads);
        return data;
    }

    [Theory]
    [MemberData(nameof(Cases))]
    public void Forward_gives_the_bits_of_single_calls(Isa isa, int extent, int channels, int variants, int images, int threads)
    {
        using var calls = new Calls(TestBackends.Cpu(isa, threads), extent, channels, variants, images);
        calls.Compare(calls.Forward);
    }

    [Theory]
    [MemberData(nameof(Cases))]
    public void Backward_gives_the_bits_of_single_calls(Isa isa, int extent, int channels, int variants, int images, int threads)
    {
        _ = variants;
        using var calls = new Calls(TestBackends.Cpu(isa, threads), extent, channels, variants: 1, images);
        calls.Compare(() => calls.Backward(weightGradients: true));
        calls.Compare(() => calls.Backward(weightGradients: false));
    }

    /// <summary>A node's mixed sum, and the convolutions and pools of two values that come after it.</summary>
    private sealed class Calls : IDisposable
    {
        private readonly CpuBackend _backend;
        private readonly int _extent, _channels, _variants, _images;
        private readonly List<nint> _blocks = [];
        private readonly List<(nint Address, float[] Initial)> _outputs = [];
        private readonly TermArgs[] _terms;
        private readonly PoolGradientArgs[] _poolGradients = GC.AllocateArray<PoolGradientArgs>(1, pinned: true);
        private readonly nint[] _x;
        private readonly nint _weights;
        private int _next;

        public Calls(CpuBackend backend, int extent, int channels, int variants, int images)
        {
            (_backend, _extent, _channels, _variants, _images) = (backend, extent, channels, variants, images);
            _x = [Input(Size(variants)), Input(Size(variants))];
            // Two edges: one of a value that all variants share, with pools, the other one varies. Seven operations each.
            _terms = GC.AllocateArray<TermArgs>(14, pinned: true);
            for (var t = 0; t < _terms.Length; t++)
            {
                var own = t < 7 ? 1 : variants;
                var pooling = t % 7 < 2 ? (Pooling)(1 + t % 7) : Pooling.None;
                _terms[t] = new TermArgs
                {
                    Y = t % 7 is 1 or 2 ? _terms[t - 1].Y : Input(Size(own)),
                    Normalization = Input(4 * own * channels),
                    Variants = own,
                    WeightIndex = t,
                    Pooling = pooling,
                    Height = extent,
                    Width = extent,
                    Stride = 1,
                };
            }
            _weights = Input(variants * _terms.Length);
            // Variant v lacks term v.
            for (var v = 0; v < variants && variants > 1; v++)
                backend.Write(_weights + sizeof(float) * v * (_terms.Length + 1), [0f]);
        }

        private int Size(int variants) => variants * _images * _extent * _extent * _channels;

        private MixedSumArgs Sum => new()
        {
            Terms = (nint)Marshal.UnsafeAddrOfPinnedArrayElement(_terms, 0),
            Weights = _weights,
            TermCount = _terms.Length,
            Variants = _variants,
            Images = _images,
            Pixels = _extent * _extent,
            Channels = _channels,
            WeightStride = _terms.Length,
        };

        private DepthwisePointwiseArgs Convolution(nint x, int kernel, int dilation, int stride) => new()
        {
            X = x,
            Depthwise = Input(kernel * kernel * _channels),
            Pointwise = Input(_channels * _channels),
            Variants = _variants,
            Images = _images,
            Height = _extent,
            Width = _extent,
            InChannels = _channels,
            OutChannels = _channels,
            Kernel = kernel,
            Stride = stride,
            Dilation = dilation,
        };

        public void Forward()
        {
            _backend.MixedSumForward(Sum with { Out = Output(Size(_variants)) });
            foreach (var x in _x)
                foreach (var stride in new[] { 1, 2 })
                    foreach (var (kernel, dilation) in new[] { (3, 1), (5, 1), (3, 2), (5, 2), (7, 1) })
                        _backend.DepthwisePointwiseForward(Convolution(x, kernel, dilation, stride) with
                        {
                            Y = Output(Size(_variants) / (_extent * _extent) * ((_extent - 1) / stride + 1) * ((_extent - 1) / stride + 1)),
                            Statistics = Output(2 * _variants * _images * _channels),
                        });
            var statistics = default(PoolingAddresses);
            statistics[Pooling.Max3x3] = Output(2 * _variants * _images * _channels);
            _backend.PoolForward(Pool with { Statistics = statistics });
        }

        public void Backward(bool weightGradients)
        {
            _backend.MixedSumBackward(Sum with
            {
                G = Input(Size(1)),
                GradientSums = Output(_images * (1 + _terms.Length) * _channels),
                WeightGradients = Output(_terms.Length),
            });
            foreach (var x in _x)
            {
                var (dx, g) = (Output(Size(1)), Input(Size(1)));
                foreach (var (kernel, dilation) in new[] { (3, 1), (5, 1), (3, 2), (5, 2) })
                    _backend.DepthwisePointwiseBackward(Convolution(x, kernel, dilation, 1) with
                    {
                        Y = Input(Size(1)),
                        G = g,
                        Coefficients = Input(3 * _channels),
                        Dx = dx,
                        DDepthwise = weightGradients ? Output(kernel * kernel * _channels) : 0,
                        DPointwise = weightGradients ? Output(_channels * _channels) : 0,
                        Accumulate = kernel == 3 && dilation == 1 ? 0 : 1,
                    });
                if (x == _x[0])
                {
                    _poolGradients[0].G = g;
                    _poolGradients[0].Coefficients[Pooling.Max3x3] = Input(3 * _channels);
                    _backend.PoolBackward(Pool with
                    {
                        Gradients = Marshal.UnsafeAddrOfPinnedArrayElement(_poolGradients, 0),
                        GradientCount = 1,
                        Dx = dx,
                        Accumulate = 1,
                    });
                }
            }
        }

        private PoolArgs Pool => new()
        {
            X = _x[0],
            Variants = _variants,
            Images = _images,
            Height = _extent,
            Width = _extent,
            Channels = _channels,
            Stride = 1,
        };

        /// <summary>Runs the calls one by one and as a group, and compares everything that they wrote.</summary>
        public void Compare(Action calls)
        {
            var first = _next;
            _outputs.Clear();
            calls();
            var alone = Results();
            Assert.DoesNotContain(alone, output => output.Contains(float.NaN));
            foreach (var (address, initial) in _outputs)
                _backend.Write(address, initial);
            TestBackends.SpoilScratch(_backend);

            (_next, var outputs) = (first, _outputs.Count);
            _backend.BeginGroup();
            calls();
            _backend.EndGroup();
            Assert.Equal(outputs, _outputs.Count);
            Assert.Equal(alone, Results());
        }

        public void Dispose() => _blocks.ForEach(_backend.Free);

        private List<float[]> Results() => [.. _outputs.Select(output =>
        {
            var values = new float[output.Initial.Length];
            _backend.Read(output.Address, values);
            return values;
        })];

        // The same block again when the same calls are made again.
        private nint Block(int count)
        {
            if (_next == _blocks.Count)
                _blocks.Add(_backend.Allocate(count * sizeof(float)));
            return _blocks[_next++];
        }

        private nint Input(int count)
        {
            var isNew = _next == _blocks.Count;
            var block = Block(count);
            if (isNew)
                _backend.Write(block, Values(count));
            return block;
        }

        private nint Output(int count)
        {
            var isNew = _next == _blocks.Count;
            var block = Block(count);
            var initial = Values(count);
            if (isNew)
                _backend.Write(block, initial);
            if (!_outputs.Exists(output => output.Address == block))
                _outputs.Add((block, initial));
            return block;
        }

        private float[] Values(int count)
        {
            var stream = new RandomStream(1, $"block {_next}");
            return [.. Enumerable.Range(0, count).Select(_ => (float)stream.NextNormal())];
        }
    }
}
