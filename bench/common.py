"""What the benchmarks share: the order of the variants, ratios, processes, header, table, plot.

The machine may be noisy, so times mean little and ratios are taken between neighbours: the variants
take turns (A B B A ...), and round k of one variant is divided by round k of the other.
"""

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

from tools.commands import clean_environment
from utils.files import ROOT
from utils.runtime.provenance import git_commit, machine, versions

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        dataset: The data set, as ``-d`` of cifar.py.
        data: Its folder, as ``--data`` of cifar.py.
        rounds: The turns of each variant; None for each benchmark's own number.
        models: The recipes to measure; None for each benchmark's own.
        threads: The threads of a process that trains alone.
        loaders: The worker processes of the plain script's DataLoader.
        scale: The factor on the number of images and the length of the turns.
    """

    dataset: str = "synthetic10"
    data: str = "data"
    rounds: int | None = None
    models: tuple[str, ...] | None = None
    threads: int = 1
    loaders: int = 2
    scale: float = 1.0

    def images(self, count: int, least: int) -> int:
        """Return a number of images, scaled."""
        return max(least, round(count * self.scale))


class Ratio(NamedTuple):
    """The median and the range of a ratio over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        """Return the ratio as tables show it."""
        return f"{self.median:.2f} ({self.least:.2f} - {self.most:.2f})"

    def percent(self) -> str:
        """Return the same in per cent."""
        return f"{self.median:.0%} ({self.least:.0%} - {self.most:.0%})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Return the ratio of numerators to denominators, taken pair by pair."""
    values = [a / b for a, b in zip(numerators, denominators, strict=True)]
    return Ratio(median(values), min(values), max(values))


def interleaved(variants: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield every variant once a round, in every other round in reverse order: A B B A A B ..."""
    for k in range(rounds):
        yield from variants if k % 2 == 0 else reversed(variants)


def measure(variants: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Let the variants take turns; return what each returns, round by round."""
    results: dict[str, list[T]] = {name: [] for name in variants}
    for name in interleaved(list(variants), rounds):
        results[name].append(variants[name]())
    return results


def timed(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that an action takes, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def process_environment(threads: int, **changes: str) -> dict[str, str]:
    """Return the environment of a measured process: its threads, the project on its path."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return clean_environment(
        OMP_NUM_THREADS=str(threads), PYTHONPATH=path, PYTHONUNBUFFERED="1", **changes
    )


class EpochTimes(NamedTuple):
    """The seconds of a training process: until its first epoch, of each epoch, and in all."""

    start: float
    epochs: list[float]
    whole: float


def time_epochs(command: Sequence[str], environment: Mapping[str, str]) -> EpochTimes:
    """Run a training script and note when its lines come.

    An epoch lasts from its line "Epoch: [1 | 2] ..." to "train loss ...", which follows the
    evaluation.

    Raises:
        subprocess.CalledProcessError: The script has failed, and has said why.
    """
    started = time.perf_counter()
    begins, ends = [], []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter()
            if line.startswith("Epoch: ["):
                begins.append(now)
            elif line.startswith("train loss"):
                ends.append(now)
    if process.returncode or not begins:
        raise subprocess.CalledProcessError(process.returncode, command)
    epochs = [b - a for a, b in zip(begins, ends, strict=True)]
    return EpochTimes(begins[0] - started, epochs, time.perf_counter() - started)


@dataclass(frozen=True)
class Result:
    """What a benchmark has found.

    Attributes:
        title: The title of the table.
        rows: The rows of the table, its head first.
        notes: The sentences below the table.
        raw: All numbers, for JSON.
        draw: Draws them on given axes.
    """

    title: str
    rows: Sequence[tuple[str, ...]]
    notes: list[str]
    raw: dict[str, Any]
    draw: Callable[[Any], None]

    def text(self) -> str:
        """Return the table with title and notes."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in self.rows]
        return "\n".join([self.title, *lines, *self.notes])


def draw_ratios(
    axes: Any, ratios: Mapping[str, Ratio], targets: Mapping[str, float], label: str
) -> None:
    """Draw medians as bars with their range, and targets as black marks."""
    names = list(ratios)[::-1]
    middles = [ratios[name].median for name in names]
    ranges = [
        [middle - ratios[name].least for middle, name in zip(middles, names, strict=True)],
        [ratios[name].most - middle for middle, name in zip(middles, names, strict=True)],
    ]
    axes.barh(names, middles, xerr=ranges, color="C0", ecolor="C7", capsize=3)
    for height, name in enumerate(names):
        if name in targets:
            axes.plot([targets[name]] * 2, [height - 0.4, height + 0.4], color="black")
    axes.set(xlabel=label)


def header() -> dict[str, Any]:
    """Return the machine and the versions that the numbers belong to."""
    found = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": git_commit(),
        **machine(),
        "versions": versions(),
        "onednn": found.group(1) if found and torch.backends.mkldnn.is_available() else "none",
        "isa": torch.backends.cpu.get_cpu_capability(),
        "isa_limit": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "load_average": os.getloadavg()[0],
    }


def header_lines(about: Mapping[str, Any], threads: int, scale: float = 1.0) -> list[str]:
    """Return the header as lines of text."""
    devices = [f"{about['processor']}, {about['cores']} cores, {threads} threads", *about["gpus"]]
    limit = f", at most {about['isa_limit']}" if about["isa_limit"] else ""
    lines = [
        f"{about['date']}  commit {about['commit'][:7] or 'unknown'}",
        "; ".join(devices),
        f"torch {about['versions']['torch']}, oneDNN {about['onednn']}, {about['isa']}{limit}",
        "ratios: median (minimum - maximum) over pairs of neighbouring runs",
    ]
    if scale != 1:
        lines.append(f"images and turns: {scale:.2g} times the usual ones (--scale)")
    if about["load_average"] > 0.5:
        lines.append(
            f"warning: other work is running here (load {about['load_average']:.1f}); "
            "ratios suffer less than times, and still suffer"
        )
    return lines
