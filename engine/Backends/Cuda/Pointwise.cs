using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int MaxParts = 8;

    public override void PointwiseForward(in PointwiseArgs a)
    {
        const string name = "pointwise_forward";
        var parts = CheckParts(name, a, out var variants);
        Require(a.Weight != 0 && a.Y != 0, "weight or y is null", name);
        for (var i = 0; i < parts.Length; i++)
            Require(parts[i].X != 0, $"part {i} is null", name);

        var launch = new PointwiseLaunch { A = a };
        launch.SetParts(parts);
        var images = (long)variants * a.Images;
        var threads = TilePixels(launch.Pixels);
        launch.Tiles = Ceiling(launch.Pixels, threads);
        var tiles = images * launch.Tiles;
        var apart = a.Statistics != 0 && launch.Tiles > 1;
        launch.Sums = apart ? Scratch(tiles * 2 * a.YChannels * sizeof(float)) : a.Statistics;
        var columns = BlockColumns(a.OutChannels, tiles);
        launch.Counters = apart ? Counters(images * Ceiling(a.OutChannels, columns)) : 0;
        Launch(ProductKernel(name, columns), new(checked((int)tiles), Ceiling(a.OutChannels, columns)), new(threads), launch,
            ProductBytes(threads, columns));
    }

    public override void PointwiseBackward(in PointwiseArgs a)
    {
        const string name = "pointwise_backward";
        var parts = CheckParts(name, a, out var variants);
        Require(variants == 1, $"takes one variant, not {variants}", name);
        var wanted = false;
        for (var i = 0; i < parts.Length; i++)
        {
            wanted |= parts[i].Dx != 0;
            Require(parts[i].X != 0 || !(a.DWeight != 0 || (parts[i].Dx != 0 && a.Relu != 0)), $"part {i} is null", name);
        }
        if (!wanted && a.DWeight == 0)
            return;
        Require(a.G != 0, "g is null", name);
        Require(!wanted || a.Weight != 0, "weight is null", name);
        Require(a.Coefficients == 0 || a.Y != 0, "coefficients need y", name);

        // Some pixels are not read.
        if (a.Stride != 1 || a.Offset != 0)
            foreach (var part in parts)
                if (part.Dx != 0 && part.Accumulate == 0)
                    Zero(part.Dx, (long)a.Images * a.Height * a.Width * part.Channels * sizeof(float));
        if (wanted)
            LaunchPointwiseInputGradient(new() { A = a }, parts);
        if (a.DWeight == 0)
            return;
        var launch = new PointwiseLaunch { A = a };
        launch.SetParts(parts);
        launch.Columns = BlockColumns(a.OutChannels, EnoughBlocks);
        var (threads, columnBlocks) = (TilePixels(launch.Pixels), Ceiling(a.OutChannels, launch.Columns));
        var chunks = 0;
        foreach (var part in parts)
            chunks += Ceiling(part.Channels, Chunk);
        launch.Groups = TileGroups(Ceiling((long)a.Images * launch.Pixels, threads), chunks * columnBlocks);
        var count = (long)launch.InChannels * a.OutChannels;
        launch.DWeight = launch.Groups > 1 ? Scratch(launch.Groups * count * sizeof(float)) : a.DWeight;
        Launch("pointwise_backward_weights", new(launch.Groups, chunks, columnBlocks), new(threads), launch,
            WeightGradientBytes(threads, launch.Columns));
        SumPartials(new PartialSum { Partial = launch.DWeight, Out = a.DWeight, Count = count, Parts = launch.Groups });
    }

    /// <summary>The gradients of those parts that ask for one.</summary>
    private void LaunchPointwiseInputGradient(PointwiseLaunch launch, ReadOnlySpan<PartArgs> parts)
    {
        launch.SetParts(parts);
        var threads = TilePixels(launch.Pixels);
        var tiles = Ceiling((long)launch.A.Images * launch.Pixels, threads);
        var widest = 0;
        foreach (var part in parts)
            widest = part.Dx != 0 ? Math.Max(widest, part.Channels) : widest;
        var columns = BlockColumns(widest, tiles);
        var blocks = 0;
        for (var i = 0; i < MaxParts; i++)
        {
            launch.FirstBlock[i] = blocks;
            if (i < parts.Length && parts[i].Dx != 0)
                blocks += Ceiling(parts[i].Channels, columns);
        }
        Launch(ProductKernel("pointwise_backward_input", columns), new(tiles, blocks), new(threads), launch, ProductBytes(threads, columns));
    }

    private static ReadOnlySpan<PartArgs> CheckParts(string name, in PointwiseArgs a, out int variants)
    {
        Require(a.Parts != 0 && a.PartCount is >= 1 and <= MaxParts, $"needs 1 to {MaxParts} parts, not {a.PartCount}", name);
        Require(a.Images > 0 && a.Height > 0 && a.Width > 0 && a.OutChannels > 0,
            $"images {a.Images}, height {a.Height}, width {a.Width} and out_channels {a.OutChannels} must be positive", name);
        Require((long)a.Images * a.Height * a.Width <= int.MaxValue, $"{a.Images} images of {a.Height} x {a.Width} pixels are too many", name);
        Require(a.Stride is 1 or 2, $"stride must be 1 or 2, not {a.Stride}", name);
        Require(a.Offset is 0 or 1, $"offset must be 0 or 1, not {a.Offset}", name);
        Require(a.YOffset >= 0 && a.YOffset + (long)a.OutChannels <= a.YChannels,
            $"channels {a.YOffset} to {a.YOffset + a.OutChannels} are not within y_channels {a.YChannels}", name);
        var parts = new ReadOnlySpan<PartArgs>((void*)a.Parts, a.PartCount);
        variants = 1;
        var channels = 0L;
        for (var i = 0; i < parts.Length; i++)
        {
            Require(parts[i].Variants >= 1 && parts[i].Channels >= 1,
                $"part {i} has {parts[i].Variants} variants and {parts[i].Channels} channels", name);
            variants = Math.Max(variants, parts[i].Variants);
            channels += parts[i].Channels;
        }
        Require(channels <= 1 << 24, "too many channels", name);
        for (var i = 0; i < parts.Length; i++)
            Require(parts[i].Variants == 1 || parts[i].Variants == variants,
                $"part {i} has {parts[i].Variants} variants, others have {variants}", name);
        return parts;
    }

    [InlineArray(MaxParts)]
    private struct PartsOfLaunch
    {
        private PartArgs _first;
    }

    [InlineArray(MaxParts)]
    private struct IntegersOfParts
    {
        private int _first;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct PointwiseLaunch
    {
        public PointwiseArgs A;
        private PartsOfLaunch _parts;
        private IntegersOfParts _firstRow;
        public IntegersOfParts FirstBlock;
        public nint Sums, Counters, DWeight;
        private int _outWidth;
        public int Pixels, Tiles, InChannels, Columns, Groups;

        public void SetParts(ReadOnlySpan<PartArgs> parts)
        {
            _outWidth = Ceiling(A.Width, A.Stride);
            Pixels = Ceiling(A.Height, A.Stride) * _outWidth;
            InChannels = 0;
            for (var i = 0; i < parts.Length; i++)
            {
                (_parts[i], _firstRow[i]) = (parts[i], InChannels);
                InChannels += parts[i].Channels;
            }
        }
    }
}
