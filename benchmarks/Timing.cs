using System.Diagnostics;

namespace PerturbNas.Benchmarks;

/// <summary>Repeats of one measurement.</summary>
/// <param name="Values">In the order measured: seconds, or ratios of seconds.</param>
internal sealed record Repeats(IReadOnlyList<double> Values)
{
    public double Median { get; } = MedianOf(Values);

    public double Minimum => Values.Min();

    public double Maximum => Values.Max();

    /// <summary>(maximum - minimum) / median.</summary>
    public double Spread => (Maximum - Minimum) / Median;

    /// <summary>Each value divided by a unit of work.</summary>
    public Repeats Per(double units) => new([.. Values.Select(value => value / units)]);

    private static double MedianOf(IReadOnlyList<double> values)
    {
        double[] ordered = [.. values.Order()];
        return (ordered[(ordered.Length - 1) / 2] + ordered[ordered.Length / 2]) / 2;
    }
}

/// <summary>How measurements are taken.</summary>
internal static class Timing
{
    /// <summary>Seconds that an action takes.</summary>
    public static double Seconds(Action action)
    {
        var start = Stopwatch.GetTimestamp();
        action();
        return Stopwatch.GetElapsedTime(start).TotalSeconds;
    }

    /// <summary>Runs an action once to warm up, then times it.</summary>
    public static Repeats Measure(int repeats, Action action)
    {
        action();
        return new([.. Enumerable.Range(0, repeats).Select(_ => Seconds(action))]);
    }

    /// <summary>How often to run an action, which is warmed up by it, to last as long as the clock needs: 10 ms.</summary>
    public static int CallsThatLast(Action action)
    {
        const double least = 0.01;
        action();
        return (int)Math.Clamp(Math.Ceiling(least / Seconds(action)), 1, 10_000);
    }

    /// <summary>Runs an action some times.</summary>
    public static void Repeat(int calls, Action action)
    {
        for (var i = 0; i < calls; i++)
            action();
    }

    /// <summary>
    /// The exponent b and the coefficient of determination of y = a x^b, by least squares on the logarithms. One point, or points of one
    /// x, have no exponent: not-a-number.
    /// </summary>
    public static (double Exponent, double R2) FitPower(IReadOnlyList<(double X, double Y)> points)
    {
        var (meanX, meanY) = (points.Average(p => Math.Log(p.X)), points.Average(p => Math.Log(p.Y)));
        double xx = 0, xy = 0, yy = 0;
        foreach (var (x, y) in points)
        {
            var (dx, dy) = (Math.Log(x) - meanX, Math.Log(y) - meanY);
            (xx, xy, yy) = (xx + dx * dx, xy + dx * dy, yy + dy * dy);
        }
        return (xy / xx, xy * xy / (xx * yy));
    }
}
