using System.Runtime.InteropServices;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Benchmarks;

/// <summary>
/// C = op(A) op(B) + beta C of column-major float32 matrices: element (i, j) of A lies at A + i + j * LeadingA. op(A) is [M][K], A itself or
/// transposed, op(B) is [K][N], C is [M][N].
/// </summary>
internal readonly record struct Gemm(
    bool TransposeA, bool TransposeB, int M, int N, int K, nint A, int LeadingA, nint B, int LeadingB, float Beta, nint C, int LeadingC);

/// <summary>Multiplies matrices that lie on the device.</summary>
internal interface IGemm : IDisposable
{
    void Multiply(in Gemm gemm);
}

/// <summary>cuBLAS (11.4 or newer): the functions in use, as cublas_api.h declares them.</summary>
internal sealed unsafe partial class CuBlas : IGemm
{
    private const int NotSupported = 15;
    private const int DefaultMath = 0, Tf32Math = 3;

    private readonly CudaLibraryHandle _handle;

    private CuBlas(string soname, CudaBackend backend)
    {
        Check(Create(out var handle), "cublasCreate");
        _handle = new(handle, Destroy);
        Check(SetStream(_handle, backend.Stream), "cublasSetStream");
        // The default never rounds float32 factors to TF32.
        Check(SetMathMode(_handle, backend.Tf32 ? Tf32Math : DefaultMath), "cublasSetMathMode");
        Check(GetVersion(_handle, out var version), "cublasGetVersion");
        Description = $"cuBLAS {version / 10000}.{version / 100 % 100}.{version % 100} ({soname})";
    }

    /// <summary>Opens the library for work in a backend's stream and precision; null: it is not installed.</summary>
    /// <exception cref="CudaLibraryException">It is installed, but cannot be used.</exception>
    public static CuBlas? Open(CudaBackend backend) => CudaLibrary.Load(CudaLibrary.Blas) is { } soname ? new(soname, backend) : null;

    /// <summary>Name, version and file.</summary>
    public string Description { get; }

    public void Multiply(in Gemm gemm)
    {
        float alpha = 1, beta = gemm.Beta;
        Check(Sgemm(_handle, gemm.TransposeA ? 1 : 0, gemm.TransposeB ? 1 : 0, gemm.M, gemm.N, gemm.K, &alpha, gemm.A, gemm.LeadingA,
            gemm.B, gemm.LeadingB, &beta, gemm.C, gemm.LeadingC), "cublasSgemm");
    }

    public void Dispose() => _handle.Dispose();

    private static void Check(int status, string call)
    {
        if (status != 0)
            throw new CudaLibraryException(call, status, Marshal.PtrToStringUTF8(GetStatusString(status)) ?? "", status == NotSupported);
    }

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasGetStatusString")]
    private static partial nint GetStatusString(int status);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasCreate_v2")]
    private static partial int Create(out nint handle);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasDestroy_v2")]
    private static partial int Destroy(nint handle);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasGetVersion_v2")]
    private static partial int GetVersion(CudaLibraryHandle handle, out int version);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasSetStream_v2")]
    private static partial int SetStream(CudaLibraryHandle handle, nint stream);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasSetMathMode")]
    private static partial int SetMathMode(CudaLibraryHandle handle, int mode);

    [LibraryImport(CudaLibrary.Blas, EntryPoint = "cublasSgemm_v2")]
    private static partial int Sgemm(CudaLibraryHandle handle, int transposeA, int transposeB, int m, int n, int k, float* alpha, nint a, int leadingA,
        nint b, int leadingB, float* beta, nint c, int leadingC);
}
