using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

/// <summary>Where data files are looked for when no folder is given.</summary>
public sealed class DataFolderTests : IDisposable
{
    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void TheFolderBesideTheRepositoryComesBeforeTheOneBelowHere()
    {
        Directory.CreateDirectory(_folder["here/data"]);
        Directory.CreateDirectory(_folder["repository/cli/bin"]);
        Assert.Equal(_folder["here/data"], DataFolder.DefaultFrom(_folder["repository/cli/bin"], _folder["here"]));
        File.WriteAllText(_folder["repository/global.json"], "{}");
        Assert.Equal(_folder["here/data"], DataFolder.DefaultFrom(_folder["repository/cli/bin"], _folder["here"]));
        Directory.CreateDirectory(_folder["shared/data"]);
        Assert.Equal(_folder["shared/data"], DataFolder.DefaultFrom(_folder["repository/cli/bin"], _folder["here"]));
    }

    [Fact]
    public void WithoutAnyThereIsNone() => Assert.Null(DataFolder.DefaultFrom(_folder.Path, _folder.Path));
}
