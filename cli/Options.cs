using CommandLine;

namespace PerturbNas.Cli;

/// <summary>
/// What every verb takes. A verb is an options class with a <see cref="VerbAttribute"/>; a static string property "Examples" of it is
/// shown at the end of its help.
/// </summary>
internal abstract class Options
{
    [Option("json", HelpText = "Print the result as one JSON object on stdout, and no progress.")]
    public bool Json { get; set; }

    [Option("quiet", HelpText = "Print the result only: no progress, no notes.")]
    public bool Quiet { get; set; }

    [Option("verbose", HelpText = "Print the full trace of an internal error.")]
    public bool Verbose { get; set; }

    /// <summary>Checks what the types of the options leave open.</summary>
    /// <exception cref="UserException">An option's value cannot be used; the message names option, value and remedy.</exception>
    public virtual void Validate()
    {
    }

    /// <summary>An option whose value must be one of a few words.</summary>
    protected static void RequireChoice(string option, string value, params string[] choices)
    {
        if (!choices.Contains(value))
            throw new UserException($"{option} is '{value}'; choose {string.Join(", ", choices[..^1])} or {choices[^1]}.");
    }

    /// <summary>An option whose value must lie in a range; one that is not given passes.</summary>
    protected static void RequireRange(string option, long? value, long least, long most = int.MaxValue)
    {
        if (value < least || value > most)
            throw new UserException(most == int.MaxValue
                ? $"{option} is {value}; give {least} or more."
                : $"{option} is {value}; give a number from {least} to {most}.");
    }

    /// <summary>Threads of the CPU backend: 0 (one per processor) to 256.</summary>
    protected static void RequireThreads(int threads) => RequireRange("--threads", threads, 0, 256);
}
