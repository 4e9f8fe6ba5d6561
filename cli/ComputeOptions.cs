using CommandLine;
using PerturbNas.Backends;

namespace PerturbNas.Cli;

/// <summary>What every verb takes that computes.</summary>
internal abstract class ComputeOptions : Options
{
    [Option("device", Default = Devices.Auto, MetaValue = "NAME",
        HelpText = "auto (cuda if it can be used, else cpu), cpu, cuda, or cuda-emulated (runs and checks the CUDA kernels without a GPU, slowly).")]
    public string Device { get; set; } = Devices.Auto;

    [Option("threads", Default = 0, MetaValue = "N", HelpText = "Worker threads of the CPU; 0: one per processor. Results do not depend on it.")]
    public int Threads { get; set; }

    [Option("tf32", HelpText = "cuda: multiply with the tensor cores, whose factors have 10 bits of mantissa instead of 23 (compute capability 8.0 and later).")]
    public bool Tf32 { get; set; }

    public override void Validate()
    {
        RequireChoice("--device", Device, [.. Devices.Names]);
        RequireRange("--threads", Threads, 0, 256);
        if (Tf32 && Device == "cpu")
            throw new UserException("--tf32 is for CUDA devices; leave it out, or give --device cuda.");
    }

    /// <summary>The backend that the options ask for; where they leave it open, a note says which it is.</summary>
    /// <exception cref="UserException">The device cannot be used.</exception>
    public Backend CreateBackend(Terminal terminal) => Devices.Create(Device, Threads, Tf32, terminal.Note);
}
