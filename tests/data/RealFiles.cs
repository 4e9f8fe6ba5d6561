using PerturbNas.Data;
using Xunit;

namespace PerturbNas.Tests.Data;

/// <summary>A test on real data files; skipped, visibly, where they are absent.</summary>
public sealed class RealFilesFactAttribute : FactAttribute
{
    /// <param name="dataSet">"cifar10" or "cifar100".</param>
    public RealFilesFactAttribute(string dataSet)
    {
        try
        {
            DataFolder.Find(CifarLayout.Of(dataSet), null);
        }
        catch (UserException e)
        {
            Skip = e.Message;
        }
    }
}
