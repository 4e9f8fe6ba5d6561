using System.Reflection;
using CommandLine;
using CommandLine.Text;

namespace PerturbNas.Cli;

/// <summary>
/// Turns arguments into a verb's options, and what CommandLineParser finds wrong into one sentence that names the option, the value and
/// the remedy.
/// </summary>
/// <param name="verbs">The options classes of the verbs.</param>
internal sealed class CommandLineReader(params Type[] verbs)
{
    private const string Footer = "Exit codes: 0 done, 1 internal error, 2 something to put right (said on stderr), 130 interrupted.";

    /// <summary>The options that the arguments stand for, checked; null if they ask for help, which has been printed.</summary>
    /// <exception cref="UserException">The arguments cannot be understood.</exception>
    public Options? Read(string[] arguments)
    {
        arguments = arguments switch
        {
            ["--version", ..] => ["version", .. arguments[1..]],
            ["help", var name, ..] => [name, "--help"],
            ["help"] => ["--help"],
            _ => [.. arguments.Select(argument => argument is "-h" or "-?" ? "--help" : argument)],
        };
        RequireValues(arguments);
        using var parser = new Parser(settings =>
        {
            settings.HelpWriter = null;
            settings.AutoVersion = false;
            settings.ParsingCulture = System.Globalization.CultureInfo.InvariantCulture;
        });
        var result = parser.ParseArguments(arguments, verbs);
        if (result is Parsed<object> parsed)
        {
            var options = (Options)parsed.Value;
            // RequireValues has made sure that no value begins with two dashes.
            options.Given = arguments.Where(argument => argument.StartsWith("--", StringComparison.Ordinal))
                .Select(argument => argument[2..].Split('=')[0]).ToHashSet();
            options.Validate();
            return options;
        }
        var errors = ((NotParsed<object>)result).Errors.ToList();
        if (errors.Any(error => error is HelpRequestedError or HelpVerbRequestedError))
        {
            Console.Write(Help(result));
            return null;
        }
        throw new UserException(Sentence(errors[0], arguments));
    }

    // CommandLineParser passes over an option at the end that lacks its value, and over arguments that no option takes. It finds
    // everything else, so the walk ends at the first option that it does not know.
    private void RequireValues(string[] arguments)
    {
        var verb = verbs.FirstOrDefault(type => NameOf(type) == arguments.FirstOrDefault());
        if (verb is null)
            return;
        var takesValue = verb.GetProperties()
            .Where(property => property.GetCustomAttribute<OptionAttribute>() is not null)
            .ToDictionary(p => $"--{p.GetCustomAttribute<OptionAttribute>()!.LongName}", p => p.PropertyType != typeof(bool));
        var free = verb.GetProperties().Count(property => ValueName(property) is not null);
        for (var i = 1; i < arguments.Length; i++)
        {
            if (!arguments[i].StartsWith('-') && --free < 0)
                throw new UserException($"'{NameOf(verb)}' has no use for '{arguments[i]}'; {SeeHelp(verb)}.");
            if (!arguments[i].StartsWith('-'))
                continue;
            if (!takesValue.TryGetValue(arguments[i].Split('=')[0], out var value))
                return;
            if (value && !arguments[i].Contains('=', StringComparison.Ordinal)
                && (++i == arguments.Length || arguments[i].StartsWith("--", StringComparison.Ordinal)))
                throw new UserException($"{arguments[i - 1]} needs a value after it; {SeeHelp(verb)}.");
        }
    }

    private string Help(ParserResult<object> result)
    {
        var verb = verbs.FirstOrDefault(type => type == result.TypeInfo.Current);
        var help = HelpText.AutoBuild(
            result,
            text =>
            {
                text.Heading = verb is null
                    ? "PerturbNas: perturbation-based architecture selection in differentiable neural architecture search."
                    : $"perturbnas {NameOf(verb)}: {verb.GetCustomAttribute<VerbAttribute>()!.HelpText}";
                text.Copyright = "";
                text.AutoVersion = false;
                text.AutoHelp = verb is not null;
                text.AdditionalNewLineAfterOption = false;
                text.MaximumDisplayWidth = Console.IsOutputRedirected ? 120 : Math.Clamp(Console.WindowWidth, 60, 120);
                text.AddDashesToOption = true;
                return text;
            },
            error => error,
            verbsIndex: verb is null).ToString();
        var examples = verb?.GetProperty("Examples", BindingFlags.Public | BindingFlags.Static)?.GetValue(null) as string
            ?? "perturbnas VERB --help explains a verb.";
        var indented = string.Join('\n', examples.Split('\n').Select(line => "  " + line));
        return $"{help.Trim()}\n\n{(verb is null ? "" : "Examples:\n")}{indented}\n\n{Footer}\n";
    }

    private string Sentence(Error error, string[] arguments)
    {
        var verb = verbs.FirstOrDefault(type => NameOf(type) == arguments.FirstOrDefault());
        var help = SeeHelp(verb);
        return error switch
        {
            NoVerbSelectedError => $"No verb is given; {help}.",
            BadVerbSelectedError e => $"There is no verb '{e.Token}'; choose {string.Join(", ", verbs.Select(NameOf))}; {help}.",
            UnknownOptionError e => $"'{NameOf(verb)}' has no option '{Dashed(e.Token)}'; {help}.",
            MissingRequiredOptionError { NameInfo.LongName: "" } =>
                $"'{NameOf(verb)}' needs {string.Join(" and ", verb!.GetProperties().Select(ValueName).OfType<string>())}; {help}.",
            MissingRequiredOptionError e => $"'{NameOf(verb)}' needs {NameOf(e.NameInfo)}; {help}.",
            RepeatedOptionError e => $"{NameOf(e.NameInfo)} is given twice; give it once.",
            BadFormatConversionError e => $"{NameOf(e.NameInfo)} takes {Kind(verb, e.NameInfo)}{ValueOf(e.NameInfo, arguments)}; {help}.",
            BadFormatTokenError e => $"'{e.Token}' cannot be understood; {help}.",
            NamedError e => $"{NameOf(e.NameInfo)} cannot be used like this; {help}.",
            _ => $"The arguments cannot be understood ({error.Tag}); {help}.",
        };
    }

    private static string SeeHelp(Type? verb) =>
        verb is null ? "'perturbnas --help' lists the verbs" : $"'perturbnas {NameOf(verb)} --help' explains its options";

    private static string NameOf(Type? verb) => verb?.GetCustomAttribute<VerbAttribute>()!.Name ?? "perturbnas";

    private static string NameOf(NameInfo name) => name.LongName.Length > 0 ? $"--{name.LongName}" : name.NameText;

    private static string? ValueName(PropertyInfo property) => property.GetCustomAttribute<ValueAttribute>()?.MetaName;

    private static string Dashed(string token) => token.Length == 1 ? $"-{token}" : $"--{token}";

    private static string Kind(Type? verb, NameInfo name)
    {
        var property = verb?.GetProperties().FirstOrDefault(p => p.GetCustomAttribute<OptionAttribute>()?.LongName == name.LongName);
        var type = property is null ? null : Nullable.GetUnderlyingType(property.PropertyType) ?? property.PropertyType;
        if (type == typeof(int))
            return $"a whole number up to {int.MaxValue}";
        return type == typeof(long) ? "a whole number" : type == typeof(double) ? "a number" : "another value";
    }

    // ", not 'x'" for "--option x" or "--option=x".
    private static string ValueOf(NameInfo name, string[] arguments)
    {
        var option = NameOf(name);
        var index = Array.FindIndex(arguments, argument => argument == option || argument.StartsWith(option + "=", StringComparison.Ordinal));
        if (index < 0)
            return "";
        var value = arguments[index] == option ? arguments.ElementAtOrDefault(index + 1) : arguments[index][(option.Length + 1)..];
        return $", not '{value}'";
    }
}
