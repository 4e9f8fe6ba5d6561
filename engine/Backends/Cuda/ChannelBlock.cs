namespace PerturbNas.Backends.Cuda;

/// <summary>
/// The thread block of operators that treat all channels alike (kernels/cuda/channels.h): its X are units of <paramref name="Unit"/>
/// channels, its Y are rows of threads; <paramref name="Groups"/> such blocks stand side by side along the channels.
/// </summary>
internal readonly record struct ChannelBlock(int Unit, int Groups, Dim3 Block)
{
    // Sixteen-byte accesses.
    private const int Wide = 4;

    public int Rows => Block.Y;

    /// <param name="channels">Of the activation.</param>
    /// <param name="rows">The most rows that have work.</param>
    /// <param name="threads">The most threads.</param>
    /// <param name="channelsPerBlock">The most channels of a block.</param>
    /// <param name="unit">See <see cref="UnitFor"/>.</param>
    public static ChannelBlock For(int channels, long rows, int threads, int channelsPerBlock, int unit)
    {
        var units = channels / unit;
        var groups = Blocks(units, channelsPerBlock / unit);
        var width = Blocks(units, groups);
        return new(unit, groups, new(width, (int)Math.Clamp(rows, 1, threads / width)));
    }

    /// <summary>Channels per access: four, if they divide the counts of channels and the addresses allow it.</summary>
    public static int UnitFor(ReadOnlySpan<int> channels, params ReadOnlySpan<nint> addresses)
    {
        foreach (var count in channels)
            if (count % Wide != 0)
                return 1;
        foreach (var address in addresses)
            if (address % (Wide * sizeof(float)) != 0)
                return 1;
        return Wide;
    }

    /// <summary>Blocks of a size that hold a count.</summary>
    public static int Blocks(long count, int size) => checked((int)((count + size - 1) / size));
}
