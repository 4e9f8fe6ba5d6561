using System.Reflection;
using System.Text;

namespace PerturbNas.Backends.Cuda;

/// <summary>
/// The kernels of kernels/cuda as PTX, embedded at build time as "cuda/OPERATOR.sm_70.ptx" and "cuda/OPERATOR.sm_80.ptx". A driver gets them one by
/// one, when they are needed: it compiles a module as a whole, and a network uses a fraction of the kernels.
/// </summary>
internal sealed class PtxModules
{
    private const string Folder = "cuda/", Extension = ".ptx";

    // What the binding itself asks for: CUDA 11.4 (instantiation of graphs).
    private const int LeastDriverVersion = 11040;

    private static readonly int[] Targets = [80, 70];

    private readonly Dictionary<string, Resource> _resourceOf = [];

    private PtxModules(int target) => Target = target;

    /// <summary>Whether this build has kernels.</summary>
    public static bool Exist => Resources().Any();

    /// <summary>The least compute capability that there are kernels for: 70 for 7.0.</summary>
    public static int LeastComputeCapability => Targets[^1];

    public static IReadOnlyList<string> TargetNames { get; } = [.. Targets.Order().Select(target => $"sm_{target}")];

    /// <summary>The compute capability that these were compiled for: 80 for sm_80.</summary>
    public int Target { get; }

    /// <summary>The least CUDA version that a driver must support: 11080 for 11.8.</summary>
    public int DriverVersion { get; private set; } = LeastDriverVersion;

    /// <summary>The kernels for a device.</summary>
    public static PtxModules For(int computeCapability)
    {
        var modules = new PtxModules(Targets.First(target => target <= computeCapability));
        foreach (var resource in Resources().Where(name => name.EndsWith($".sm_{modules.Target}{Extension}", StringComparison.Ordinal)))
            modules.Add(resource);
        return modules;
    }

    /// <summary>
    /// The module that has just this kernel, on the lines where the resource has it (its other kernels' lines are empty); null: there is no such
    /// kernel.
    /// </summary>
    public byte[]? ModuleOf(string kernel)
    {
        if (!_resourceOf.TryGetValue(kernel, out var resource))
            return null;
        var text = resource.Text.AsSpan();
        using var module = new MemoryStream();
        var at = 0;
        foreach (var (other, lines) in resource.Kernels)
        {
            if (other == kernel)
                continue;
            module.Write(text[at..lines.Start.Value]);
            for (var left = text[lines].Count((byte)'\n'); left > 0; left--)
                module.WriteByte((byte)'\n');
            at = lines.End.Value;
        }
        module.Write(text[at..]);
        return module.ToArray();
    }

    public static byte[] Read(string resource)
    {
        using var stream = Assembly.GetExecutingAssembly().GetManifestResourceStream(resource)!;
        var text = new byte[stream.Length];
        stream.ReadExactly(text);
        return text;
    }

    private static IEnumerable<string> Resources() => Assembly.GetExecutingAssembly().GetManifestResourceNames()
        .Where(name => name.StartsWith(Folder, StringComparison.Ordinal) && name.EndsWith(Extension, StringComparison.Ordinal));

    private void Add(string name)
    {
        const string version = ".version ", entry = ".entry ";
        var resource = new Resource(Read(name), []);
        var (kernel, first, at) = ((string?)null, 0, 0);
        foreach (var line in Encoding.ASCII.GetString(resource.Text).Split('\n'))
        {
            if (line.IndexOf(entry, StringComparison.Ordinal) is >= 0 and var begin)
            {
                (kernel, first) = (line[(begin + entry.Length)..].Split('(')[0].Trim(), at);
            }
            else if (kernel != null && line == "}")
            {
                resource.Kernels.Add((kernel, first..(at + line.Length)));
                _resourceOf.TryAdd(kernel, resource);
                kernel = null;
            }
            else if (kernel == null && line.StartsWith(version, StringComparison.Ordinal))
            {
                // Since CUDA 11.0 brought PTX 7.0, the two count alike.
                var parts = line[version.Length..].Split('.');
                DriverVersion = Math.Max(DriverVersion, 1000 * (int.Parse(parts[0]) + 4) + 10 * int.Parse(parts[1]));
            }
            at += line.Length + 1;
        }
    }

    /// <summary>An embedded module: its text, and the part of it that belongs to each kernel.</summary>
    private sealed record Resource(byte[] Text, List<(string Kernel, Range Lines)> Kernels);
}
