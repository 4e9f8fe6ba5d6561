namespace PerturbNas.Tests.Data;

/// <summary>An empty folder that is deleted at the end of a test.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    private readonly DirectoryInfo _folder = Directory.CreateTempSubdirectory("perturbnas-");

    public string Path => _folder.FullName;

    /// <summary>The path of a file or folder in it.</summary>
    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => _folder.Delete(true);
}
