using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Emulator;

/// <summary>Lanes that take different ways must compute what each would alone, and come together again where the ways do.</summary>
public sealed class ControlFlowTests(EmulatedDeviceFixture fixture) : IClassFixture<EmulatedDeviceFixture>
{
    /// <summary>All 32 lanes take part in this, or it is a fault: it proves that they came together.</summary>
    private const string Together = "vote.sync.ballot.b32 votes, true, -1; ";

    private EmulatedDevice Device => fixture.Device;

    [EmulatedCudaFact]
    public void Loops_may_end_at_different_times() => Check(
        """
          mov.u32 a, tid;
          mov.u32 d, 0;
        loop:
          setp.le.u32 p, a, 1;
          @p bra done;
          and.b32 b, a, 1;
          setp.eq.u32 q, b, 0;
          @q bra even;
          mad.lo.u32 a, a, 3, 1;
          bra.uni next;
        even:
          shr.u32 a, a, 1;
        next:
          add.u32 d, d, 1;
          bra loop;
        done:
        """ + Together,
        thread =>
        {
            var steps = 0u;
            for (var a = thread; a > 1; steps++)
                a = a % 2 == 0 ? a / 2 : (3 * a) + 1;
            return steps;
        });

    [EmulatedCudaFact]
    public void A_loop_may_be_left_in_the_middle_and_at_its_end() => Check(
        """
          mov.u32 a, 0;
          mov.u32 d, 0;
          and.b32 c, tid, 7;
        loop:
          setp.eq.u32 p, a, c;
          @p bra left;
          add.u32 d, d, tid;
          add.u32 a, a, 1;
          setp.lt.u32 q, a, 5;
          @q bra loop;
          add.u32 d, d, 1000;
        left:
        """ + Together,
        thread => (thread & 7) < 5 ? thread * (thread & 7) : (thread * 5) + 1000);

    [EmulatedCudaFact]
    public void Nested_branches_meet_at_their_own_ends() => Check(
        $"""
          and.b32 a, tid, 1;
          setp.ne.u32 p, a, 0;
          mov.u32 d, 1;
          @p bra odd;
          and.b32 a, tid, 2;
          setp.ne.u32 q, a, 0;
          @q bra two;
          add.u32 d, d, 10;
          bra inner;
        two:
          add.u32 d, d, 20;
        inner:
          vote.sync.ballot.b32 votes, true, 0x55555555;
          add.u32 d, d, votes;
          bra outer;
        odd:
          add.u32 d, d, 300;
          vote.sync.ballot.b32 votes, true, 0xaaaaaaaa;
        outer:
          {Together}
        """,
        thread => thread % 2 == 1 ? 301 : 1 + (thread % 4 == 2 ? 20u : 10u) + 0x55555555);

    [EmulatedCudaFact]
    public void Threads_may_return_early() => Check(
        """
          setp.ge.u32 p, tid, 40;
          @p ret;
          and.b32 a, tid, 3;
          setp.eq.u32 q, a, 2;
          @q exit;
          activemask.b32 d;
        """,
        thread => thread >= 40 || thread % 4 == 2 ? null : thread < 32 ? 0xbbbbbbbb : 0xbb);

    [EmulatedCudaFact]
    public void An_indexed_branch_goes_each_way() => Check(
        $"""
          rem.u32 a, tid, 5;
          min.u32 a, a, 3;
        ways: .branchtargets zero, one, two, one;
          brx.idx a, ways;
        zero:
          mov.u32 d, 100;
          bra end;
        one:
          mov.u32 d, 200;
          bra end;
        two:
          mov.u32 d, 300;
        end:
          {Together}
        """,
        thread => (thread % 5) switch { 0 => 100, 2 => 300, _ => 200 });

    [EmulatedCudaFact]
    public void Lanes_exchange_values()
    {
        foreach (var (instruction, from) in new (string, Func<int, int>)[]
        {
            ("shfl.sync.idx.b32 d|p, tid, 5, 31, -1", lane => 5),
            ("shfl.sync.idx.b32 d, tid, 3, 0x181f, -1", lane => (lane & 24) | 3),
            ("shfl.sync.up.b32 d|p, tid, 3, 0, -1", lane => lane - 3),
            ("shfl.sync.down.b32 d|p, tid, 4, 31, -1", lane => lane + 4),
            ("shfl.sync.bfly.b32 d|p, tid, 6, 31, -1", lane => lane ^ 6),
            ("shfl.sync.down.b32 d|p, tid, 2, 0x181f, -1", lane => (lane & 7) + 2 < 8 ? lane + 2 : 99),
        })
        {
            var reportsRange = instruction.Contains('|');
            Check(
                $"mov.pred p, false; {instruction}; selp.u32 a, 1000, 0, p; add.u32 d, d, a;",
                thread =>
                {
                    var lane = (int)thread % 32;
                    var source = from(lane);
                    var inside = source is >= 0 and < 32;
                    return (thread & ~31u) + (uint)(inside ? source : lane) + (inside && reportsRange ? 1000u : 0);
                });
        }
    }

    [EmulatedCudaFact]
    public void Lanes_vote_and_reduce()
    {
        Check("setp.gt.u32 p, tid, 20; vote.sync.ballot.b32 d, p, -1;", thread => thread < 32 ? 0xffe00000 : ~0u);
        Check("setp.gt.u32 p, tid, 20; vote.sync.any.pred q, !p, -1; selp.u32 d, 1, 0, q;", thread => thread < 32 ? 1u : 0);
        Check("setp.gt.u32 p, tid, 20; vote.sync.all.pred q, p, -1; selp.u32 d, 1, 0, q;", thread => thread < 32 ? 0u : 1);
        Check("setp.gt.u32 p, tid, 20; vote.sync.uni.pred q, p, -1; selp.u32 d, 1, 0, q;", thread => thread < 32 ? 0u : 1);
        Check("redux.sync.add.u32 d, tid, -1;", thread => ((thread & ~31u) * 32) + (31 * 16));
        Check("sub.s32 a, 9, tid; redux.sync.min.s32 d, a, -1;", thread => unchecked((uint)(9 - (int)(thread | 31))));
        Check("redux.sync.max.u32 d, tid, -1;", thread => thread | 31);
        Check("redux.sync.xor.b32 d, tid, -1;", thread => 0);
    }

    [EmulatedCudaFact]
    public void A_barrier_joins_all_warps_and_a_numbered_one_those_that_it_counts() => Check(
        """
          mul.wide.u32 address, tid, 4;
          mov.u64 tile64, tile;
          add.u64 address, address, tile64;
          add.u32 a, tid, 7;
          st.shared.u32 [address], a;
          bar.sync 0;
          xor.b32 b, tid, 63;
          mul.wide.u32 address, b, 4;
          add.u64 address, address, tile64;
          ld.shared.u32 d, [address];
          setp.ge.u32 p, tid, 64;
          @p bra rest;
          bar.sync 1, 64;
          mul.wide.u32 address, tid, 4;
          add.u64 address, address, tile64;
          st.shared.u32 [address], 0;
        rest:
        """,
        thread => (thread ^ 63) + 7);

    [EmulatedCudaFact]
    public void Special_registers_say_where_a_thread_is()
    {
        var function = Device.Function(
            """
            .visible .entry k(.param .u64 out)
            {
              .reg .b32 x, sum, extent, index;
              .reg .b64 address, offset;
              mov.u32 index, %ctaid.z; mov.u32 x, %nctaid.y; mul.lo.u32 index, index, x; mov.u32 x, %ctaid.y; add.u32 index, index, x;
              mov.u32 x, %nctaid.x; mul.lo.u32 index, index, x; mov.u32 x, %ctaid.x; add.u32 index, index, x;
              mov.u32 x, %ntid.z; mul.lo.u32 index, index, x; mov.u32 x, %tid.z; add.u32 index, index, x;
              mov.u32 x, %ntid.y; mul.lo.u32 index, index, x; mov.u32 x, %tid.y; add.u32 index, index, x;
              mov.u32 x, %ntid.x; mul.lo.u32 index, index, x; mov.u32 x, %tid.x; add.u32 index, index, x;
              mov.u32 sum, %laneid; mov.u32 x, %warpid; mad.lo.u32 sum, x, 32, sum;
              mov.u32 x, %nctaid.z; mad.lo.u32 sum, x, 1000, sum;
              ld.param.u64 address, [out]; mul.wide.u32 offset, index, 4; add.u64 address, address, offset;
              st.global.u32 [address], sum;
              ret;
            }
            """);
        var output = Device.Allocate(4 * 2 * 3 * 4 * 5 * 7 * 2);
        Device.Check(Device.TryLaunch(function, (2, 3, 4), (5, 7, 2), 0, 0, output));
        Assert.Equal(
            Enumerable.Range(0, 2 * 3 * 4 * 5 * 7 * 2).Select(i => (uint)(4000 + (i % 70))), Device.Download<uint>(output, 2 * 3 * 4 * 5 * 7 * 2));
    }

    /// <summary>Runs a body that computes `d` from `tid` with 128 threads in each of two blocks; null: the thread returns without a result.</summary>
    private void Check(string body, Func<uint, uint?> expected)
    {
        const int threads = 128;
        const uint untouched = 0x12345678;
        var function = Device.Function(
            $$"""
            .visible .entry k(.param .u64 out)
            {
              .reg .pred p, q, true;
              .reg .b32 a, b, c, d, tid, block, votes;
              .reg .b64 address, tile64;
              .shared .align 4 .b8 tile[512];
              mov.u32 tid, %tid.x;
              mov.pred true, 1;
              {{body.Replace("false", "0", StringComparison.Ordinal)}}
              mov.u32 block, %ctaid.x;
              mad.lo.u32 block, block, {{threads}}, tid;
              mul.wide.u32 address, block, 4;
              ld.param.u64 tile64, [out];
              add.u64 address, address, tile64;
              st.global.u32 [address], d;
              ret;
            }
            """);
        var output = Device.Upload<uint>(Enumerable.Repeat(untouched, 2 * threads).ToArray());
        Device.Run(function, 2, threads, output);
        var results = Device.Download<uint>(output, 2 * threads);
        for (var i = 0; i < results.Length; i++)
            Assert.True(results[i] == (expected((uint)(i % threads)) ?? untouched), $"thread {i} has {results[i]}, not {expected((uint)(i % threads))}\n{body}");
    }
}
