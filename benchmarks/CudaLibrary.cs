using System.Runtime.InteropServices;

namespace PerturbNas.Benchmarks;

/// <summary>A call of one of NVIDIA's libraries failed.</summary>
/// <param name="call">The library's function.</param>
/// <param name="status">What it returned.</param>
/// <param name="text">The library's own words for that.</param>
/// <param name="notSupported">The library has nothing for these shapes, which is no fault.</param>
internal sealed class CudaLibraryException(string call, int status, string text, bool notSupported)
    : Exception($"{call} failed with status {status} ({text})")
{
    /// <summary>Whether the library just has nothing for these shapes.</summary>
    public bool NotSupported => notSupported;
}

/// <summary>A handle or descriptor of a library, given back by the library's own function.</summary>
internal sealed class CudaLibraryHandle : SafeHandle
{
    private readonly Func<nint, int> _destroy;

    public CudaLibraryHandle(nint value, Func<nint, int> destroy)
        : base(0, ownsHandle: true)
    {
        _destroy = destroy;
        SetHandle(value);
    }

    public override bool IsInvalid => handle == 0;

    protected override bool ReleaseHandle() => _destroy(handle) == 0;
}

/// <summary>Finds NVIDIA's libraries: the newest version that is installed and known to have the functions in use.</summary>
internal static class CudaLibrary
{
    public const string Blas = "cublas", Dnn = "cudnn";

    private static readonly Dictionary<string, string[]> _sonames = new()
    {
        [Blas] = ["libcublas.so.13", "libcublas.so.12", "libcublas.so.11"],
        [Dnn] = ["libcudnn.so.9", "libcudnn.so.8"],
    };

    private static readonly Dictionary<string, (string Soname, nint Library)> _loaded = [];

    static CudaLibrary() => NativeLibrary.SetDllImportResolver(typeof(CudaLibrary).Assembly,
        (name, _, _) => _loaded.TryGetValue(name, out var found) ? found.Library : 0);

    /// <summary>The file that a library was loaded from; null: none of them can be loaded here.</summary>
    public static string? Load(string name)
    {
        if (_loaded.TryGetValue(name, out var found))
            return found.Soname;
        foreach (var soname in _sonames[name])
        {
            if (!NativeLibrary.TryLoad(soname, out var library))
                continue;
            _loaded.Add(name, (soname, library));
            return soname;
        }
        return null;
    }

    /// <summary>"none of libcudnn.so.9, libcudnn.so.8 can be loaded".</summary>
    public static string WhyMissing(string name) => $"none of {string.Join(", ", _sonames[name])} can be loaded";
}
