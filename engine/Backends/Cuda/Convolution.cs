using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public partial class CudaBackend
{
    /// <summary>The most shared memory that rows of x take, in floats.</summary>
    private const int MostStaged = 1 << 13;

    public override void ConvolutionForward(in ConvolutionArgs a)
    {
        const string name = "convolution_forward";
        Check(name, a);
        Require(a.X != 0 && a.Weight != 0 && a.Y != 0, "x, weight or y is null", name);
        var launch = new ConvolutionLaunch(a);
        var images = (long)a.Variants * a.Images;
        var threads = TilePixels(launch.Pixels);
        launch.Tiles = Ceiling(launch.Pixels, threads);
        var tiles = images * launch.Tiles;
        var apart = a.Statistics != 0 && launch.Tiles > 1;
        launch.Sums = apart ? Scratch(tiles * 2 * a.OutChannels * sizeof(float)) : a.Statistics;
        var columns = BlockColumns(a.OutChannels, tiles);
        launch.Counters = apart ? Counters(images * Ceiling(a.OutChannels, columns)) : 0;
        launch.Staged = StagedFloats(a, launch.OutWidth, threads);
        Launch(ProductKernel(name, columns), new(checked((int)tiles), Ceiling(a.OutChannels, columns)), new(threads), launch,
            ProductBytes(threads, columns) + launch.Staged * sizeof(float));
    }

    public override void ConvolutionBackward(in ConvolutionArgs a)
    {
        const string name = "convolution_backward";
        Check(name, a);
        Require(a.Variants == 1, $"takes one variant, not {a.Variants}", name);
        if (a.Dx == 0 && a.DWeight == 0)
            return;
        Require(a.G != 0, "g is null", name);
        Require(a.Coefficients == 0 || a.Y != 0, "coefficients need y", name);
        Require(a.Dx == 0 || a.Weight != 0, "weight is null", name);
        Require(a.X != 0 || !(a.DWeight != 0 || a.Relu != 0), "x is null", name);

        var launch = new ConvolutionLaunch(a);
        if (a.Dx != 0)
        {
            var pixels = a.Height * a.Width;
            var threads = TilePixels(pixels);
            var tiles = Ceiling((long)a.Images * pixels, threads);
            var columns = BlockColumns(a.InChannels, tiles);
            Launch(ProductKernel($"{name}_input", columns), new(tiles, Ceiling(a.InChannels, columns)), new(threads), launch,
                ProductBytes(threads, columns));
        }
        if (a.DWeight != 0)
        {
            launch.Columns = BlockColumns(a.OutChannels, EnoughBlocks);
            var threads = TilePixels(launch.Pixels);
            var (chunks, columnBlocks) = (Ceiling(launch.Depth, Chunk), Ceiling(a.OutChannels, launch.Columns));
            launch.Groups = TileGroups(Ceiling((long)a.Images * launch.Pixels, threads), chunks * columnBlocks);
            var count = (long)launch.Depth * a.OutChannels;
            launch.DWeight = launch.Groups > 1 ? Scratch(launch.Groups * count * sizeof(float)) : a.DWeight;
            launch.Staged = StagedFloats(a, launch.OutWidth, threads);
            Launch($"{name}_weights", new(launch.Groups, chunks, columnBlocks), new(threads), launch,
                WeightGradientBytes(threads, launch.Columns) + launch.Staged * sizeof(float));
            SumPartials(new PartialSum { Partial = launch.DWeight, Out = a.DWeight, Count = count, Parts = launch.Groups });
        }
    }

    private static void Check(string name, in ConvolutionArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Height > 0 && a.Width > 0 && a.InChannels > 0 && a.OutChannels > 0,
            $"variants {a.Variants}, images {a.Images}, height {a.Height}, width {a.Width}, in_channels {a.InChannels} and out_channels " +
            $"{a.OutChannels} must be positive", name);
        Require(a.KernelH > 0 && a.KernelW > 0 && a.StrideH > 0 && a.StrideW > 0 && a.PaddingH >= 0 && a.PaddingW >= 0,
            $"kernel {a.KernelH} x {a.KernelW}, stride {a.StrideH} x {a.StrideW}, padding {a.PaddingH} x {a.PaddingW} is not possible", name);
        var (height, width) = (a.Height + 2L * a.PaddingH, a.Width + 2L * a.PaddingW);
        Require(height >= a.KernelH && width >= a.KernelW, $"the kernel {a.KernelH} x {a.KernelW} is larger than the padded image", name);
        const int largest = 1 << 30;
        Require(height <= largest && width <= largest && (double)a.KernelH * a.KernelW * a.InChannels <= largest && height * width <= largest
            && width * a.InChannels <= largest,
            $"kernel {a.KernelH} x {a.KernelW} with padding {a.PaddingH} x {a.PaddingW} is too large", name);
    }

    /// <summary>
    /// The shared memory, in floats, for the rows of x that a tile of so many output pixels reads; none where pixels are read by sixteen bytes
    /// anyway, or where rows are too long.
    /// </summary>
    private static int StagedFloats(in ConvolutionArgs a, int outWidth, int pixels)
    {
        var rows = (long)Ceiling(pixels - 1, outWidth) * a.StrideH + a.KernelH;
        // Up to three floats before the first row, and as many as make it a multiple of four.
        var floats = (rows * a.Width * a.InChannels + 6) / 4 * 4;
        return a.InChannels % 4 != 0 && floats <= MostStaged ? (int)floats : 0;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct ConvolutionLaunch
    {
        private readonly ConvolutionArgs _a;
        public nint Sums, Counters, DWeight;
        private readonly int _outHeight;
        public readonly int OutWidth;
        public int Tiles;
        public readonly int Depth;
        public int Staged, Columns, Groups;

        public ConvolutionLaunch(in ConvolutionArgs a)
        {
            _a = a;
            _outHeight = (a.Height + 2 * a.PaddingH - a.KernelH) / a.StrideH + 1;
            OutWidth = (a.Width + 2 * a.PaddingW - a.KernelW) / a.StrideW + 1;
            Depth = a.KernelH * a.KernelW * a.InChannels;
        }

        public readonly int Pixels => _outHeight * OutWidth;
    }
}
