using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cuda;

// What the convolutions share on the host's side: see kernels/cuda/matrix.h and kernels/cuda/partials.cu.
public unsafe partial class CudaBackend
{
    /// <summary>Channels of a chunk (kDepth).</summary>
    private const int Chunk = 16;

    /// <summary>Blocks that a large device needs to be busy. A constant, so that results depend on shapes alone.</summary>
    private const int EnoughBlocks = 132;

    /// <summary>Enough for every use in a search.</summary>
    private const long LeastCounters = 1 << 14;

    private readonly Stack<nint> _counters = [];
    private long _counterCount;
    private bool _tf32;

    /// <summary>
    /// Multiply in TF32 (10 bits of mantissa) on the tensor cores where weights are a matrix, forward and in the gradients of activations;
    /// gradients of weights stay float32.
    /// </summary>
    /// <exception cref="UserException">The device has no such tensor cores.</exception>
    public bool Tf32
    {
        get => _tf32;
        set
        {
            if (value && _ptx.Target < 80)
                throw new UserException($"TF32 needs a device of compute capability 8.0 or more, which {Name} is not; run without it.");
            _tf32 = value;
        }
    }

    private static int Ceiling(long count, int size) => checked((int)((count + size - 1) / size));

    /// <summary>The kernel for blocks of so many columns.</summary>
    private string ProductKernel(string kernel, int columns) => $"{kernel}_c{columns}{(_tf32 ? "_tf32" : "")}";

    /// <summary>
    /// The columns of a block, 16, 32 or 64: all if there are not more, but fewer where otherwise there would not be enough blocks.
    /// </summary>
    private static int BlockColumns(int columns, long tiles)
    {
        var width = columns <= 16 ? 16 : columns <= 32 ? 32 : 64;
        while (width > 16 && tiles * Ceiling(columns, width) < EnoughBlocks)
            width /= 2;
        return width;
    }

    /// <summary>The threads of a block, and so the pixels of a tile.</summary>
    private static int TilePixels(long pixels) => pixels <= 64 ? 64 : 128;

    /// <summary>Shared memory of multiply_chunks and of the statistics after it.</summary>
    private static int ProductBytes(int pixels, int columns) => sizeof(float) * 2 * Chunk * (pixels + columns + 8);

    /// <summary>Shared memory of a WeightGradient: its tiles of inputs and of output gradients.</summary>
    private static int WeightGradientBytes(int pixels, int columns) => sizeof(float) * pixels * (Chunk + columns);

    /// <summary>The groups of tiles that have a sum of their own where so many blocks work on each.</summary>
    private static int TileGroups(long tiles, int blocks) => (int)Math.Clamp(2 * EnoughBlocks / blocks, 1, tiles);

    /// <summary>
    /// So many counters of blocks, zero between launches. Those that a captured graph knows stay where they are until the end.
    /// </summary>
    private nint Counters(long count)
    {
        if (count > _counterCount)
        {
            _counterCount = Math.Max(count, LeastCounters);
            _counters.Push(Allocate(_counterCount * sizeof(uint)));
        }
        return _counters.Peek();
    }

    private void FreeCounters()
    {
        while (_counters.TryPop(out var address))
            Free(address);
    }

    /// <summary>Adds up what several blocks have left apart.</summary>
    private void SumPartials(params ReadOnlySpan<PartialSum> sums)
    {
        var arguments = new PartialSums();
        var (count, blocks) = (0, 0);
        foreach (var sum in sums)
        {
            if (sum.Parts <= 1)
                continue;
            ((PartialSum*)&arguments)[count++] = sum;
            blocks = Math.Max(blocks, Ceiling(sum.Count, 32));
        }
        if (count > 0)
            Launch("sum_partials", new(blocks, count), new(32, 8), arguments, 32 * 8 * sizeof(float));
    }

    /// <summary>Pieces of the scratch memory.</summary>
    private struct ScratchPlan
    {
        private const long Alignment = 256;

        public long Bytes { get; private set; }

        /// <summary>The offset of so many floats.</summary>
        public long Floats(long count)
        {
            var offset = Bytes;
            Bytes += (count * sizeof(float) + Alignment - 1) / Alignment * Alignment;
            return offset;
        }
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct PartialSum
    {
        public nint Partial, Out;
        public long Count, Parts;
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct PartialSums
    {
        public PartialSum First, Second;
    }
}
