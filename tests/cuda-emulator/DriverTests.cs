using System.Runtime.InteropServices;
using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Emulator;

/// <summary>What the driver functions do beside running kernels: counters, memory, capture, and a device that is lost.</summary>
public sealed class DriverTests : IDisposable
{
    private const string AddOne =
        """
        .visible .entry k(.param .u64 array)
        {
          .reg .b32 a, tid;
          .reg .b64 address, offset;
          mov.u32 tid, %tid.x;
          mul.wide.u32 offset, tid, 4;
          ld.param.u64 address, [array];
          add.u64 address, address, offset;
          ld.global.u32 a, [address];
          add.u32 a, a, 1;
          st.global.u32 [address], a;
          ret;
        }
        """;

    private readonly Lazy<EmulatedDevice> _device = new(() => new());

    private EmulatedDevice Device => _device.Value;

    public void Dispose()
    {
        if (_device.IsValueCreated)
            _device.Value.Dispose();
    }

    /// <summary>One warp accesses `global` at base + stride * lane, with `bytes` a lane.</summary>
    [EmulatedCudaTheory]
    [InlineData(4, 4, 0, 4)]
    [InlineData(4, 4, 4, 5)]
    [InlineData(4, 8, 0, 8)]
    [InlineData(4, 32, 0, 32)]
    [InlineData(4, 0, 12, 1)]
    [InlineData(16, 16, 0, 16)]
    [InlineData(16, 32, 16, 32)]
    [InlineData(1, 1, 31, 2)]
    public void Sectors_of_global_memory_are_counted(int bytes, int stride, int start, int sectors)
    {
        var (type, value) = bytes switch { 1 => ("u8", "a"), 16 => ("v4.u32", "{a, b, c, d}"), _ => ("u32", "a") };
        var counters = Access($"ld.global.{type} {value}, [address]; st.global.{type} [address], {value};", "ld.param.u64 address, [array];", stride, start);
        Assert.Equal((1ul, (ulong)sectors, (ulong)bytes * 32), (counters.GlobalLoadRequests, counters.GlobalLoadSectors, counters.GlobalLoadBytes));
        Assert.Equal((1ul, (ulong)sectors, (ulong)bytes * 32), (counters.GlobalStoreRequests, counters.GlobalStoreSectors, counters.GlobalStoreBytes));
    }

    /// <summary>One warp loads shared memory at stride * lane; a request of 4, 8, 16 bytes a lane needs 1, 2, 4 passes at least.</summary>
    [EmulatedCudaTheory]
    [InlineData(4, 4, 1, 0)]
    [InlineData(4, 0, 1, 0)]
    [InlineData(4, 8, 2, 1)]
    [InlineData(4, 128, 32, 31)]
    [InlineData(4, 132, 1, 0)]
    [InlineData(8, 8, 2, 0)]
    [InlineData(8, 128, 32, 30)]
    [InlineData(8, 136, 2, 0)]
    [InlineData(16, 16, 4, 0)]
    [InlineData(16, 64, 16, 12)]
    [InlineData(16, 144, 4, 0)]
    [InlineData(1, 1, 1, 0)]
    public void Bank_conflicts_of_shared_memory_are_counted(int bytes, int stride, int wavefronts, int conflicts)
    {
        var (type, value) = bytes switch { 1 => ("u8", "a"), 8 => ("v2.u32", "{a, b}"), 16 => ("v4.u32", "{a, b, c, d}"), _ => ("u32", "a") };
        const string write = "mov.u64 address, tile; mad.wide.u32 address, tid, 160, address; mov.u32 a, 0; ";
        var fill = write + string.Concat(Enumerable.Range(0, 40).Select(k => $"st.shared.u32 [address+{4 * k}], 0; ")) + "bar.sync 0;";
        var filled = Access("", fill + " mov.u64 address, tile;", stride, 0);
        Device.Call<EmulatedDevice.Action>("pnEmulatorResetCounters")();
        var counters = Access($"ld.shared.{type} {value}, [address];", fill + " mov.u64 address, tile;", stride, 0);
        Assert.Equal(1ul, counters.SharedRequests - filled.SharedRequests);
        Assert.Equal((ulong)wavefronts, counters.SharedWavefronts - filled.SharedWavefronts);
        Assert.Equal((ulong)conflicts, counters.SharedConflicts - filled.SharedConflicts);
    }

    [EmulatedCudaFact]
    public void Instructions_and_what_they_compute_are_counted()
    {
        var function = Device.Function(
            """
            .visible .entry counted()
            {
              .reg .pred p;
              .reg .b32 tid;
              .reg .f32 f;
              mov.u32 tid, %tid.x;
              cvt.rn.f32.u32 f, tid;
              setp.lt.u32 p, tid, 40;
              @p bra few;
              fma.rn.f32 f, f, f, f;
            few:
              mul.f32 f, f, f;
              bar.sync 0;
              ret;
            }
            """, "counted");
        Device.Check(Device.TryLaunch(function, (3, 1, 1), (64, 1, 1), 0, 0));
        var c = Device.KernelCounters()["counted"];
        Assert.Equal((1ul, 3ul, 192ul), (c.Launches, c.Blocks, c.Threads));
        // cvt, setp, bra, mul, bar, ret by both warps, fma by the second; the move of a special register costs nothing.
        Assert.Equal(3ul * 13, c.WarpInstructions);
        Assert.Equal(3ul * ((6 * 64) + 24), c.LaneInstructions);
        Assert.Equal(3ul * ((2 * 24) + 64), c.FloatOperations);
        Assert.Equal((3ul, 3ul), (c.Barriers, c.DivergentBranches));
        Device.Call<EmulatedDevice.Action>("pnEmulatorResetCounters")();
        Assert.Empty(Device.KernelCounters());
    }

    [EmulatedCudaFact]
    public void Memory_is_limited_and_freed()
    {
        Device.Call<EmulatedDevice.SizeAction>("pnEmulatorSetCapacity")(1000);
        var allocate = Device.Call<EmulatedDevice.OutAddressSize>("cuMemAlloc_v2");
        var free = Device.Call<EmulatedDevice.AddressCall>("cuMemFree_v2");
        Device.Check(allocate(out var first, 600));
        Assert.Equal(EmulatedDevice.OutOfMemory, allocate(out _, 401));
        Device.Check(Device.Call<EmulatedDevice.OutSizeOutSize>("cuMemGetInfo_v2")(out var left, out var total));
        Assert.Equal((400, 1000), ((int)left, (int)total));
        Device.Check(free(first));
        Assert.Equal(EmulatedDevice.InvalidValue, free(first));
        Assert.Equal(EmulatedDevice.InvalidValue, allocate(out _, 0));
        Device.Check(Device.Call<EmulatedDevice.OutAddressSizeStream>("cuMemAllocAsync")(out var second, 1000, 0));
        Assert.NotEqual(first, second);
        Device.Check(Device.Call<EmulatedDevice.PointerPointer>("cuMemFreeAsync")((nint)second, 0));
    }

    [EmulatedCudaFact]
    public void Copies_stay_within_an_allocation_and_carry_what_was_never_written()
    {
        var source = Device.Allocate(64);
        var target = Device.Upload<uint>(new uint[16]);
        Device.Check(Device.Call<EmulatedDevice.SetBytes>("cuMemsetD8_v2")(source, 0x21, 32));
        var copy = Device.Call<EmulatedDevice.OnDevice>("cuMemcpyDtoD_v2");
        Assert.Equal(EmulatedDevice.InvalidValue, copy(target, source, 65));
        Assert.Equal(EmulatedDevice.InvalidValue, copy(target + 32, source, 64));
        Device.Check(copy(target, source, 64));
        Assert.Equal(Enumerable.Repeat(0x21212121u, 8), Device.Download<uint>(target, 8));
        var function = Device.Function(AddOne);
        Device.Run(function, 1, 8, target);
        Assert.Equal(EmulatedDevice.IllegalAddress, Device.TryLaunch(function, (1, 1, 1), (9, 1, 1), 0, 0, target));
        Assert.Contains("uninitialised read", Device.LastFault);
    }

    [EmulatedCudaFact]
    public void Captured_work_runs_when_the_graph_is_launched()
    {
        var function = Device.Function(AddOne);
        Device.Check(Device.Call<EmulatedDevice.OutPointerUint>("cuStreamCreate")(out var stream, 1));
        Device.Check(Device.Call<EmulatedDevice.OutPointerSizeUint>("cuMemHostAlloc")(out var host, 64, 0));
        var array = Device.Upload<uint>(new uint[16]);
        Device.Check(Device.Call<EmulatedDevice.PointerInt>("cuStreamBeginCapture_v2")(stream, 0));
        Device.Check(Device.Call<EmulatedDevice.SetBytesAsync>("cuMemsetD8Async")(array, 0, 64, stream));
        Device.Check(Device.TryLaunch(function, (1, 1, 1), (16, 1, 1), 0, stream, array));
        Device.Check(Device.TryLaunch(function, (1, 1, 1), (8, 1, 1), 0, stream, array));
        Device.Check(Device.Call<EmulatedDevice.FromDeviceAsync>("cuMemcpyDtoHAsync_v2")(host, array, 64, stream));
        Device.Check(Device.Call<EmulatedDevice.PointerOutPointer>("cuStreamEndCapture")(stream, out var graph));
        nuint nodes = 0;
        Device.Check(Device.Call<EmulatedDevice.PointerPointerOutSize>("cuGraphGetNodes")(graph, 0, ref nodes));
        Assert.Equal(4, (int)nodes);
        Assert.Empty(Device.KernelCounters());
        Device.Check(Device.Call<EmulatedDevice.OutPointerPointerUlong>("cuGraphInstantiateWithFlags")(out var executable, graph, 0));
        Device.Check(Device.Call<EmulatedDevice.PointerCall>("cuGraphDestroy")(graph));
        for (var launch = 1; launch <= 2; launch++)
        {
            Device.Check(Device.Call<EmulatedDevice.PointerPointer>("cuGraphLaunch")(executable, stream));
            Device.Check(Device.Call<EmulatedDevice.PointerCall>("cuStreamSynchronize")(stream));
            Assert.Equal(2ul * (ulong)launch, Device.KernelCounters()["k"].Launches);
        }
        for (var i = 0; i < 16; i++)
            Assert.Equal(i < 8 ? 2 : 1, Marshal.ReadInt32(host, 4 * i));
        Device.Check(Device.Call<EmulatedDevice.PointerCall>("cuGraphExecDestroy")(executable));
    }

    [EmulatedCudaFact]
    public void What_cannot_be_captured_spoils_the_capture()
    {
        Device.Check(Device.Call<EmulatedDevice.OutPointerUint>("cuStreamCreate")(out var stream, 1));
        Device.Check(Device.Call<EmulatedDevice.PointerInt>("cuStreamBeginCapture_v2")(stream, 0));
        Assert.Equal(EmulatedDevice.CaptureUnsupported, Device.Call<EmulatedDevice.PointerCall>("cuStreamSynchronize")(stream));
        Assert.Equal(EmulatedDevice.CaptureInvalidated, Device.Call<EmulatedDevice.PointerOutPointer>("cuStreamEndCapture")(stream, out _));
        Device.Check(Device.Call<EmulatedDevice.PointerInt>("cuStreamBeginCapture_v2")(stream, 0));
        Assert.Equal(EmulatedDevice.CaptureUnsupported, Device.Call<EmulatedDevice.OutAddressSize>("cuMemAlloc_v2")(out _, 16));
        Assert.Equal(EmulatedDevice.CaptureInvalidated, Device.Call<EmulatedDevice.PointerOutPointer>("cuStreamEndCapture")(stream, out _));
        Device.Check(Device.Call<EmulatedDevice.PointerCall>("cuStreamSynchronize")(stream));
    }

    [EmulatedCudaFact]
    public void A_lost_device_refuses_everything()
    {
        var function = Device.Function(AddOne);
        var array = Device.Upload<uint>(new uint[16]);
        Device.Call<EmulatedDevice.LongAction>("pnEmulatorLoseAfter")(2);
        Device.Run(function, 1, 16, array);
        Device.Run(function, 1, 16, array);
        Assert.Equal(EmulatedDevice.DeviceUnavailable, Device.TryLaunch(function, (1, 1, 1), (16, 1, 1), 0, 0, array));
        Assert.Equal(EmulatedDevice.DeviceUnavailable, Device.Call<EmulatedDevice.PointerCall>("cuStreamSynchronize")(0));
        Device.Call<EmulatedDevice.ErrorText>("cuGetErrorName")(EmulatedDevice.DeviceUnavailable, out var name);
        Assert.Equal("CUDA_ERROR_DEVICE_UNAVAILABLE", Marshal.PtrToStringUTF8(name));
        Device.Reset();
        Assert.Equal(Enumerable.Repeat(2u, 16), Device.Download<uint>(array, 16));
    }

    [EmulatedCudaFact]
    public void Launches_beyond_the_limits_are_refused()
    {
        var function = Device.Function(
            ".visible .entry k() .maxntid 128, 1, 1 { .shared .align 4 .b8 tile[4096]; ret; }");
        Assert.Equal(EmulatedDevice.InvalidValue, Device.TryLaunch(function, (1, 1, 1), (129, 1, 1), 0, 0));
        Assert.Equal(EmulatedDevice.InvalidValue, Device.TryLaunch(function, (0, 1, 1), (32, 1, 1), 0, 0));
        Assert.Equal(EmulatedDevice.InvalidValue, Device.TryLaunch(function, (1, 1, 1), (32, 1, 1), 49153, 0));
        var set = Device.Call<EmulatedDevice.PointerIntInt>("cuFuncSetAttribute");
        Device.Check(set(function, 8, 100_000));
        Device.Check(Device.TryLaunch(function, (1, 1, 1), (32, 1, 1), 100_000, 0));
        Assert.Equal(EmulatedDevice.InvalidValue, set(function, 8, 1_000_000));
        var get = Device.Call<EmulatedDevice.OutIntIntPointer>("cuFuncGetAttribute");
        Device.Check(get(out var shared, 1, function));
        Device.Check(get(out var threads, 0, function));
        Assert.Equal((4096, 128), (shared, threads));
        Device.Check(Device.Call<EmulatedDevice.Occupancy>("cuOccupancyMaxActiveBlocksPerMultiprocessor")(out var blocks, function, 128, 0));
        Assert.Equal(16, blocks);
    }

    [EmulatedCudaFact]
    public void Modules_for_newer_drivers_and_devices_are_refused()
    {
        const string empty = ".visible .entry k() { ret; }";
        Assert.Equal(EmulatedDevice.UnsupportedPtxVersion, Device.Load(empty, version: "8.0").Status);
        Assert.Equal("PTX version 8.0 is newer than this driver's 7.8", Device.LastFault);
        Assert.Equal(EmulatedDevice.NoBinaryForGpu, Device.Load(empty, target: "sm_90").Status);
        Assert.Equal("the module is for sm_90, the device is sm_80", Device.LastFault);
        var (_, module, _) = Device.Load(empty, target: "sm_70");
        Assert.Equal(EmulatedDevice.NotFound, Device.Call<EmulatedDevice.GetFunction>("cuModuleGetFunction")(out _, module, "other"));
    }

    /// <summary>What a kernel counts in which one warp computes address = start + stride * lane and executes `body`.</summary>
    private EmulatedDevice.Counters Access(string body, string from, int stride, int start)
    {
        var function = Device.Function(
            $$"""
            .visible .entry access(.param .u64 array)
            {
              .reg .b32 a, b, c, d, tid;
              .reg .b64 address;
              .shared .align 128 .b8 tile[5120];
              mov.u32 tid, %tid.x;
              {{from}}
              mad.wide.u32 address, tid, {{stride}}, address;
              add.u64 address, address, {{start}};
              {{body}}
              ret;
            }
            """, "access");
        Device.Run(function, 1, 32, Device.Upload<uint>(new uint[2048]));
        return Device.KernelCounters()["access"];
    }
}
