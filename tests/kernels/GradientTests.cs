using PerturbNas.Backends;
using PerturbNas.Training;

namespace PerturbNas.Tests.Kernels;

/// <summary>
/// The oracle's backward kernels against central differences of its forward kernels, in double. The function that is differentiated is
/// L(y) = sum of a_c g y + b_c y^2 / 2 + c_c y over the elements of the output: its gradient with respect to y is the pending
/// gradient a g + b y + c that the backward kernels take.
/// </summary>
public class GradientTests
{
    // L is quadratic between the kinks of the operators (ReLU, maximum), so central differences are exact but for roundoff, about
    // 1e-16 / Step of an output's value, and the step can be so small that hardly any input lies within a step of a kink.
    private const double Step = 1e-7;

    private const double Tolerance = 1e-6;

    // Each case runs its forward kernel some dozen times.
    private const double LargestFlops = 4e6;

    public static TheoryData<string> Cases()
    {
        var data = new TheoryData<string>();
        foreach (var kernelCase in KernelCases.All)
            if (kernelCase.Backward != null && kernelCase.Differentiable && kernelCase.Cost(KernelPass.Forward).Flops < LargestFlops)
                data.Add(kernelCase.Name);
        return data;
    }

    [Theory]
    [MemberData(nameof(Cases))]
    public void Backward_equals_finite_differences(string name)
    {
        var kernelCase = TestBackends.Case(name);
        using var run = new KernelRun(kernelCase, TestBackends.Reference);
        run.Prepare(KernelPass.Forward, continuous: true);
        run.Call(KernelPass.Forward);
        run.Prepare(KernelPass.Backward, run.Outputs(KernelPass.Forward), continuous: true);
        run.Call(KernelPass.Backward);
        var gradients = run.Outputs(KernelPass.Backward);
        var stream = new RandomStream(1, name);
        foreach (var (gradientName, gradient) in gradients)
        {
            if (gradientName == "gradient_sums") // BatchNormChainTests differentiate through these
                continue;
            var buffer = Buffer(kernelCase, gradientName);
            if (buffer.Values(name, true) is { } initial)
                for (var i = 0; i < gradient.Length; i++)
                    gradient[i] -= initial[i];
            var input = Buffer(kernelCase, gradientName.StartsWith("d_", StringComparison.Ordinal) ? gradientName[2..] : gradientName[1..]);
            // dx of a kernel that normalises its input is the gradient of the normalised value.
            if (kernelCase.Buffers.Any(candidate => candidate.Name == "x_normalization") && gradientName == "dx")
            {
                var normalization = Buffer(kernelCase, "x_normalization").Values(name, true)!;
                for (var i = 0; i < gradient.Length; i++)
                    gradient[i] *= normalization[i % (normalization.Length / 4)];
            }
            CheckDirections(kernelCase, run, input, gradient, stream);
        }
    }

    /// <summary>Some single elements, and all elements at once in random directions.</summary>
    private static void CheckDirections(KernelCase kernelCase, KernelRun run, KernelBuffer input, double[] gradient, RandomStream stream)
    {
        var values = input.Values(kernelCase.Name, true)!;
        for (var trial = 0; trial < 8; trial++)
        {
            var direction = new double[values.Length];
            if (trial < 5)
                direction[stream.NextInt(values.Length)] = 1;
            else
                for (var i = 0; i < values.Length; i++)
                    direction[i] = stream.NextNormal();
            // Subtracted term by term, so that outputs that do not change add no roundoff.
            var (up, down) = (LossTerms(1), LossTerms(-1));
            var expected = up.Zip(down, (a, b) => a - b).Sum() / (2 * Step);
            run.Write(input, values);
            var actual = gradient.Zip(direction, (g, d) => g * d).Sum();
            var scale = Math.Sqrt(gradient.Sum(g => g * g) * direction.Sum(d => d * d) / values.Length);
            var roundoff = 1e-15 / Step * Math.Sqrt(up.Sum(term => term * term));
            Assert.True(
                Math.Abs(expected - actual) <= Tolerance * scale + roundoff,
                $"{kernelCase.Name}: the gradient of {input.Name} in direction {trial} is {actual:g10}, finite differences say {expected:g10}");

            double[] LossTerms(int sign)
            {
                run.Write(input, [.. values.Zip(direction, (value, d) => value + sign * Step * d)]);
                run.Call(KernelPass.Forward);
                var y = run.Read(kernelCase.Buffers.First(buffer => buffer.Name is "y" or "out"));
                var g = run.Read(Buffer(kernelCase, "g"));
                if (kernelCase.Buffers.FirstOrDefault(buffer => buffer.Name == "coefficients") is not { } pending)
                    return [.. y.Zip(g, (a, b) => a * b)];
                var abc = run.Read(pending);
                var channels = abc.Length / 3;
                return [.. y.Select((value, i) =>
                {
                    var c = i % channels;
                    return abc[c] * g[i] * value + abc[channels + c] * value * value / 2 + abc[2 * channels + c] * value;
                })];
            }
        }
    }

    private static KernelBuffer Buffer(KernelCase kernelCase, string name) => kernelCase.Buffers.Single(buffer => buffer.Name == name);
}
