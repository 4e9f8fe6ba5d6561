using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace PerturbNas.Backends.Cpu;

/// <summary>Kernels that work image by image and can be calls of a group: enum pn_kernel.</summary>
internal enum Kernel
{
    DepthwisePointwiseForward,
    DepthwisePointwiseBackward,
    PoolForward,
    PoolBackward,
    MixedSumForward,
    MixedSumBackward,
}

/// <summary>
/// Calls that have been put off, as pn_run_group takes them, and what waits for them. Memory only grows: a steady state allocates nothing.
/// </summary>
internal sealed unsafe class CallGroup : IDisposable
{
    // Room for the largest argument struct, a multiple of the cache line.
    private const int SlotBytes = 192;

    private readonly List<BatchNormBackwardArgs> _after = [];
    private byte* _arguments;
    private Call* _calls;
    private int _capacity;

    /// <summary>Calls put off.</summary>
    public int Count { get; private set; }

    /// <summary>Address of an array of pn_call.</summary>
    public nint Calls => (nint)_calls;

    /// <summary>What is to run after the calls.</summary>
    public ReadOnlySpan<BatchNormBackwardArgs> After => CollectionsMarshal.AsSpan(_after);

    public void Add<T>(Kernel kernel, in T arguments)
        where T : unmanaged
    {
        if (sizeof(T) > SlotBytes)
            throw new InvalidOperationException($"{typeof(T).Name} has {sizeof(T)} bytes, a slot has {SlotBytes}");
        if (Count == _capacity)
            Grow();
        Unsafe.Write(_arguments + Count * SlotBytes, arguments);
        _calls[Count++].Kernel = kernel;
    }

    public void AddAfter(in BatchNormBackwardArgs arguments) => _after.Add(arguments);

    public void Clear()
    {
        Count = 0;
        _after.Clear();
    }

    public void Dispose()
    {
        NativeMemory.AlignedFree(_arguments);
        NativeMemory.Free(_calls);
        _arguments = null;
        _calls = null;
        _capacity = 0;
    }

    private void Grow()
    {
        _capacity = Math.Max(64, 2 * _capacity);
        _arguments = (byte*)NativeMemory.AlignedRealloc(_arguments, (nuint)(_capacity * SlotBytes), 64);
        _calls = (Call*)NativeMemory.Realloc(_calls, (nuint)(_capacity * sizeof(Call)));
        for (var i = 0; i < _capacity; i++)
        {
            _calls[i].Arguments = _arguments + i * SlotBytes;
            _calls[i].Reserved = 0;
        }
    }

    private struct Call
    {
        public void* Arguments;
        public Kernel Kernel;
        public int Reserved;
    }
}
