using PerturbNas.Backends;

namespace PerturbNas.Benchmarks;

/// <summary>
/// The benchmarks: dotnet run -c Release --project benchmarks -- SUITE. Time on a quiet machine only, and compare only what one run
/// has measured: machines that are shared drift.
/// </summary>
internal static class Program
{
    private const int Done = 0, InternalError = 1, UserError = 2;

    private static int Main(string[] arguments)
    {
        try
        {
            if (BenchmarkOptions.Read(arguments) is not { } options)
                return Done;
            using var report = new Report(options);
            switch (options.Suite)
            {
                case "kernels":
                    KernelSuite.Run(options, report);
                    break;
                case "search-step":
                    SearchStepSuite.Run(options, report);
                    break;
                case "scoring":
                    ScoringSuite.Run(options, report);
                    break;
                case "selection":
                    SelectionSuite.Run(options, report);
                    break;
                case "scaling":
                    ScalingSuite.Run(options, report);
                    break;
                case "busy":
                    BusySuite.Run(options, report);
                    break;
                case "targets":
                    TargetsSuite.Run(options, report);
                    break;
                case "racing":
                    RacingSuite.Run(options, report);
                    break;
            }
            return Done;
        }
        catch (UserException e)
        {
            Console.Error.WriteLine($"benchmarks: {e.Message}");
            return UserError;
        }
        catch (KernelException e) when (e.Status == KernelStatus.OutOfMemory)
        {
            Console.Error.WriteLine($"benchmarks: Out of memory, {e.Message}; give a smaller --batch, --channels or --layers.");
            return UserError;
        }
        catch (Exception e)
        {
            Console.Error.WriteLine($"benchmarks: internal error: {e}");
            return InternalError;
        }
    }
}
