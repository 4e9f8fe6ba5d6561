using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;

namespace PerturbNas.Tests.Kernels;

/// <summary>Memory, the choice of threads and instruction set, and the measured limits of the CPU backend.</summary>
public class CpuBackendTests
{
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(4097)]
    [InlineData((2 << 20) - 1)]
    [InlineData(2 << 20)]
    [InlineData((5 << 20) + 3)]
    public unsafe void Allocate_gives_aligned_zeros_again_and_again(long bytes)
    {
        using var backend = new CpuBackend(1);
        for (var round = 0; round < 3; round++)
        {
            var address = backend.Allocate(bytes);
            Assert.Equal(0, address % 64);
            var memory = new Span<byte>((void*)address, (int)bytes);
            Assert.Equal(-1, memory.IndexOfAnyExcept((byte)0));
            memory.Fill(1);
            backend.Free(address);
        }
    }

    [Fact]
    public void A_huge_block_costs_memory_only_where_it_is_used()
    {
        using var backend = new CpuBackend(1);
        var before = Environment.WorkingSet;
        var bytes = 2L << 30;
        var address = backend.Allocate(bytes);
        backend.Write(address + (nint)(bytes / 2), new[] { 1.5f });
        Assert.True(Environment.WorkingSet - before < 256 << 20);
        backend.Free(address);
    }

    [Fact]
    public void Write_and_read_convert_between_float_and_double()
    {
        foreach (var backend in new Backend[] { TestBackends.Reference, TestBackends.Cpu(Isa.Best, 1) })
        {
            var address = backend.Allocate(3 * backend.ElementSize);
            backend.Write(address, [1.5f, -2, 0.25f]);
            var doubles = new double[3];
            backend.Read(address, doubles);
            Assert.Equal([1.5, -2, 0.25], doubles);
            backend.Write(address, [0.5, 4, -8.0]);
            var floats = new float[3];
            backend.Read(address, floats);
            Assert.Equal([0.5f, 4, -8], floats);
            backend.Free(address);
        }
    }

    [Fact]
    public void Zero_threads_is_one_for_each_processor()
    {
        using var backend = new CpuBackend();
        Assert.Equal(Environment.ProcessorCount, backend.Threads);
        Assert.Contains(backend.IsaName, new[] { "portable", "avx2", "avx512", "avx512-zen" });
    }

    [Fact]
    public void Too_many_threads_are_a_user_error() =>
        Assert.Contains("257", Assert.Throws<UserException>(() => new CpuBackend(257)).Message, StringComparison.Ordinal);

    [Fact]
    public void The_environment_narrows_the_best_instruction_set()
    {
        var before = Environment.GetEnvironmentVariable(CpuBackend.IsaVariable);
        try
        {
            foreach (var isa in TestBackends.InstructionSets)
            {
                var name = TestBackends.Cpu(isa, 1).IsaName;
                Environment.SetEnvironmentVariable(CpuBackend.IsaVariable, name);
                using var backend = new CpuBackend(1);
                Assert.Equal(name, backend.IsaName);
            }
            Environment.SetEnvironmentVariable(CpuBackend.IsaVariable, "sse9");
            var exception = Assert.Throws<UserException>(() => new CpuBackend(1));
            Assert.Contains("sse9", exception.Message, StringComparison.Ordinal);
            Assert.Contains(CpuBackend.IsaVariable, exception.Message, StringComparison.Ordinal);
        }
        finally
        {
            Environment.SetEnvironmentVariable(CpuBackend.IsaVariable, before);
        }
    }

    [Fact]
    public void The_best_kernels_are_those_made_for_this_processor()
    {
        var before = Environment.GetEnvironmentVariable(CpuBackend.IsaVariable);
        try
        {
            Environment.SetEnvironmentVariable(CpuBackend.IsaVariable, null);
            var processor = File.ReadAllText("/proc/cpuinfo");
            var widest = TestBackends.InstructionSets.Where(isa => isa != Isa.Avx512Zen).Max();
            var expected = widest == Isa.Avx512 && processor.Contains("AuthenticAMD", StringComparison.Ordinal) ? Isa.Avx512Zen : widest;
            using var backend = new CpuBackend(1);
            Assert.Equal(TestBackends.Cpu(expected, 1).IsaName, backend.IsaName);
        }
        finally
        {
            Environment.SetEnvironmentVariable(CpuBackend.IsaVariable, before);
        }
    }

    [Fact]
    public void Limits_are_measured()
    {
        var limits = TestBackends.Cpu(Isa.Best, 1).MeasureLimits();
        Assert.InRange(limits.Gigaflops, 0.1, 1e5);
        Assert.InRange(limits.GigabytesPerSecond, 0.1, 1e4);
    }
}
