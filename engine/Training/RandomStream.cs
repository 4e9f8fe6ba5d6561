using System.Buffers.Binary;
using System.Security.Cryptography;
using System.Text;

namespace PerturbNas.Training;

/// <summary>
/// A counter-based stream of randomness, named by purpose ("initialisation/stem.0.weight", "data order", "noise"), so that adding
/// one consumer does not shift another, and any position can be reached directly (resume). The generator is Philox4x32-10
/// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), the same as in the noise kernel.
/// </summary>
public struct RandomStream
{
    private readonly ulong _position;
    private ulong _block;
    private (uint, uint, uint, uint) _words;
    private int _used;

    /// <param name="seed">The run's seed.</param>
    /// <param name="purpose">The stream's name.</param>
    /// <param name="position">A sub-stream, for example the step number.</param>
    public RandomStream(long seed, string purpose, long position = 0)
    {
        Key = KeyOf(seed, purpose);
        _position = (ulong)position;
        _used = 4;
    }

    /// <summary>The stream's 64-bit key, as the noise kernel takes it.</summary>
    public ulong Key { get; }

    /// <summary>The key of a stream: the first 8 bytes of SHA-256("seed:purpose").</summary>
    public static ulong KeyOf(long seed, string purpose) =>
        BinaryPrimitives.ReadUInt64LittleEndian(SHA256.HashData(Encoding.UTF8.GetBytes($"{seed}:{purpose}")));

    /// <summary>Four 32-bit words of Philox4x32-10 for a 64-bit key and a 128-bit counter (index low, position high).</summary>
    public static (uint X0, uint X1, uint X2, uint X3) Philox(ulong key, ulong index, ulong position)
    {
        uint c0 = (uint)index, c1 = (uint)(index >> 32), c2 = (uint)position, c3 = (uint)(position >> 32);
        uint k0 = (uint)key, k1 = (uint)(key >> 32);
        for (var round = 0; round < 10; round++)
        {
            var p0 = 0xD2511F53UL * c0;
            var p1 = 0xCD9E8D57UL * c2;
            (c0, c1, c2, c3) = ((uint)(p1 >> 32) ^ c1 ^ k0, (uint)p1, (uint)(p0 >> 32) ^ c3 ^ k1, (uint)p0);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        return (c0, c1, c2, c3);
    }

    public uint NextUInt32()
    {
        if (_used == 4)
        {
            _words = Philox(Key, _block++, _position);
            _used = 0;
        }
        return _used++ switch { 0 => _words.Item1, 1 => _words.Item2, 2 => _words.Item3, _ => _words.Item4 };
    }

    /// <summary>Uniform in 0..bound-1, without bias (rejection).</summary>
    public int NextInt(int bound)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(bound);
        var limit = uint.MaxValue - uint.MaxValue % (uint)bound;
        uint x;
        do
            x = NextUInt32();
        while (x >= limit);
        return (int)(x % (uint)bound);
    }

    /// <summary>Uniform in [0, 1), 24 bits.</summary>
    public float NextSingle() => (NextUInt32() >> 8) * (1f / (1 << 24));

    /// <summary>Normal(0, 1) by Box-Muller, one value from two words.</summary>
    public double NextNormal()
    {
        var u = (NextUInt32() + 0.5) / 4294967296.0;
        var v = NextUInt32() / 4294967296.0;
        return Math.Sqrt(-2 * Math.Log(u)) * Math.Cos(2 * Math.PI * v);
    }

    /// <summary>Fisher-Yates shuffle in place.</summary>
    public void Shuffle(Span<int> items)
    {
        for (var i = items.Length - 1; i > 0; i--)
        {
            var j = NextInt(i + 1);
            (items[i], items[j]) = (items[j], items[i]);
        }
    }
}
