using PerturbNas.Backends;
using PerturbNas.Backends.Planning;

namespace PerturbNas.Reports;

/// <summary>All calls of one kernel in a piece of work.</summary>
public readonly record struct KernelWork(double Calls, Cost Cost);

/// <summary>The kernel calls that a piece of work is made of, and the least that they have to do.</summary>
public sealed class Workload
{
    private readonly SortedDictionary<string, KernelWork> _kernels = new(StringComparer.Ordinal);

    public IReadOnlyDictionary<string, KernelWork> Kernels => _kernels;

    public Cost Total => _kernels.Values.Aggregate(default(Cost), (sum, work) => sum + work.Cost);

    public static Workload operator +(Workload a, Workload b)
    {
        var sum = new Workload();
        sum.Add(a, 1);
        sum.Add(b, 1);
        return sum;
    }

    /// <summary>The work done several times over; parts of a time are for averages.</summary>
    public static Workload operator *(double times, Workload work)
    {
        var product = new Workload();
        product.Add(work, times);
        return product;
    }

    /// <summary>Seconds that a machine needs at least if every kernel reaches its limit.</summary>
    public double SecondsAtLeast(MachineLimits limits) => _kernels.Values.Sum(work => work.Cost.SecondsAtLeast(limits));

    internal void Add(KernelCall call) => Add(call.Kernel, new KernelWork(1, call.Cost));

    private void Add(Workload other, double times)
    {
        foreach (var (kernel, work) in other._kernels)
            Add(kernel, new KernelWork(times * work.Calls, new Cost((long)(times * work.Cost.Flops),
                (long)(times * work.Cost.Bytes), (long)(times * work.Cost.ProductFlops))));
    }

    private void Add(string kernel, KernelWork work)
    {
        var before = _kernels.GetValueOrDefault(kernel);
        _kernels[kernel] = new KernelWork(before.Calls + work.Calls, before.Cost + work.Cost);
    }
}
