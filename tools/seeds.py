"""Train a recipe with several seeds, and print mean and standard deviation of what comes out.

    ./launcher.sh -m resnet20 -d cifar10 --seeds 0-4

One seed is trained after the other, or one per GPU at a time. The run of seed N has the folder
seed<N> in that of the recipe, or of -c. The same command again goes on: it leaves seeds alone that
are trained to their end, and continues the others.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tools.published import mean_and_std
from tools.results import accuracies, flags_beside, read_args, read_rows
from utils import log
from utils.config.args import parse_args
from utils.config.schema import Config
from utils.errors import BAD_INPUT, FAILED, RUN_AGAIN, UserError, command
from utils.files import ROOT, make_output
from utils.launch.commands import script_arguments
from utils.launch.environment import core_count
from utils.launch.options import USAGE, Job, Options, check_job, read_options
from utils.launch.processes import end_with_parent

# Seconds between two looks at the trainings.
POLL_INTERVAL = 0.1
# What asks the launchers to save and stop; SIGUSR2 asks them to save and go on.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Flags for cifar.py that make no sense for all seeds alike: each has its own seed, goes on where it
# was, has results of its own, and may have a GPU of its own.
_NOT_FOR_SEVERAL = {
    "--seed", "--manualSeed", "--start-epoch", "--overwrite", "-e", "--evaluate", "--estimate",
    "--trace", "--gpu-id", "-h", "--help", "--version",
}  # fmt: skip

# Where a training takes place: variables of its environment.
Slot = Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """The training of one seed.

    Attributes:
        seed: The seed.
        folder: The run folder.
    """

    seed: int
    folder: Path


@command
def main() -> int:
    """Train the seeds of a launcher's command line and return the exit code."""
    options = read_options(sys.argv[1:])
    if options.show == "help":
        print(USAGE)
        return 0
    job = check_job(options, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not job.seeds or options.dry_run or options.show:
        raise UserError("--seeds: name the seeds, and nothing that only prints")
    config = common_config(job)
    parent = Path(config.run.checkpoint or "")  # The launcher always names one.
    runs = [Run(seed, parent / f"seed{seed}") for seed in job.seeds]
    left = unfinished(runs, job, config)
    for run in runs:
        if run not in left:
            log.info(f"seed {run.seed}: is trained already, {run.folder}")
    slots = slots_of(job, options, len(left))
    if len(slots) > 1:
        make_output(parent, "-- -c")
    trainings = Trainings(left, slots, partial(launch, options, job))
    trainings.run()
    code = trainings.exit_code()
    kind = "validation" if config.data.val_split else "test"
    what = f"{job.recipe.name} on {config.data.dataset}, {kind} accuracy"
    log.info(report(runs, config.train.epochs, what, code != BAD_INPUT))
    return code


def common_config(job: Job) -> Config:
    """Return the configuration that all seeds have in common.

    Raises:
        UserError: A flag is wrong, or does not go with several seeds.
    """
    for flag in job.flags:
        if flag.partition("=")[0] in _NOT_FOR_SEVERAL:
            raise UserError(f"-- {flag}: does not go with --seeds; leave it out")
    config = parse_args(script_arguments(job.recipe, job.dataset, job.flags))
    if config.run.resume not in (None, "auto"):
        raise UserError(
            f"-- --resume {config.run.resume}: is for one run; --seeds continues its own, leave "
            "it out"
        )
    return config


def unfinished(runs: Sequence[Run], job: Job, config: Config) -> list[Run]:
    """Return the runs that are not trained to their end.

    Raises:
        UserError: A folder holds a run that was trained in another way.
    """
    left = []
    wanted = _training(job, config.options())
    for run in runs:
        try:
            about = read_args(run.folder)
        except UserError:  # There is none, or it is damaged: that is for --resume auto to judge.
            left.append(run)
            continue
        for start in [*about.get("earlier", []), about]:
            options = {**start["options"], "epochs": about["options"].get("epochs")}
            found = _training(job, options)
            if (options.get("seed"), found) != (run.seed, wanted):
                raise UserError(
                    f"--seeds: {run.folder} was trained with --seed {options.get('seed')} {found}, "
                    f"not with --seed {run.seed} {wanted}; name another folder with -- -c DIR, or "
                    "remove this one"
                )
        if len(read_rows(run.folder)) < config.train.epochs:
            left.append(run)
    return left


def _training(job: Job, options: Mapping[str, Any]) -> str:
    """Return the flags that tell a training from another, but for the seed, as a text."""
    images = ["dataset", "data_md5", *(["data"] if options.get("dataset") == "folder" else [])]
    values = {f"--{name.replace('_', '-')}": options.get(name) for name in images}
    words = [word for flag, value in values.items() if value for word in (flag, str(value))]
    return shlex.join([*words, *flags_beside(job.recipe, {**options, "seed": 0})])


def slots_of(job: Job, options: Options, count: int) -> list[Slot]:
    """Return the places for trainings at the same time: one for each -n GPUs, else one for all.

    Args:
        job: Names the GPUs.
        options: Where hosts are named, all GPUs of all of them are one place.
        count: The number of trainings; there are no more places than these.
    """
    ids, workers = job.gpu_ids, job.workers
    if not ids or options.hosts or options.discovery:
        return [{}]
    starts = range(0, len(ids) - workers + 1, workers)
    places = [",".join(ids[start : start + workers]) for start in starts][: max(1, count)]
    # A launcher that knew of no other would give all cores to its workers.
    threads = max(1, core_count() // (len(places) * workers))
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
    return [{"CUDA_VISIBLE_DEVICES": place, **own} for place in places]


def launch(
    options: Options, job: Job, run: Run, slot: Slot, alone: bool
) -> subprocess.Popen[bytes]:
    """Start the launcher of one seed.

    Args:
        options: The launcher's options, of all seeds.
        job: What they mean.
        run: The training.
        slot: Where it is trained.
        alone: Whether no other seed is trained at the same time: its output goes to the screen
            then, else to a file beside the run folder.
    """
    own = ("--seed", str(run.seed), "-c", str(run.folder), "--resume", "auto")
    one = options.words(
        seeds="",
        gpus="" if slot else options.gpus,
        workers=str(job.workers),
        flags=(*job.flags, *own),
    )
    text = f"seed {run.seed}: training in {run.folder}"
    with ExitStack() as stack:
        output = None
        if not alone:
            file = stack.enter_context(run.folder.with_suffix(".out").open("ab"))
            output = file.fileno()
            text += f" on GPU {slot['CUDA_VISIBLE_DEVICES']}, output in {file.name}"
        log.info(text)
        return subprocess.Popen(
            ["bash", str(ROOT / "launcher.sh"), *one],
            env={**os.environ, **slot},
            stdout=output,
            stderr=output,
            preexec_fn=partial(_prepare_launcher, os.getpid()),
        )


def _prepare_launcher(parent: int) -> None:
    """Let a launcher save and stop when this process is killed; runs in its process."""
    # Until its supervisor handles it, a request to save and go on would end it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    end_with_parent(signal.SIGTERM, parent)


@dataclass
class _Running:
    """A run that is under way; ``forwarded`` counts the requests that its launcher has had."""

    run: Run
    slot: Slot
    process: subprocess.Popen[bytes]
    forwarded: int


class Trainings:
    """Trains runs, as many at a time as there are slots, and passes signals on to their launchers.

    A run that fails leaves the others alone. After bad input, such as a run folder in use, and
    after a request to stop no other run is started.

    Args:
        runs: The runs.
        slots: The places for trainings at the same time.
        launch: Starts the launcher of a run on a slot.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        slots: Sequence[Slot],
        launch: Callable[[Run, Slot, bool], subprocess.Popen[bytes]],
    ) -> None:
        """Start nothing yet."""
        self._waiting, self._free = list(runs), list(slots)
        self._alone = len(slots) == 1
        self._launch = launch
        self._running: list[_Running] = []
        self._codes: set[int] = set()
        self._requests: list[int] = []

    def run(self) -> None:
        """Train until all runs have ended, or nothing more is to be started."""
        for number in (*STOP_SIGNALS, signal.SIGUSR2):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, for example.
                signal.signal(number, lambda number, _: self._requests.append(number))
        while True:
            seen = len(self._requests)
            if self._waiting and self._free and not self._is_over():
                run, slot = self._waiting.pop(0), self._free.pop(0)
                process = self._launch(run, slot, self._alone)
                self._running.append(_Running(run, slot, process, seen))
                continue
            if not self._running:
                return
            time.sleep(POLL_INTERVAL)
            self._forward_requests()
            self._collect()

    def exit_code(self) -> int:
        """Return the exit code of the whole: bad input, else a stop, else a failure, else 0."""
        if BAD_INPUT in self._codes:
            return BAD_INPUT
        if self._is_over() and (self._waiting or self._codes - {0}):
            return RUN_AGAIN
        return FAILED if self._codes - {0} else 0

    def _is_over(self) -> bool:
        """Return whether no other run is to be started."""
        stops = {BAD_INPUT, RUN_AGAIN, *(128 + number for number in STOP_SIGNALS)}
        return bool(self._codes & stops or set(self._requests) & set(STOP_SIGNALS))

    def _forward_requests(self) -> None:
        for running in self._running:
            for number in self._requests[running.forwarded :]:
                running.process.send_signal(number)
                running.forwarded += 1

    def _collect(self) -> None:
        for running in list(self._running):
            if (code := running.process.poll()) is None:
                continue
            self._running.remove(running)
            self._free.append(running.slot)
            code = code if code >= 0 else 128 - code
            self._codes.add(code)
            if code:
                log.info(f"seed {running.run.seed}: has ended with exit code {code}")


def report(runs: Sequence[Run], epochs: int, what: str, goes_on: bool) -> str:
    """Return a line for each seed, and mean and standard deviation over those that are whole.

    Args:
        runs: The runs.
        epochs: The epochs of a whole run.
        what: What the figures are, in words.
        goes_on: Whether the same command would go on with what is left.
    """
    lines, whole = ["seed  epochs    last    best  accuracy in per cent"], []
    for run in runs:
        rows = read_rows(run.folder)
        line = f"{run.seed:>4}  {len(rows):>6}"
        if rows:
            found = accuracies(rows)
            line += f"  {found['last_accuracy']:>6.2f}  {found['best_accuracy']:>6.2f}"
            line += f"  (epoch {found['best_epoch']})"
            if len(rows) >= epochs:
                whole.append(found)
        lines.append(line)
    if whole:
        last = mean_and_std([found["last_accuracy"] for found in whole])
        best = mean_and_std([found["best_accuracy"] for found in whole])
        lines.append(f"{what}, n = {len(whole)}: last {last} %, best {best} %")
    if len(whole) < len(runs):
        rest = "; the same command goes on" if goes_on else ""
        lines.append(f"{len(whole)} of {len(runs)} seeds are trained to their end{rest}")
    return "\n".join(lines)


if __name__ == "__main__":
    log.open_streams()
    sys.exit(main())
