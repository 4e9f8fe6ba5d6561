using System.Runtime.CompilerServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int GlobalAveragePoolParts = 32;

    public override void GlobalAveragePoolForward(in GlobalAveragePoolArgs a)
    {
        var launch = CheckGlobalAveragePool(a, out var variants);
        Require(a.Out != 0, "out is null");
        var parts = new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount);
        for (var i = 0; i < parts.Length; i++)
            Require(parts[i].X != 0, $"part {i} has no x");
        LaunchGlobalAveragePool("global_average_pool_forward", variants * a.Images, launch);
    }

    public override void GlobalAveragePoolBackward(in GlobalAveragePoolArgs a)
    {
        var launch = CheckGlobalAveragePool(a, out var variants);
        Require(variants == 1, $"takes one variant, not {variants}");
        Require(a.G != 0, "g is null");
        LaunchGlobalAveragePool("global_average_pool_backward", a.Images, launch);
    }

    private static GlobalAveragePoolLaunch CheckGlobalAveragePool(
        in GlobalAveragePoolArgs a, out int variants, [CallerMemberName] string kernel = "")
    {
        Require(a.Parts != 0 && a.PartCount >= 1 && a.Images >= 1 && a.Pixels >= 1,
            $"every extent must be positive, not N {a.Images}, P {a.Pixels}, {a.PartCount} parts", kernel);
        if (a.PartCount > GlobalAveragePoolParts)
            throw new KernelException(
                $"{kernel}: at most {GlobalAveragePoolParts} parts on a CUDA device, not {a.PartCount}", KernelStatus.NotSupported);
        var parts = new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount);
        variants = 1;
        for (var i = 0; i < parts.Length; i++)
        {
            Require(parts[i].Variants >= 1 && parts[i].Channels >= 1, $"part {i} has V {parts[i].Variants}, C {parts[i].Channels}", kernel);
            variants = Math.Max(variants, parts[i].Variants);
        }
        for (var i = 0; i < parts.Length; i++)
            Require(parts[i].Variants == 1 || parts[i].Variants == variants,
                $"part {i} has {parts[i].Variants} variants, which is neither 1 nor {variants}", kernel);
        return new(a);
    }

    private void LaunchGlobalAveragePool(string kernel, int images, in GlobalAveragePoolLaunch launch)
    {
        const int threads = 256, channelsPerBlock = 64;
        var block = ChannelBlock.For(launch.WidestPart, launch.Call.Pixels, threads, channelsPerBlock, launch.Unit);
        Launch(kernel, new Dim3(images, block.Groups, launch.Call.PartCount), block.Block, launch);
    }

    private readonly struct GlobalAveragePoolLaunch
    {
        public readonly GlobalAveragePoolArgs Call;
        public readonly int Channels, Unit;
        public readonly FirstChannels First;
        public readonly PartArray Parts;

        public GlobalAveragePoolLaunch(in GlobalAveragePoolArgs a)
        {
            Call = a;
            var parts = new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount);
            parts.CopyTo(Parts);
            Unit = ChannelBlock.UnitFor([], a.Out, a.G);
            for (var i = 0; i < parts.Length; i++)
            {
                First[i] = Channels;
                Channels += parts[i].Channels;
                Unit = Math.Min(Unit, ChannelBlock.UnitFor([parts[i].Channels], parts[i].X, parts[i].Dx));
            }
        }

        public int WidestPart
        {
            get
            {
                var widest = 0;
                for (var i = 0; i < Call.PartCount; i++)
                    widest = Math.Max(widest, Parts[i].Channels);
                return widest;
            }
        }
    }

    [InlineArray(GlobalAveragePoolParts)]
    private struct FirstChannels
    {
        private int _first;
    }

    [InlineArray(GlobalAveragePoolParts)]
    private struct PartArray
    {
        private PartArgs _first;
    }
}
