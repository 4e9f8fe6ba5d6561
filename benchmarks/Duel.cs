using System.Text.Json;

namespace PerturbNas.Benchmarks;

/// <summary>Our repeats and the peer's, taken in turns, so that a drift of the machine hits both.</summary>
/// <param name="Ours">Seconds of our repeats.</param>
/// <param name="Peer">Seconds of the peer's.</param>
/// <param name="Ratio">Of each pair the peer's seconds, per unit of work, over ours.</param>
/// <param name="PeerPeakBytes">Largest resident size of the peer.</param>
/// <param name="PeerLoss">What the peer's last repeat gave.</param>
/// <param name="WaitingPeer">Processor seconds that the peer used in all while we were timed.</param>
/// <param name="WaitingOurs">The same for us while the peer was timed.</param>
internal sealed record Duel(
    Repeats Ours, Repeats Peer, Repeats Ratio, long PeerPeakBytes = 0, double PeerLoss = 0, double WaitingPeer = 0, double WaitingOurs = 0)
{
    /// <summary>What else the peer's last repeat gave.</summary>
    public Dictionary<string, JsonElement>? Extra { get; init; }

    /// <summary>Losses of the two programs may differ by rounding; anything wrong differs by more.</summary>
    private const double LossTolerance = 1e-4;

    /// <summary>What the waiting program may use of the other's time; the system counts in hundredths of a second for each repeat.</summary>
    private const double MostWaiting = 0.02, Tick = 0.01;

    // The peer's threads spin for some milliseconds before they sleep, which would double what we take for a single kernel.
    private static readonly TimeSpan _untilPeerSleeps = TimeSpan.FromMilliseconds(100);

    /// <summary>The peers that the options ask for, one after the other.</summary>
    public static IEnumerable<string> Modes(BenchmarkOptions options) =>
        !options.Peer ? [] : options.PeerMode == "both" ? ["tuned", "stock"] : [options.PeerMode];

    /// <exception cref="UserException">The two programs do not compute the same loss.</exception>
    public static void RequireSameLoss(string what, double ours, double peers)
    {
        if (!(Math.Abs(ours - peers) <= LossTolerance * Math.Abs(peers)))
            throw new UserException($"The {what} is {ours:G9} here and {peers:G9} in the peer, which is not the same work; " +
                "run the tests, one of the two is wrong.");
    }

    /// <summary>Warms both up and times them alternately.</summary>
    /// <param name="ours">Runs our work once.</param>
    /// <param name="workOfOurs">Our work in one repeat, in units of the peer's.</param>
    /// <param name="request">What the peer is to do, where it does more than one thing.</param>
    public static Duel Run(int repeats, Action ours, double workOfOurs, Peer peer, Report report, object? request = null)
    {
        ours();
        var last = peer.Repeat(request);
        List<double> mine = [], theirs = [];
        double waitingPeer = 0, waitingOurs = 0;
        for (var i = 0; i < repeats; i++)
        {
            Thread.Sleep(_untilPeerSleeps);
            var before = peer.ProcessorSeconds;
            mine.Add(Timing.Seconds(ours));
            waitingPeer += peer.ProcessorSeconds - before;
            var ourBefore = Environment.CpuUsage.TotalTime;
            last = peer.Repeat(request);
            waitingOurs += (Environment.CpuUsage.TotalTime - ourBefore).TotalSeconds;
            theirs.Add(last.Seconds);
        }
        if (waitingPeer > MostWaiting * mine.Sum() + repeats * Tick)
            report.Note($"the peer, waiting, used {waitingPeer:0.00} processor seconds of the {mine.Sum():0.00} s that we were timed");
        if (waitingOurs > MostWaiting * theirs.Sum() + repeats * Tick)
            report.Note($"we, waiting, used {waitingOurs:0.00} processor seconds of the {theirs.Sum():0.00} s that the peer was timed");
        return new Duel(new(mine), new(theirs), RatioOf(mine, workOfOurs, theirs), last.PeakBytes, last.Loss, waitingPeer, waitingOurs) { Extra = last.Extra };
    }

    /// <summary>The same with a peer in this process, which leaves neither memory nor time to be watched.</summary>
    /// <param name="peers">Runs the peer's work once.</param>
    /// <param name="workOfPeers">The units of work in that.</param>
    public static Duel Run(int repeats, Action ours, double workOfOurs, Action peers, double workOfPeers)
    {
        ours();
        peers();
        List<double> mine = [], theirs = [];
        for (var i = 0; i < repeats; i++)
        {
            mine.Add(Timing.Seconds(ours));
            theirs.Add(Timing.Seconds(peers) / workOfPeers);
        }
        return new Duel(new(mine), new(theirs), RatioOf(mine, workOfOurs, theirs));
    }

    private static Repeats RatioOf(List<double> mine, double workOfOurs, List<double> theirs) =>
        new([.. mine.Select((seconds, i) => theirs[i] / (seconds / workOfOurs))]);
}
