using System.ComponentModel;
using System.Diagnostics;

namespace PerturbNas.Tests.Cuda;

/// <summary>Compiles a kernel from changed sources, as CMakeLists.txt compiles the ones that ship.</summary>
internal static class PlantedKernels
{
    private static readonly string[] Compilers = ["clang-19", "clang-18", "clang-17", "clang-16", "clang"];

    /// <summary>The PTX of kernels/cuda/OPERATOR.cu after edits, each of a text that must occur exactly once in its file.</summary>
    public static byte[] Compile(string @operator, params IReadOnlyList<Edit> edits)
    {
        var folder = Directory.CreateTempSubdirectory("planted-");
        try
        {
            const string contract = "perturbnas_kernels.h";
            File.Copy(Path.Combine(KernelFolder, contract), Path.Combine(folder.FullName, contract));
            var cuda = folder.CreateSubdirectory("cuda");
            foreach (var file in Directory.GetFiles(Path.Combine(KernelFolder, "cuda")))
            {
                var text = File.ReadAllText(file);
                foreach (var edit in edits.Where(edit => edit.File == Path.GetFileName(file)))
                {
                    Assert.True(text.Split(edit.Before).Length == 2, $"{edit.File} does not have exactly one '{edit.Before}'");
                    text = text.Replace(edit.Before, edit.After, StringComparison.Ordinal);
                }
                File.WriteAllText(Path.Combine(cuda.FullName, Path.GetFileName(file)), text);
            }
            var ptx = Path.Combine(folder.FullName, "planted.ptx");
            Compile(folder.FullName, Path.Combine(cuda.FullName, $"{@operator}.cu"), ptx);
            return File.ReadAllBytes(ptx);
        }
        finally
        {
            folder.Delete(recursive: true);
        }
    }

    private static string KernelFolder
    {
        get
        {
            for (var folder = new DirectoryInfo(AppContext.BaseDirectory); folder != null; folder = folder.Parent)
                if (File.Exists(Path.Combine(folder.FullName, "PerturbNas.sln")))
                    return Path.Combine(folder.FullName, "kernels");
            throw new DirectoryNotFoundException($"no folder above {AppContext.BaseDirectory} holds PerturbNas.sln");
        }
    }

    private static void Compile(string include, string source, string ptx)
    {
        foreach (var compiler in Compilers)
        {
            var start = new ProcessStartInfo(compiler,
            [
                "-x", "cuda", "--cuda-device-only", "-nocudainc", "-nocudalib", "-O3", "-S", "--cuda-gpu-arch=sm_80", "--cuda-feature=+ptx78",
                "-std=c++20", "-I", include, source, "-o", ptx,
            ])
            { RedirectStandardError = true };
            try
            {
                using var process = Process.Start(start)!;
                var errors = process.StandardError.ReadToEnd();
                process.WaitForExit();
                Assert.True(process.ExitCode == 0, errors);
                return;
            }
            catch (Win32Exception)
            {
                // There is no such compiler here: the next one.
            }
        }
        Assert.Fail($"none of {string.Join(", ", Compilers)} is there, which compile the kernels that ship");
    }

    /// <summary>A change of one file of kernels/cuda.</summary>
    public sealed record Edit(string File, string Before, string After);
}
