using PerturbNas.Autograd;
using PerturbNas.Backends;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Tests.Engine;

/// <summary>A supernet of a few channels on 8x8 images of noise, with alphas that are not uniform.</summary>
internal sealed class SmallNetwork : IDisposable
{
    public const int ImageSize = 8;
    public const int Classes = 5;

    public SmallNetwork(Backend backend, string space, int channels = 4, int layers = 3, int images = 4)
    {
        Backend = backend;
        var parsed = space.StartsWith('{') ? SearchSpace.Parse(space, "test") : SearchSpace.Load(space);
        Network = new Supernet(backend, parsed, new SupernetSize(channels, layers, Classes, ImageSize), seed: 3);
        Arena = new Arena(backend);
        foreach (var type in Enum.GetValues<CellType>())
            Network.Alphas.Set(type, [.. Network.Alphas.Get(type).Select((_, i) => (double)(float)(0.7 * Math.Sin(i + (int)type)))]);
        Data = NewImages(images, first: 0);
    }

    public Backend Backend { get; }

    public Supernet Network { get; }

    public Arena Arena { get; }

    public ImageSet Data { get; }

    /// <summary>Images of random pixels with random labels.</summary>
    public static ImageSet NewImages(int count, int first)
    {
        var stream = new RandomStream(5, "test images", first);
        var pixels = new byte[count * 3 * ImageSize * ImageSize];
        for (var i = 0; i < pixels.Length; i++)
            pixels[i] = (byte)stream.NextInt(256);
        var labels = new int[count];
        for (var i = 0; i < count; i++)
            labels[i] = stream.NextInt(Classes);
        return new ImageSet
        {
            Name = "noise",
            Classes = Classes,
            Height = ImageSize,
            Width = ImageSize,
            FirstRecord = first,
            Pixels = pixels,
            Labels = labels,
            Mean = [0.5f, 0.5f, 0.5f],
            Std = [0.29f, 0.29f, 0.29f],
        };
    }

    /// <summary>Records a pass over all images.</summary>
    public SupernetPass Record(TapeOptions options, EdgeStates? states = null, params IReadOnlyList<Mask> masks) =>
        Network.Record(Arena, options, Data.Count, states ?? new EdgeStates(), masks);

    /// <summary>Runs a pass forward over all images and, where it has gradients, backward.</summary>
    public (double[] LossSums, long[] Correct) Run(SupernetPass pass)
    {
        var images = new float[Data.Count * Data.ImageSize];
        var labels = new int[Data.Count];
        BatchLoader.InRecordOrder(Data, Data.Count).Fill(0, 0, images, labels);
        pass.Forward(images, labels);
        var (losses, correct) = (new double[pass.Variants], new long[pass.Variants]);
        pass.ReadResults(losses, correct);
        if (pass.Tape.Options.AnyGradients)
            pass.Backward();
        return (losses, correct);
    }

    /// <summary>All weight gradients, in the order of the weights.</summary>
    public double[] WeightGradients() => Read(weight => weight.Gradient);

    /// <summary>Sets every weight gradient to a value.</summary>
    public void FillWeightGradients(float value)
    {
        foreach (var weight in Network.Parameters.Weights)
            Backend.Write(weight.Gradient, [.. Enumerable.Repeat(value, weight.Count)]);
    }

    /// <summary>The alpha gradients of both cell types.</summary>
    public double[] AlphaGradients() => [.. Enum.GetValues<CellType>().SelectMany(Network.Alphas.GetGradients)];

    public void Dispose()
    {
        Network.Dispose();
        Arena.Dispose();
    }

    private double[] Read(Func<Parameter, nint> address) => [.. Network.Parameters.Weights.SelectMany(weight =>
    {
        var values = new double[weight.Count];
        Backend.Read(address(weight), values);
        return values;
    })];
}
