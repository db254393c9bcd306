"""Prove on this machine that training does not depend on workers, engine or interruptions.

    ./launcher.sh --verify

This trains small networks several times, in double precision, and compares the loss of every step,
the final parameters and the evaluation: one process against several workers of each engine, a run
that is killed and resumed against one that nobody touched, and one that goes on with another number
of workers. Every check prints a line; the exit code is 1 if one fails. --plant MISTAKE injects a
mistake that other projects have made into the runs that are checked, and must make a check fail.

Where PyTorch sees GPUs, all of it happens on them, and CUDA graphs are compared with eager steps,
too; with CUDA_VISIBLE_DEVICES= the CPU is proved. What the machine is too small for is named.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.commands import SCRIPTS, clean_environment, engine_command
from tools.fault_injection import MISTAKES
from utils.checkpoint.format import LATEST, load
from utils.files import ROOT
from utils.launch.commands import has_horovod

FAILED = 1
COMMON = [
    "-d", "synthetic10", "--train-size", "101", "--test-size", "53", "--train-batch", "64",
    "--epochs", "2", "--schedule", "1", "--dtype", "float64", "--tf32", "off", "--graph", "off",
    "--overwrite",
]  # fmt: skip
# A graph's learning rate is a tensor of float32, the only one that the fused update on GPUs takes.
# So both rates of a run are numbers that float32 holds exactly.
ALEXNET = [*COMMON, "-a", "alexnet", "--lr", "0.0625", "--gamma", "0.5"]
SYNCED = [
    *COMMON, "-a", "wrn", "--depth", "10", "--widen-factor", "1", "--drop", "0.3", "--sync-bn",
    "--lr", "0.125", "--gamma", "0.5",
]  # fmt: skip
# GPUs train more steps: NCCL's graph is captured at the twelfth, and replayed with a smaller batch
# in between.
GRAPH = ["--graph", "on"]
ON_GPUS = ["--train-size", "997"]
# Doubles round by 1e-16. Sums in another order, of engines and algorithms, differ by so much, which
# the few steps of these runs let grow to 1e-15, with batch norm to 1e-13 (seen on a CPU); the rest
# is left for other processors. The mistakes that are looked for move parameters by more than 1e-3,
# or the accuracy. TF32 plays no part in doubles; it is off all the same.
ROUNDING, SYNCED_ROUNDING = 1e-9, 1e-7
LONGEST = 300  # The seconds that a run may take.


@dataclass(frozen=True)
class Group:
    """Workers that train together.

    Attributes:
        name: Their name in the lines that are printed.
        engine: Their engine: "serial", "dist" or "horovod".
        most: The largest number of them.
        settings: Variables for their environment.
    """

    name: str = "one process"
    engine: str = "serial"
    most: int = 1
    settings: dict[str, str] = field(default_factory=dict)


@dataclass
class Run:
    """What a run has left.

    Attributes:
        losses: The loss of every step.
        state: The content of the last checkpoint.
        accuracies: The validation accuracy of every epoch, as log.txt has it.
    """

    losses: list[float]
    state: dict[str, Any]
    accuracies: list[str]


class Runner:
    """Starts the runs in a folder of their own.

    Args:
        folder: The folder of run folders and traces.
        mistake: The mistake to inject into the runs that are checked, or "none".
        on_gpus: Whether the runs may see the GPUs.
        program: The script that injects a mistake and trains, and its first arguments.
    """

    def __init__(
        self,
        folder: Path,
        mistake: str,
        on_gpus: bool,
        program: tuple[str, ...] = (str(ROOT / "tools" / "fault_injection.py"),),
    ) -> None:
        """Start nothing yet."""
        self.folder = folder
        self.mistake = mistake
        self.program = program
        self.more = ON_GPUS if on_gpus else []
        self.settings = {"OMP_NUM_THREADS": "1"} | ({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})
        # All workers are on this machine, whose own name may lead nowhere.
        if Path("/sys/class/net/lo").exists():
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                self.settings[name] = os.environ.get(name, "lo")
        self.count = 0

    def run(
        self, flags: list[str], group: Group, workers: int, mistake: str, into: Path | None = None
    ) -> Path:
        """Train and return the run folder.

        The exit code does not matter: some runs get killed.

        Args:
            flags: The flags for the script.
            group: The workers.
            workers: Their number.
            mistake: The mistake or fault to inject, or "none".
            into: The run folder, if it is not to be a new one.
        """
        self.count += 1
        folder = into or self.folder / str(self.count)
        script = SCRIPTS[group.engine].removesuffix(".py")
        command = engine_command(group.engine, workers, *self.program)
        command += [mistake, script, *flags, *self.more, "-c", str(folder)]
        command += ["--trace", str(folder / "trace.json")]
        environment = clean_environment(**self.settings, **group.settings)
        try:
            self.last = subprocess.run(
                command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST
            )
        except subprocess.TimeoutExpired:
            words = f"error: has not ended within {LONGEST} seconds"
            self.last = subprocess.CompletedProcess(command, FAILED, "", words)
        return folder

    def reference(self, flags: list[str], group: Group = Group(), workers: int = 1) -> Run | None:
        """Return a run without any mistake, to compare with; None, after a line, if it fails."""
        try:
            return self.result(self.run(flags, group, workers, "none"))
        except RuntimeError as error:
            print(f"FAIL  {group.name} with {workers}, to compare with: {error}", flush=True)
            return None

    def checked(self, flags: list[str], group: Group, workers: int) -> Run:
        """Return a run that is checked, with the mistake, if there is one."""
        return self.result(self.run(flags, group, workers, self.mistake))

    def killed(self, flags: list[str], group: Group, workers: int, step: int) -> Path:
        """Return the folder of a run that was killed after some steps; it saves after each."""
        return self.run([*flags, "--save-every", "1"], group, workers, f"kill-{step}")

    def resumed(self, killed: Path, flags: list[str], group: Group, workers: int) -> Run:
        """Continue a copy of a killed run, with as many workers or others, and return it.

        Raises:
            RuntimeError: It was not killed after a save, or does not finish now.
        """
        if not (killed / LATEST).exists():
            raise RuntimeError("the run to go on with has not been killed after a save")
        folder = self.folder / f"resumed-{self.count}"
        shutil.copytree(killed, folder)
        (folder / "trace.json").unlink(missing_ok=True)  # Left if it was not killed in time.
        flags = [flag for flag in flags if flag != "--overwrite"]
        more = ["--save-every", "1", "--resume", "auto"]
        return self.result(self.run([*flags, *more], group, workers, self.mistake, into=folder))

    def result(self, folder: Path) -> Run:
        """Read what the last run has left.

        Raises:
            RuntimeError: It has not finished, or has gone on without a graph. The message is what
                the run has said.
        """
        for line in self.last.stdout.splitlines():
            if "warning: --graph" in line:
                raise RuntimeError(line)
        try:
            trace = json.loads((folder / "trace.json").read_text())
            state = load(folder / LATEST)
            rows = (folder / "log.txt").read_text().splitlines()[1:]
        except Exception as error:
            words = (self.last.stderr or self.last.stdout).strip().splitlines()
            said = [line for line in words if "error" in line.lower()] or words
            raise RuntimeError(said[0] if said else str(error)) from error
        return Run(trace["loss"], state, [row.split("\t")[4] for row in rows])


def compare(one: Run, other: Run, tolerance: float) -> tuple[bool, str]:
    """Compare two runs.

    Args:
        one: A run from its start.
        other: Another one, which may have the last steps only.
        tolerance: The largest difference of losses and parameters that is allowed.

    Returns:
        Whether they agree, and in words how far they differ and from which step on.
    """
    if not other.losses:
        return False, "it has trained no step"
    steps = list(zip(reversed(one.losses), reversed(other.losses), strict=False))
    gaps = [abs(a - b) for a, b in reversed(steps)]
    offset = len(one.losses) - len(gaps)
    first = next((offset + k for k, gap in enumerate(gaps) if not gap <= tolerance), None)
    tensors, others = _tensors_of(one), _tensors_of(other)
    if tensors.keys() != others.keys():
        return False, f"only one of them has {min(tensors.keys() ^ others.keys())}"
    differences = (
        float((tensor.double() - others[name].double()).abs().max())
        for name, tensor in tensors.items()
    )
    worst = max(differences, default=0.0)
    words = f"loss differs by {max(gaps, default=0.0):.1e}, parameters by {worst:.1e}"
    if first is not None:
        words += f", first at step {first}"
    same_scores = one.accuracies == other.accuracies
    if not same_scores:
        words += f", accuracy {' '.join(one.accuracies)} against {' '.join(other.accuracies)}"
    return first is None and worst <= tolerance and same_scores, words


def _tensors_of(run: Run) -> dict[str, torch.Tensor]:
    """Return parameters, buffers and momentum of a run by name."""
    entries = run.state["optimizer"]["state"].items()
    momentum = {f"momentum of parameter {i}": entry["momentum_buffer"] for i, entry in entries}
    return {**run.state["state_dict"], **momentum}


def groups_of(gpus: int, horovod: bool) -> tuple[list[Group], list[str]]:
    """Return the groups for a machine, and in words what cannot be tried on it.

    Args:
        gpus: The number of its GPUs; 0 for a proof on the CPU.
        horovod: Whether Horovod is installed.
    """
    most = 2 if gpus == 2 else 3
    groups = [Group("dist", "dist", most), Group("horovod", "horovod", most)]
    left_out = ["two GPUs: groups of three workers are left out"] if gpus == 2 else []
    if gpus == 1:
        # NCCL does not let two ranks use one GPU, Gloo does.
        settings = {"CIFAR_SHARE_GPU": "1"}
        groups = [Group("dist over Gloo on one GPU", "dist", most, settings)]
        left_out = ["one GPU: NCCL between GPUs, and Horovod, are left out"]
    elif not horovod:
        groups.pop()
        left_out.append("Horovod is not installed (./setup.sh --horovod): its checks are left out")
    return groups, left_out


class Checks:
    """Compares runs, and prints a line for each comparison.

    Attributes:
        caught: The names of those that have failed.
    """

    def __init__(self) -> None:
        """Start without any comparison."""
        self.caught: list[str] = []

    def __call__(
        self, name: str, tolerance: float, reference: Run | None, run: Callable[[], Run]
    ) -> Run | None:
        """Run what is checked, compare it, and return it, if it has finished.

        Args:
            name: What is checked.
            tolerance: The largest difference that is allowed.
            reference: The run to compare with; None if that has failed.
            run: Starts what is checked.
        """
        done = None
        try:
            if reference is None:
                raise RuntimeError("the run to compare with has failed")
            done = run()
            holds, words = compare(reference, done, tolerance)
        except RuntimeError as error:
            holds, words = False, str(error)
        if not holds:
            self.caught.append(name)
        print(f"{'ok  ' if holds else 'FAIL'}  {name}: {words} (allowed {tolerance:g})", flush=True)
        return done


def verify(runner: Runner, gpus: int) -> list[str]:
    """Run all checks, each of which prints a line, and return the names of those that fail.

    Args:
        runner: Starts the runs.
        gpus: The number of GPUs; 0 for a proof on the CPU.
    """
    groups, left_out = groups_of(gpus, has_horovod())
    for line in left_out:
        print(f"note: {line}", flush=True)
    check = Checks()
    alone = runner.reference(ALEXNET)
    synced = runner.reference(SYNCED)
    if gpus:
        check_graphs(check, runner, gpus, alone, synced)
    killed: dict[str, Path] = {}
    for group in groups:
        several = [
            check(
                f"{group.name}, {workers} workers train as one",
                ROUNDING,
                alone,
                partial(runner.checked, ALEXNET, group, workers),
            )
            for workers in range(2, group.most + 1)
        ]
        check(
            f"{group.name}, 2 workers with --sync-bn and dropout train as one",
            SYNCED_ROUNDING,
            synced,
            partial(runner.checked, SYNCED, group, 2),
        )
        flags, untouched = ALEXNET, several[0]
        if gpus:  # Their algorithms repeat themselves bit for bit on demand only.
            flags = [*ALEXNET, "--deterministic"]
            untouched = runner.reference(flags, group, 2)
        killed[group.name] = runner.killed(flags, group, 2, step=3)
        check(
            f"{group.name}, killed and resumed equals untouched",
            0.0,
            untouched,
            partial(runner.resumed, killed[group.name], flags, group, 2),
        )
    last = groups[-1].name
    other = groups[0] if groups[0].most > 2 else Group()
    check(
        f"{last}, killed with 2 workers, resumed by {other.name} with {other.most}, trains as one",
        ROUNDING,
        alone,
        partial(runner.resumed, killed[last], ALEXNET, other, other.most),
    )
    return check.caught


def check_graphs(
    check: Checks, runner: Runner, gpus: int, alone: Run | None, synced: Run | None
) -> None:
    """Check CUDA graphs against eager steps, and NCCL inside them.

    Args:
        check: Compares.
        runner: Starts the runs.
        gpus: The number of GPUs.
        alone: One process without batch norm, to compare with; None if that has failed.
        synced: One process with batch norm and dropout, likewise.
    """
    serial = Group()
    most = min(gpus, 2)
    nccl = Group("dist over NCCL", "dist", most, {"CIFAR_KEEP_DDP": "1"})
    train = f"{nccl.name}, {'1 worker trains' if most == 1 else '2 workers train'} as one"
    unsynced = [flag for flag in SYNCED if flag != "--sync-bn"]
    check(
        "a graph trains as eager steps do",
        ROUNDING,
        alone,
        partial(runner.checked, [*ALEXNET, *GRAPH], serial, 1),
    )
    check(
        "a graph with batch norm and dropout trains as eager steps do",
        SYNCED_ROUNDING,
        synced,
        partial(runner.checked, [*unsynced, *GRAPH], serial, 1),
    )
    if gpus == 1:
        check(
            train,
            ROUNDING,
            alone,
            partial(runner.checked, ALEXNET, nccl, most),
        )
    check(
        f"{train} in a graph",
        ROUNDING,
        alone,
        partial(runner.checked, [*ALEXNET, *GRAPH], nccl, most),
    )
    check(
        f"{train} in a graph with --sync-bn and dropout",
        SYNCED_ROUNDING,
        synced,
        partial(runner.checked, [*SYNCED, *GRAPH], nccl, most),
    )
    # The smaller last batch trains beside the graph, after warm-up, recording and replays.
    killed = runner.killed([*ALEXNET, *GRAPH], serial, 1, step=4)
    check(
        "killed under a graph and resumed trains as untouched",
        ROUNDING,
        alone,
        partial(runner.resumed, killed, [*ALEXNET, *GRAPH], serial, 1),
    )


def main() -> int:
    """Verify as the command line says and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plant", choices=sorted(MISTAKES), default="none", metavar="MISTAKE",
        help=f"plant one of {', '.join(sorted(MISTAKES))}",
    )  # fmt: skip
    options = parser.parse_args()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus:
        print(f"on {gpus} GPU(s), {torch.cuda.get_device_name(0)}, in double precision, TF32 off")
    with tempfile.TemporaryDirectory() as folder:
        caught = verify(Runner(Path(folder), options.plant, gpus > 0), gpus)
    planted = "" if options.plant == "none" else f"; planted: {options.plant}"
    print(f"failed: {'; '.join(caught)}{planted}" if caught else f"all checks hold{planted}")
    return FAILED if caught else 0


if __name__ == "__main__":
    sys.exit(main())
