using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

public unsafe partial class CudaBackend
{
    private const int TileRows = 8;

    public override void DepthwisePointwiseForward(in DepthwisePointwiseArgs a)
    {
        const string name = "depthwise_pointwise_forward";
        Check(name, a);
        Require(a.Y != 0, "y must not be null", name);
        var (launch, stride) = OnGrid(a);
        var images = (long)a.Variants * a.Images;
        launch.Tiles = CoverWith(launch.OutHeight, launch.OutWidth, a.Kernel, stride, launch.Dilation);
        var tiles = images * launch.Tiles.Count;
        var apart = a.Statistics != 0 && launch.Tiles.Count > 1;
        launch.Sums = apart ? Scratch(tiles * 2 * a.OutChannels * sizeof(float)) : a.Statistics;
        var columns = BlockColumns(a.OutChannels, tiles);
        launch.Counters = apart ? Counters(images * Ceiling(a.OutChannels, columns)) : 0;
        var threads = launch.Tiles.Pixels;
        var floats = launch.Tiles.WindowFloats + Chunk * (a.Kernel * a.Kernel + threads + TileRows + 2 * (columns + 8));
        Launch(ProductKernel($"{name}_k{a.Kernel}_s{stride}", columns), new(checked((int)tiles), Ceiling(a.OutChannels, columns)),
            new(threads), launch, floats * sizeof(float));
    }

    public override void DepthwisePointwiseBackward(in DepthwisePointwiseArgs a)
    {
        const string name = "depthwise_pointwise_backward";
        Check(name, a);
        Require(a.Variants == 1, $"there must be one variant, not {a.Variants}", name);
        Require(a.G != 0, "g must not be null", name);
        Require(a.Coefficients == 0 || a.Y != 0, "coefficients need y, which is null", name);
        Require((a.DDepthwise == 0) == (a.DPointwise == 0), "needs d_depthwise and d_pointwise or neither, but only one is null", name);
        Require(a.GradientSums == 0 || a.XNormalization != 0, "gradient_sums need x_normalization, which is null", name);
        var wantInput = a.Dx != 0 || a.GradientSums != 0;
        var wantWeights = a.DDepthwise != 0;
        if (!wantInput && !wantWeights)
            return;

        var (weights, stride) = OnGrid(a);
        weights.Tiles = CoverWith(weights.OutHeight, weights.OutWidth, a.Kernel, stride, weights.Dilation);
        var outTiles = (long)a.Images * weights.Tiles.Count;
        var (chunks, columns) = (Ceiling(a.InChannels, Chunk), BlockColumns(a.OutChannels, EnoughBlocks));
        var columnBlocks = Ceiling(a.OutChannels, columns);
        weights.Columns = columns;
        weights.Groups = TileGroups(outTiles, chunks * columnBlocks);

        var input = weights;
        input.Tiles = a.Stride == 1
            ? CoverWith(a.Height, a.Width, a.Kernel, 1, a.Dilation)
            : CoverStrided(a.Height, a.Width, a.Kernel, a.Dilation);
        (input.Dilation, input.DilationShift) = a.Stride == 1 ? (a.Dilation, a.Dilation - 1) : (1, 0);
        var inTiles = (long)a.Images * input.Tiles.Count;

        var (taps, matrix, sumsApart) = (a.Kernel * a.Kernel * a.InChannels, a.InChannels * a.OutChannels, input.Tiles.Count > 1);
        var partial = wantWeights && weights.Groups > 1;
        var plan = new ScratchPlan();
        var dz = plan.Floats((long)a.Images * weights.OutHeight * weights.OutWidth * a.InChannels);
        var sums = plan.Floats(a.GradientSums != 0 && sumsApart ? inTiles * 2 * a.InChannels : 0);
        var partialTaps = plan.Floats(partial ? (long)weights.Groups * taps : 0);
        var partialMatrix = plan.Floats(partial ? (long)weights.Groups * matrix : 0);
        var scratch = Scratch(plan.Bytes);
        input.Dz = weights.Dz = scratch + (nint)dz;
        input.Sums = a.GradientSums != 0 && sumsApart ? scratch + (nint)sums : a.GradientSums;
        input.Counters = a.GradientSums != 0 && sumsApart ? Counters((long)a.Images * chunks) : 0;
        weights.DDepthwise = partial ? scratch + (nint)partialTaps : a.DDepthwise;
        weights.DPointwise = partial ? scratch + (nint)partialMatrix : a.DPointwise;

        LaunchPointwiseInputGradient(new()
        {
            A = new()
            {
                Weight = a.Pointwise,
                Y = a.Y,
                G = a.G,
                Coefficients = a.Coefficients,
                PartCount = 1,
                Images = a.Images,
                Height = weights.OutHeight,
                Width = weights.OutWidth,
                OutChannels = a.OutChannels,
                Stride = 1,
                YChannels = a.OutChannels,
            },
        }, [new() { Dx = weights.Dz, Variants = 1, Channels = a.InChannels }]);
        if (wantInput)
            Launch(a.Stride == 1 ? $"{name}_input_k{a.Kernel}" : $"{name}_strided_input", new(checked((int)inTiles), chunks),
                new(input.Tiles.Pixels), input, sizeof(float) * (input.Tiles.WindowFloats + Chunk * a.Kernel * a.Kernel));
        if (wantWeights)
        {
            var threads = weights.Tiles.Pixels;
            var floats = weights.Tiles.WindowFloats + Chunk * (a.Kernel * a.Kernel + 2 * (threads + TileRows)) + threads * columns;
            // At the end the same memory takes the threads' sums of the taps or of the matrix.
            floats = Math.Max(floats, threads * Math.Max(4 * a.Kernel, Chunk));
            Launch($"{name}_weights_k{a.Kernel}_s{stride}", new(weights.Groups, chunks, columnBlocks), new(threads), weights,
                floats * sizeof(float));
        }
        SumPartials(
            new PartialSum
            {
                Partial = weights.DDepthwise,
                Out = a.DDepthwise,
                Count = taps,
                Parts = wantWeights ? weights.Groups : 0,
            },
            new PartialSum
            {
                Partial = weights.DPointwise,
                Out = a.DPointwise,
                Count = matrix,
                Parts = wantWeights ? weights.Groups : 0,
            });
    }

    private static void Check(string name, in DepthwisePointwiseArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Height > 0 && a.Width > 0 && a.InChannels > 0 && a.OutChannels > 0,
            $"every extent must be positive, not V {a.Variants}, N {a.Images}, H {a.Height}, W {a.Width}, Cin {a.InChannels}, Cout {a.OutChannels}", name);
        Require(a.Kernel is 3 or 5 or 7, $"the kernel must be 3, 5 or 7, not {a.Kernel}", name);
        Require(a.Stride is 1 or 2, $"the stride must be 1 or 2, not {a.Stride}", name);
        Require(a.Dilation is 1 or 2, $"the dilation must be 1 or 2, not {a.Dilation}", name);
        Require(a.X != 0 && a.Depthwise != 0 && a.Pointwise != 0, "x, depthwise and pointwise must not be null", name);
    }

    /// <summary>
    /// A launch without tiles, and the stride on the grid: with stride 2 and dilation 2 the convolution is an ordinary one on the pixels with
    /// even coordinates.
    /// </summary>
    private static (DepthwisePointwiseLaunch Launch, int Stride) OnGrid(in DepthwisePointwiseArgs a)
    {
        var step = a.Stride == 2 && a.Dilation == 2 ? 2 : 1;
        var (stride, dilation) = step == 2 ? (1, 1) : (a.Stride, a.Dilation);
        return (new()
        {
            A = a,
            OutHeight = (a.Height - 1) / a.Stride + 1,
            OutWidth = (a.Width - 1) / a.Stride + 1,
            Height = Ceiling(a.Height, step),
            Width = Ceiling(a.Width, step),
            Step = step,
            Dilation = dilation,
            DilationShift = dilation - 1,
            Padding = dilation * (a.Kernel / 2),
        }, stride);
    }

    /// <summary>Tiles of 8 rows of 8 or 16 outputs, with windows of what these read.</summary>
    private static DepthwiseTiles CoverWith(int height, int width, int kernel, int stride, int dilation)
    {
        var tileWidth = width <= 8 ? 8 : 16;
        var reach = (kernel - 1) * dilation + 1;
        var columns = (tileWidth - 1) * stride + reach;
        // Neighbouring rows of outputs begin half of the banks apart, and so do neighbouring columns.
        var oddColumns = dilation == 2 ? ((columns + 1) / 2) | 1 : 0;
        var places = dilation == 2 ? oddColumns + columns / 2 : columns;
        var rowStep = stride == 1 ? (places | 1) * Chunk : places * Chunk + 8;
        return new(height, width, tileWidth, (TileRows - 1) * stride + reach, columns, rowStep, oddColumns);
    }

    /// <summary>Tiles of x, with windows of the output gradients (stride 2) that reach these.</summary>
    private static DepthwiseTiles CoverStrided(int height, int width, int kernel, int dilation)
    {
        var tileWidth = width <= 8 ? 8 : 16;
        var reach = (kernel - 1) * dilation;
        var columns = (tileWidth - 1 + reach) / 2 + 2;
        return new(height, width, tileWidth, (TileRows - 1 + reach) / 2 + 2, columns, (columns | 1) * Chunk, 0);
    }

    [StructLayout(LayoutKind.Sequential)]
    private readonly struct DepthwiseTiles
    {
        private readonly int _widthShift, _across;

        public readonly int Count;
        private readonly int _rows, _columns, _reciprocal, _rowStep, _oddColumns;

        public DepthwiseTiles(int height, int width, int tileWidth, int rows, int columns, int rowStep, int oddColumns)
        {
            _widthShift = tileWidth == 8 ? 3 : 4;
            _across = Ceiling(width, tileWidth);
            Count = checked(_across * Ceiling(height, TileRows));
            (_rows, _columns, _rowStep, _oddColumns) = (rows, columns, rowStep, oddColumns);
            _reciprocal = Ceiling(1 << 20, columns);
        }

        public int Width => 1 << _widthShift;

        public int Pixels => TileRows * Width;

        public int WindowFloats => _rows * _rowStep;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct DepthwisePointwiseLaunch
    {
        public DepthwisePointwiseArgs A;
        public DepthwiseTiles Tiles;
        public nint Sums, Counters, Dz, DDepthwise, DPointwise;
        public int OutHeight, OutWidth, Height, Width, Step, Dilation, DilationShift, Padding, Columns, Groups;
    }
}
