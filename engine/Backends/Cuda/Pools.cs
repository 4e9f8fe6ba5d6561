using System.Runtime.CompilerServices;

namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    // A block has few channels, so that an image is spread over several.
    private const int PoolChannels = 32;

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
    }

    private void LaunchPoolForward(string kernel, in PoolArgs a)
    {
        const int threads = 512;
        var outputs = (long)((a.Height - 1) / a.Stride + 1) * ((a.Width - 1) / a.Stride + 1);
        var unit = ChannelBlock.UnitFor([a.Channels], a.X, a.Y, a.Statistics);
        var block = ChannelBlock.For(a.Channels, outputs, threads, PoolChannels, unit);
        Launch(kernel, new Dim3(a.Variants * a.Images, block.Groups), block.Block, new PoolLaunch(a, unit));
    }

    private void LaunchPoolBackward(string kernel, in PoolArgs a)
    {
        const int threads = 256, stripRows = 4;
        if (a.Dx == 0)
            return;
        var strips = (long)ChannelBlock.Blocks(a.Height, stripRows) * a.Width;
        var unit = ChannelBlock.UnitFor([a.Channels], a.X, a.Dx);
        var block = ChannelBlock.For(a.Channels, strips, threads, PoolChannels, unit);
        Launch(kernel, new Dim3(a.Images, block.Groups, ChannelBlock.Blocks(strips, block.Rows)), block.Block, new PoolLaunch(a, unit));
    }

    private readonly record struct PoolLaunch(PoolArgs Call, int Unit);
}
