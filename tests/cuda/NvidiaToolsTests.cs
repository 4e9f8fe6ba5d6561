using System.Reflection;
using System.Runtime.InteropServices;
using PerturbNas.Backends.Cuda;
using PerturbNas.Tests.Kernels;
using Xunit.Abstractions;

namespace PerturbNas.Tests.Cuda;

/// <summary>What NVIDIA's own tools say about the CUDA kernels and the driver's binding, on a machine without a device.</summary>
public sealed class NvidiaToolsTests(ITestOutputHelper output)
{
    /// <summary>Warps that a multiprocessor should hold; the kernels' independent loads and sums do the rest.</summary>
    private const int LeastWarps = 12;

    // What a multiprocessor of compute capability 9.0 has (CUDA C++ Programming Guide, table of technical specifications).
    private const int MultiprocessorRegisters = 65536, MultiprocessorWarps = 64, MultiprocessorBlocks = 32;
    private const int MultiprocessorSharedBytes = 228 << 10, ReservedSharedBytes = 1 << 10;

    private static readonly string[] Products = ["depthwise_pointwise", "pointwise", "convolution"];

    [NvidiaToolsFact]
    public void Every_module_assembles_and_no_kernel_spills_registers()
    {
        foreach (var (resource, architecture) in NvidiaTools.Modules())
        {
            var kernels = NvidiaTools.Assemble(resource, architecture).Kernels;
            Assert.NotEmpty(kernels);
            foreach (var (name, kernel) in kernels)
                Assert.True(kernel.StackBytes == 0, $"{name} has {kernel.StackBytes} bytes of local memory on sm_{architecture}");
        }
    }

    [NvidiaToolsFact]
    public void Kernels_leave_room_for_enough_warps_at_the_shapes_of_a_search()
    {
        using var launches = new SearchLaunches();
        launches.RunConvolutions();
        Assert.NotEmpty(launches.Shapes);
        foreach (var (kernel, (threads, sharedBytes)) in launches.Shapes)
        {
            var registers = Kernel(kernel, 90).Registers;
            var warps = ResidentWarps(registers, threads, sharedBytes);
            output.WriteLine($"{kernel}: {registers} registers, {threads} threads, {sharedBytes} bytes shared, {warps} warps");
            Assert.True(warps >= LeastWarps, $"{kernel}: {registers} registers, {threads} threads and {sharedBytes} bytes of shared memory a block " +
                $"leave room for {warps} warps");
        }
    }

    [NvidiaToolsFact]
    public void Activations_move_sixteen_bytes_at_a_time()
    {
        foreach (var (name, kernel) in Kernels(90).Where(pair => !pair.Key.EndsWith("_tf32", StringComparison.Ordinal)))
        {
            Assert.True(kernel.Count("LDG.E.128") > 0, $"{name} loads no 16 bytes at a time");
            // Gradients of weights and their sums are written once, element by element.
            if (!name.Contains("weights", StringComparison.Ordinal))
                Assert.True(kernel.Count("STG.E.128") > 0, $"{name} stores no 16 bytes at a time");
        }
    }

    [NvidiaToolsFact]
    public void Weights_are_copied_asynchronously_from_sm_80_on()
    {
        foreach (var (name, kernel) in Kernels(90).Where(pair => pair.Key.Contains("forward", StringComparison.Ordinal)))
            Assert.True(kernel.Count("LDGSTS.E.BYPASS.128") > 0, $"{name} copies nothing asynchronously");
    }

    [NvidiaToolsFact]
    public void Tensor_cores_multiply_only_where_TF32_was_asked_for()
    {
        var tf32 = 0;
        foreach (var (name, kernel) in Kernels(90))
        {
            var wanted = name.EndsWith("_tf32", StringComparison.Ordinal);
            tf32 += wanted ? 1 : 0;
            Assert.True(kernel.Count("HMMA.1688.F32.TF32") > 0 == wanted, $"{name} has {kernel.Count("HMMA.1688.F32.TF32")} products in TF32");
            Assert.Equal(kernel.Count("HMMA"), kernel.Count("HMMA.1688.F32.TF32"));
        }
        Assert.NotEqual(0, tf32);
    }

    [NvidiaToolsFact]
    public void NVIDIAs_driver_exports_every_function_of_the_binding()
    {
        var names = typeof(NativeDriver).GetMethods(BindingFlags.Static | BindingFlags.NonPublic)
            .Select(method => method.GetCustomAttribute<LibraryImportAttribute>()?.EntryPoint).OfType<string>().ToList();
        Assert.NotEmpty(names);
        var library = NativeLibrary.Load(Path.Combine(NvidiaTools.LibraryFolder, "libcuda.so.1"));
        try
        {
            Assert.All(names, name => Assert.True(NativeLibrary.TryGetExport(library, name, out _), $"libcuda.so.1 exports no {name}"));
        }
        finally
        {
            NativeLibrary.Free(library);
        }
    }

    [NvidiaToolsFact]
    public void NVIDIAs_driver_without_a_device_ends_the_program_with_one_sentence()
    {
        if (CudaDevice.MayExist)
            return;
        var (exitCode, text, error) = Cli.CommandLine.Run(
            ["quickstart", "--device", "cuda"], new() { ["LD_LIBRARY_PATH"] = NvidiaTools.LibraryFolder });
        Assert.Equal("", text);
        Assert.Matches(@"^perturbnas: [^\n]*CUDA_ERROR_NO_DEVICE[^\n]*--device cpu\.\n$", error);
        Assert.Equal(2, exitCode);
    }

    /// <summary>The convolutions' kernels by name.</summary>
    private static IEnumerable<KeyValuePair<string, AssembledKernel>> Kernels(int architecture) => NvidiaTools.Modules()
        .Where(module => module.Architecture == architecture && Products.Contains(OperatorOf(module.Resource)))
        .SelectMany(module => NvidiaTools.Assemble(module.Resource, architecture).Kernels);

    private static AssembledKernel Kernel(string name, int architecture) => NvidiaTools.Modules()
        .Where(module => module.Architecture == architecture)
        .Select(module => NvidiaTools.Assemble(module.Resource, architecture).Kernels.GetValueOrDefault(name)).OfType<AssembledKernel>().Single();

    private static string OperatorOf(string resource) => resource.Split('/')[1].Split('.')[0];

    /// <summary>Warps that a multiprocessor holds at a time; registers are given to a warp in units of 256.</summary>
    private static int ResidentWarps(int registers, int threads, int sharedBytes)
    {
        var warps = (threads + 31) / 32;
        var byRegisters = MultiprocessorRegisters / ((registers * 32 + 255) / 256 * 256) / warps;
        var byShared = MultiprocessorSharedBytes / (sharedBytes + ReservedSharedBytes);
        return warps * new[] { byRegisters, byShared, MultiprocessorWarps / warps, MultiprocessorBlocks }.Min();
    }

    /// <summary>The blocks that the convolutions of a search at batch 64 are launched with.</summary>
    private sealed unsafe class SearchLaunches : CudaLaunchCounter
    {
        /// <summary>Threads and bytes of shared memory of a block, by kernel; the largest where they differ.</summary>
        public Dictionary<string, (int Threads, int SharedBytes)> Shapes { get; } = [];

        public void RunConvolutions()
        {
            foreach (var (size, channels) in new[] { (32, 16), (16, 32), (8, 64) })
                foreach (var (kernel, dilation) in new[] { (3, 1), (5, 1), (3, 2), (5, 2) })
                    foreach (var stride in new[] { 1, 2 })
                        Run(KernelCases.DepthwisePointwise(size, size, channels, channels, kernel, stride, dilation, new(Images: 64, Normalization: true)));
        }

        private protected override void Launch(string kernel, Dim3 grid, Dim3 block, void* argument, int sharedBytes)
        {
            var (threads, shared) = Shapes.GetValueOrDefault(kernel);
            Shapes[kernel] = (Math.Max(threads, (int)block.Count), Math.Max(shared, sharedBytes));
        }

        private void Run(KernelCase kernelCase)
        {
            using var run = new KernelRun(kernelCase, this);
            foreach (var pass in kernelCase.Passes())
                run.Call(pass);
        }
    }
}
