"""Is training with branches worth it? `python -m benchmarks.expand [--data-dir DIR] [--epochs N] [--seeds N] …`.

A small plain ConvNet and a small ResNet learn CIFAR-10, or, without `--data-dir`, the digits of scikit-learn: as they
are (plain), with the branches that `repvgg_jax.expand` gives them (repvgg, acnet, dbb), and as they are, with gradients
multiplied as RepVGG's branches would (multipliers). The recipe is the same for all: SGD with Nesterov's momentum, a
warm-up and a cosine, decay of kernels, random flips and crops. A seed sets weights, order and augmentation alike.

Accuracy is that of the network itself, with the kernels that the branches have become, on all test images: the mean
over the seeds, and the smallest and the largest. Time, temporary memory and parameters of a training step are relative
to plain. Steps of all ways take turns: the median, and the median of the ratios within a turn. `--same-seconds` also
trains plain for as many epochs as take the seconds that each way takes.

Each training is a line as soon as it is done; the tables follow.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tabulate import tabulate

from benchmarks.branch_training import BATCH, NETWORKS, WAYS, Data, Task, Way, load
from benchmarks.command import end_with, positive, whole
from repvgg_jax.cli.devices import require_devices
from repvgg_jax.cli.huge_pages import restart_with_huge_pages

HEADERS = ("way", "accuracy %", "step (ms)", "time", "memory", "parameters")


class Result(NamedTuple):
    """What a training came to: accuracy in percent, and how far the network is from its branches."""

    accuracy: float
    difference: float


class Contest:
    """The ways of one network, and what each training came to, by way, epochs and seed."""

    def __init__(self, network: str, data: Data, options: Any):
        self.network, self.options, self.task = network, options, Task(network, data)
        self.ways: list[Way] = []
        self.results: dict[tuple[str, int, int], Result] = {}
        for name in options.ways:
            start = time.perf_counter()
            self.ways.append(Way(name, self.task, options.init, options.rate))
            note(f"{network} {name}: compiled in {time.perf_counter() - start:.0f} s")
        times = step_times(self.ways, options.turns)
        self.milliseconds = np.median(times, 0)
        self.ratios = np.median(times / times[:, :1], 0)

    def run(self) -> None:
        """Train all, seed by seed, so that an interrupted run has all ways for the first seeds."""
        for seed in range(self.options.seeds):
            for way in self.ways:
                self._train(way, self.options.epochs, seed)
        if self.options.same_seconds:
            for seed in range(self.options.seeds):
                for ratio in self.ratios[1:]:
                    self._train(self.ways[0], self._epochs(ratio), seed)

    def _train(self, way: Way, epochs: int, seed: int) -> None:
        if (way.name, epochs, seed) in self.results:
            return
        title = f"{self.network} {way.name}, seed {seed}, {epochs} epochs"
        start = time.perf_counter()

        def progress(epoch: int, loss: float) -> None:
            note(f"{title}: epoch {epoch}, loss {loss:.3f}, {time.perf_counter() - start:.0f} s")

        training = way.train(seed, epochs, progress)
        accuracy = self.task.accuracy(way.collapse(training), training.statistics)
        self.results[way.name, epochs, seed] = result = Result(accuracy, way.difference(training))
        seconds = time.perf_counter() - start
        print(f"{title}: {accuracy:.2f} %, collapsed within {result.difference:.0e}, {seconds:.0f} s", flush=True)

    def _epochs(self, ratio: float) -> int:
        """Epochs of plain that take as long as those of a way."""
        return max(1, round(self.options.epochs * ratio))

    def table(self) -> str:
        """A line for each way."""
        plain, rows = self.ways[0], []
        for way, milliseconds, ratio in zip(self.ways, self.milliseconds, self.ratios, strict=True):
            row = [
                way.name,
                self._accuracy(way.name, self.options.epochs),
                f"{milliseconds:.1f}",
                f"{ratio:.2f}",
                f"{way.memory / plain.memory:.2f}",
                f"{way.parameters / plain.parameters:.2f}",
            ]
            if self.options.same_seconds:
                epochs = self._epochs(ratio)
                row.append(f"{self._accuracy(plain.name, epochs)}, {epochs} epochs")
            rows.append(row)
        headers = [*HEADERS, "plain, same seconds %"][: len(rows[0])]
        alignment = ("left", *["right"] * (len(headers) - 1))
        return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)

    def _accuracy(self, way: str, epochs: int) -> str:
        found = [self.results[way, epochs, seed].accuracy for seed in range(self.options.seeds)]
        return f"{np.mean(found):.2f} ({min(found):.2f}–{max(found):.2f})"


def step_times(ways: Sequence[Way], turns: int) -> np.ndarray:
    """Milliseconds of a step, `(turns, ways)`. The ways take turns, of which the first does not count."""
    data = ways[0].task.data
    trainings = [way.begin(0) for way in ways]

    def turn(number: int) -> float:
        # Two steps: the first finds memory and caches as another way has left them.
        for _ in range(2):
            start = time.perf_counter()
            setting = np.arange(BATCH), np.float32(0), np.zeros(2, np.int32)
            trainings[number], _ = ways[number].step(trainings[number], data.images, data.labels, *setting)
            jax.block_until_ready(trainings[number])
        return 1000 * (time.perf_counter() - start)

    return np.array([[turn(number) for number in range(len(ways))] for _ in range(turns + 1)])[1:]


def note(text: str) -> None:
    """Say on standard error where a run is."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="where CIFAR-10 lies as TFDS prepares it; without, the digits are learnt")
    parser.add_argument("--epochs", type=whole, default=4)
    parser.add_argument("--seeds", type=whole, default=3, help="how many")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="plain is always among them")
    parser.add_argument("--images", type=whole, help="to train on, at most; the default is all")
    parser.add_argument("--same-seconds", action="store_true", help="train plain for as long as each way, too")
    parser.add_argument("--init", choices=("same", "published"), default="same", help="how branches begin: see expand")
    parser.add_argument("--rate", type=positive, default=0.1, help="the largest learning rate")
    parser.add_argument("--turns", type=whole, default=20, help="steps of each way that are timed")
    options = parser.parse_args(arguments)
    options.ways = list(dict.fromkeys(["plain", *options.ways]))
    device = require_devices()[0]
    data = load("digits" if options.data_dir is None else "cifar10", options.data_dir, options.images)
    contests = []
    for network in dict.fromkeys(options.networks):
        contest = Contest(network, data, options)
        contest.run()
        contests.append(contest)
    print(
        f"\n{data.name}, {len(data.images):,} images, {options.epochs} epochs in batches of {BATCH}, branches begin as "
        f"'{options.init}', rate {options.rate:g}, {device.device_kind}, jax {jax.__version__}\n"
        f"Accuracy: mean (smallest–largest) of {options.seeds} seeds on {len(data.test_labels):,} test images"
    )
    for contest in contests:
        print(f"\n{contest.network}\n\n{contest.table()}")


if __name__ == "__main__":
    restart_with_huge_pages()
    end_with(main)
