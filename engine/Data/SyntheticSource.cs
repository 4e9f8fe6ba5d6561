using PerturbNas.Training;

namespace PerturbNas.Data;

/// <summary>
/// Images drawn by the program, for tests and demonstrations without files: 32x32 colour images of ten classes, every pair of five
/// shapes (disk, square, triangle, ring, cross) and two textures (stripes, checks). Class = 2 * shape + texture, so that the shape
/// alone leaves two classes possible, the texture alone five, and only both together one. Position, size, a slight turn of shape
/// and texture, period, phase, colours and background are random; colours do not depend on the class, and all
/// shapes of one size have the same area, so that the mean colour carries nothing.
/// </summary>
public sealed class SyntheticSource(long seed = 0) : ImageSource
{
    private const int Side = 32;

    private const int Plane = Side * Side;

    // Sub-pixel samples per axis: edges and fine textures must not depend on the pixel grid.
    private const int Samples = 2;

    private const int ClassCount = 10;

    // Turn of shape and texture, in radians: enough that no two images are alike, little enough that a short search learns the classes.
    private const double MaximumTurn = 0.35;

    public override string Name => "synthetic";

    public override int Classes => ClassCount;

    public override int Height => Side;

    public override int Width => Side;

    // Measured over the 50,000 training images of seed 0, to two decimals of the mean and three of the deviation.
    public override IReadOnlyList<float> Mean { get; } = [0.5f, 0.5f, 0.5f];

    public override IReadOnlyList<float> Std { get; } = [0.162f, 0.162f, 0.162f];

    public override string Location => "synthetic";

    /// <summary>As many as CIFAR-10 has.</summary>
    public override int Count(DataPart part) => part == DataPart.Train ? 50_000 : 10_000;

    protected override void ReadRecords(DataPart part, int first, byte[] pixels, int[] labels)
    {
        var purpose = $"synthetic/{part}";
        Parallel.For(0, labels.Length, i => labels[i] = Draw(purpose, first + i, pixels.AsSpan(i * 3 * Plane, 3 * Plane)));
    }

    /// <summary>Draws one record and returns its label.</summary>
    private int Draw(string purpose, int record, Span<byte> pixels)
    {
        var label = Label(purpose, record);
        var shape = label / 2;
        var checks = label % 2 == 1;
        var random = new RandomStream(seed, purpose, record);

        // The radius of the disk of the shape's area, in pixels, and the centre.
        var radius = Uniform(ref random, 6.5, 9.5);
        var centreX = Side / 2 + Uniform(ref random, -4, 4);
        var centreY = Side / 2 + Uniform(ref random, -4, 4);
        var (shapeSin, shapeCos) = Math.SinCos(Uniform(ref random, -MaximumTurn, MaximumTurn));
        var (textureSin, textureCos) = Math.SinCos(Uniform(ref random, -MaximumTurn, MaximumTurn));
        var period = Uniform(ref random, 4, 6.5);
        var phaseX = random.NextSingle();
        var phaseY = random.NextSingle();

        // The texture's light and dark and the background between them, tinted: what is what can be seen, but colours say nothing.
        Span<double> colours = stackalloc double[9];
        for (var channel = 0; channel < 3; channel++)
        {
            colours[channel] = 255 - random.NextInt(96);
            colours[3 + channel] = random.NextInt(96);
            colours[6 + channel] = 80 + random.NextInt(96);
        }
        var slopeX = Uniform(ref random, -1, 1);
        var slopeY = Uniform(ref random, -1, 1);

        for (var y = 0; y < Side; y++)
            for (var x = 0; x < Side; x++)
            {
                int first = 0, second = 0;
                for (var sample = 0; sample < Samples * Samples; sample++)
                {
                    var dx = x + (sample % Samples + 0.5) / Samples - centreX;
                    var dy = y + (sample / Samples + 0.5) / Samples - centreY;
                    if (!Inside(shape, (dx * shapeCos + dy * shapeSin) / radius, (dy * shapeCos - dx * shapeSin) / radius))
                        continue;
                    var u = (dx * textureCos + dy * textureSin) / period + phaseX;
                    var v = (dy * textureCos - dx * textureSin) / period + phaseY;
                    var odd = u - Math.Floor(u) < 0.5;
                    if (checks)
                        odd ^= v - Math.Floor(v) < 0.5;
                    if (odd)
                        first++;
                    else
                        second++;
                }
                var outside = Samples * Samples - first - second;
                var gradient = slopeX * (x - Side / 2) + slopeY * (y - Side / 2);
                var noise = random.NextUInt32();
                for (var channel = 0; channel < 3; channel++)
                {
                    var value = (first * colours[channel] + second * colours[3 + channel] + outside * (colours[6 + channel] + gradient))
                        / (Samples * Samples);
                    value += (byte)(noise >> 8 * channel) * (24.0 / 255) - 12;
                    pixels[channel * Plane + y * Side + x] = (byte)Math.Clamp(Math.Round(value), 0, 255);
                }
            }
        return label;
    }

    /// <summary>Every ten records from a multiple of ten are the ten classes in random order: any prefix is balanced.</summary>
    private int Label(string purpose, int record)
    {
        Span<int> classes = stackalloc int[ClassCount];
        for (var i = 0; i < ClassCount; i++)
            classes[i] = i;
        new RandomStream(seed, $"{purpose}/labels", record / ClassCount).Shuffle(classes);
        return classes[record % ClassCount];
    }

    /// <summary>Whether a point lies in a shape of area pi around the origin.</summary>
    private static bool Inside(int shape, double x, double y)
    {
        switch (shape)
        {
            case 0: // Disk.
                return x * x + y * y <= 1;
            case 1: // Square of side sqrt(pi).
                return Math.Max(Math.Abs(x), Math.Abs(y)) <= 0.886227;
            case 2: // Equilateral triangle; its inscribed circle has radius sqrt(pi / (3 sqrt(3))).
                return Math.Max(-y, 0.5 * y + 0.866025 * Math.Abs(x)) <= 0.777558;
            case 3: // Ring; outer radius 1.2, the inner one leaves the area of pi.
                var distance = x * x + y * y;
                return distance is <= 1.44 and >= 0.44;
            default: // Cross of two bars, 2 L by 2 L / 3: area 20 / 9 L^2 = pi.
                var longer = Math.Max(Math.Abs(x), Math.Abs(y));
                var shorter = Math.Min(Math.Abs(x), Math.Abs(y));
                return longer <= 1.188998 && shorter <= 1.188998 / 3;
        }
    }

    private static double Uniform(ref RandomStream random, double low, double high) => low + (high - low) * random.NextSingle();
}
