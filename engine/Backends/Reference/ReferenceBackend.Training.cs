using PerturbNas.Training;

namespace PerturbNas.Backends.Reference;

/// <summary>The classifier, its loss, the optimisers and the noise.</summary>
public sealed unsafe partial class ReferenceBackend
{
    public override void LinearForward(in LinearArgs a)
    {
        CheckLinear(a);
        Require(a.X != 0 && a.Weight != 0 && a.Bias != 0 && a.Out != 0);
        var bias = Load(a.Bias, a.OutChannels);
        var output = Product(
            Load(a.X, (long)a.Rows * a.InChannels), Load(a.Weight, a.InChannels * a.OutChannels), a.InChannels, a.OutChannels);
        for (var i = 0; i < output.Length; i++)
            output[i] += bias[i % a.OutChannels];
        Store(a.Out, output);
    }

    public override void LinearBackward(in LinearArgs a)
    {
        CheckLinear(a);
        Require(a.G != 0);
        Require(a.Dx == 0 || a.Weight != 0);
        Require(a.DWeight == 0 || a.X != 0);
        var g = Load(a.G, (long)a.Rows * a.OutChannels);
        if (a.Dx != 0)
            Store(a.Dx, ProductWithTransposed(g, Load(a.Weight, a.InChannels * a.OutChannels), a.InChannels, a.OutChannels));
        if (a.DWeight != 0)
            Store(a.DWeight, TransposedProduct(Load(a.X, (long)a.Rows * a.InChannels), g, a.InChannels, a.OutChannels));
        Store(a.DBias, ImageSums(g, null, 1, a.OutChannels));
    }

    public override void SoftmaxCrossEntropy(in SoftmaxCrossEntropyArgs a)
    {
        Require(a.Variants > 0 && a.Images > 0 && a.Classes > 0);
        Require(a.Logits != 0 && a.Labels != 0 && a.LossSums != 0 && a.CorrectCounts != 0);
        Require(a.Smoothing is >= 0 and <= 1);
        Require(a.Dlogits == 0 || a.Variants == 1);
        var logits = Load(a.Logits, (long)a.Variants * a.Images * a.Classes);
        var labels = new ReadOnlySpan<int>((void*)a.Labels, a.Images);
        foreach (var label in labels)
            Require(label >= 0 && label < a.Classes);
        for (var v = 0; v < a.Variants; v++)
        {
            var (lossSum, correctCount) = (0.0, 0L);
            for (var image = 0; image < a.Images; image++)
            {
                var first = (v * a.Images + image) * a.Classes;
                var (largest, total) = (first, 0.0);
                for (var i = first; i < first + a.Classes; i++)
                    if (logits[i] > logits[largest])
                        largest = i;
                for (var i = first; i < first + a.Classes; i++)
                    total += Math.Exp(logits[i] - logits[largest]);
                var logTotal = logits[largest] + Math.Log(total);
                var loss = 0.0;
                for (var c = 0; c < a.Classes; c++)
                {
                    var target = (double)a.Smoothing / a.Classes + (c == labels[image] ? 1 - (double)a.Smoothing : 0);
                    var logProbability = logits[first + c] - logTotal;
                    loss -= target * logProbability;
                    if (a.Dlogits != 0)
                        ((double*)a.Dlogits)[first + c] = (double)a.Scale / a.Images * (Math.Exp(logProbability) - target);
                }
                var correct = largest - first == labels[image] ? 1 : 0;
                if (a.ImageLosses != 0)
                    ((double*)a.ImageLosses)[v * a.Images + image] = loss;
                if (a.ImageCorrect != 0)
                    ((int*)a.ImageCorrect)[v * a.Images + image] = correct;
                lossSum += loss;
                correctCount += correct;
            }
            ((double*)a.LossSums)[v] = lossSum;
            ((long*)a.CorrectCounts)[v] = correctCount;
        }
    }

    public override void SgdStep(in SgdArgs a)
    {
        Require(a.Count >= 0);
        Require(a.Parameters != 0 && a.Gradients != 0 && a.MomentumBuffer != 0 && a.Norm != 0);
        var parameters = (double*)a.Parameters;
        var gradients = (double*)a.Gradients;
        var momentum = (double*)a.MomentumBuffer;
        var squares = 0.0;
        for (var i = 0L; i < a.Count; i++)
            squares += gradients[i] * gradients[i];
        var norm = Math.Sqrt(squares);
        var clip = a.MaxNorm > 0 ? Math.Min(1, a.MaxNorm / (norm + 1e-6)) : 1;
        for (var i = 0L; i < a.Count; i++)
        {
            var d = clip * gradients[i] + a.WeightDecay * parameters[i];
            momentum[i] = a.Momentum * momentum[i] + d;
            parameters[i] -= a.Rate * momentum[i];
        }
        *(double*)a.Norm = norm;
    }

    public override void AdamStep(in AdamArgs a)
    {
        Require(a.Count >= 0 && a.Step >= 1);
        Require(a.Parameters != 0 && a.Gradients != 0 && a.FirstMoment != 0 && a.SecondMoment != 0);
        var parameters = (double*)a.Parameters;
        var gradients = (double*)a.Gradients;
        var first = (double*)a.FirstMoment;
        var second = (double*)a.SecondMoment;
        double beta1 = a.Beta1, beta2 = a.Beta2;
        for (var i = 0L; i < a.Count; i++)
        {
            var d = gradients[i] + a.WeightDecay * parameters[i];
            first[i] = beta1 * first[i] + (1 - beta1) * d;
            second[i] = beta2 * second[i] + (1 - beta2) * d * d;
            var mean = first[i] / (1 - Math.Pow(beta1, a.Step));
            var square = second[i] / (1 - Math.Pow(beta2, a.Step));
            parameters[i] -= a.Rate * mean / (Math.Sqrt(square) + a.Epsilon);
        }
    }

    public override void NoiseNormal(in NoiseArgs a)
    {
        Require(a.Count >= 0);
        Require(a.Out != 0);
        var output = (double*)a.Out;
        for (var i = 0L; i < a.Count; i++)
        {
            var (x0, x1, x2, x3) = RandomStream.Philox(a.Key, (ulong)(i / 4), a.Position);
            var (first, second) = i % 4 < 2 ? (x0, x1) : (x2, x3);
            var radius = Math.Sqrt(-2 * Math.Log((first + 0.5) / 4294967296.0));
            var angle = 2 * Math.PI * (second / 4294967296.0);
            output[i] = radius * (i % 2 == 0 ? Math.Cos(angle) : Math.Sin(angle));
        }
    }

    private static void CheckLinear(in LinearArgs a) => Require(a.Rows > 0 && a.InChannels > 0 && a.OutChannels > 0);
}
