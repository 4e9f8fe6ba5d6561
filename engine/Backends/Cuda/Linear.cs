using System.Runtime.CompilerServices;

namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    public override void LinearForward(in LinearArgs a)
    {
        const int threads = 256, rowsPerBlock = 4, channelsPerBlock = 64;
        CheckLinear(a);
        Require(a.X != 0 && a.Weight != 0 && a.Bias != 0 && a.Out != 0, "x, weight, bias or out is null");
        var block = ChannelBlock.For(a.OutChannels, a.InChannels, threads, channelsPerBlock, unit: 1);
        Launch("linear_forward", new Dim3(ChannelBlock.Blocks(a.Rows, rowsPerBlock), block.Groups), block.Block, a);
    }

    public override void LinearBackward(in LinearArgs a)
    {
        const int tile = 16, threads = 256;
        CheckLinear(a);
        if (a.Dx == 0 && a.DWeight == 0 && a.DBias == 0)
            return;
        Require(a.G != 0, "g is null");
        Require(a.Dx == 0 || a.Weight != 0, "weight is null");
        Require(a.DWeight == 0 || a.X != 0, "x is null");
        if (a.Dx != 0)
            Launch("linear_backward_input", new Dim3(ChannelBlock.Blocks(a.InChannels, tile), ChannelBlock.Blocks(a.Rows, tile)),
                new Dim3(tile, tile), a);
        if (a.DWeight != 0 || a.DBias != 0)
            Launch("linear_backward_weight", ChannelBlock.Blocks((a.InChannels + 1L) * a.OutChannels, threads), threads, a);
    }

    private static void CheckLinear(in LinearArgs a, [CallerMemberName] string kernel = "") =>
        Require(a.Rows > 0 && a.InChannels > 0 && a.OutChannels > 0,
            $"rows {a.Rows}, in_channels {a.InChannels} and out_channels {a.OutChannels} must be positive", kernel);
}
