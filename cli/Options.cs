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

    /// <summary>Long names of the options that stand on the command line; the others have their defaults.</summary>
    public IReadOnlySet<string> Given { get; set; } = new HashSet<string>();

    /// <summary>Checks what the types of the options leave open.</summary>
    /// <exception cref="UserException">An option's value cannot be used; the message names option, value and remedy.</exception>
    public virtual void Validate()
    {
    }

    /// <summary>
    /// What is resumed keeps the settings that it was started with: options that are given must agree with them, the others do not count.
    /// </summary>
    /// <param name="what">What is resumed, for the message.</param>
    /// <param name="settings">Options by long name with the value given, or by default, and the one kept; null: none.</param>
    /// <exception cref="UserException">An option that is given differs.</exception>
    protected void RequireAgreement(string what, params IEnumerable<(string Option, object? Value, object? Kept)> settings)
    {
        var differing = settings.Where(setting => Given.Contains(setting.Option) && !Equals(setting.Value, setting.Kept))
            .Select(setting => $"--{setting.Option} is {Text(setting.Value)} but was {Text(setting.Kept)}").ToList();
        if (differing.Count > 0)
            throw new UserException($"{string.Join(" and ", differing)} when {what} was started; leave {(differing.Count == 1 ? "it" : "them")} " +
                "out to resume, or start anew.");

        static string Text(object? value) => value switch
        {
            null => "not given",
            bool flag => flag ? "on" : "off",
            _ => $"{value}",
        };
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
}
