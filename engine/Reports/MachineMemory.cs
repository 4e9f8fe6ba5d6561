using System.Globalization;

namespace PerturbNas.Reports;

/// <summary>Memory that a process can still get: what the machine has available, or less where a control group (container) limits it.</summary>
public static class MachineMemory
{
    /// <summary>Bytes available to this process on top of what it has already; null: the system does not say.</summary>
    /// <param name="root">Where /proc and /sys are looked for.</param>
    public static long? Available(string root = "/")
    {
        var available = Kibibytes(Path.Combine(root, "proc/meminfo"), "MemAvailable");
        // In a container the process's own group is often mounted as the root, so that its path leads nowhere: then the root counts.
        var groups = Path.Combine(root, "sys/fs/cgroup");
        var own = Read(Path.Combine(root, "proc/self/cgroup"))?.Split('\n').FirstOrDefault(line => line.StartsWith("0::", StringComparison.Ordinal));
        var path = own is null ? "" : own[3..].Trim('/');
        while (true)
        {
            available = Smaller(available, LeftIn(Path.Combine(groups, path)));
            if (path.Length == 0)
                break;
            path = Path.GetDirectoryName(path) ?? "";
        }
        // Version 1 of control groups has a tree of its own for memory.
        return Smaller(available, Left(Path.Combine(groups, "memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"));
    }

    private static long? LeftIn(string group) => Left(group, "memory.max", "memory.current", "inactive_file");

    // The file cache counts as used but is given up on demand.
    private static long? Left(string group, string limitFile, string usageFile, string cacheName)
    {
        if (Number(Read(Path.Combine(group, limitFile))) is not { } limit || Number(Read(Path.Combine(group, usageFile))) is not { } usage)
            return null;
        var cache = Read(Path.Combine(group, "memory.stat"))?.Split('\n').FirstOrDefault(line => line.StartsWith(cacheName + " ", StringComparison.Ordinal));
        return Math.Max(0, limit - Math.Max(0, usage - (Number(cache?[(cacheName.Length + 1)..]) ?? 0)));
    }

    private static long? Smaller(long? a, long? b) => a is null || b < a ? b : a;

    private static long? Kibibytes(string file, string name)
    {
        var line = Read(file)?.Split('\n').FirstOrDefault(line => line.StartsWith(name + ":", StringComparison.Ordinal));
        return Number(line?[(name.Length + 1)..].Replace("kB", "", StringComparison.Ordinal)) * 1024;
    }

    private static long? Number(string? text) =>
        long.TryParse(text, NumberStyles.Integer, CultureInfo.InvariantCulture, out var number) ? number : null;

    private static string? Read(string file)
    {
        try
        {
            return File.ReadAllText(file);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }
}
