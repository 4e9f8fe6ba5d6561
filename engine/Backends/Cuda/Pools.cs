using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int PoolGradients = 8;

    public override void PoolForward(in PoolArgs a)
    {
        // A block has few channels, so that an image is spread over several.
        const int threads = 512, channels = 32;
        CheckPool(a);
        Require(a.Y[Pooling.None] == 0 && a.Statistics[Pooling.None] == 0, "what is not pooled has no y and no statistics");
        nint[] results = [a.Y[Pooling.Max3x3], a.Y[Pooling.Avg3x3], a.Statistics[Pooling.Max3x3], a.Statistics[Pooling.Avg3x3]];
        if (Array.TrueForAll(results, address => address == 0))
            return;
        var outputs = (long)Ceiling(a.Height, a.Stride) * Ceiling(a.Width, a.Stride);
        var unit = ChannelBlock.UnitFor([a.Channels], [a.X, .. results]);
        var block = ChannelBlock.For(a.Channels, outputs, threads, channels, unit);
        Launch("pool_3x3_forward", new Dim3(a.Variants * a.Images, block.Groups), block.Block, new PoolLaunch { Call = a, Unit = unit });
    }

    public override void PoolBackward(in PoolArgs a)
    {
        // The largest tile, as in kernels/cuda/pools.cu.
        const int threads = 256, rows = 8, columns = 32, channels = 16;
        CheckPool(a);
        Require(a.Variants == 1, $"takes one variant, not {a.Variants}");
        Require(a.Gradients != 0 && a.GradientCount >= 1, "there are no gradients");
        var gradients = new ReadOnlySpan<PoolGradientArgs>((void*)a.Gradients, a.GradientCount);
        var unit = ChannelBlock.UnitFor([a.Channels], a.X, a.Dx);
        for (var i = 0; i < gradients.Length; i++)
        {
            var (g, skip, maximum, average) = (gradients[i].G, gradients[i].Coefficients[Pooling.None],
                gradients[i].Coefficients[Pooling.Max3x3], gradients[i].Coefficients[Pooling.Avg3x3]);
            Require(g != 0, $"g of gradient {i} is null");
            Require(skip != 0 || maximum != 0 || average != 0, $"gradient {i} has no coefficients");
            Require(skip == 0 || a.Stride == 1, $"a skip connection has stride 1, but gradient {i} is of stride {a.Stride}");
            unit = Math.Min(unit, ChannelBlock.UnitFor([a.Channels], g, skip, maximum, average));
        }
        if (gradients.Length > PoolGradients)
            throw new KernelException(
                $"{nameof(PoolBackward)}: a pool has at most {PoolGradients} gradients on a CUDA device, not {gradients.Length}",
                KernelStatus.NotSupported);
        if (a.Dx == 0)
            return;
        var launch = new PoolLaunch { Call = a, Unit = unit };
        gradients.CopyTo(launch.Gradients);
        var pixels = (long)Math.Min(a.Height, rows) * Math.Min(a.Width, columns);
        var block = ChannelBlock.For(a.Channels, pixels, threads, channels, unit);
        var tiles = Ceiling(a.Height, rows) * Ceiling(a.Width, columns);
        Launch("pool_3x3_backward", new Dim3(a.Images, block.Groups, tiles), block.Block, launch);
    }

    private static void CheckPool(in PoolArgs a, [CallerMemberName] string kernel = "")
    {
        Require(a.Variants >= 1 && a.Images >= 1 && a.Height >= 1 && a.Width >= 1 && a.Channels >= 1,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, H {a.Height}, W {a.Width}, C {a.Channels}", kernel);
        Require(a.Stride is 1 or 2, $"stride must be 1 or 2, not {a.Stride}", kernel);
        Require(a.X != 0, "x is null", kernel);
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct PoolLaunch
    {
        public PoolArgs Call;
        public int Unit;
        public GradientArray Gradients;
    }

    [InlineArray(PoolGradients)]
    private struct GradientArray
    {
        private PoolGradientArgs _first;
    }
}
