using PerturbNas.Backends;
using PerturbNas.Networks;

namespace PerturbNas.Training;

/// <summary>
/// SGD with momentum, weight decay (L2, added to the gradient) and clipping of the gradient's norm, over all weights of a network in one
/// pass. Decay also shrinks weights whose gradient is zero, as in the reference.
/// </summary>
public sealed class Sgd : IDisposable
{
    public const float Momentum = 0.9f;
    public const float WeightDecay = 3e-4f;
    public const float MaximumNorm = 5;

    private readonly Backend _backend;
    private readonly ParameterStore _store;
    private readonly nint _norm;

    public Sgd(Backend backend, ParameterStore store)
    {
        (_backend, _store) = (backend, store);
        MomentumAddress = backend.Allocate(store.WeightCount * backend.ElementSize);
        _norm = backend.Allocate(sizeof(double));
    }

    /// <summary>The momentum buffer, in the layout of the flat weight array.</summary>
    public nint MomentumAddress { get; }

    /// <summary>One step with the gradients of the store; returns their 2-norm before clipping.</summary>
    public double Step(float rate)
    {
        _backend.SgdStep(new SgdArgs
        {
            Parameters = _store.WeightsAddress,
            Gradients = _store.GradientsAddress,
            MomentumBuffer = MomentumAddress,
            Norm = _norm,
            Count = _store.WeightCount,
            Rate = rate,
            Momentum = Momentum,
            WeightDecay = WeightDecay,
            MaxNorm = MaximumNorm,
        });
        Span<double> norm = stackalloc double[1];
        _backend.ReadBytes(_norm, System.Runtime.InteropServices.MemoryMarshal.AsBytes(norm));
        return norm[0];
    }

    public void Dispose()
    {
        _backend.Free(MomentumAddress);
        _backend.Free(_norm);
    }
}

/// <summary>Adam for the alphas: rate 3e-4, betas 0.5 and 0.999, epsilon 1e-8, weight decay 1e-3 added to the gradient.</summary>
public sealed class AlphaAdam : IDisposable
{
    public const float Rate = 3e-4f;

    private readonly Backend _backend;
    private readonly ArchitectureParameters _alphas;

    public AlphaAdam(Backend backend, ArchitectureParameters alphas)
    {
        (_backend, _alphas) = (backend, alphas);
        FirstMoment = backend.Allocate((long)alphas.Count * backend.ElementSize);
        SecondMoment = backend.Allocate((long)alphas.Count * backend.ElementSize);
    }

    /// <summary>Steps taken so far.</summary>
    public long Steps { get; set; }

    public nint FirstMoment { get; }

    public nint SecondMoment { get; }

    /// <summary>One step with the gradients of the alphas.</summary>
    public void Step() => _backend.AdamStep(new AdamArgs
    {
        Parameters = _alphas.Values.Address,
        Gradients = _alphas.Gradients.Address,
        FirstMoment = FirstMoment,
        SecondMoment = SecondMoment,
        Count = _alphas.Count,
        Step = ++Steps,
        Rate = Rate,
        Beta1 = 0.5f,
        Beta2 = 0.999f,
        Epsilon = 1e-8f,
        WeightDecay = 1e-3f,
    });

    public void Dispose()
    {
        _backend.Free(FirstMoment);
        _backend.Free(SecondMoment);
    }
}

/// <summary>Cosine decay of the learning rate over epochs (Loshchilov and Hutter 2017).</summary>
/// <param name="First">Rate of epoch 0.</param>
/// <param name="Last">Rate that the curve ends at, after the last epoch.</param>
public sealed record CosineSchedule(double First, double Last)
{
    /// <summary>Rate of an epoch: Last + (First - Last) (1 + cos(pi epoch / epochs)) / 2.</summary>
    public float Rate(int epoch, int epochs) => (float)(Last + (First - Last) * (1 + Math.Cos(Math.PI * epoch / Math.Max(1, epochs))) / 2);
}
