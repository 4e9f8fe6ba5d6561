using PerturbNas.Backends;
using PerturbNas.Backends.Planning;
using PerturbNas.Data;
using PerturbNas.Networks;
using PerturbNas.Selection;
using PerturbNas.Spaces;
using PerturbNas.Tensors;
using PerturbNas.Training;

namespace PerturbNas.Benchmarks;

/// <summary>Extents of a workload.</summary>
internal sealed record WorkloadSize(string Space, int Channels, int Layers, int Batch)
{
    public static WorkloadSize Of(BenchmarkOptions options) => new(options.Space, options.Channels, options.Layers, options.Batch);
}

/// <summary>A supernet as it is initialised, with batches of random 32x32 images of ten classes.</summary>
internal sealed class Workload : IDisposable
{
    private const int Seed = 0, Side = 32, Classes = 10;

    private readonly Backend _backend;
    private readonly Arena _arena;
    private readonly ImageSet _images;
    private readonly int _batch;

    public Workload(WorkloadSize size, Backend backend, int batches = 1)
    {
        (_backend, _batch) = (backend, size.Batch);
        Network = new Supernet(backend, SearchSpace.Load(size.Space), new SupernetSize(size.Channels, size.Layers, Classes, Side), Seed);
        _arena = new Arena(backend);
        var stream = new RandomStream(Seed, "benchmark images");
        var labels = new int[batches * size.Batch];
        for (var i = 0; i < labels.Length; i++)
            labels[i] = stream.NextInt(Classes);
        var pixels = new byte[labels.Length * 3 * Side * Side];
        for (var i = 0; i < pixels.Length; i++)
            pixels[i] = (byte)stream.NextUInt32();
        _images = new ImageSet
        {
            Name = "random",
            Classes = Classes,
            Height = Side,
            Width = Side,
            FirstRecord = 0,
            Pixels = pixels,
            Labels = labels,
            Mean = [0.5f, 0.5f, 0.5f],
            Std = [0.25f, 0.25f, 0.25f],
        };
    }

    /// <summary>What some work asks of its kernels, learnt by running it on a backend that only counts.</summary>
    public static Cost Count(WorkloadSize size, Action<Workload> work)
    {
        using var backend = new MeteredBackend();
        using var workload = new Workload(size, backend);
        work(workload);
        return backend.Total;
    }

    public Supernet Network { get; }

    /// <summary>Bytes of activations, gradients and scratch that the largest pass so far was planned with.</summary>
    public long ArenaBytes => _arena.Capacity;

    /// <summary>A trainer whose alpha and weight steps take the workload's batches without augmentation, as the peer does.</summary>
    public SupernetTrainer NewTrainer()
    {
        var loader = new BatchLoader(_images, _batch, Seed, "benchmark", augment: false);
        return new SupernetTrainer(Network, _backend, _arena, loader, loader, updatesAlpha: true, new EdgeStates(), noisePurpose: 0);
    }

    public MaskedEvaluation NewEvaluation(int batches) => new(Network, _arena, _images, _batch, batches);

    /// <summary>Loss of the first batch with batch statistics.</summary>
    public double FirstLoss() => NewEvaluation(1).Evaluate(new EdgeStates(), [Mask.None])[0].Loss;

    /// <summary>A supernet's weights and alphas for a peer: reference names, OIHW order.</summary>
    public static SafeTensorsFile WeightsOf(Supernet network)
    {
        var file = new SafeTensorsFile();
        foreach (var weight in network.Parameters.Weights)
            file.Add(weight.Name, [.. weight.FileShape.Select(extent => (long)extent)], network.Parameters.GetValues(weight));
        foreach (var type in Enum.GetValues<CellType>())
            file.Add(ArchitectureParameters.NameOf(type), [CellTopology.Edges, network.Alphas.Columns(type)],
                [.. network.Alphas.Get(type).Select(value => (float)value)]);
        return file;
    }

    /// <summary>Writes weights, alphas and the first batch for the peer.</summary>
    public void Write(string path)
    {
        var file = WeightsOf(Network);
        var images = new float[_batch * _images.ImageSize];
        for (var i = 0; i < images.Length; i++)
            images[i] = (_images.Pixels[i] / 255f - _images.Mean[0]) / _images.Std[0];
        file.Add("images", [_batch, 3, Side, Side], images);
        file.Add("labels", [_batch], [.. _images.Labels.Take(_batch).Select(label => (long)label)]);
        file.Write(path);
    }

    public void Dispose()
    {
        Network.Dispose();
        _arena.Dispose();
    }
}
