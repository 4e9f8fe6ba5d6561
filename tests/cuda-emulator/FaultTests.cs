using System.Text.RegularExpressions;
using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Emulator;

/// <summary>
/// A planted error of every kind must be found, at the line that is marked with "// here", in the block and the thread that the case names; and the
/// device refuses all work from then on.
/// </summary>
public sealed partial class FaultTests(EmulatedDeviceFixture fixture) : IClassFixture<EmulatedDeviceFixture>
{
    private static readonly Dictionary<string, Error> Errors = new()
    {
        ["a load past the end"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (1, 0, 0), (8, 0, 0), "0 bytes past the end of an allocation of 416 bytes",
            """
              add.u64 address, array, offset;
              ld.global.u32 a, [address+128]; // here
            """),
        ["a load before the beginning"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (0, 0, 0), null,
            """
              add.u64 address, array, offset;
              ld.global.u32 a, [address+-4]; // here
            """),
        ["a store through the null pointer"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (3, 0, 0), "the null pointer",
            """
              setp.eq.u32 p, tid, 3;
              mov.u64 address, 0;
              @p st.global.u32 [address], tid; // here
            """),
        ["a store past the end by some lanes"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (21, 0, 0), "4 bytes past the end of an allocation of 416 bytes",
            """
              mul.wide.u32 offset, tid, 20;
              add.u64 address, array, offset;
              st.global.u32 [address], tid; // here
            """),
        ["a vector that straddles the end"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (0, 0, 0), "0 bytes past the end of an allocation of 416 bytes",
            """
              ld.global.v4.u32 {a, b, a, b}, [array+416]; // here
            """),
        ["a misaligned vector"] = new(
            "misaligned", EmulatedDevice.MisalignedAddress, (0, 0, 0), (1, 0, 0), "global load of 8 bytes",
            """
              add.u64 address, array, offset;
              ld.global.v2.u32 {a, b}, [address]; // here
            """),
        ["a use after free"] = new(
            "use after free", EmulatedDevice.IllegalAddress, (0, 0, 0), (0, 0, 0), "4 bytes into a freed allocation of 64 bytes",
            """
              ld.param.u64 address, [freed];
              ld.global.u32 a, [address+4]; // here
            """),
        ["a load of what nobody wrote"] = new(
            "uninitialised read", EmulatedDevice.IllegalAddress, (0, 0, 0), (4, 0, 0), "16 bytes into an allocation of 64 bytes",
            """
              ld.param.u64 address, [unwritten];
              setp.eq.u32 q, block, 0;
              @q st.global.v4.u32 [address], {tid, tid, tid, tid};
              add.u64 address, address, offset;
              setp.lt.and.u32 p, tid, 6, q;
              @p ld.global.u32 a, [address]; // here
            """),
        ["a load of shared memory that nobody wrote"] = new(
            "uninitialised read", EmulatedDevice.IllegalAddress, (0, 0, 0), (32, 0, 0), "128 bytes into shared variable 'tile' of 256 bytes",
            """
              add.u64 address, tile64, offset;
              setp.lt.u32 p, tid, 32;
              @p st.shared.u32 [address], tid;
              bar.sync 0;
              ld.shared.u32 a, [address]; // here
            """),
        ["a load of local memory that nobody wrote"] = new(
            "uninitialised read", EmulatedDevice.IllegalAddress, (0, 0, 0), (0, 0, 0), "4 bytes into local variable 'stack' of 8 bytes",
            """
              st.local.u32 [stack], tid;
              ld.local.v2.u32 {a, b}, [stack]; // here
            """),
        ["a store past a shared variable"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (63, 0, 0), "0 bytes past the end of shared variable 'tile' of 256 bytes",
            """
              add.u64 address, tile64, offset;
              st.shared.u32 [address+4], tid; // here
            """),
        ["a store past local memory"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (2, 0, 0), "local store of 4 bytes",
            """
              mov.u64 address, stack;
              add.u64 address, address, offset;
              setp.lt.u32 p, tid, 3;
              @p st.local.u32 [address], tid; // here
            """),
        ["a load past the parameters"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (6, 0, 0), "of 24 bytes of parameters",
            """
              mov.u64 address, array_;
              add.u64 address, address, offset;
              ld.param.u32 a, [address]; // here
            """),
        ["a missing barrier between a write and a read"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (32, 0, 0), "which thread (31,0,0) wrote with no barrier in between",
            """
              add.u64 address, tile64, offset;
              st.shared.u32 [address], tid;
              setp.eq.u32 p, tid, 32;
              @p ld.shared.u32 a, [address+-4]; // here
            """),
        ["a missing barrier between a read and a write"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (40, 0, 0), "which thread (8,0,0) read with no barrier in between",
            """
              add.u64 address, tile64, offset;
              st.shared.u32 [address], tid;
              bar.sync 0;
              ld.shared.u32 a, [address];
              setp.eq.u32 p, tid, 40;
              @p st.shared.u32 [address+-128], tid; // here
            """),
        ["two threads that write the same word"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (1, 0, 0), "which thread (0,0,0) wrote with no __syncwarp",
            """
              shr.u64 offset, offset, 3;
              and.b64 offset, offset, -4;
              add.u64 address, tile64, offset;
              st.shared.u32 [address], tid; // here
            """),
        ["a missing __syncwarp"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (0, 0, 0), "which thread (1,0,0) wrote with no __syncwarp or barrier in between",
            """
              add.u64 address, tile64, offset;
              st.shared.u32 [address], tid;
              bar.warp.sync -1;
              ld.shared.u32 a, [address];
              st.shared.u32 [address], tid;
              xor.b64 address, address, 4;
              ld.shared.u32 a, [address]; // here
            """),
        ["a race between bytes of one word's neighbours"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (0, 0, 0), "4 bytes 0 bytes into shared variable 'tile'",
            """
              cvt.u64.u32 offset, tid;
              add.u64 address, tile64, offset;
              st.shared.u8 [address], tid;
              setp.eq.u32 p, tid, 0;
              @p ld.shared.u32 a, [address]; // here
            """),
        ["an atomic and a plain access"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (32, 0, 0), "wrote with no barrier in between",
            """
              setp.eq.u32 p, tid, 0;
              @p st.shared.u32 [tile], 0;
              bar.sync 0;
              setp.lt.u32 q, tid, 32;
              @q red.shared.add.u32 [tile], 1;
              @!q ld.shared.u32 a, [tile]; // here
            """),
        ["a copy that is read before it is waited for"] = new(
            "asynchronous copy", EmulatedDevice.LaunchFailed, (0, 0, 0), (0, 0, 0), "where an asynchronous copy has not been waited for",
            """
              add.u64 address, tile64, offset;
              add.u64 offset, array, offset;
              cp.async.ca.shared.global [address], [offset], 4;
              cp.async.commit_group;
              cp.async.wait_group 1;
              ld.shared.u32 a, [address]; // here
            """),
        ["a copy that is waited for by another thread only"] = new(
            "shared-memory race", EmulatedDevice.LaunchFailed, (0, 0, 0), (32, 0, 0), "wrote with no barrier in between",
            """
              add.u64 address, tile64, offset;
              add.u64 offset, array, offset;
              cp.async.ca.shared.global [address], [offset], 4;
              cp.async.wait_all;
              setp.ge.u32 p, tid, 32;
              @p ld.shared.u32 a, [address+-128]; // here
            """),
        ["a copy from past the end"] = new(
            "out of bounds", EmulatedDevice.IllegalAddress, (0, 0, 0), (26, 0, 0), "0 bytes past the end of an allocation of 416 bytes",
            """
              shl.b64 wide, offset, 2;
              add.u64 wide, array, wide;
              and.b64 offset, offset, 127;
              shl.b64 offset, offset, 2;
              mov.u64 address, large;
              add.u64 address, address, offset;
              cp.async.cg.shared.global [address], [wide], 16; // here
            """),
        ["two blocks that add to the same word"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (5, 0, 0),
            "the thread reads 4 bytes 8 bytes into an allocation of 416 bytes, which block (0,0,0) wrote in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, tid, 5;
              @p ld.global.u32 a, [address+8]; // here
              add.u32 a, a, 1;
              @p st.global.u32 [address+8], a;
            """),
        ["two blocks that write the same word"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (33, 0, 0), "writes 16 bytes 16 bytes into an allocation of 416 bytes, which block (0,0,0) wrote",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, block, 0;
              setp.eq.and.u32 q, tid, 7, p;
              @q st.global.u32 [address+24], 1;
              setp.eq.and.u32 q, tid, 33, !p;
              @q st.global.v4.u32 [address+16], {a, a, a, a}; // here
            """),
        ["a block that writes what another reads"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (7, 0, 0), "which block (0,0,0) read in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, block, 0;
              @p ld.global.u32 a, [address+12];
              setp.eq.and.u32 q, tid, 7, !p;
              @q st.global.u32 [address+12], tid; // here
            """),
        ["a copy from what another block writes"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "which block (0,0,0) wrote in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, block, 0;
              @p st.global.u32 [address+4], 1;
              @!p cp.async.ca.shared.global [tile64], [address], 8; // here
              cp.async.wait_all;
            """),
        ["a plain read of a word that other blocks update"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "which several blocks updated in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, tid, 0;
              @p red.global.add.u32 [address], 1;
              setp.eq.and.u32 q, block, 1, p;
              @q ld.global.u32 a, [address]; // here
            """),
        ["an update of a word that another block reads"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "updates 4 bytes 0 bytes into an allocation of 416 bytes, which block (0,0,0) read",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, block, 0;
              @p ld.global.u32 a, [address];
              @!p red.global.add.u32 [address], 1; // here
            """),
        ["a last block without a fence before it is counted"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "which block (0,0,0) wrote in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, tid, 0;
              @p st.global.u32 [array+100], tid;
              @p atom.global.add.u32 a, [address], 1;
              membar.gl;
              setp.eq.and.u32 q, a, 1, p;
              @q ld.global.u32 b, [address+100]; // here
            """),
        ["a last block without a fence after it is counted"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "which block (0,0,0) wrote in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, tid, 0;
              @p st.global.u32 [array+100], tid;
              membar.gl;
              @p atom.global.add.u32 a, [address], 1;
              setp.eq.and.u32 q, a, 1, p;
              @q ld.global.u32 b, [address+100]; // here
            """),
        ["a last block that reads what is written after the count"] = new(
            "race between blocks", EmulatedDevice.LaunchFailed, (1, 0, 0), (0, 0, 0), "which block (0,0,0) wrote in the same launch",
            """
              ld.param.u64 address, [array_];
              setp.eq.u32 p, tid, 0;
              membar.gl;
              @p atom.global.add.u32 a, [address], 1;
              @p st.global.u32 [array+100], tid;
              membar.gl;
              setp.eq.and.u32 q, a, 1, p;
              @q ld.global.u32 b, [address+100]; // here
            """),
        ["a barrier that some threads of a warp reach"] = new(
            "barrier divergence", EmulatedDevice.LaunchFailed, (0, 0, 0), (5, 0, 0), "some threads of the warp",
            """
              setp.ge.u32 p, tid, 5;
              @p bar.sync 0; // here
            """),
        ["a barrier that some warps reach"] = new(
            "barrier divergence", EmulatedDevice.LaunchFailed, (0, 0, 0), (32, 0, 0), "while threads 0..31 of the block have exited",
            """
              setp.lt.u32 p, tid, 32;
              @p bra skip;
              bar.sync 0; // here
            skip:
            """),
        ["two barriers for one"] = new(
            "barrier divergence", EmulatedDevice.LaunchFailed, (0, 0, 0), (0, 0, 0), "wait at the one in line",
            """
              setp.lt.u32 p, tid, 32;
              @p bra other;
              bar.sync 0;
              bra skip;
            other:
              bar.sync 0; // here
            skip:
            """),
        ["a shuffle with lanes that do not take part"] = new(
            "barrier divergence", EmulatedDevice.LaunchFailed, (0, 0, 0), (0, 0, 0), "the mask of shfl.sync",
            """
              setp.lt.u32 p, tid, 16;
              @p shfl.sync.bfly.b32 a, tid, 1, 31, -1; // here
            """),
        ["a trap"] = new(
            "trap", EmulatedDevice.LaunchFailed, (0, 0, 0), (7, 0, 0), null,
            """
              setp.ne.u32 p, tid, 7;
              @p bra skip;
              trap; // here
            skip:
            """),
    };

    private EmulatedDevice Device => fixture.Device;

    public static TheoryData<string> Names() => [.. Errors.Keys];

    [EmulatedCudaTheory]
    [MemberData(nameof(Names))]
    public void Is_found_and_named(string name)
    {
        var error = Errors[name];
        var body =
            $$"""
            .visible .entry planted(.param .u64 array_, .param .u64 freed, .param .u64 unwritten)
            {
              .reg .pred p, q;
              .reg .b32 a, b, tid, block;
              .reg .b64 array, address, offset, tile64, wide;
              .shared .align 16 .b8 tile[256];
              .shared .align 16 .b8 large[4096];
              .local .align 8 .b8 stack[8];
              mov.u32 tid, %tid.x;
              mov.u32 block, %ctaid.x;
              mul.wide.u32 offset, tid, 4;
              mov.u64 tile64, tile;
              ld.param.u64 array, [array_];
              mul.wide.u32 wide, block, 256;
              add.u64 array, array, wide;
            {{error.Body}}
              ret;
            }
            """;
        var function = Device.Function(body, "planted");
        var array = Device.Upload<uint>(new uint[104]);
        var freed = Device.Upload<uint>(new uint[16]);
        Device.Check(Device.Call<EmulatedDevice.AddressCall>("cuMemFree_v2")(freed));
        try
        {
            Assert.Equal(error.Status, Device.TryLaunch(function, (2, 1, 1), (64, 1, 1), 0, 0, array, freed, Device.Allocate(64)));
            var fault = Device.LastFault;
            var place = Place().Match(fault);
            Assert.True(place.Success, fault);
            Assert.Equal(error.Kind, place.Groups["kind"].Value);
            Assert.Equal("planted", place.Groups["kernel"].Value);
            var lines = body.Split('\n');
            Assert.Equal(2 + Array.FindIndex(lines, line => line.Contains("// here", StringComparison.Ordinal)), int.Parse(place.Groups["line"].Value));
            Assert.Equal(error.Block.ToString(), place.Groups["block"].Value.Replace(",", ", ", StringComparison.Ordinal));
            Assert.Equal(error.Thread.ToString(), place.Groups["thread"].Value.Replace(",", ", ", StringComparison.Ordinal));
            Assert.Contains(error.Text ?? "", fault);

            Assert.Equal(error.Status, Device.TryLaunch(function, (1, 1, 1), (1, 1, 1), 0, 0, array, freed, array));
            Assert.Equal(error.Status, Device.Call<EmulatedDevice.OutAddressSize>("cuMemAlloc_v2")(out _, 16));
        }
        finally
        {
            Device.Reset();
        }
    }

    [EmulatedCudaFact]
    public void The_last_block_may_use_what_all_left_behind_fences()
    {
        // Every block adds its number to a sum that is its own, and to one that all update; the last one adds up the former and sets the counter back.
        const int blocks = 40;
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 array_)
            {
              .reg .pred p;
              .reg .b32 a, sum, block, next;
              .reg .b64 array, own, offset;
              ld.param.u64 array, [array_];
              mov.u32 block, %ctaid.x;
              mul.wide.u32 offset, block, 4;
              add.u64 own, array, offset;
              st.global.u32 [own+12], block;
              ld.global.u32 a, [own+12];
              add.u32 a, a, block;
              st.global.u32 [own+12], a;
              red.global.add.u32 [array+8], block;
              membar.gl;
              atom.global.add.u32 a, [array], 1;
              membar.gl;
              setp.ne.u32 p, a, 39;
              @p ret;
              mov.u32 sum, 0;
              mov.u32 next, 0;
            add:
              ld.global.u32 a, [array+12];
              add.u32 sum, sum, a;
              add.u64 array, array, 4;
              add.u32 next, next, 1;
              setp.lt.u32 p, next, 40;
              @p bra add;
              ld.param.u64 array, [array_];
              st.global.u32 [array+4], sum;
              st.global.u32 [array], 0;
              ret;
            }
            """);
        var array = Device.Upload<uint>(new uint[3 + blocks]);
        const uint sum = blocks * (blocks - 1) / 2;
        for (var launch = 1u; launch <= 2; launch++)
        {
            Device.Run(function, blocks, 1, array);
            Assert.Equal([0, 2 * sum, launch * sum], Device.Download<uint>(array, 3));
        }
    }

    [EmulatedCudaFact]
    public void Blocks_may_share_what_they_only_read_and_the_bytes_of_a_word()
    {
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 array_, .param .u64 bytes)
            {
              .reg .b32 a, block;
              .reg .b64 array, own, offset;
              ld.param.u64 array, [array_];
              ld.param.u64 own, [bytes];
              mov.u32 block, %ctaid.x;
              cvt.u64.u32 offset, block;
              add.u64 own, own, offset;
              ld.global.u32 a, [array];
              add.u32 a, a, block;
              st.global.u8 [own], a;
              ret;
            }
            """);
        var bytes = Device.Upload<byte>(new byte[256]);
        Device.Run(function, 256, 1, Device.Upload<uint>([3]), bytes);
        Assert.Equal(Enumerable.Range(3, 256).Select(value => (byte)value), Device.Download<byte>(bytes, 256));
    }

    [EmulatedCudaFact]
    public void The_first_faulty_block_is_named_whichever_runs_first()
    {
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 array)
            {
              .reg .pred p;
              .reg .b32 a, block;
              .reg .b64 address, offset;
              ld.param.u64 address, [array];
              mov.u32 block, %ctaid.x;
              and.b32 a, block, 63;
              setp.ne.u32 p, a, 37;
              @p bra good;
              mul.wide.u32 offset, block, 4096;
              add.u64 address, address, offset;
            good:
              ld.global.u32 a, [address];
              ret;
            }
            """);
        var array = Device.Upload<uint>(new uint[4]);
        for (var repetition = 0; repetition < 5; repetition++)
        {
            Assert.Equal(EmulatedDevice.IllegalAddress, Device.TryLaunch(function, (1000, 1, 1), (32, 1, 1), 0, 0, array));
            Assert.Contains("block (37,0,0)", Device.LastFault);
            Device.Reset();
        }
    }

    [EmulatedCudaTheory]
    [InlineData("foo.u32 a, a;", "unknown instruction 'foo.u32'", 6)]
    [InlineData("div.rz.f32 f, f, f;", "unknown instruction 'div.rz.f32'", 6)]
    [InlineData("add.cc.f32 f, f, f;", "unknown instruction 'add.cc.f32'", 6)]
    [InlineData("add.u32 a, a;", "'add.u32' has 3 operands, not 2", 6)]
    [InlineData("add.u64 a, a, a;", "'add.u64' has operands of sizes that it does not take", 6)]
    [InlineData("\n\n  bra nowhere;", "there is no label 'nowhere'", 8)]
    [InlineData("mov.u32 a, b;", "an operand is of a kind that the instruction does not take", 6)]
    [InlineData("mov.u32 a, %b;", "unknown register '%b'", 6)]
    [InlineData("call.uni f, ();", "'call' is not supported: functions must be inlined", 6)]
    [InlineData("ld.param.u64 w, [p+4];", "'ld.param.u64' does not read a parameter", 6)]
    public void Modules_that_cannot_be_run_are_refused_by_name_and_line(string instruction, string message, int line)
    {
        var (status, _, log) = Device.Load($".visible .entry k(.param .u64 p)\n{{\n  .reg .b32 a; .reg .f32 f; .reg .b64 w;\n\n  {instruction}\n  ret;\n}}");
        Assert.Equal(EmulatedDevice.InvalidPtx, status);
        Assert.Equal($"{message}, line {line} of the PTX", log);
        Assert.Equal(log, Device.LastFault);
    }

    [GeneratedRegex(@"^(?<kind>[^:]+): .+ \(kernel '(?<kernel>\w+)', PTX line (?<line>\d+), block (?<block>\(\d+,\d+,\d+\)), thread (?<thread>\(\d+,\d+,\d+\))\)$")]
    private static partial Regex Place();

    private sealed record Error(string Kind, int Status, (int X, int Y, int Z) Block, (int X, int Y, int Z) Thread, string? Text, string Body);
}
