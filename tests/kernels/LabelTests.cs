using PerturbNas.Backends;
using PerturbNas.Backends.Cpu;
using PerturbNas.Tests.Cuda;

namespace PerturbNas.Tests.Kernels;

/// <summary>Labels outside the classes are refused with one sentence, by the call or when its results are read, and nothing is written.</summary>
public sealed class LabelTests
{
    private const int Images = 40, Classes = 3, Image = 37;

    [Theory]
    [InlineData(-1, 1)]
    [InlineData(Classes, 1)]
    [InlineData(Classes, 2)]
    public void Outside_the_classes_are_refused_by_the_cpu(int label, int variants) => AssertRefused(TestBackends.Cpu(Isa.Best, 1), label, variants);

    [EmulatedCudaTheory]
    [InlineData(-1, 1)]
    [InlineData(Classes, 1)]
    [InlineData(Classes, 2)]
    public void Outside_the_classes_are_refused_by_cuda(int label, int variants) => AssertRefused(TestBackends.Cuda, label, variants);

    private static void AssertRefused(Backend backend, int label, int variants)
    {
        const int lossBytes = 2 * sizeof(double), gradientBytes = Images * Classes * sizeof(float);
        var logits = backend.Allocate(variants * Images * Classes * sizeof(float));
        var labels = backend.Allocate(Images * sizeof(int));
        var outputs = backend.Allocate((2 * lossBytes) + gradientBytes);
        var arguments = new SoftmaxCrossEntropyArgs
        {
            Logits = logits,
            Labels = labels,
            LossSums = outputs,
            CorrectCounts = outputs + lossBytes,
            Dlogits = variants == 1 ? outputs + (2 * lossBytes) : 0,
            Variants = variants,
            Images = Images,
            Classes = Classes,
            Scale = 1,
        };
        var given = new int[Images];
        (given[Image], given[Image + 1]) = (label, label);
        backend.Write(labels, given);
        var read = new byte[(2 * lossBytes) + gradientBytes];
        var refusal = Assert.Throws<KernelException>(() =>
        {
            backend.SoftmaxCrossEntropy(arguments);
            backend.ReadBytes(outputs, read);
        });
        Assert.Equal(KernelStatus.InvalidArgument, refusal.Status);
        Assert.EndsWith($": image {Image} has label {label}, outside 0..{Classes - 1}", refusal.Message);
        backend.ReadBytes(outputs, read);
        Assert.All(read, value => Assert.Equal(0, value));

        backend.Write(labels, new int[Images]);
        backend.SoftmaxCrossEntropy(arguments);
        backend.ReadBytes(outputs, read);
        Assert.Equal(Images * Math.Log(Classes), BitConverter.ToDouble(read), 1e-12);
        foreach (var address in new[] { logits, labels, outputs })
            backend.Free(address);
    }
}
