using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Backends.Cuda;
using PerturbNas.Benchmarks;
using PerturbNas.Tests.Cuda;
using PerturbNas.Tests.Kernels;

namespace PerturbNas.Tests.Benchmarks;

/// <summary>
/// What is asked of cuBLAS and cuDNN, without a device: with both played by plain loops on the processor, every operator's values are those of
/// our CPU kernels, forward and backward.
/// </summary>
public sealed class LibraryPeerTests
{
    // Float32 on our side, with sums of some hundred terms.
    private const double Tolerance = 3e-6;

    private const int Batch = 3, Side = 6;

    private static readonly Dictionary<string, (PeerOperator Work, KernelCase Case)> Operators = Build().ToDictionary(each => each.Case.Name);

    public static TheoryData<string> Names() => [.. Operators.Keys];

    [Theory]
    [MemberData(nameof(Names))]
    public void Both_libraries_compute_what_our_kernels_do(string name)
    {
        var (work, kernelCase) = Operators[name];
        AssertSame(work, kernelCase, new HostGemm(), new HostLayers());
    }

    [Fact]
    public void Without_cuDNN_products_of_pointwise_convolutions_are_compared_and_nothing_else()
    {
        foreach (var (work, kernelCase) in Operators.Values)
        {
            var compared = AssertSame(work, kernelCase, new HostGemm(), layers: null);
            Assert.Equal(work is { Operator: "pointwise", Stride: 1 }, compared);
        }
    }

    [Fact]
    public void Without_cuBLAS_operators_without_products_are_compared()
    {
        foreach (var (work, kernelCase) in Operators.Values)
        {
            var compared = AssertSame(work, kernelCase, gemm: null, new HostLayers());
            Assert.Equal(work.Operator is not "depthwise_pointwise" && work is not { Operator: "pointwise", Stride: 1 }, compared);
        }
    }

    [Fact]
    public void There_is_no_library_call_for_a_mixed_sum()
    {
        var peer = new LibraryPeer(TestBackends.Cpu(Isa.Portable, 1), new HostGemm(), new HostLayers());
        Assert.Null(peer.Prepare(new("mixed_sum", Batch, Side, 8, Terms: 3), KernelCases.MixedSum(1, Batch, Side * Side, 8, [(1, false, 0)], 1), new(new Dictionary<string, nint>())));
    }

    /// <summary>Rows of pixels are columns to cuBLAS: [pixels][5] = [pixels][7] * [7][5], its gradients, and no other product.</summary>
    [Fact]
    public void A_pointwise_convolution_is_three_column_major_products()
    {
        var gemm = new HostGemm();
        const int pixels = Batch * Side * Side;
        AssertSame(new("pointwise", Batch, Side, 7, Out: 5), KernelCases.Pointwise(Side, Side, [new(7)], 5, new(Images: Batch)), gemm, new HostLayers());
        var shapes = gemm.Calls.Select(g => (g.TransposeA, g.TransposeB, g.M, g.N, g.K, g.LeadingA, g.LeadingB, g.LeadingC, g.Beta)).ToList();
        Assert.Equal((false, false, 5, pixels, 7, 5, 7, 5, 0f), shapes[0]);
        Assert.Contains((true, false, 7, pixels, 5, 5, 5, 7, 0f), shapes);
        Assert.Contains((false, true, 5, 7, pixels, 5, 7, 5, 0f), shapes);
        Assert.Equal(3, shapes.Count);
    }

    [Fact]
    public void Another_result_is_refused_in_one_sentence()
    {
        var (work, kernelCase) = Operators.Values.First(each => each.Work.Operator == "pointwise");
        using var memory = new CaseBuffers(kernelCase, TestBackends.Cpu(Isa.Portable, 1));
        using var peer = new LibraryPeer(memory.Backend, new HostGemm { Omitted = 1 }, new HostLayers());
        using var ready = peer.Prepare(work, kernelCase, memory.Addresses)!;
        ready.Run(KernelPass.Forward);
        var error = Assert.Throws<UserException>(() => ready.RequireSame(KernelPass.Forward, tf32: true));
        Assert.StartsWith($"{kernelCase.Name}, Forward: the y of NVIDIA's libraries is ", error.Message, StringComparison.Ordinal);
    }

    [EmulatedCudaFact]
    public void A_library_that_is_not_installed_is_named_with_its_files()
    {
        if (CudaLibrary.Load(CudaLibrary.Blas) is not null || CudaLibrary.Load(CudaLibrary.Dnn) is not null)
            return;
        using var backend = new CudaBackend(DeviceKind.CudaEmulated);
        var notes = new List<string>();
        Assert.Null(LibraryPeer.Open(backend, notes.Add));
        Assert.Equal(
            [
                "cuBLAS is not installed (none of libcublas.so.13, libcublas.so.12, libcublas.so.11 can be loaded): nothing with pointwise products is compared with it",
                "cuDNN is not installed (none of libcudnn.so.9, libcudnn.so.8 can be loaded): nothing is compared with it",
            ], notes);
    }

    /// <summary>cudnn_cnn.h: two integers, a float, a size_t at 16, two enumerators and three reserved integers.</summary>
    [Fact]
    public void What_cuDNN_says_of_an_algorithm_is_laid_out_as_its_header_has_it()
    {
        Assert.Equal(48, Unsafe.SizeOf<CuDnn.AlgorithmPerformance>());
        Assert.Equal([0, 4, 8, 16, 24, 28], new[] { "Number", "Status", "Milliseconds", "Memory", "Determinism", "MathType" }
            .Select(field => (int)Marshal.OffsetOf<CuDnn.AlgorithmPerformance>(field)));
    }

    [NvidiaToolsFact]
    public void NVIDIAs_cuBLAS_exports_every_function_of_the_binding()
    {
        // Not loaded: it would want cublasLt, which is five times as large.
        var exported = NvidiaTools.Output("nm", "-D", "--defined-only", Path.Combine(NvidiaTools.LibraryFolder, "libcublas.so.11"))
            .Split('\n').Select(line => line.Split(' ')[^1].Split('@')[0]).ToHashSet();
        Assert.All(EntryPoints(typeof(CuBlas)), name => Assert.Contains(name, exported));
    }

    [CuDnnFact]
    public void NVIDIAs_cuDNN_exports_every_function_of_the_binding()
    {
        var library = NativeLibrary.Load(CudaLibrary.Load(CudaLibrary.Dnn)!);
        Assert.All(EntryPoints(typeof(CuDnn)), name => Assert.True(NativeLibrary.TryGetExport(library, name, out _), $"cuDNN exports no {name}"));
    }

    private static List<string> EntryPoints(Type binding)
    {
        List<string> names = [.. binding.GetMethods(BindingFlags.Static | BindingFlags.NonPublic)
            .Select(method => method.GetCustomAttribute<LibraryImportAttribute>()?.EntryPoint).OfType<string>()];
        Assert.NotEmpty(names);
        return names;
    }

    private static IEnumerable<(PeerOperator Work, KernelCase Case)> Build()
    {
        var options = new Options(Images: Batch);
        foreach (var (kernel, stride, dilation, normalization) in new[] { (3, 1, 1, false), (3, 1, 2, true), (5, 2, 1, false), (5, 2, 2, true) })
            yield return (new("depthwise_pointwise", Batch, Side, 8, stride, kernel, dilation),
                KernelCases.DepthwisePointwise(Side, Side, 8, 8, kernel, stride, dilation, options with { Normalization = normalization }));
        foreach (var wanted in new[] { Wanted.All, Wanted.Input, Wanted.Weights })
        {
            yield return (new("depthwise_pointwise", Batch, Side, 5), KernelCases.DepthwisePointwise(Side, Side, 5, 5, 3, 1, 1, options with { Wanted = wanted }));
            yield return (new("pointwise", Batch, Side, 6, Parts: 3, Out: 5),
                KernelCases.Pointwise(Side, Side, [new(6), new(6), new(6)], 5, options with { Wanted = wanted }));
            yield return (new("pointwise", Batch, Side, 6, Stride: 2, Parts: 2, Out: 5),
                KernelCases.Pointwise(Side, Side, [new(6), new(6)], 5, options with { Wanted = wanted }, stride: 2, yChannels: 10));
            yield return (new("convolution", Batch, Side, 4, Out: 6),
                KernelCases.Convolution(Side, Side, 4, 6, (3, 3), (1, 1), (1, 1), options with { Wanted = wanted }));
        }
        yield return (new("convolution", Batch, Side, 3, Out: 8, Relu: false),
            KernelCases.Convolution(Side, Side, 3, 8, (3, 3), (1, 1), (1, 1), options with { Wanted = Wanted.Weights }, relu: false));
        foreach (var maximum in new[] { true, false })
            foreach (var stride in new[] { 1, 2 })
                yield return (new(maximum ? "max_pool_3x3" : "avg_pool_3x3", Batch, Side, 4, stride), KernelCases.Pool([maximum ? Pooling.Max3x3 : Pooling.Avg3x3], Side, Side, 4, stride, options));
    }

    /// <summary>Whether the libraries have something for an operator; then its values are ours.</summary>
    private static bool AssertSame(PeerOperator work, KernelCase kernelCase, IGemm? gemm, ILayers? layers)
    {
        using var memory = new CaseBuffers(kernelCase, TestBackends.Cpu(Isa.Portable, 1));
        using var peer = new LibraryPeer(memory.Backend, gemm, layers);
        using var ready = peer.Prepare(work, kernelCase, memory.Addresses);
        if (ready is null)
            return false;
        foreach (var pass in kernelCase.Passes())
        {
            ready.Run(pass);
            memory.Run(pass);
            var differences = ready.Differences(pass);
            var compared = pass == KernelPass.Backward
                ? kernelCase.Buffers.Count(buffer => buffer.Role == BufferRole.BackwardOutput && buffer.Name != "gradient_sums")
                : layers is null ? 1 : 3;
            // The weights of every part of a concatenation count by themselves.
            Assert.Equal(compared + (pass == KernelPass.Backward && memory.Addresses["d_weight"] != 0 ? work.Parts - 1 : 0), differences.Count);
            foreach (var (what, difference) in differences)
                Assert.True(difference <= Tolerance, $"{kernelCase.Name}, {pass}: {what} is {difference:g3} of its norm away");
        }
        return true;
    }

    /// <summary>A case's buffers, filled, its forward pass run.</summary>
    private sealed class CaseBuffers : IDisposable
    {
        private readonly KernelCase _case;
        private readonly Dictionary<string, nint> _blocks = [];

        public CaseBuffers(KernelCase kernelCase, Backend backend)
        {
            (_case, Backend) = (kernelCase, backend);
            foreach (var buffer in kernelCase.Buffers)
            {
                _blocks[buffer.Name] = backend.Allocate((long)buffer.Count * buffer.ElementSize(backend.ElementSize));
                if (buffer.Values(kernelCase.Name, continuous: true) is { } values)
                    backend.Write(_blocks[buffer.Name], values);
            }
            Addresses = new(_blocks);
            Run(KernelPass.Forward);
        }

        public Backend Backend { get; }

        public KernelAddresses Addresses { get; }

        public void Run(KernelPass pass) => _case.Call(pass)(Backend, pass == KernelPass.Backward
            ? Addresses
            : new(_case.Buffers.Where(buffer => buffer.Role != BufferRole.BackwardOutput).ToDictionary(buffer => buffer.Name, buffer => _blocks[buffer.Name])));

        public void Dispose()
        {
            foreach (var block in _blocks.Values)
                Backend.Free(block);
        }
    }
}

/// <summary>A test with NVIDIA's cuDNN; skipped, visibly, where it is not installed: nothing that the tests may fetch from has it.</summary>
public sealed class CuDnnFactAttribute : FactAttribute
{
    public CuDnnFactAttribute() => Skip = CudaLibrary.Load(CudaLibrary.Dnn) is null ? $"cuDNN is not installed: {CudaLibrary.WhyMissing(CudaLibrary.Dnn)}." : null;
}
