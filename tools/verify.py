"""Prove on this machine that training does not depend on workers, engine or interruptions.

    ./launcher.sh --verify

Trains small networks several times, in double precision, and compares the loss of every step, the
final parameters and the evaluation: one process against several workers of each engine, a run that
is killed and resumed against one that nobody touched, and one that goes on with another number of
workers. One line a check; exit code 1 if one fails. --plant MISTAKE plants a mistake that other
projects have made into the runs that are checked, and must make a check fail.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.arms import ROOT, SCRIPTS, clean_environment, engine_command, has_horovod
from tools.planted import MISTAKES
from utils import checkpoint

FAILED = 1
COMMON = [
    "-d", "synthetic10", "--train-size", "101", "--test-size", "53", "--train-batch", "64",
    "--epochs", "2", "--schedule", "1", "--dtype", "float64", "--overwrite",
]  # fmt: skip
ALEXNET = [*COMMON, "-a", "alexnet", "--lr", "0.05"]
SYNCED = [*COMMON, *"-a wrn --depth 10 --widen-factor 1 --drop 0.3 --sync-bn".split()]


@dataclass
class Run:
    """What a run has left: loss of every step, weights, momentum, validation accuracies."""

    losses: list[float]
    state: dict[str, Any]
    accuracies: list[str]


class Runner:
    """Starts the runs in a folder of their own.

    Args:
        folder: for run folders and traces.
        mistake: to plant into the runs that are checked, or "none".
    """

    def __init__(self, folder: Path, mistake: str) -> None:
        self.folder = folder
        self.mistake = mistake
        self.count = 0

    def run(
        self, flags: list[str], engine: str, workers: int, mistake: str, into: Path | None = None
    ) -> Path:
        """Train; returns the run folder. The exit code is not looked at: runs get killed."""
        self.count += 1
        folder = into or self.folder / str(self.count)
        script = SCRIPTS[engine].removesuffix(".py")
        command = engine_command(engine, workers, str(ROOT / "tools" / "planted.py"))
        command += [mistake, script, *flags, "-c", str(folder)]
        command += ["--trace", str(folder / "trace.json")]
        environment = clean_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        self.last = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        return folder

    def reference(self, flags: list[str]) -> Run:
        """One process without any mistake, to compare with."""
        return self.result(self.run(flags, "serial", 1, "none"))

    def checked(self, flags: list[str], engine: str, workers: int) -> Run:
        """A run that is checked: with the mistake, if one is planted."""
        return self.result(self.run(flags, engine, workers, self.mistake))

    def killed(self, flags: list[str], engine: str, workers: int, step: int) -> Path:
        """The folder of a run that has been killed after some steps; it saves after each."""
        return self.run([*flags, "--save-every", "1"], engine, workers, f"kill-{step}")

    def resumed(self, killed: Path, flags: list[str], engine: str, workers: int) -> Run:
        """A killed run that goes on, with as many workers or others; its folder stays."""
        folder = self.folder / f"resumed-{self.count}"
        shutil.copytree(killed, folder)
        flags = [flag for flag in flags if flag != "--overwrite"]
        more = ["--save-every", "1", "--resume", "auto"]
        return self.result(self.run([*flags, *more], engine, workers, self.mistake, into=folder))

    def result(self, folder: Path) -> Run:
        """Read what a run has left.

        Raises:
            RuntimeError: it has not finished; has its last words.
        """
        try:
            trace = json.loads((folder / "trace.json").read_text())
            state = checkpoint.load(folder / checkpoint.LATEST)
            rows = (folder / "log.txt").read_text().splitlines()[1:]
        except Exception as error:
            words = (self.last.stderr or self.last.stdout).strip().splitlines()
            said = [line for line in words if "error" in line.lower()] or words
            raise RuntimeError(said[0] if said else str(error)) from error
        return Run(trace["loss"], state, [row.split("\t")[4] for row in rows])


def compare(one: Run, other: Run, tolerance: float) -> tuple[bool, str]:
    """Whether two runs agree, and in words how far they differ and from which step on."""
    steps = list(zip(reversed(one.losses), reversed(other.losses), strict=False))
    gaps = [abs(a - b) for a, b in reversed(steps)]  # a resumed run has its last steps only
    offset = len(one.losses) - len(gaps)
    first = next((offset + k for k, gap in enumerate(gaps) if not gap <= tolerance), None)
    tensors = {**one.state["state_dict"], **_momentum(one.state)}
    others = {**other.state["state_dict"], **_momentum(other.state)}
    worst = max(
        (float((tensor.double() - others[name].double()).abs().max()) for name, tensor in
         tensors.items()),
        default=0.0,
    )  # fmt: skip
    words = f"loss differs by {max(gaps, default=0.0):.1e}, parameters by {worst:.1e}"
    if first is not None:
        words += f", first at step {first}"
    same_scores = one.accuracies == other.accuracies
    if not same_scores:
        words += f", accuracy {' '.join(one.accuracies)} against {' '.join(other.accuracies)}"
    return first is None and worst <= tolerance and same_scores, words


def _momentum(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    entries = state["optimizer"]["state"].items()
    return {f"momentum of parameter {i}": entry["momentum_buffer"] for i, entry in entries}


def verify(runner: Runner) -> list[str]:
    """Run all checks, print a line each; returns the names of those that fail."""
    engines = ["dist", "horovod"] if has_horovod() else ["dist"]
    if len(engines) == 1:
        print("note: Horovod is not installed (./setup.sh --horovod): its checks are left out")
    alone = runner.reference(ALEXNET)
    synced = runner.reference(SYNCED)
    caught: list[str] = []

    def check(name: str, tolerance: float, reference: Run | None, run: Callable[[], Run]) -> Any:
        done = None
        try:
            if reference is None:
                raise RuntimeError("the run to compare with has failed")
            done = run()
            holds, words = compare(reference, done, tolerance)
        except RuntimeError as error:
            holds, words = False, str(error)
        if not holds:
            caught.append(name)
        print(f"{'ok  ' if holds else 'FAIL'}  {name}: {words} (allowed {tolerance:g})", flush=True)
        return done

    for engine in engines:
        two = check(
            f"{engine}, 2 workers train as one",
            1e-9,
            alone,
            partial(runner.checked, ALEXNET, engine, 2),
        )
        check(
            f"{engine}, 3 workers train as one",
            1e-9,
            alone,
            partial(runner.checked, ALEXNET, engine, 3),
        )
        check(
            f"{engine}, 2 workers with --sync-bn and dropout train as one",
            1e-7,
            synced,
            partial(runner.checked, SYNCED, engine, 2),
        )
        killed = runner.killed(ALEXNET, engine, 2, step=3)
        check(
            f"{engine}, killed and resumed equals untouched",
            0.0,
            two,
            partial(runner.resumed, killed, ALEXNET, engine, 2),
        )
    check(
        f"{engine}, killed with 2 workers, resumed by dist with 3, trains as one",
        1e-9,
        alone,
        partial(runner.resumed, killed, ALEXNET, "dist", 3),
    )
    return caught


def main() -> int:
    """Parse, verify; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plant", choices=sorted(MISTAKES), default="none", metavar="MISTAKE",
                        help=f"plant one of {', '.join(sorted(MISTAKES))}")  # fmt: skip
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        caught = verify(Runner(Path(folder), options.plant))
    planted = "" if options.plant == "none" else f"; planted: {options.plant}"
    print(f"failed: {'; '.join(caught)}{planted}" if caught else f"all checks hold{planted}")
    return FAILED if caught else 0


if __name__ == "__main__":
    sys.exit(main())
