using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace PerturbNas.Backends.Cpu;

/// <summary>
/// The functions of libperturbnas_kernels, as kernels/perturbnas_kernels.h declares them, and the three of libc that big memory
/// blocks need. Kernels return a status, which only <see cref="CpuBackend"/> looks at: nothing else calls them.
/// </summary>
internal static partial class NativeKernels
{
    /// <summary>PN_ABI_VERSION of the header that the argument structs mirror.</summary>
    internal const int AbiVersion = 4;

    private const string Library = "perturbnas_kernels";

    [LibraryImport(Library, EntryPoint = "pn_abi_version")]
    internal static partial int LibraryAbiVersion();

    [LibraryImport(Library, EntryPoint = "pn_last_error")]
    internal static partial nint LastError();

    [LibraryImport(Library, EntryPoint = "pn_context_create")]
    internal static partial int ContextCreate(int threads, Isa isa, out ContextHandle context);

    [LibraryImport(Library, EntryPoint = "pn_context_destroy")]
    internal static partial void ContextDestroy(nint context);

    [LibraryImport(Library, EntryPoint = "pn_context_threads")]
    internal static partial int ContextThreads(ContextHandle context);

    [LibraryImport(Library, EntryPoint = "pn_context_isa")]
    internal static partial nint ContextIsa(ContextHandle context);

    [LibraryImport(Library, EntryPoint = "pn_measure_limits")]
    internal static partial int MeasureLimits(ContextHandle context, out MachineLimits limits);

    [LibraryImport(Library, EntryPoint = "pn_run_group")]
    internal static partial int RunGroup(ContextHandle context, nint calls, int count);

    [LibraryImport(Library, EntryPoint = "pn_pointwise_forward")]
    internal static partial int PointwiseForward(ContextHandle context, in PointwiseArgs a);

    [LibraryImport(Library, EntryPoint = "pn_pointwise_backward")]
    internal static partial int PointwiseBackward(ContextHandle context, in PointwiseArgs a);

    [LibraryImport(Library, EntryPoint = "pn_convolution_forward")]
    internal static partial int ConvolutionForward(ContextHandle context, in ConvolutionArgs a);

    [LibraryImport(Library, EntryPoint = "pn_convolution_backward")]
    internal static partial int ConvolutionBackward(ContextHandle context, in ConvolutionArgs a);

    [LibraryImport(Library, EntryPoint = "pn_batch_norm_forward")]
    internal static partial int BatchNormForward(ContextHandle context, in BatchNormForwardArgs a);

    [LibraryImport(Library, EntryPoint = "pn_batch_norm_backward")]
    internal static partial int BatchNormBackward(ContextHandle context, in BatchNormBackwardArgs a);

    [LibraryImport(Library, EntryPoint = "pn_global_average_pool_forward")]
    internal static partial int GlobalAveragePoolForward(ContextHandle context, in GlobalAveragePoolArgs a);

    [LibraryImport(Library, EntryPoint = "pn_global_average_pool_backward")]
    internal static partial int GlobalAveragePoolBackward(ContextHandle context, in GlobalAveragePoolArgs a);

    [LibraryImport(Library, EntryPoint = "pn_linear_forward")]
    internal static partial int LinearForward(ContextHandle context, in LinearArgs a);

    [LibraryImport(Library, EntryPoint = "pn_linear_backward")]
    internal static partial int LinearBackward(ContextHandle context, in LinearArgs a);

    [LibraryImport(Library, EntryPoint = "pn_softmax_cross_entropy_run")]
    internal static partial int SoftmaxCrossEntropy(ContextHandle context, in SoftmaxCrossEntropyArgs a);

    [LibraryImport(Library, EntryPoint = "pn_sgd_step")]
    internal static partial int SgdStep(ContextHandle context, in SgdArgs a);

    [LibraryImport(Library, EntryPoint = "pn_adam_step")]
    internal static partial int AdamStep(ContextHandle context, in AdamArgs a);

    [LibraryImport(Library, EntryPoint = "pn_noise_normal")]
    internal static partial int NoiseNormal(ContextHandle context, in NoiseArgs a);

    [LibraryImport("libc", EntryPoint = "mmap", SetLastError = true)]
    internal static partial nint MemoryMap(nint address, nuint bytes, int protection, int flags, int file, nint offset);

    [LibraryImport("libc", EntryPoint = "munmap")]
    internal static partial int MemoryUnmap(nint address, nuint bytes);

    [LibraryImport("libc", EntryPoint = "madvise")]
    internal static partial int MemoryAdvise(nint address, nuint bytes, int advice);
}

/// <summary>A pn_context: the worker threads and the scratch memory of one backend.</summary>
internal sealed class ContextHandle() : SafeHandleZeroOrMinusOneIsInvalid(ownsHandle: true)
{
    protected override bool ReleaseHandle()
    {
        NativeKernels.ContextDestroy(handle);
        return true;
    }
}
