using System.Runtime.InteropServices;
using PerturbNas.Backends;
using PerturbNas.Backends.Cuda;

namespace PerturbNas.Cli;

/// <summary>The program: reads the command line, runs a verb, and turns every ending into an exit code and at most one sentence.</summary>
internal static class Program
{
    private const int Done = 0, InternalError = 1, UserError = 2, Interrupted = 130;

    private static int Main(string[] arguments)
    {
        Options? options = null;
        using var cancellation = new CancellationTokenSource();
        using var interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, signal => Stop(signal, cancellation));
        using var terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, signal => Stop(signal, cancellation));
        try
        {
            options = new CommandLineReader(typeof(QuickstartOptions), typeof(SearchOptions), typeof(SelectOptions),
                typeof(ScoreOptions), typeof(PlanOptions), typeof(ProfileOptions), typeof(DataOptions), typeof(DevicesOptions),
                typeof(VersionOptions)).Read(arguments);
            if (options is not null)
                Run(options, cancellation.Token);
            return Done;
        }
        catch (UserException e)
        {
            Console.Error.WriteLine($"perturbnas: {e.Message}");
            return UserError;
        }
        catch (Exception e) when (e is OutOfMemoryException or KernelException { Status: KernelStatus.OutOfMemory })
        {
            Console.Error.WriteLine($"perturbnas: The memory does not suffice ({e.Message.TrimEnd('.')}); use fewer channels or layers, or a smaller batch.");
            return UserError;
        }
        catch (CudaException e)
        {
            Console.Error.WriteLine($"perturbnas: The CUDA device failed: {e.Message.TrimEnd('.')}; what a run had saved is intact, go on from there with " +
                "--resume once the device works again, or with --device cpu.");
            return UserError;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Where the engine knows what to do about it, it says so itself; what is left is mostly a full disk.
            Console.Error.WriteLine($"perturbnas: {e.Message.TrimEnd('.')}; make room or fix the permissions, then try again.");
            return UserError;
        }
        catch (OperationCanceledException) when (cancellation.IsCancellationRequested)
        {
            Console.Error.WriteLine("perturbnas: interrupted.");
            return Interrupted;
        }
        catch (Exception e)
        {
            Console.Error.WriteLine($"perturbnas: internal error: {e.GetType().Name}: {e.Message}");
            Console.Error.WriteLine(options?.Verbose == true ? e.ToString() : $"The full trace is in {SaveTrace(e, arguments)}.");
            return InternalError;
        }
    }

    private static void Run(Options options, CancellationToken cancellation)
    {
        cancellation.ThrowIfCancellationRequested();
        switch (options)
        {
            case QuickstartOptions quickstart:
                QuickstartCommand.Run(quickstart, cancellation);
                break;
            case SearchOptions search:
                SearchCommand.Run(search, cancellation);
                break;
            case SelectOptions select:
                SelectCommand.Run(select, cancellation);
                break;
            case ScoreOptions score:
                ScoreCommand.Run(score, cancellation);
                break;
            case DataOptions data:
                DataCommand.Run(data, cancellation);
                break;
            case PlanOptions plan:
                PlanCommand.Run(plan);
                break;
            case ProfileOptions profile:
                ProfileCommand.Run(profile, cancellation);
                break;
            case DevicesOptions devices:
                DevicesCommand.Run(devices);
                break;
            case VersionOptions version:
                VersionCommand.Run(version);
                break;
        }
    }

    // The first signal asks the work to save and stop; the second has its usual effect and ends the process.
    private static void Stop(PosixSignalContext signal, CancellationTokenSource cancellation)
    {
        if (cancellation.IsCancellationRequested)
            return;
        signal.Cancel = true;
        Console.Error.WriteLine("perturbnas: stopping after this step; once more to stop at once.");
        cancellation.Cancel();
    }

    private static string SaveTrace(Exception e, string[] arguments)
    {
        var path = Path.Combine(Path.GetTempPath(), $"perturbnas-error-{Environment.ProcessId}.txt");
        File.WriteAllText(path, $"perturbnas {string.Join(' ', arguments)}\n{e}\n");
        return path;
    }
}
