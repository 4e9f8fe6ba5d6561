using System.Runtime.InteropServices;
using PerturbNas.Backends;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// The buffers of one case on one backend: allocated between sentinels, filled or poisoned, run, read back and inspected.
/// </summary>
public sealed class KernelRun : IDisposable
{
    private const int Guard = 256;
    private const byte Sentinel = 0xA5;

    private readonly KernelCase _case;
    private readonly Backend _backend;
    private readonly Dictionary<string, nint> _addresses = [];

    public KernelRun(KernelCase kernelCase, Backend backend)
    {
        _case = kernelCase;
        _backend = backend;
        foreach (var buffer in kernelCase.Buffers)
            _addresses[buffer.Name] = backend.Allocate(BlockSize(buffer)) + Guard;
    }

    /// <summary>Writes a buffer of reals.</summary>
    public void Write(KernelBuffer buffer, double[] values) => _backend.Write(_addresses[buffer.Name], values);

    /// <summary>Reads a buffer as doubles.</summary>
    public double[] Read(KernelBuffer buffer)
    {
        if (buffer.Kind == BufferKind.Real)
        {
            var values = new double[buffer.Count];
            _backend.Read(_addresses[buffer.Name], values);
            return values;
        }
        var bytes = ReadBytes(buffer);
        return buffer.Kind switch
        {
            BufferKind.Int32 => Array.ConvertAll(MemoryMarshal.Cast<byte, int>(bytes).ToArray(), value => (double)value),
            BufferKind.Int64 => Array.ConvertAll(MemoryMarshal.Cast<byte, long>(bytes).ToArray(), value => (double)value),
            _ => MemoryMarshal.Cast<byte, double>(bytes).ToArray(),
        };
    }

    public byte[] ReadBytes(KernelBuffer buffer)
    {
        var bytes = new byte[Size(buffer)];
        _backend.ReadBytes(_addresses[buffer.Name], bytes);
        return bytes;
    }

    /// <summary>
    /// Puts every buffer that the pass uses into its state before the call: inputs and added-to outputs as the case fills them, other
    /// outputs not-a-number, and for the backward pass the forward outputs as given.
    /// </summary>
    public void Prepare(KernelPass pass, IReadOnlyDictionary<string, double[]>? forwardOutputs = null, bool continuous = false)
    {
        foreach (var buffer in _case.Buffers)
        {
            var values = pass == KernelPass.Backward && buffer.Role == BufferRole.ForwardOutput
                ? forwardOutputs![buffer.Name]
                : buffer.Values(_case.Name, continuous);
            var block = new byte[BlockSize(buffer)];
            Array.Fill(block, Sentinel);
            if (values == null)
                block.AsSpan(Guard, (int)Size(buffer)).Fill(0xFF); // not-a-number in every real format
            _backend.Write(_addresses[buffer.Name] - Guard, MemoryMarshal.Cast<byte, int>(block));
            if (values != null && buffer.Kind == BufferKind.Real)
                Write(buffer, values);
            else if (values != null && buffer.Kind == BufferKind.Int32)
                _backend.Write(_addresses[buffer.Name], Array.ConvertAll(values, value => (int)value));
        }
    }

    public void Call(KernelPass pass)
    {
        var present = _case.Buffers.Where(buffer => pass == KernelPass.Backward || buffer.Role != BufferRole.BackwardOutput);
        _case.Call(pass)(_backend, new(present.ToDictionary(buffer => buffer.Name, buffer => _addresses[buffer.Name])));
    }

    /// <summary>Everything that the pass wrote.</summary>
    public Dictionary<string, double[]> Outputs(KernelPass pass) =>
        _case.Buffers.Where(buffer => buffer.IsOutput(pass)).ToDictionary(buffer => buffer.Name, Read);

    /// <summary>The bytes of every buffer, so that two runs can be compared bit by bit.</summary>
    public Dictionary<string, byte[]> Bytes() => _case.Buffers.ToDictionary(buffer => buffer.Name, ReadBytes);

    /// <summary>The first sentinel that was overwritten, in words, or null.</summary>
    public string? BrokenSentinel()
    {
        var zone = new byte[Guard];
        foreach (var buffer in _case.Buffers)
            foreach (var (offset, side) in new[] { (-(long)Guard, "before"), (Size(buffer), "after") })
            {
                _backend.ReadBytes(_addresses[buffer.Name] + (nint)offset, zone);
                var broken = Array.FindIndex(zone, value => value != Sentinel);
                if (broken >= 0)
                    return $"{buffer.Name}: byte {broken} of the {Guard} {side} it was overwritten";
            }
        return null;
    }

    public void Dispose()
    {
        foreach (var address in _addresses.Values)
            _backend.Free(address - Guard);
    }

    private long Size(KernelBuffer buffer) => (long)buffer.Count * buffer.ElementSize(_backend.ElementSize);

    private long BlockSize(KernelBuffer buffer) => (Size(buffer) + 2 * Guard + 3) / 4 * 4;
}
