using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Emulator;

/// <summary>Loads, stores, atomics, asynchronous copies and matrix products, by their results.</summary>
public sealed class MemoryTests(EmulatedDeviceFixture fixture) : IClassFixture<EmulatedDeviceFixture>
{
    private const int Threads = 64;

    private EmulatedDevice Device => fixture.Device;

    private static uint[] Numbers { get; } = [.. Enumerable.Range(0, Threads * 8).Select(i => (uint)(i * 2654435761L) ^ 0x5bd1e995)];

    [EmulatedCudaTheory]
    [InlineData("global")]
    [InlineData("shared")]
    [InlineData("local")]
    [InlineData("generic global")]
    [InlineData("generic shared")]
    [InlineData("generic local")]
    public void Every_space_keeps_what_is_stored_in_every_width(string space)
    {
        var dotted = space.StartsWith("generic", StringComparison.Ordinal) ? "" : "." + space;
        var memory = space.Replace("generic ", "", StringComparison.Ordinal);
        var place = memory switch
        {
            "global" => "ld.param.u64 base, [scratch]; mul.wide.u32 offset, tid, 64; add.u64 base, base, offset;",
            "shared" => "mov.u64 base, tile; mul.wide.u32 offset, tid, 64; add.u64 base, base, offset;",
            _ => "mov.u64 base, stack;",
        };
        if (dotted.Length == 0 && memory != "global")
            place += $" cvta.{memory}.u64 base, base;";
        var function = Device.Function(
            $$"""
            .visible .entry k(.param .u64 in, .param .u64 out, .param .u64 scratch)
            {
              .reg .b16 h, i;
              .reg .b32 a, b, c, d, tid;
              .reg .f32 f, g;
              .reg .b64 base, offset, source, target, wide, wide2;
              .shared .align 16 .b8 tile[{{Threads * 64}}];
              .local .align 16 .b8 stack[64];
              mov.u32 tid, %tid.x;
              {{place}}
              mul.wide.u32 offset, tid, 32;
              ld.param.u64 source, [in]; add.u64 source, source, offset;
              ld.param.u64 target, [out]; add.u64 target, target, offset;
              ld.global.v4.u32 {a, b, c, d}, [source];
              st{{dotted}}.v4.b32 [base], {d, c, b, a};
              ld.global.v2.u32 {a, b}, [source+16];
              st{{dotted}}.v2.u32 [base+16], {b, a};
              ld.global.nc.v2.u64 {wide, wide2}, [source];
              st{{dotted}}.u64 [base+24], wide2;
              cvt.u16.u32 h, a;
              st{{dotted}}.u16 [base+32], h;
              st{{dotted}}.u8 [base+34], b;
              st{{dotted}}.u8 [base+35], a;
              ld{{dotted}}.v4.u32 {a, b, c, d}, [base];
              st.global.v4.u32 [target], {a, b, c, d};
              ld{{dotted}}.v2.f32 {f, g}, [base+16];
              st.global.f32 [target+16], f;
              ld{{dotted}}.s16 a, [base+32];
              st.global.u32 [target+20], a;
              ld{{dotted}}.s8 wide, [base+34];
              ld{{dotted}}.u8 h, [base+35];
              cvt.u64.u16 wide2, h;
              shl.b64 wide2, wide2, 32;
              xor.b64 wide, wide, wide2;
              ld{{dotted}}.u64 wide2, [base+24];
              xor.b64 wide, wide, wide2;
              st.global.u64 [target+24], wide;
              ret;
            }
            """);
        var output = Device.Allocate(Threads * 32);
        Device.Run(function, 1, Threads, Device.Upload<uint>(Numbers), output, Device.Allocate(Threads * 64));
        var results = Device.Download<uint>(output, Threads * 8);
        for (var thread = 0; thread < Threads; thread++)
        {
            var n = Numbers.AsSpan(thread * 8, 8);
            var wide = (((ulong)n[3] << 32) | n[2]) ^ (ulong)(sbyte)n[5] ^ ((ulong)(byte)n[4] << 32);
            Assert.Equal([n[3], n[2], n[1], n[0], n[5], (uint)(short)n[4], (uint)wide, (uint)(wide >> 32)], results.AsSpan(thread * 8, 8).ToArray());
        }
    }

    [EmulatedCudaFact]
    public void Variables_of_a_module_have_their_initial_values() => Assert.Equal(
        [0x3f800000, 7, 0, 2, 0x44332211u, 0, 9, ~0u],
        Results(
            8,
            """
            .visible .const .align 4 .f32 one = 0f3F800000;
            .visible .global .align 4 .u32 table[3] = {7, 0x0, 2};
            .visible .const .align 4 .b8 bytes[8] = {0x11, 0x22, 0x33, 0x44};
            .global .align 8 .s32 nested[2][1] = {{9}, {-1}};
            """,
            """
              mov.u64 address, one; ld.const.u32 a, [address]; st.global.u32 [out], a;
              ld.global.u32 a, [table]; st.global.u32 [out+4], a;
              ld.global.u32 a, [table+4]; st.global.u32 [out+8], a;
              mov.u64 address, table+8; ld.global.u32 a, [address]; st.global.u32 [out+12], a;
              mov.u64 address, bytes; ld.const.u32 a, [address]; st.global.u32 [out+16], a;
              ld.const.u32 a, [bytes+4]; st.global.u32 [out+20], a;
              cvta.global.u64 address, nested; ld.u32 a, [address]; st.global.u32 [out+24], a;
              ld.global.s32 a, [nested+4]; st.global.u32 [out+28], a;
            """));

    [EmulatedCudaFact]
    public void Parameters_may_be_read_at_an_address_that_is_computed()
    {
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 out, .param .align 8 .b8 values[24])
            {
              .reg .b32 tid, a;
              .reg .b64 base, address, offset, wide;
              mov.u32 tid, %tid.x;
              mul.wide.u32 offset, tid, 4;
              mov.b64 base, values;
              add.u64 address, base, offset;
              ld.param.u32 a, [address+8];
              ld.param.u64 address, [out];
              add.u64 address, address, offset;
              ld.param.s32 wide, [base];
              cvt.u32.u64 tid, wide;
              add.u32 a, a, tid;
              st.global.u32 [address], a;
              ret;
            }
            """);
        var output = Device.Allocate(16);
        var parameters = new byte[32];
        BitConverter.TryWriteBytes(parameters, output);
        foreach (var (value, k) in new[] { -5, 0, 10, 20, 30, 40 }.Select((value, k) => (value, k)))
            BitConverter.TryWriteBytes(parameters.AsSpan(8 + (4 * k)), value);
        Device.RunWithStruct(function, 4, parameters);
        Assert.Equal([5, 15, 25, 35], Device.Download<int>(output, 4));
    }

    [EmulatedCudaFact]
    public void Atomics_act_in_a_fixed_order()
    {
        var results = Results(
            12, "",
            """
              st.global.u32 [out], 5; st.global.u32 [out+4], 100; st.global.u32 [out+8], 3; st.global.u32 [out+12], 0;
              st.global.u32 [out+16], 0x3f000000; st.global.u32 [out+20], 255; st.global.u64 [out+24], 7; st.global.u32 [out+32], 1; st.global.u32 [out+36], 4;
              st.global.u32 [out+40], 0; st.global.u32 [out+44], 9;
              atom.global.add.u32 a, [out], 6;
              atom.global.gpu.min.s32 b, [out+4], -7;
              atom.global.relaxed.max.u32 b, [out+8], 8;
              atom.global.exch.b32 b, [out+12], a;
              red.global.add.f32 [out+16], 0f3E800000;
              red.global.and.b32 [out+20], 0x18;
              atom.global.add.u64 wide, [out+24], 0x100000000;
              atom.cas.b32 b, [out+32], 1, 77;
              atom.global.cas.b32 b, [out+32], 1, 78;
              red.global.inc.u32 [out+36], 4;
              atom.global.dec.u32 b, [out+40], 6;
              red.global.or.b32 [out+44], 6;
            """);
        Assert.Equal([11, unchecked((uint)-7), 8, 5, 0x3f400000, 0x18, 7, 1, 77, 0, 6, 15], results);
    }

    [EmulatedCudaFact]
    public void Atomics_on_shared_memory_add_up_over_the_block()
    {
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 out)
            {
              .reg .pred p;
              .reg .b32 tid, a;
              .reg .b64 address;
              .shared .align 4 .u32 sum;
              mov.u32 tid, %tid.x;
              setp.eq.u32 p, tid, 0;
              @p st.shared.u32 [sum], 1000;
              bar.sync 0;
              red.shared.add.u32 [sum], tid;
              bar.sync 0;
              ld.shared.u32 a, [sum];
              ld.param.u64 address, [out];
              @p st.global.u32 [address], a;
              ret;
            }
            """);
        var output = Device.Allocate(4);
        Device.Run(function, 1, Threads, output);
        Assert.Equal([1000u + (Threads * (Threads - 1) / 2)], Device.Download<uint>(output, 1));
    }

    [EmulatedCudaFact]
    public void Asynchronous_copies_arrive_when_they_are_waited_for()
    {
        var function = Device.Function(
            $$"""
            .extern .shared .align 16 .b8 tile[];
            .visible .entry k(.param .u64 in, .param .u64 out)
            {
              .reg .b32 tid, a, b, c, d, target;
              .reg .b64 source, base, offset;
              mov.u32 tid, %tid.x;
              mul.wide.u32 offset, tid, 16;
              ld.param.u64 source, [in]; add.u64 source, source, offset;
              mov.u32 target, tile;
              mad.lo.u32 target, tid, 32, target;
              cp.async.cg.shared.global [target], [source], 16;
              cp.async.commit_group;
              cp.async.ca.shared.global [target+16], [source+{{Threads * 16}}], 8;
              cp.async.ca.shared.global [target+24], [source+{{(Threads * 16) + 8}}], 8, 4;
              cp.async.commit_group;
              cp.async.wait_group 1;
              ld.shared.v2.u32 {a, b}, [target+8];
              cp.async.wait_all;
              ld.shared.u32 c, [target+20];
              ld.shared.v2.u32 {tid, d}, [target+24];
              add.u32 b, b, d;
              ld.param.u64 base, [out]; add.u64 base, base, offset;
              st.global.v4.u32 [base], {a, b, c, tid};
              ret;
            }
            """);
        var output = Device.Allocate(Threads * 16);
        Device.Check(Device.TryLaunch(function, (1, 1, 1), (Threads, 1, 1), Threads * 32, 0, Device.Upload<uint>(Numbers), output));
        var results = Device.Download<uint>(output, Threads * 4);
        for (var thread = 0; thread < Threads; thread++)
        {
            int first = thread * 4, second = first + (Threads * 4);
            Assert.Equal([Numbers[first + 2], Numbers[first + 3], Numbers[second + 1], Numbers[second + 2]], results.AsSpan(first, 4).ToArray());
        }
    }

    [EmulatedCudaTheory]
    [InlineData(8)]
    [InlineData(4)]
    public void Matrix_products_look_at_the_upper_19_bits_of_their_operands(int depth)
    {
        const int rows = 16, columns = 8;
        var random = new Random(depth);
        float[] Random(int count) => [.. Enumerable.Range(0, count).Select(_ => (float)((random.NextDouble() - 0.5) * 8))];
        float[] a = Random(rows * depth), b = Random(depth * columns), c = Random(rows * columns);
        string[] Lanes(string[] offsets, string name, string target) =>
            [.. offsets.Select((offset, k) => $"{offset} ld.param.u64 base, [{name}]; add.u64 base, base, wide; ld.global.u32 {target}{k}, [base];")];
        string At(int row, int column, int width) => // of group (lane / 4) + row, member (lane % 4) + column
            $"add.u32 i, group, {row}; add.u32 j, member, {column}; mad.lo.u32 i, i, {width}, j; mul.wide.u32 wide, i, 4;";
        string AtB(int row) => $"add.u32 i, member, {row}; mad.lo.u32 i, i, {columns}, group; mul.wide.u32 wide, i, 4;";
        string AtC(int row, int column) => $"add.u32 i, group, {row}; mad.lo.u32 j, member, 2, {column}; mad.lo.u32 i, i, {columns}, j; mul.wide.u32 wide, i, 4;";
        string[] offsetsA = depth == 8 ? [At(0, 0, 8), At(8, 0, 8), At(0, 4, 8), At(8, 4, 8)] : [At(0, 0, 4), At(8, 0, 4)];
        string[] offsetsB = depth == 8 ? [AtB(0), AtB(4)] : [AtB(0)];
        string[] offsetsC = [AtC(0, 0), AtC(0, 1), AtC(8, 0), AtC(8, 1)];
        string List(string name, int count) => "{" + string.Join(", ", Enumerable.Range(0, count).Select(k => name + k)) + "}";
        var function = Device.Function(
            $$"""
            .visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc)
            {
              .reg .b32 a<4>, b<2>, lane, group, member, i, j;
              .reg .f32 c<4>;
              .reg .b64 base, wide;
              mov.u32 lane, %laneid;
              shr.u32 group, lane, 2;
              and.b32 member, lane, 3;
              {{string.Join("\n  ", [.. Lanes(offsetsA, "pa", "a"), .. Lanes(offsetsB, "pb", "b"), .. Lanes(offsetsC, "pc", "c")])}}
              mma.sync.aligned.m16n8k{{depth}}.row.col.f32.tf32.tf32.f32 {{List("c", 4)}}, {{List("a", depth / 2)}}, {{List("b", depth / 4)}}, {{List("c", 4)}};
              {{string.Join("\n  ", offsetsC.Select((offset, k) => $"{offset} ld.param.u64 base, [pc]; add.u64 base, base, wide; st.global.f32 [base], c{k};"))}}
              ret;
            }
            """);
        var output = Device.Upload<float>(c);
        Device.Run(function, 1, 32, Device.Upload<float>(a), Device.Upload<float>(b), output);
        var results = Device.Download<float>(output, rows * columns);
        static double Tf32(float x) => BitConverter.UInt32BitsToSingle(BitConverter.SingleToUInt32Bits(x) & 0xffffe000);
        for (var row = 0; row < rows; row++)
            for (var column = 0; column < columns; column++)
            {
                double sum = c[(row * columns) + column];
                for (var k = 0; k < depth; k++)
                    sum += Tf32(a[(row * depth) + k]) * Tf32(b[(k * columns) + column]);
                Assert.Equal((float)sum, results[(row * columns) + column]);
            }
    }

    /// <summary>What one thread stores at `out`.</summary>
    private uint[] Results(int count, string variables, string body)
    {
        var function = Device.Function(
            $$"""
            {{variables}}
            .visible .entry k(.param .u64 target)
            {
              .reg .b32 a, b;
              .reg .b64 address, wide, out;
              ld.param.u64 out, [target];
            {{body}}
              ret;
            }
            """);
        var output = Device.Allocate(count * 4);
        Device.Run(function, 1, 1, output);
        return Device.Download<uint>(output, count);
    }
}
