using PerturbNas.Backends;

namespace PerturbNas.Tensors;

/// <summary>
/// A piece of backend memory. Either it has an address of its own (parameters), or it is part of a tape's plan: then it lives in the
/// arena from the first to the last operator that uses it, and shares its place with blocks that live at other times.
/// </summary>
public sealed class Block
{
    private readonly Arena? _arena;
    private readonly nint _address;

    internal Block(Arena arena, long bytes)
    {
        _arena = arena;
        Bytes = bytes;
    }

    /// <summary>Memory that is owned by someone else and never moves.</summary>
    public Block(nint address, long bytes)
    {
        _address = address;
        Bytes = bytes;
    }

    public long Bytes { get; }

    public nint Address => _arena is null ? _address : _arena.Base + (nint)Offset;

    internal bool Planned => _arena is not null;

    internal long Offset { get; set; } = -1;

    internal int FirstUse { get; set; } = int.MaxValue;

    internal int LastUse { get; set; } = -1;
}

/// <summary>
/// The memory that tapes lay their blocks out in. Tapes that never run at the same time (alpha step, weight step, scoring) share one
/// arena, so the peak is the largest plan, not the sum. What a tape left in it is lost when another one runs.
/// </summary>
public sealed class Arena(Backend backend) : IDisposable
{
    internal nint Base { get; private set; }

    /// <summary>Bytes reserved.</summary>
    public long Capacity { get; private set; }

    internal void Reserve(long bytes)
    {
        if (bytes <= Capacity)
            return;
        if (Base != 0)
            backend.Free(Base);
        (Base, Capacity) = (0, 0);
        Base = backend.Allocate(bytes);
        Capacity = bytes;
    }

    public void Dispose()
    {
        if (Base != 0)
            backend.Free(Base);
        (Base, Capacity) = (0, 0);
    }
}
