"""The peer of our selection: perturbation-based architecture selection (Wang et al., ICLR 2021) the reference's way in PyTorch.

    python3 benchmarks/peer/selection.py --space s3 --init FILE --order ORDER.json      (Debian's python3-torch)

One pass of the whole supernet for every candidate and validation batch, with batch statistics; after every round but the last a tuning of
some steps, each with an α step (Adam) and a weight step (SGD, clipped). So that decisions can be compared, everything random is given: ORDER.json
has for `normal` and `reduce` the `edges` and `nodes` in the order of their rounds; FILE has weights and α, the validation half
(`images`, `labels`, evaluated in batches of --batch in this order) and the batches of all tuning steps (`alpha_images`,
`alpha_labels`, `weight_images`, `weight_labels`: a leading axis for the step).

The first line printed has the versions and settings and `initial_loss`, that of the first validation batch. Every repeat starts from FILE
and prints {"seconds", "scoring_seconds", "tuning_seconds", "loss", "peak_bytes", "accuracy", "decisions"}: the decisions in their
order as [cell, edge, operation], or [cell, edge, "removed"]; loss and accuracy are those of the supernet reduced to them.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch.nn import functional

from common import add_common, fill, new_supernet, peak_bytes, report, requests, settings, start

CELLS = ("normal", "reduce")
NODE_EDGES = [range(0, 2), range(2, 5), range(5, 9), range(9, 14)]
ROUNDS, OPERATION_ROUNDS = 17, 14


class Selection:
    def __init__(self, arguments):
        self.arguments = arguments
        self.order = json.loads(Path(arguments.order).read_text())
        self.network = new_supernet(arguments.space, arguments.channels, arguments.layers, arguments.classes)
        self.tensors = fill(self.network, arguments.init)
        if arguments.mode == "tuned":
            for name in ("images", "alpha_images", "weight_images"):
                batches = self.tensors[name].view(-1, *self.tensors[name].shape[-3:]).contiguous(memory_format=torch.channels_last)
                self.tensors[name] = batches.view(self.tensors[name].shape)
        self.reset()

    def reset(self):
        fill(self.network, self.arguments.init)
        if self.arguments.mode == "tuned":
            self.network.to(memory_format=torch.channels_last)
        self.weights = list(self.network.weights().values())
        self.sgd = torch.optim.SGD(self.weights, lr=0.0025, momentum=0.9, weight_decay=3e-4)
        self.adam = torch.optim.Adam(self.network.alphas().values(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
        # The fixed rows of edges that are decided or removed, by cell and edge.
        self.decided = {cell: {} for cell in CELLS}
        self.decisions = []
        self.step = 0
        self.scoring_seconds = self.tuning_seconds = 0

    def rows(self):
        rows = {}
        for cell in CELLS:
            table = list(torch.softmax(getattr(self.network, f"alphas_{cell}"), dim=-1))
            for edge, row in self.decided[cell].items():
                table[edge] = row
            rows[f"alphas_{cell}"] = table
        return rows

    def evaluate(self, rows, batches=None):
        """Mean loss and accuracy on the validation half, or on its first batches."""
        size = self.arguments.batch
        loss = correct = count = 0
        with torch.no_grad():
            for images, labels in list(zip(self.tensors["images"].split(size), self.tensors["labels"].split(size)))[:batches]:
                logits = self.network(images, rows)
                loss += functional.cross_entropy(logits, labels, reduction="sum").item()
                correct += (logits.argmax(dim=1) == labels).sum().item()
                count += len(labels)
        return loss / count, correct / count

    def masked_accuracies(self, cell, masks):
        """Accuracy with each (edge, operation) left out; operation None: the whole edge."""
        accuracies = []
        for edge, operation in masks:
            with torch.no_grad():
                rows = self.rows()
                row = rows[f"alphas_{cell}"][edge].clone()
                row[slice(None) if operation is None else operation] = 0
                rows[f"alphas_{cell}"][edge] = row
            accuracies.append(self.evaluate(rows)[1])
        return accuracies

    def decide(self, cell, edge):
        operations = getattr(self.network, f"alphas_{cell}").shape[1]
        accuracies = self.masked_accuracies(cell, [(edge, o) for o in range(operations)])
        chosen = min(range(operations), key=lambda o: accuracies[o])
        self.decided[cell][edge] = functional.one_hot(torch.tensor(chosen), operations).float()
        self.decisions.append([cell, edge, chosen])

    def thin_out(self, cell, node):
        left = [edge for edge in NODE_EDGES[node]]
        while len(left) > 2:
            accuracies = self.masked_accuracies(cell, [(edge, None) for edge in left])
            edge = max(reversed(range(len(left))), key=lambda i: accuracies[i])
            self.decided[cell][left[edge]] = torch.zeros_like(self.decided[cell][left[edge]])
            self.decisions.append([cell, left.pop(edge), "removed"])

    def tune(self, steps):
        for _ in range(steps):
            self.adam.zero_grad()
            self.loss("alpha").backward()
            self.adam.step()
            self.sgd.zero_grad()
            self.loss("weight").backward()
            torch.nn.utils.clip_grad_norm_(self.weights, 5.0)
            self.sgd.step()
            self.step += 1

    def loss(self, which):
        images, labels = (self.tensors[f"{which}_{what}"][self.step] for what in ("images", "labels"))
        return functional.cross_entropy(self.network(images, self.rows()), labels)

    def run(self):
        steps = len(self.tensors["weight_labels"]) // (ROUNDS - 1)
        for index in range(ROUNDS):
            begin = time.perf_counter()
            for cell in CELLS:
                if index < OPERATION_ROUNDS:
                    self.decide(cell, self.order[cell]["edges"][index])
                else:
                    self.thin_out(cell, self.order[cell]["nodes"][index - OPERATION_ROUNDS])
            middle = time.perf_counter()
            if index < ROUNDS - 1:
                self.tune(steps)
            self.scoring_seconds += middle - begin
            self.tuning_seconds += time.perf_counter() - middle
        with torch.no_grad():
            return self.evaluate(self.rows())


def main():
    parser = argparse.ArgumentParser(description="Times PyTorch at a whole selection.")
    add_common(parser)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--order", required=True, help="JSON file with the order of edges and nodes")
    arguments = parser.parse_args()
    selection = start(Selection, arguments)
    report(**settings(arguments), initial_loss=selection.evaluate(selection.rows(), batches=1)[0])
    for _ in requests() if arguments.lockstep else [None]:
        selection.reset()
        begin = time.perf_counter()
        loss, accuracy = selection.run()
        report(
            seconds=time.perf_counter() - begin,
            scoring_seconds=selection.scoring_seconds,
            tuning_seconds=selection.tuning_seconds,
            loss=loss,
            peak_bytes=peak_bytes(),
            accuracy=accuracy,
            decisions=selection.decisions,
        )


main()
