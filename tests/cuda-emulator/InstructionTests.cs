using System.Numerics;
using System.Runtime.CompilerServices;
using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Emulator;

/// <summary>
/// Every instruction that computes a lane's value from the same lane's operands, against the value computed here: for all lanes of a warp and for
/// some of them, the others of which must keep what they had.
/// </summary>
public sealed class InstructionTests(EmulatedDeviceFixture fixture) : IClassFixture<EmulatedDeviceFixture>
{
    private const int Threads = 256, FixedBits = 1074;
    private const ulong Untouched = 0xdeadbeefcafef00d;
    private static readonly Dictionary<string, Case> Cases = All().ToDictionary(c => c.Name);

    public static TheoryData<string> Names() => [.. Cases.Keys];

    [EmulatedCudaTheory]
    [MemberData(nameof(Names))]
    public void Computes_what_the_host_computes(string name)
    {
        var c = Cases[name];
        var device = fixture.Device;
        var function = device.Function(c.Ptx());
        var inputs = c.Inputs.Select((type, k) => Values(type, k)).ToArray();
        foreach (var threads in new[] { Threads, Threads - 13 })
            foreach (var skipped in new[] { 0u, 0x5a3cu })
            {
                var output = device.Upload<ulong>(Enumerable.Repeat(Untouched, Threads).ToArray());
                ulong[] arrays = [output, .. inputs.Select(values => device.Upload<ulong>(values)), skipped];
                device.Run(function, 1, threads, arrays);
                var results = device.Download<ulong>(output, Threads);
                for (var thread = 0; thread < Threads; thread++)
                {
                    var operands = inputs.Select(values => values[thread]).ToArray();
                    if (thread >= threads || (skipped >> (thread % 32) & 1) != 0)
                        Assert.True(results[thread] == Untouched, $"{name}: thread {thread} wrote, though it did not execute");
                    else
                        Assert.True(
                            c.IsRight(operands, results[thread]),
                            $"{name}: thread {thread} has 0x{results[thread]:x} for 0x{string.Join(", 0x", operands.Select(o => o.ToString("x")))}");
                }
            }
    }

    private static IEnumerable<Case> All()
    {
        foreach (var c in Integers<short>().Concat(Integers<ushort>()).Concat(Integers<int>()).Concat(Integers<uint>()).Concat(Integers<long>()).Concat(Integers<ulong>()))
            yield return c;
        foreach (var c in Bits<ushort>(16).Concat(Bits<uint>(32)).Concat(Bits<ulong>(64)))
            yield return c;
        foreach (var c in Floats<float>().Concat(Floats<double>()))
            yield return c;
        foreach (var c in Others())
            yield return c;
    }

    private static IEnumerable<Case> Integers<T>() where T : unmanaged, IBinaryInteger<T>, IMinMaxValue<T>
    {
        var t = Case.TypeName<T>();
        var bits = Unsafe.SizeOf<T>() * 8;
        var isSigned = T.MinValue != T.Zero;
        yield return Case.Of<T, T, T>($"add.{t}", (a, b) => unchecked(a + b));
        yield return Case.Of<T, T, T>($"sub.{t}", (a, b) => unchecked(a - b));
        yield return Case.Of<T, T, T>($"mul.lo.{t}", (a, b) => unchecked(a * b));
        yield return Case.Of<T, T, T>($"mul.hi.{t}", High);
        yield return Case.Of<T, T, T, T>($"mad.lo.{t}", (a, b, c) => unchecked((a * b) + c));
        yield return Case.Of<T, T, T, T>($"mad.hi.{t}", (a, b, c) => unchecked(High(a, b) + c));
        yield return Case.Of<T, T, T>($"div.{t}", Quotient);
        yield return Case.Of<T, T, T>($"rem.{t}", (a, b) => b == T.Zero ? a : unchecked(a - (Quotient(a, b) * b)));
        yield return Case.Of<T, T, T>($"min.{t}", T.Min);
        yield return Case.Of<T, T, T>($"max.{t}", T.Max);
        yield return Case.Of<T, T, uint>($"shr.{t}", (a, n) => a >> (int)Math.Min(n, bits - 1) >> (n >= bits ? 1 : 0));
        foreach (var (name, compare) in Comparisons<T>())
            yield return Case.Of<uint, T, T>($"setp.{name}.{t}", (a, b) => compare(a, b) ? 1u : 0u, $"setp.{name}.{t} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
        if (bits == 32)
            yield return Case.Of<uint, T, T>($"set.le.u32.{t}", (a, b) => a <= b ? ~0u : 0);
        if (isSigned)
        {
            yield return Case.Of<T, T>($"neg.{t}", a => unchecked(T.Zero - a));
            yield return Case.Of<T, T>($"abs.{t}", a => a < T.Zero ? unchecked(T.Zero - a) : a);
        }
        if (bits >= 32)
        {
            yield return Case.Of<uint, T>($"bfind.{t}", a => Leading(a));
            yield return Case.Of<uint, T>($"bfind.shiftamt.{t}", a => Leading(a) == ~0u ? ~0u : (uint)bits - 1 - Leading(a));
            yield return Case.Of<T, T, uint, uint>($"bfe.{t}", (a, position, length) =>
            {
                var (p, n) = ((int)(position & 255), (int)(length & 255));
                var result = BigInteger.Zero;
                var signBit = n > 0 && isSigned && Bit(a, Math.Min(p + n - 1, bits - 1));
                for (var k = 0; k < bits; k++)
                    if (k < n && p + k < bits ? Bit(a, p + k) : signBit)
                        result |= BigInteger.One << k;
                return T.CreateTruncating(result);
            });
        }
        yield return Case.Of<float, T>($"cvt.rn.f32.{t}", a => float.CreateTruncating(a));
        yield return Case.Of<double, T>($"cvt.rn.f64.{t}", a => double.CreateTruncating(a));
        foreach (var (letter, round) in Roundings())
        {
            yield return Case.Of<T, float>($"cvt.r{letter}i.{t}.f32", a => T.CreateSaturating(float.IsNaN(a) ? 0 : round(a)));
            yield return Case.Of<T, double>($"cvt.r{letter}i.{t}.f64", a => T.CreateSaturating(double.IsNaN(a) ? 0 : round(a)));
        }
        yield return Case.Of<sbyte, T>($"cvt.s8.{t}", sbyte.CreateTruncating);
        yield return Case.Of<byte, T>($"cvt.u8.{t}", byte.CreateTruncating);
        yield return Case.Of<short, T>($"cvt.s16.{t}", short.CreateTruncating);
        yield return Case.Of<ushort, T>($"cvt.u16.{t}", ushort.CreateTruncating);
        yield return Case.Of<int, T>($"cvt.s32.{t}", int.CreateTruncating);
        yield return Case.Of<uint, T>($"cvt.u32.{t}", uint.CreateTruncating);
        yield return Case.Of<long, T>($"cvt.s64.{t}", long.CreateTruncating);
        yield return Case.Of<ulong, T>($"cvt.u64.{t}", ulong.CreateTruncating);
        yield return Case.Of<T, sbyte>($"cvt.{t}.s8", T.CreateTruncating);
        yield return Case.Of<T, byte>($"cvt.{t}.u8", T.CreateTruncating);
        yield return Case.Of<short, T>($"cvt.sat.s16.{t}", short.CreateSaturating);
        yield return Case.Of<byte, T>($"cvt.sat.u8.{t}", byte.CreateSaturating);

        uint Leading(T a)
        {
            if (isSigned && a < T.Zero)
                a = ~a;
            for (var k = bits - 1; k >= 0; k--)
                if (Bit(a, k))
                    return (uint)k;
            return ~0u;
        }

        T High(T a, T b) => T.CreateTruncating(BigInteger.CreateChecked(a) * BigInteger.CreateChecked(b) >> bits);
        T Quotient(T a, T b) => b == T.Zero ? unchecked(T.Zero - T.One) : T.CreateTruncating(BigInteger.CreateChecked(a) / BigInteger.CreateChecked(b));
        static bool Bit(T a, int k) => (a >> k & T.One) != T.Zero;
    }

    private static IEnumerable<Case> Bits<T>(int bits) where T : unmanaged, IBinaryInteger<T>, IUnsignedNumber<T>
    {
        yield return Case.Of<T, T, T>($"and.b{bits}", (a, b) => a & b);
        yield return Case.Of<T, T, T>($"or.b{bits}", (a, b) => a | b);
        yield return Case.Of<T, T, T>($"xor.b{bits}", (a, b) => a ^ b);
        yield return Case.Of<T, T>($"not.b{bits}", a => ~a);
        yield return Case.Of<T, T>($"cnot.b{bits}", a => a == T.Zero ? T.One : T.Zero);
        yield return Case.Of<T, T, uint>($"shl.b{bits}", (a, n) => n >= bits ? T.Zero : a << (int)n);
        yield return Case.Of<T, T, uint>($"shr.b{bits}", (a, n) => n >= bits ? T.Zero : a >> (int)n);
        yield return Case.Of<T, T, T, uint>(
            $"selp.b{bits}", (a, b, c) => c > 9 ? a : b, $"setp.gt.u32 p, {{3}}, 9; selp.b{bits} {{0}}, {{1}}, {{2}}, p;");
        yield return Case.Of<T, T, T, int>($"slct.b{bits}.s32", (a, b, c) => c >= 0 ? a : b);
        yield return Case.Of<T, T>($"mov.b{bits}", a => a);
        yield return Case.Of<uint, T, T>($"setp.eq.b{bits}", (a, b) => a == b ? 1u : 0, $"setp.eq.b{bits} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
        if (bits == 16)
            yield break;
        yield return Case.Of<uint, T>($"popc.b{bits}", a => uint.CreateTruncating(T.PopCount(a)));
        yield return Case.Of<uint, T>($"clz.b{bits}", a => uint.CreateTruncating(T.LeadingZeroCount(a)));
        yield return Case.Of<T, T>($"brev.b{bits}", a =>
        {
            var result = T.Zero;
            for (var k = 0; k < bits; k++)
                result |= (a >> k & T.One) << (bits - 1 - k);
            return result;
        });
        yield return Case.Of<T, T, T, uint, uint>($"bfi.b{bits}", (a, b, position, length) =>
        {
            var (p, n) = ((int)(position & 255), (int)(length & 255));
            for (var k = 0; k < n && p + k < bits; k++)
                b = (b & ~(T.One << (p + k))) | (k < bits ? (a >> k & T.One) << (p + k) : T.Zero);
            return b;
        });
    }

    private static IEnumerable<Case> Floats<T>() where T : unmanaged, IBinaryFloatingPointIeee754<T>
    {
        var t = Case.TypeName<T>();
        yield return Case.Of<T, T, T>($"add.{t}", (a, b) => a + b);
        yield return Case.Of<T, T, T>($"add.rn.{t}", (a, b) => a + b);
        yield return Case.Of<T, T, T>($"sub.{t}", (a, b) => a - b);
        yield return Case.Of<T, T, T>($"mul.{t}", (a, b) => a * b);
        yield return Case.Of<T, T, T>($"mul.rn.{t}", (a, b) => a * b);
        yield return Case.Of<T, T, T, T>($"fma.rn.{t}", T.FusedMultiplyAdd);
        yield return Case.Of<T, T, T, T>($"mad.rn.{t}", T.FusedMultiplyAdd);
        foreach (var r in "zmp")
        {
            yield return Case.Of<T, T, T>($"add.r{r}.{t}", (a, b) => Round(r, a + b, a, T.One, b));
            yield return Case.Of<T, T, T>($"sub.r{r}.{t}", (a, b) => Round(r, a - b, a, T.One, -b));
            yield return Case.Of<T, T, T>($"mul.r{r}.{t}", (a, b) => Round(r, a * b, a, b, T.Zero));
            yield return Case.Of<T, T, T, T>($"fma.r{r}.{t}", (a, b, c) => Round(r, T.FusedMultiplyAdd(a, b, c), a, b, c));
        }
        yield return Case.Of<T, T, T>($"div.rn.{t}", (a, b) => a / b);
        yield return Case.Of<T, T>($"rcp.rn.{t}", a => T.One / a);
        yield return Case.Of<T, T>($"sqrt.rn.{t}", T.Sqrt);
        yield return Case.Of<T, T>($"neg.{t}", a => -a);
        yield return Case.Of<T, T>($"abs.{t}", T.Abs);
        yield return Case.Of<T, T, T>($"min.{t}", T.MinNumber);
        yield return Case.Of<T, T, T>($"max.{t}", T.MaxNumber);
        yield return Case.Of<T, T, T>($"copysign.{t}", (a, b) => T.CopySign(b, a));
        yield return Case.Of<uint, T>($"testp.finite.{t}", a => T.IsFinite(a) ? 1u : 0, $"testp.finite.{t} p, {{1}}; selp.u32 {{0}}, 1, 0, p;");
        yield return Case.Of<uint, T>($"testp.infinite.{t}", a => T.IsInfinity(a) ? 1u : 0, $"testp.infinite.{t} p, {{1}}; selp.u32 {{0}}, 1, 0, p;");
        foreach (var (letter, round) in Roundings())
            yield return Case.Of<T, T>($"cvt.r{letter}i.{t}.{t}", a => T.CreateChecked(round(double.CreateChecked(a))));
        foreach (var (name, compare) in Comparisons<T>())
        {
            yield return Case.Of<uint, T, T>(
                $"setp.{name}.{t}", (a, b) => !T.IsNaN(a) && !T.IsNaN(b) && compare(a, b) ? 1u : 0, $"setp.{name}.{t} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
            yield return Case.Of<uint, T, T>(
                $"setp.{name}u.{t}", (a, b) => T.IsNaN(a) || T.IsNaN(b) || compare(a, b) ? 1u : 0, $"setp.{name}u.{t} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
        }
        yield return Case.Of<uint, T, T>(
            $"setp.num.{t}", (a, b) => T.IsNaN(a) || T.IsNaN(b) ? 0u : 1, $"setp.num.{t} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
        yield return Case.Of<uint, T, T>(
            $"setp.nan.{t}", (a, b) => T.IsNaN(a) || T.IsNaN(b) ? 1u : 0, $"setp.nan.{t} p, {{1}}, {{2}}; selp.u32 {{0}}, 1, 0, p;");
    }

    private static IEnumerable<Case> Others()
    {
        yield return Case.Of<int, short, short>("mul.wide.s16", (a, b) => a * b);
        yield return Case.Of<uint, ushort, ushort>("mul.wide.u16", (a, b) => (uint)a * b);
        yield return Case.Of<long, int, int>("mul.wide.s32", (a, b) => (long)a * b);
        yield return Case.Of<ulong, uint, uint>("mul.wide.u32", (a, b) => (ulong)a * b);
        yield return Case.Of<long, int, int, long>("mad.wide.s32", (a, b, c) => unchecked(((long)a * b) + c));
        yield return Case.Of<ulong, uint, uint, ulong>("mad.wide.u32", (a, b, c) => unchecked(((ulong)a * b) + c));
        yield return Case.Of<int, int, int>("add.sat.s32", (a, b) => (int)Math.Clamp((long)a + b, int.MinValue, int.MaxValue));
        yield return Case.Of<int, int, int>("sub.sat.s32", (a, b) => (int)Math.Clamp((long)a - b, int.MinValue, int.MaxValue));
        yield return Case.Of<uint, uint, uint, uint>("sad.u32", (a, b, c) => unchecked((a > b ? a - b : b - a) + c));
        yield return Case.Of<uint, uint, uint>("mul24.lo.u32", (a, b) => unchecked((a & 0xffffff) * (b & 0xffffff)));
        yield return Case.Of<uint, uint, uint, uint>("lop3.b32", (a, b, c) => (a & b) | (a & c) | (b & c), "lop3.b32 {0}, {1}, {2}, {3}, 0xe8;");
        yield return Case.Of<uint, uint, uint, uint>("lop3.b32 of another table", (a, b, c) => (a & ~b) ^ c, "lop3.b32 {0}, {1}, {2}, {3}, 0x9a;");
        yield return Case.Of<uint, uint, uint, uint>("shf.l.wrap.b32", (a, b, n) => (uint)((((ulong)b << 32) | a) << (int)(n & 31) >> 32));
        yield return Case.Of<uint, uint, uint, uint>("shf.r.wrap.b32", (a, b, n) => (uint)((((ulong)b << 32) | a) >> (int)(n & 31)));
        yield return Case.Of<uint, uint, uint, uint>("shf.l.clamp.b32", (a, b, n) => n >= 32 ? a : (uint)((((ulong)b << 32) | a) << (int)n >> 32));
        yield return Case.Of<uint, uint, uint, uint>("shf.r.clamp.b32", (a, b, n) => n >= 32 ? b : (uint)((((ulong)b << 32) | a) >> (int)n));
        yield return Case.Of<uint, uint, uint, uint>("prmt.b32", (a, b, selector) =>
        {
            var bytes = ((ulong)b << 32) | a;
            var result = 0u;
            for (var k = 0; k < 4; k++)
            {
                var s = (int)(selector >> (4 * k)) & 15;
                var value = (uint)(bytes >> (8 * (s & 7))) & 255;
                result |= ((s & 8) == 0 ? value : value >= 128 ? 255u : 0) << (8 * k);
            }
            return result;
        });
        yield return Case.Of<uint, uint, uint, uint>(
            "setp.and", (a, b, c) => a < b && c > 5 ? 1u : 0, "setp.gt.u32 q, {3}, 5; setp.lt.and.u32 p, {1}, {2}, q; selp.u32 {0}, 1, 0, p;");
        yield return Case.Of<uint, uint, uint, uint>(
            "setp.or with a negation", (a, b, c) => a < b || c <= 5 ? 1u : 0, "setp.gt.u32 q, {3}, 5; setp.lt.or.u32 p, {1}, {2}, !q; selp.u32 {0}, 1, 0, p;");
        yield return Case.Of<uint, uint, uint, uint>(
            "setp.xor with the complement", (a, b, c) => (a >= b) ^ (c > 5) ? 1u : 0,
            "setp.gt.u32 q, {3}, 5; setp.lt.xor.u32 p|r, {1}, {2}, q; selp.u32 {0}, 1, 0, r;");
        yield return Case.Of<uint, uint, uint>(
            "and, or, xor, not of predicates", (a, b) => ((a > 9 && b > 9) || !(a > 9 ^ b > 9)) ? 1u : 0,
            "setp.gt.u32 p, {1}, 9; setp.gt.u32 q, {2}, 9; and.pred r, p, q; xor.pred p, p, q; not.pred p, p; or.pred p, p, r; selp.u32 {0}, 1, 0, p;");
        const string halves = "{{ .reg .b32 a, b, c, d; mov.b64 {{a, b}}, {1}; mov.b64 {{c, d}}, {2}; ";
        yield return Case.Of<ulong, ulong, ulong>(
            "add.cc.u32 and addc.u32", (a, b) => unchecked(a + b), halves + "add.cc.u32 a, a, c; addc.u32 b, b, d; mov.b64 {0}, {{a, b}}; }}");
        yield return Case.Of<ulong, ulong, ulong>(
            "sub.cc.u32 and subc.u32", (a, b) => unchecked(a - b), halves + "sub.cc.u32 a, a, c; subc.u32 b, b, d; mov.b64 {0}, {{a, b}}; }}");
        yield return Case.Of<uint, ulong, ulong>(
            "addc.cc.s32", (a, b) => ulong.MaxValue - a < b ? 1u : 0, halves + "add.cc.s32 a, a, c; addc.cc.s32 b, b, d; addc.s32 {0}, 0, 0; }}");
        yield return Case.Of<uint, ulong, ulong>(
            "subc.cc.s32", (a, b) => a < b ? ~0u : 0, halves + "sub.cc.s32 a, a, c; subc.cc.s32 b, b, d; subc.s32 {0}, 0, 0; }}");
        yield return Case.Of<ulong, ulong, ulong, ulong>(
            "add.cc.u64 and addc.s64", (a, b, c) => unchecked(c + (ulong.MaxValue - a < b ? 1u : 0)),
            "{{ .reg .b64 low; add.cc.u64 low, {1}, {2}; addc.s64 {0}, {3}, 0; }}");
        yield return Case.Of<ulong, ulong, ulong, ulong>(
            "sub.cc.s64, subc.cc.u64 and subc.u64", (a, b, c) => a < b || (a == b && c > 5) ? ulong.MaxValue : 0,
            "{{ .reg .b64 low; sub.cc.s64 low, 5, {3}; subc.cc.u64 low, {1}, {2}; subc.u64 {0}, 0, 0; }}");
        yield return Case.Of<uint, uint, uint>(
            "a carry that some lanes write anew", (a, b) => a <= b && uint.MaxValue - a < b ? 1u : 0,
            "setp.gt.u32 p, {1}, {2}; add.cc.u32 x, {1}, {2}; @p add.cc.u32 y, 0, 0; addc.u32 {0}, 0, 0;");
        yield return Case.Of<ulong, uint, uint>("pack of two halves", (a, b) => ((ulong)b << 32) | a, "mov.b64 {0}, {{{1}, {2}}};");
        yield return Case.Of<uint, ulong>("halves of 64 bits", a => (uint)(a >> 32) - (uint)a, "mov.b64 {{x, y}}, {1}; sub.u32 {0}, y, x;");
        yield return Case.Of<uint, ushort, ushort>("pack of two quarters", (a, b) => ((uint)b << 16) | a, "mov.b32 {0}, {{{1}, {2}}};");
        yield return Case.Of<ulong, uint, uint>(
            "a guarded instruction", (a, b) => a > b ? 7u : 9u, "setp.gt.u32 p, {1}, {2}; mov.u64 {0}, 9; @p mov.u64 {0}, 7;");
        yield return Case.Of<uint, uint, uint>(
            "an instruction guarded by a negation", (a, b) => a > b ? a : a + b, "setp.gt.u32 p, {1}, {2}; mov.u32 {0}, {1}; @!p add.u32 {0}, {0}, {2};");

        yield return Case.Of<float, float, float>("min.NaN.f32", MathF.Min);
        yield return Case.Of<float, float, float>("max.NaN.f32", MathF.Max);
        yield return Case.Of<float, float, float>("add.ftz.f32", (a, b) => Flush(Flush(a) + Flush(b)));
        yield return Case.Of<float, float, float>("mul.ftz.f32", (a, b) => Flush(Flush(a) * Flush(b)));
        yield return Case.Of<float, float, float, float>("fma.rn.ftz.f32", (a, b, c) => Flush(MathF.FusedMultiplyAdd(Flush(a), Flush(b), Flush(c))));
        yield return Case.Of<float, float, float>("mul.rz.ftz.f32", (a, b) => Flush(Round('z', Flush(a) * Flush(b), Flush(a), Flush(b), 0)));
        yield return Case.Of<float, float, float>("add.rp.sat.f32", (a, b) => Saturate(Round('p', a + b, a, 1, b)));
        yield return Case.Of<float, float, float>("add.sat.f32", (a, b) => Saturate(a + b));
        yield return Case.Of<float, float, float, float>("fma.rn.sat.f32", (a, b, c) => Saturate(MathF.FusedMultiplyAdd(a, b, c)));
        yield return Case.Of<uint, float, float>(
            "setp.lt.ftz.f32", (a, b) => Flush(a) < Flush(b) ? 1u : 0, "setp.lt.ftz.f32 p, {1}, {2}; selp.u32 {0}, 1, 0, p;");
        yield return Case.Of<float, float, float>("set.gt.f32.f32", (a, b) => a > b ? 1 : 0);
        yield return Case.Of<double, float>("cvt.f64.f32", a => a);
        yield return Case.Of<float, double>("cvt.rn.f32.f64", a => (float)a);
        yield return Case.Of<float, float>("cvt.sat.f32.f32", Saturate);
        yield return Case.Of<uint, float>("cvt.rna.tf32.f32", a =>
        {
            var bits = BitConverter.SingleToUInt32Bits(a);
            return float.IsFinite(a) ? (bits + 0x1000) & ~0x1fffu : bits;
        });
        // The errors that the PTX manual states, as a share of the result or absolute.
        yield return Case.Near("ex2.approx.f32", a => Math.Pow(2, a), 2.4e-7);
        yield return Case.Near("ex2.approx.ftz.f32", a => Flush((float)Math.Pow(2, a)), 2.4e-7);
        yield return Case.Near("lg2.approx.f32", a => Math.Log2(a), 2.4e-7, absolute: 2.4e-7);
        yield return Case.Near("sin.approx.f32", a => Math.Sin(a), 0, absolute: 5e-7);
        yield return Case.Near("cos.approx.f32", a => Math.Cos(a), 0, absolute: 5e-7);
        yield return Case.Near("tanh.approx.f32", a => Math.Tanh(a), 5e-4);
        yield return Case.Near("rcp.approx.f32", a => 1 / (double)a, 1.2e-7);
        yield return Case.Near("sqrt.approx.f32", a => Math.Sqrt(a), 1.2e-7);
        yield return Case.Near("rsqrt.approx.f32", a => 1 / Math.Sqrt(a), 2.4e-7);
        yield return Case.Of<float, float, float>("div.full.f32", (a, b) => a / b);
    }

    private static IEnumerable<(string, Func<T, T, bool>)> Comparisons<T>() where T : INumber<T> =>
    [
        ("eq", (a, b) => a == b), ("ne", (a, b) => a != b), ("lt", (a, b) => a < b), ("le", (a, b) => a <= b), ("gt", (a, b) => a > b),
        ("ge", (a, b) => a >= b),
    ];

    private static IEnumerable<(char, Func<double, double>)> Roundings() =>
        [('n', Math.Round), ('z', Math.Truncate), ('m', Math.Floor), ('p', Math.Ceiling)];

    /// <summary>a * b + c rounded toward zero (z), minus (m) or plus (p) infinity.</summary>
    /// <param name="nearest">The same rounded to nearest.</param>
    private static T Round<T>(char direction, T nearest, T a, T b, T c) where T : IBinaryFloatingPointIeee754<T>
    {
        if (!T.IsFinite(a) || !T.IsFinite(b) || !T.IsFinite(c))
            return nearest;
        var exact = (Fixed(a) * Fixed(b)) + (Fixed(c) << FixedBits);
        var above = T.IsInfinity(nearest) ? T.Sign(nearest) : (Fixed(nearest) << FixedBits).CompareTo(exact);
        return direction == 'm' || (direction == 'z' && exact.Sign > 0)
            ? above > 0 ? T.BitDecrement(nearest) : nearest
            : above < 0 ? T.BitIncrement(nearest) : nearest;
    }

    /// <summary>x * 2^FixedBits, which is an integer.</summary>
    private static BigInteger Fixed<T>(T x) where T : IBinaryFloatingPointIeee754<T>
    {
        var bits = BitConverter.DoubleToInt64Bits(double.CreateChecked(x));
        var (exponent, fraction) = ((int)(bits >> 52) & 0x7ff, bits & ((1L << 52) - 1));
        var magnitude = exponent == 0 ? fraction : (BigInteger)(fraction | (1L << 52)) << (exponent - 1);
        return bits < 0 ? -magnitude : magnitude;
    }

    private static float Flush(float x) => float.IsSubnormal(x) ? MathF.CopySign(0, x) : x;

    private static float Saturate(float x) => x > 0 ? MathF.Min(x, 1) : 0;

    /// <summary>Values around the ends of the type's range and zero, and of random bits.</summary>
    private static ulong[] Values(string type, int operand)
    {
        var random = new Random(type.GetHashCode(StringComparison.Ordinal) % 1 + 7 + operand);
        var edges = type switch
        {
            "f32" => new[]
            {
                0, -0f, 1, -1, 0.5f, -2.5f, 1.5f, 3, 100.25f, -77.75f, 1e-40f, -1e-39f, float.MaxValue, float.MinValue, float.Epsilon,
                float.PositiveInfinity, float.NegativeInfinity, float.NaN, 2147483648f, -2147483648f, 4294967296f, 255.5f, 65536f,
            }.Select(x => (ulong)BitConverter.SingleToUInt32Bits(x)).ToArray(),
            "f64" => new[]
            {
                0, -0d, 1, -1, 0.5, -2.5, 1.5, 3, 100.25, -77.75, 1e-310, double.MaxValue, double.MinValue, double.PositiveInfinity,
                double.NegativeInfinity, double.NaN, 2147483648, -2147483649, 9223372036854775808, 1.8446744073709552e19, 1e-40, 1e39,
            }.Select(BitConverter.DoubleToUInt64Bits).ToArray(),
            _ =>
            [
                0, 1, 2, 3, 5, 8, 16, 31, 32, 33, 63, 64, 127, 128, 255, 256, 32767, 32768, 65535, 0x7fffffff, 0x80000000, 0xffffffff,
                0x7fffffffffffffff, 0x8000000000000000, ulong.MaxValue, ulong.MaxValue - 1,
            ],
        };
        return [.. Enumerable.Range(0, Threads).Select(_ => random.Next(4) switch
        {
            0 => edges[random.Next(edges.Length)],
            1 when type == "f32" => BitConverter.SingleToUInt32Bits((float)((random.NextDouble() - 0.5) * 300)),
            1 when type == "f64" => BitConverter.DoubleToUInt64Bits((random.NextDouble() - 0.5) * 300),
            1 => (ulong)random.Next(70),
            _ => (ulong)random.NextInt64(long.MinValue, long.MaxValue),
        })];
    }

    /// <summary>An instruction with its operands' types and what it should give; arrays hold 64 bits an element, the value in the lower ones.</summary>
    private sealed record Case(string Name, string Output, string[] Inputs, string Text, Func<ulong[], ulong, bool> IsRight)
    {
        public static string TypeName<T>() where T : unmanaged =>
            (typeof(T) == typeof(float) || typeof(T) == typeof(double) ? "f" : Equals(default(T), (object)(sbyte)0) || IsSigned<T>() ? "s" : "u") +
            (Unsafe.SizeOf<T>() * 8);

        public static Case Of<D, A>(string name, Func<A, D> f, string? text = null) where D : unmanaged where A : unmanaged =>
            Exact<D>(name, text, [TypeName<A>()], o => f(As<A>(o[0])));

        public static Case Of<D, A, B>(string name, Func<A, B, D> f, string? text = null) where D : unmanaged where A : unmanaged where B : unmanaged =>
            Exact<D>(name, text, [TypeName<A>(), TypeName<B>()], o => f(As<A>(o[0]), As<B>(o[1])));

        public static Case Of<D, A, B, C>(string name, Func<A, B, C, D> f, string? text = null)
            where D : unmanaged where A : unmanaged where B : unmanaged where C : unmanaged =>
            Exact<D>(name, text, [TypeName<A>(), TypeName<B>(), TypeName<C>()], o => f(As<A>(o[0]), As<B>(o[1]), As<C>(o[2])));

        public static Case Of<D, A, B, C, E>(string name, Func<A, B, C, E, D> f, string? text = null)
            where D : unmanaged where A : unmanaged where B : unmanaged where C : unmanaged where E : unmanaged =>
            Exact<D>(
                name, text, [TypeName<A>(), TypeName<B>(), TypeName<C>(), TypeName<E>()], o => f(As<A>(o[0]), As<B>(o[1]), As<C>(o[2]), As<E>(o[3])));

        public static Case Near(string name, Func<float, double> f, double relative, double absolute = 0) => new(
            name, "f32", ["f32"], Spell(name, 1), (o, result) =>
            {
                var (expected, actual) = (f(As<float>(o[0])), As<float>(result));
                if (!float.IsFinite((float)expected))
                    return ((float)expected).Equals(actual);
                return Math.Abs(actual - expected) <= (Math.Abs(expected) * relative) + absolute + 1.5e-45;
            });

        public string Ptx()
        {
            var loads = string.Concat(Inputs.Select((type, k) => $"""
                  ld.param.u64 base, [p{k + 1}];
                  add.u64 base, base, offset;
                  ld.global.{Memory(type)} in{k}, [base];

                """));
            object[] operands = ["out", .. Inputs.Select((_, k) => $"in{k}")];
            return $$"""
                .visible .entry k({{string.Join(", ", Enumerable.Range(0, Inputs.Length + 2).Select(k => $".param .u64 p{k}"))}})
                {
                  .reg .pred p, q, r;
                  .reg .b32 x, y, tid, mask;
                  .reg .b64 base, offset, target, mask64;
                  .reg {{Register(Output)}} out;
                  {{string.Concat(Inputs.Select((type, k) => $".reg {Register(type)} in{k}; "))}}
                  mov.u32 tid, %tid.x;
                  mul.wide.u32 offset, tid, 8;
                  ld.param.u64 target, [p0];
                  add.u64 target, target, offset;
                {{loads}}
                  ld.param.u64 mask64, [p{{Inputs.Length + 1}}];
                  cvt.u32.u64 mask, mask64;
                  and.b32 x, tid, 31;
                  shr.u32 mask, mask, x;
                  and.b32 mask, mask, 1;
                  setp.ne.u32 p, mask, 0;
                  @p bra done;
                  {{string.Format(null, Text, operands)}}
                  st.global.u64 [target], 0;
                  st.global.{{Memory(Output)}} [target], out;
                done:
                  ret;
                }
                """;
        }

        private static Case Exact<D>(string name, string? text, string[] inputs, Func<ulong[], D> f) where D : unmanaged => new(
            name, TypeName<D>(), inputs, text ?? Spell(name, inputs.Length), (o, result) => f(o).Equals(As<D>(result)));

        private static string Spell(string name, int inputs) => $"{name} {string.Join(", ", Enumerable.Range(0, inputs + 1).Select(k => $"{{{k}}}"))};";

        private static bool IsSigned<T>() where T : unmanaged =>
            typeof(T) == typeof(short) || typeof(T) == typeof(int) || typeof(T) == typeof(long);

        private static T As<T>(ulong bits) where T : unmanaged => Unsafe.As<ulong, T>(ref bits);

        private static string Register(string type) => type[1..] is "8" or "16" ? ".b16" : type[0] == 'f' ? "." + type : ".b" + type[1..];

        private static string Memory(string type) => type[0] == 's' && type[1..] != "8" ? "u" + type[1..] : type;
    }
}
