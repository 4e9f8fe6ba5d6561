"""The peer of our benchmarks: the DARTS reference's way of working in PyTorch, timed one repeat at a time.

    python3 benchmarks/peer/peer.py --space s5 --work search-step --repeats 3      (Debian's python3-torch)

The first line printed is a JSON object with the versions and settings seen and `initial_loss`, the loss of the initial
weights with batch statistics (before any step; our engine's must agree; for derived-train with 0.4 times the auxiliary
loss). Then every repeat prints {"work", "mode", "seconds", "loss", "peak_bytes"}: loss is that of the repeat's last
forward pass, before its update; peak_bytes is the process's largest resident size so far. With --lockstep a repeat runs
for each line read from standard input until it ends, so that a driver can alternate repeats of two programs.

Work: `scoring` is a forward pass without gradients; `alpha-step` a full backward pass, weight gradients included, and
Adam on α; `weight-step` the same pass, clipping and SGD; `search-step` both; `derived-train` a training step of the
derived network. All with batch statistics. `--mode tuned` uses channels_last; its other half is the caller's
environment, which must be set before the start: MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
MALLOC_TOP_PAD_=268435456.

--init names a safetensors file with every weight and α, and optionally `images` [N, 3, H, W] and `labels` [N], which
then replace the random batch. Exit code 2 with one sentence where that file or an option does not fit.

Time on a quiet machine only: the threads of PyTorch spin, so that a busy machine slows a step many times over.
"""

import argparse
import time

import torch
from torch.nn import functional

from common import SPACES, DerivedNetwork, add_common, fill, new_supernet, parse_genotype, peak_bytes, report, requests, settings, start

CLIP, AUXILIARY_WEIGHT = 5.0, 0.4
# The architecture that the DARTS paper found on CIFAR-10 with second order.
DARTS_V2 = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=range(2, 6), "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), "
    "('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"
)


def parse_arguments():
    parser = argparse.ArgumentParser(description="Times PyTorch at the work of our benchmarks.")
    add_common(parser)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--work", choices=Peer.works(), default="search-step")
    parser.add_argument("--genotype", default=DARTS_V2, help="of derived-train; text form")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


class Peer:
    def __init__(self, arguments):
        torch.manual_seed(0)
        self.derived = arguments.work == "derived-train"
        sizes = (arguments.channels, arguments.layers, arguments.classes)
        if self.derived:
            self.network = DerivedNetwork(parse_genotype(arguments.genotype), *sizes)
            weights = self.network.parameters()
        else:
            self.network = new_supernet(arguments.space, *sizes)
            weights = self.network.weights().values()
            alphas = self.network.alphas().values()
        tensors = fill(self.network, arguments.init) if arguments.init else {}
        batch = tensors.get("images"), tensors.get("labels")
        if batch[0] is None or batch[1] is None:
            images = torch.randn(arguments.batch, 3, arguments.image_size, arguments.image_size)
            batch = images, torch.randint(arguments.classes, (arguments.batch,))
        self.images, self.labels = batch
        if arguments.mode == "tuned":
            self.network.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.weights = list(weights)
        self.sgd = torch.optim.SGD(self.weights, lr=0.025, momentum=0.9, weight_decay=3e-4)
        if not self.derived:
            self.adam = torch.optim.Adam(alphas, lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    @staticmethod
    def works():
        return ["search-step", "alpha-step", "weight-step", "scoring", "derived-train"]

    def loss(self):
        if not self.derived:
            return functional.cross_entropy(self.network(self.images), self.labels)
        logits, auxiliary = self.network(self.images)
        return functional.cross_entropy(logits, self.labels) + AUXILIARY_WEIGHT * functional.cross_entropy(
            auxiliary, self.labels
        )

    def scoring(self):
        with torch.no_grad():
            return self.loss().item()

    def alpha_step(self):
        self.adam.zero_grad()
        loss = self.loss()
        loss.backward()
        self.adam.step()
        return loss.item()

    def weight_step(self):
        self.sgd.zero_grad()
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
        self.sgd.step()
        return loss.item()

    derived_train = weight_step

    def search_step(self):
        self.alpha_step()
        return self.weight_step()


def main():
    arguments = parse_arguments()
    peer = start(Peer, arguments)
    run = getattr(peer, arguments.work.replace("-", "_"))
    report(
        **settings(arguments),
        work=arguments.work,
        parameters=sum(p.numel() for p in peer.weights),
        batch=list(peer.images.shape),
        initial_loss=peer.scoring(),
    )
    for _ in requests() if arguments.lockstep else range(arguments.repeats):
        begin = time.perf_counter()
        loss = run()
        seconds = time.perf_counter() - begin
        report(work=arguments.work, mode=arguments.mode, seconds=seconds, loss=loss, peak_bytes=peak_bytes())


main()
