using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int PoolGradients = 8;

    public override void MaxPoolForward(in PoolArgs a)
    {
        CheckPoolForward(a);
        LaunchPoolForward("max_pool_3x3_forward", a);
    }

    public override void MaxPoolBackward(in PoolArgs a)
    {
        CheckPoolBackward(a);
        LaunchPoolBackward("max_pool_3x3_backward", a);
    }

    public override void AvgPoolForward(in PoolArgs a)
    {
        CheckPoolForward(a);
        LaunchPoolForward("avg_pool_3x3_forward", a);
    }

    public override void AvgPoolBackward(in PoolArgs a)
    {
        CheckPoolBackward(a);
        LaunchPoolBackward("avg_pool_3x3_backward", a);
    }

    private static void CheckPool(in PoolArgs a, string kernel)
    {
        Require(a.Variants >= 1 && a.Images >= 1 && a.Height >= 1 && a.Width >= 1 && a.Channels >= 1,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, H {a.Height}, W {a.Width}, C {a.Channels}", kernel);
        Require(a.Stride is 1 or 2, $"stride must be 1 or 2, not {a.Stride}", kernel);
    }

    private static void CheckPoolForward(in PoolArgs a, [CallerMemberName] string kernel = "")
    {
        CheckPool(a, kernel);
        Require(a.X != 0, "x is null", kernel);
    }

    private static void CheckPoolBackward(in PoolArgs a, [CallerMemberName] string kernel = "")
    {
        CheckPool(a, kernel);
        Require(a.Variants == 1, $"takes one variant, not {a.Variants}", kernel);
        Require(a.X != 0, "x is null", kernel);
        Require(a.Gradients != 0 && a.GradientCount >= 1, "there are no gradients", kernel);
        var gradients = new ReadOnlySpan<PendingGradientArgs>((void*)a.Gradients, a.GradientCount);
        for (var i = 0; i < gradients.Length; i++)
            Require(gradients[i].G != 0, $"g of gradient {i} is null", kernel);
        if (a.GradientCount > PoolGradients)
            throw new KernelException(
                $"{kernel}: a pool has at most {PoolGradients} gradients on a CUDA device, not {a.GradientCount}", KernelStatus.NotSupported);
    }

    private void LaunchPoolForward(string kernel, in PoolArgs a)
    {
        // A block has few channels, so that an image is spread over several.
        const int threads = 512, channels = 32;
        if (a.Y == 0 && a.Statistics == 0)
            return;
        var outputs = (long)Ceiling(a.Height, a.Stride) * Ceiling(a.Width, a.Stride);
        var unit = ChannelBlock.UnitFor([a.Channels], a.X, a.Y, a.Statistics);
        var block = ChannelBlock.For(a.Channels, outputs, threads, channels, unit);
        Launch(kernel, new Dim3(a.Variants * a.Images, block.Groups), block.Block, new PoolLaunch { Call = a, Unit = unit });
    }

    private void LaunchPoolBackward(string kernel, in PoolArgs a)
    {
        // The largest tile, as in kernels/cuda/pools.cu.
        const int threads = 256, rows = 8, columns = 32, channels = 16;
        if (a.Dx == 0)
            return;
        var launch = new PoolLaunch { Call = a, Unit = ChannelBlock.UnitFor([a.Channels], a.X, a.Dx) };
        var gradients = new ReadOnlySpan<PendingGradientArgs>((void*)a.Gradients, a.GradientCount);
        gradients.CopyTo(launch.Gradients);
        foreach (var gradient in gradients)
            launch.Unit = Math.Min(launch.Unit, ChannelBlock.UnitFor([a.Channels], gradient.G, gradient.Coefficients));
        var pixels = (long)Math.Min(a.Height, rows) * Math.Min(a.Width, columns);
        var block = ChannelBlock.For(a.Channels, pixels, threads, channels, launch.Unit);
        var tiles = Ceiling(a.Height, rows) * Ceiling(a.Width, columns);
        Launch(kernel, new Dim3(a.Images, block.Groups, tiles), block.Block, launch);
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
        private PendingGradientArgs _first;
    }
}
