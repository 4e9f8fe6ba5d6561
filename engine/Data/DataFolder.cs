namespace PerturbNas.Data;

/// <summary>Finds the folder of the data files.</summary>
public static class DataFolder
{
    /// <summary>The environment variable that names the default data folder.</summary>
    public const string Variable = "PERTURBNAS_DATA";

    /// <summary>The folder below the current one that data sets are fetched to when no other is known.</summary>
    public const string BelowHere = "data";

    /// <summary>
    /// The folder that is meant when none is given: the environment variable PERTURBNAS_DATA, else ../shared/data beside the
    /// repository that the program runs from, if it exists, else ./data (where fetching puts it), if it exists; else null.
    /// </summary>
    public static string? Default()
    {
        var fromEnvironment = Environment.GetEnvironmentVariable(Variable);
        if (!string.IsNullOrEmpty(fromEnvironment))
            return fromEnvironment;
        return DefaultFrom(AppContext.BaseDirectory, Environment.CurrentDirectory);
    }

    internal static string? DefaultFrom(string programFolder, string currentFolder)
    {
        for (var folder = new DirectoryInfo(programFolder); folder is not null; folder = folder.Parent)
            if (File.Exists(Path.Combine(folder.FullName, "global.json")))
            {
                var beside = Path.GetFullPath(Path.Combine(folder.FullName, "..", "shared", "data"));
                if (Directory.Exists(beside))
                    return beside;
                break;
            }
        var below = Path.Combine(currentFolder, BelowHere);
        return Directory.Exists(below) ? below : null;
    }

    /// <summary>The folder that holds a data set's files: the given folder or one of the usual folders below it.</summary>
    /// <param name="layout">The data set.</param>
    /// <param name="dataFolder">The folder of the files or a parent of it; null: <see cref="Default"/>.</param>
    /// <exception cref="UserException">No such folder.</exception>
    public static string Find(CifarLayout layout, string? dataFolder)
    {
        var root = dataFolder ?? Default();
        var fetch = $"run 'perturbnas data fetch {layout.Name}'";
        if (root is null)
            throw new UserException($"No data folder for {layout.Name}; give --data-dir, set {Variable}, or {fetch}.");
        if (!Directory.Exists(root))
            throw new UserException($"The data folder '{root}' does not exist; give another with --data-dir or {Variable}, or {fetch}.");
        foreach (var below in layout.Folders)
        {
            var folder = Path.Combine(root, below);
            if (layout.Files.Any(file => File.Exists(Path.Combine(folder, file.Name))))
                return folder;
        }
        throw new UserException(
            $"The data folder '{root}' has no {layout.Name} files such as {layout.Files[0].Name}, itself or in "
            + $"{layout.Folders[1]}; give another with --data-dir or {Variable}, or {fetch}.");
    }
}
