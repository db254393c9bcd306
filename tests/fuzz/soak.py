"""Train for minutes under random faults, then prove that nothing came of them.

    python tests/fuzz/soak.py [--minutes 20] [--seed 1] [--engine dist|horovod] [--output DIR]

Two workers train by launcher.sh. From a seed, faults are drawn: workers and launchers are killed,
workers stopped and continued, signals sent to one worker or to all, the newest checkpoint damaged
before a kill, the disk full for a while. After the time is over the run is asked to stop, and a
run that nobody touches is trained to the same step: every parameter, momentum and batch-norm
statistic must be the same bit for bit. The last quarter has no kills, so that one group of workers
lives long enough to see whether its memory or its open files grow.

Not collected by pytest. Exit code 0: everything held; 1: it did not; the last line is JSON.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.process import children_of, workers_below
from tools.commands import SCRIPTS, clean_environment, engine_command
from utils.checkpoint import format as checkpoint

FLAGS = [
    "--train-size", "1001", "--test-size", "200", "--train-batch", "64", "--epochs", "10000",
    "--lr", "0.02", "--save-every", "3", "--timeout", "60",
]  # fmt: skip
STEPS = 16  # an epoch: 1,001 images in batches of 64
RECIPE = "-a resnet --depth 20".split()


class Job:
    """The launcher and what it has started.

    Args:
        engine: "dist" or "horovod".
        folder: of the run.
        log: gets the output.
    """

    def __init__(self, engine: str, folder: Path, log: Path) -> None:
        command = [
            str(ROOT / "launcher.sh"), "-m", "resnet20", "-n", "2", "-d", "synthetic10",
            "-f", engine, "--max-restarts", "1000", "--", *FLAGS,
            "-c", str(folder), "--resume", "auto",
        ]  # fmt: skip
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=clean_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> bool:
        """Whether the launcher has ended."""
        return self.process.poll() is not None

    def workers(self) -> dict[int, int]:
        """The processes that train, by rank."""
        return workers_below(self.process.pid)

    def launcher(self) -> int | None:
        """The process of torch.distributed.launch or horovodrun."""
        children = children_of(self.process.pid)
        return children[0] if children else None


class Faults:
    """What may happen, by name.

    Args:
        job: the job.
        folder: of its run.
        draw: the generator.
    """

    gentle = ("pause", "save", "full-disk")
    rough = ("kill-worker", "kill-launcher", "term-worker", "interrupt", "damage")

    def __init__(self, job: Job, folder: Path, draw: random.Random) -> None:
        self.job = job
        self.folder = folder
        self.draw = draw

    def happen(self, name: str) -> None:
        """Let it happen; a process that has just ended is nothing to speak of."""
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, KeyError, IndexError):
            getattr(self, "_" + name.replace("-", "_"))()

    def _worker(self) -> int:
        return self.draw.choice(sorted(self.job.workers().values()))

    def _kill_worker(self) -> None:
        os.kill(self._worker(), signal.SIGKILL)

    def _kill_launcher(self) -> None:
        launcher = self.job.launcher()
        if launcher:
            os.kill(launcher, signal.SIGKILL)

    def _term_worker(self) -> None:
        os.kill(self._worker(), self.draw.choice((signal.SIGTERM, signal.SIGUSR1)))

    def _interrupt(self) -> None:
        self.job.process.send_signal(self.draw.choice((signal.SIGINT, signal.SIGTERM)))

    def _save(self) -> None:
        os.kill(self._worker(), signal.SIGUSR2)

    def _pause(self) -> None:
        worker = self._worker()
        os.kill(worker, signal.SIGSTOP)
        time.sleep(self.draw.uniform(0.5, 3))
        os.kill(worker, signal.SIGCONT)

    def _full_disk(self) -> None:
        worker = self.job.workers()[0]
        limits = resource.prlimit(worker, resource.RLIMIT_FSIZE)
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1000, limits[1]))
        time.sleep(self.draw.uniform(2, 8))
        resource.prlimit(worker, resource.RLIMIT_FSIZE, limits)

    def _damage(self) -> None:
        """Of two good checkpoints the newest is spoilt; the workers are held still, then killed."""
        if not (self.folder / checkpoint.PREVIOUS).exists():
            return
        workers = self.job.workers()
        for worker in workers.values():
            os.kill(worker, signal.SIGSTOP)
        path = self.folder / checkpoint.LATEST
        content = bytearray(path.read_bytes())
        if self.draw.random() < 0.5:
            content = content[: self.draw.randrange(len(content))]
        else:
            content[len(content) // 2] ^= 1 << self.draw.randrange(8)
        # A new file: the best checkpoint may be another name of the old one.
        spoilt = path.with_name("spoilt")
        spoilt.write_bytes(content)
        spoilt.replace(path)
        os.kill(workers[0], signal.SIGKILL)
        os.kill(workers[1], signal.SIGCONT)


def usage(process: int) -> tuple[float, int]:
    """Resident memory in MiB and open files of a process."""
    words = Path(f"/proc/{process}/statm").read_text().split()
    files = len(os.listdir(f"/proc/{process}/fd"))
    return int(words[1]) * resource.getpagesize() / 2**20, files


def soak(engine: str, minutes: float, seed: int, folder: Path, log: Path) -> dict:
    """Train under faults until the time is over; returns what has happened."""
    draw = random.Random(seed)
    happened: Counter[str] = Counter()
    samples: dict[int, list[tuple[float, float, int]]] = {}
    begun = time.monotonic()
    end, calm = begun + 60 * minutes, begun + 45 * minutes
    job = Job(engine, folder, log)
    due = begun + 20
    while (now := time.monotonic()) < end:
        time.sleep(0.25)
        if job.ended():
            code = job.process.returncode
            if code not in (75, 130, 143):  # the latter before the workers were there
                raise SystemExit(f"the job has ended with {code}; see {log}")
            happened["resumed by hand" if code == 75 else "begun again by hand"] += 1
            job = Job(engine, folder, log)
        for process in job.workers().values():
            with contextlib.suppress(OSError):
                samples.setdefault(process, []).append((now, *usage(process)))
        if now > due and job.workers():
            faults = Faults(job, folder, draw)
            names = faults.gentle if now > calm else faults.rough + faults.gentle
            name = draw.choice(names)
            print(f"{now - begun:6.0f} s  {name}", flush=True)
            faults.happen(name)
            happened[name] += 1
            due = time.monotonic() + draw.uniform(5, 30)
    asked = time.monotonic()
    job.process.terminate()
    code = job.process.wait(60)
    return {
        "faults": dict(happened),
        "restarts": log.read_text(errors="replace").count("; restart "),
        "last exit code": code,
        "seconds to stop": round(time.monotonic() - asked, 1),
        **growth(samples),
    }


def growth(samples: dict[int, list[tuple[float, float, int]]]) -> dict:
    """Growth of memory and open files of the worker that has lived longest.

    The first minute, in which memory is still being taken, does not count; then the first fifth
    of its life is compared with the last. A file that is just being written is open too, so the
    fewest open files count: what leaks stays.
    """
    life = max(samples.values(), key=lambda points: points[-1][0] - points[0][0])
    later = [point for point in life if point[0] > life[0][0] + 60] or life
    part = max(1, len(later) // 5)
    memory = [median(p[1] for p in points) for points in (later[:part], later[-part:])]
    files = [min(p[2] for p in points) for points in (later[:part], later[-part:])]
    return {
        "longest life, s": round(life[-1][0] - life[0][0]),
        "memory, MiB": [round(m, 1) for m in memory],
        "memory growth, %": round(100 * (memory[1] / memory[0] - 1), 2),
        "open files": files,
    }


def train_untouched(engine: str, folder: Path, steps: int, log: Path) -> None:
    """Train so many steps and save then, in the same place: before or after an evaluation."""
    inside = steps % STEPS > 0
    fault = f"kill-{steps}" if inside else f"term-{steps - 2}"
    script = [
        str(ROOT / "tools" / "fault_injection.py"),
        fault,
        SCRIPTS[engine].removesuffix(".py"),
    ]
    arguments = [*RECIPE, "--wd", "1e-4", "-d", "synthetic10", *FLAGS, "-c", str(folder)]
    arguments += ["--schedule", "81", "122", "--gamma", "0.1"]
    arguments += ["--save-every", "1"] if inside else []
    with log.open("ab") as file:
        subprocess.run(
            engine_command(engine, 2, *script, *arguments),
            env=clean_environment(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
            stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False,
        )  # fmt: skip


def state_of(folder: Path) -> tuple[int, dict]:
    """Steps done, and the digests of what a run consists of."""
    state = checkpoint.load(folder / checkpoint.LATEST)
    parts = ("state_dict", "buffers", "optimizer", "step_sums", "epoch", "step", "best_acc")
    return state["epoch"] * STEPS + state["step"], {p: checkpoint.digest(state[p]) for p in parts}


def main() -> int:
    """Parse, soak, compare; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("dist", "horovod"), default="dist")
    parser.add_argument("--output", type=Path, help="folder of runs and log (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        output = options.output or Path(temporary)
        output.mkdir(parents=True, exist_ok=True)
        log = output / "soak.log"
        result = soak(options.engine, options.minutes, options.seed, output / "soaked", log)
        steps, soaked = state_of(output / "soaked")
        print(f"untouched run of {steps} steps", flush=True)
        train_untouched(options.engine, output / "untouched", steps, log)
        steps_alone, alone = state_of(output / "untouched")
    result |= {"engine": options.engine, "minutes": options.minutes, "seed": options.seed}
    result |= {"steps": steps, "equal": (steps_alone, alone) == (steps, soaked)}
    held = (
        result["equal"]
        and result["last exit code"] == 75
        and result["memory growth, %"] < 2
        and result["open files"][0] == result["open files"][1]
    )
    if not result["equal"]:
        differing = [p for p in soaked if soaked[p] != alone[p]]
        result["differs"] = {"steps": [steps_alone, steps], "parts": differing}
    print(json.dumps(result))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
