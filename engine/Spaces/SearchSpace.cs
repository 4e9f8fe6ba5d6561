using System.Text.Json;
using PerturbNas.Networks;

namespace PerturbNas.Spaces;

/// <summary>
/// A search space as data: the candidate operations of every edge of both cell types, in alpha column order. All edges of a cell type
/// have the same number of candidates. The built-in spaces are those of the paper (DARTS-PT, section 5; S1..S4 of RobustDARTS).
/// </summary>
public sealed class SearchSpace
{
    private static readonly string[] _s5 =
        ["max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"];

    private SearchSpace(string name, IReadOnlyList<IReadOnlyList<string>> normal, IReadOnlyList<IReadOnlyList<string>> reduction) =>
        (Name, Normal, Reduction) = (name, normal, reduction);

    /// <summary>The names of the built-in spaces.</summary>
    public static IReadOnlyList<string> BuiltIn { get; } = ["s1", "s2", "s3", "s4", "s5", "darts"];

    public string Name { get; }

    /// <summary>Candidate operations of the 14 normal edges.</summary>
    public IReadOnlyList<IReadOnlyList<string>> Normal { get; }

    /// <summary>Candidate operations of the 14 reduction edges.</summary>
    public IReadOnlyList<IReadOnlyList<string>> Reduction { get; }

    public IReadOnlyList<IReadOnlyList<string>> Operations(CellType type) => type == CellType.Normal ? Normal : Reduction;

    /// <summary>Candidates per edge: the columns of the alpha table.</summary>
    public int Columns(CellType type) => Operations(type)[0].Count;

    /// <summary>A built-in space by name, or one from a JSON file.</summary>
    /// <exception cref="UserException">Unknown name, or a file that does not describe a space.</exception>
    public static SearchSpace Load(string nameOrFile) => nameOrFile switch
    {
        "s1" => S1(),
        "s2" => Uniform("s2", "skip_connect", "sep_conv_3x3"),
        "s3" => Uniform("s3", "none", "skip_connect", "sep_conv_3x3"),
        "s4" => Uniform("s4", "noise", "sep_conv_3x3"),
        "s5" => Uniform("s5", _s5),
        "darts" => Uniform("darts", ["none", .. _s5]),
        _ when File.Exists(nameOrFile) => Parse(File.ReadAllText(nameOrFile), nameOrFile),
        _ => throw new UserException($"'{nameOrFile}' is neither a space ({string.Join(", ", BuiltIn)}) nor a file; give one of these names " +
            "or the path of a space file."),
    };

    /// <summary>Reads the JSON form, see <see cref="ToJson"/>; "operations" instead of the tables gives every edge the same candidates.</summary>
    public static SearchSpace Parse(string json, string source)
    {
        try
        {
            using var document = JsonDocument.Parse(json);
            var root = document.RootElement;
            if (root.ValueKind != JsonValueKind.Object)
                throw Bad("must be a JSON object");
            var name = "custom";
            if (root.TryGetProperty("name", out var given))
                name = given.ValueKind == JsonValueKind.String ? given.GetString()! : throw Bad("'name' is not a text; put it in quotes");
            if (root.TryGetProperty("operations", out var operations))
            {
                var candidates = Names(operations, "operations");
                return Uniform(name, [.. candidates]);
            }
            return new SearchSpace(name, Table("normal"), Table("reduction"));

            IReadOnlyList<IReadOnlyList<string>> Table(string property)
            {
                if (!root.TryGetProperty(property, out var table) || table.ValueKind != JsonValueKind.Array)
                    throw Bad($"needs either 'operations' or both 'normal' and 'reduction'; '{property}' is missing or not a list");
                if (table.GetArrayLength() != CellTopology.Edges)
                    throw Bad($"'{property}' has {table.GetArrayLength()} edges, not {CellTopology.Edges}");
                var rows = table.EnumerateArray().Select((row, edge) => Names(row, $"{property}[{edge}]")).ToList();
                var odd = rows.FindIndex(row => row.Count != rows[0].Count);
                return odd < 0 ? rows : throw Bad($"'{property}' has {rows[0].Count} candidates at edge 0 but {rows[odd].Count} at edge {odd}; " +
                    "all edges need the same number");
            }

            IReadOnlyList<string> Names(JsonElement list, string where)
            {
                if (list.ValueKind != JsonValueKind.Array || list.GetArrayLength() == 0)
                    throw Bad($"'{where}' must be a list of at least one operation");
                var names = new List<string>();
                foreach (var item in list.EnumerateArray())
                {
                    var operation = item.ValueKind == JsonValueKind.String ? item.GetString()! : item.GetRawText();
                    if (!CandidateOperation.Names.Contains(operation))
                        throw Bad($"unknown operation '{operation}' in '{where}'; known are {string.Join(", ", CandidateOperation.Names)}");
                    if (names.Contains(operation))
                        throw Bad($"'{where}' names '{operation}' twice");
                    names.Add(operation);
                }
                return names;
            }
        }
        catch (JsonException e)
        {
            throw Bad($"it is not valid JSON in line {e.LineNumber + 1}, byte {e.BytePositionInLine + 1}; correct it", e);
        }

        UserException Bad(string what, Exception? cause = null) => new($"Space file '{source}': {what}.", cause);
    }

    /// <summary>The space as JSON, as it is kept in a run's configuration.</summary>
    public string ToJson() => JsonSerializer.Serialize(new { name = Name, normal = Normal, reduction = Reduction });

    /// <summary>The genotype of edge states in which every node has two edges left, each with one operation.</summary>
    public Genotype ToGenotype(EdgeStates states)
    {
        return new Genotype(Cell(CellType.Normal), Cell(CellType.Reduction));

        List<GenotypeEdge> Cell(CellType type) =>
            [.. Enumerable.Range(0, CellTopology.Edges).Where(edge => states[type, edge] >= 0)
                .Select(edge => new GenotypeEdge(Operations(type)[edge][states[type, edge]], CellTopology.SourceOf(edge)))];
    }

    private static SearchSpace Uniform(string name, params string[] operations)
    {
        var table = Enumerable.Repeat<IReadOnlyList<string>>(operations, CellTopology.Edges).ToList();
        return new SearchSpace(name, table, table);
    }

    private static SearchSpace S1()
    {
        const string normal = "skip/dil3 skip/dil5 skip/dil5 skip/sep3 skip/dil3 max/skip skip/sep3 skip/sep3 skip/dil3 skip/sep3 max/skip " +
            "skip/dil3 dil3/dil5 dil3/dil5";
        const string reduction = "max/avg max/dil3 max/avg max/avg skip/dil5 max/avg max/sep3 skip/dil3 skip/dil5 max/avg max/avg skip/dil5 " +
            "skip/dil5 skip/dil5";
        return new SearchSpace("s1", Expand(normal), Expand(reduction));

        static IReadOnlyList<IReadOnlyList<string>> Expand(string pairs) =>
            [.. pairs.Split(' ').Select(pair => (IReadOnlyList<string>)[.. pair.Split('/').Select(Full)])];

        static string Full(string shortName) => shortName switch
        {
            "skip" => "skip_connect",
            "max" => "max_pool_3x3",
            "avg" => "avg_pool_3x3",
            "sep3" => "sep_conv_3x3",
            "dil3" => "dil_conv_3x3",
            _ => "dil_conv_5x5",
        };
    }
}
