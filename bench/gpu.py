"""The command behind bench/gpu.sh: seconds an epoch on one GPU, against targets and a plain script.

All arms run in one worker process (bench/gpu_worker.py), which is ended and started anew where an
arm fails or takes too long. After each arm gpu.json is written; the table comes last, also when
the command is told to end.
"""

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn

import torch

from bench.common import Result, arm_environment, header, header_lines, ratio, timed
from bench.gpu_worker import TEST, TRAIN
from utils.config.recipes import find_recipe
from utils.errors import UserError, command
from utils.files import make_output, write_text

GIB = 2**30
BUDGET = 510  # seconds in all
ARM_BUDGET = 90  # seconds of one arm
START_BUDGET = 120  # seconds until the worker has its images
LEAST = 5  # seconds below which no arm is begun
KERNELS = 25  # rows of a profile


class Model(NamedTuple):
    """A row of the plan.

    Attributes:
        floor: seconds of an epoch that bf16 cannot go below on an H200, from FLOPs, bytes and
            launches; None where nobody has counted.
        target: seconds of an epoch in bf16.
        gain: the plain script's time over ours in fp32 that is aimed at; None compares nothing.
        share: of the images in that comparison.
    """

    floor: float | None = None
    target: float | None = None
    gain: float | None = None
    share: float = 1.0


MODELS = {
    "alexnet": Model(0.03, 0.1, gain=10),
    "vgg19_bn": Model(0.15, 0.3, gain=10),
    "resnet110": Model(0.9, 1.3, gain=3, share=0.25),
    "wrn28_10": Model(2.0, 5),
    "resnext29_8x64d": Model(2.8, 6),
    "densenet_bc_100_12": Model(1.2, 2),
    "resnet1202": Model(9.3, 13),
}
# The first of a precision pays for the choice of algorithms, as a run of its own would.
ARMS = ("bf16 graph", "fp32 graph", "bf16", "fp32")

HEAD = ("model", "arm", "s an epoch", "target", "first epoch", "first steps", "capture", "images/s",
        "% of floor", "peak GiB", "plain / ours", "target")  # fmt: skip
NOTES = [
    "s an epoch: 50,000 images trained and 10,000 evaluated; ~: extrapolated from fewer steps",
    "first steps: seconds until the sixth step is done, choice of algorithms, compilation and "
    "capture included; a model's later arms find algorithms chosen",
    "% of floor: of what an H200 allows in bf16; peak: of tensors",
    "plain: the plain script's loop with so many DataLoader workers in fp32, in turns with ours "
    "(fp32 graph), both with the same TF32 setting; images/s of script: whole epochs",
]


class _Parser(argparse.ArgumentParser):
    """Reports bad input as a UserError of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a flag, a value or a recipe that does not exist, or no GPU.
    """
    parser = _Parser(prog="bench/gpu.sh", allow_abbrev=False, add_help=False)
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-results"))
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--loaders", type=lambda text: text.split(","), default=["4", "16"])
    parser.add_argument("--profile", metavar="MODEL")
    parser.add_argument("--compile", action="store_true")
    # For the tests: everything but the device, on few images.
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args(argv)
    if not options.budget > 0:
        raise UserError(f"--budget {options.budget:g}: give seconds, a number above 0")
    if not all(count.isdecimal() for count in options.loaders):
        raise UserError(f"--loaders {','.join(options.loaders)}: give numbers such as 4,16")
    if options.profile:
        options.profile = find_recipe(options.profile).name
    options.models = [find_recipe(name).name for name in options.only or MODELS]
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU: PyTorch sees none here; run this on a machine that has one")
    return options


class Job(NamedTuple):
    """An arm of a model."""

    model: str
    arm: str

    def __str__(self) -> str:
        return f"{self.model}:{self.arm}:{MODELS.get(self.model, Model()).share}"


def plan(options: argparse.Namespace) -> list[Job]:
    """What is to be measured, in this order."""
    jobs, last = [], []
    for name in options.models:
        arms = [*ARMS, *(["bf16 graph compiled"] if options.compile else [])]
        if MODELS.get(name, Model()).gain:
            arms.append("plain")
            last.append(Job(name, "script bf16"))
        jobs += [Job(name, arm) for arm in arms]
    jobs += last
    if options.profile:
        jobs = [Job(options.profile, f"profile {arm}") for arm in ARMS]
    if options.device == "cpu":  # which computes bf16 slowly, if at all
        jobs = [Job(name, arm.replace("bf16", "fp32")) for name, arm in jobs]
    return list(dict.fromkeys(jobs))


class Worker:
    """The process that measures; give its output lines one by one.

    Raises (``line``):
        queue.Empty: none has come in time.
    """

    def __init__(self, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
        command = [sys.executable, "-m", "bench.gpu_worker", *map(str, jobs)]
        command += ["--loaders", *options.loaders, "--scale", str(options.scale)]
        self.process = subprocess.Popen(
            command,
            # Taken down after a profile, CUPTI may not start again beside graphs. torch's profiler
            # sees to that for the graphs that torch.compile makes, not for ours.
            env=arm_environment(torch.get_num_threads(), TEARDOWN_CUPTI="0", **hidden),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def line(self, seconds: float) -> str | None:
        """The next line; None at the end."""
        return self.lines.get(timeout=max(0.0, seconds))

    def end(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure_all(jobs: Sequence[Job], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A record for every job, in order; one with an "error" where it has not been measured."""
    ends = time.monotonic() + options.budget
    left = list(jobs)
    while left and ends - time.monotonic() > LEAST:
        worker = Worker(left, options)
        try:
            yield from _records(worker, left, ends)
        finally:
            worker.end()
    for job in left:
        yield {**job._asdict(), "error": "did not fit into the time"}


def _records(worker: Worker, left: list[Job], ends: float) -> Iterator[dict[str, Any]]:
    """The records of one worker; takes their jobs off the list, a failed one included."""
    limit = START_BUDGET
    while left:
        rest = ends - time.monotonic()
        try:
            line = worker.line(min(rest, limit))
        except queue.Empty:
            if rest > limit:
                yield {**left.pop(0)._asdict(), "error": f"took more than {limit} s"}
            return
        if line is None:
            lost = left[:1] if limit == ARM_BUDGET else left  # all where it did not even start
            for job in list(lost):
                left.remove(job)
                yield {**job._asdict(), "error": "the process has failed"}
            return
        record = json.loads(line)
        limit = ARM_BUDGET
        if "model" in record:
            left.pop(0)
            yield record
            if "error" in record or record.get("warnings"):
                return  # the worker has ended


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device can do: bytes/s of a copy, read and written, and FLOP/s of a bf16 product."""
    large = device.type == "cuda"
    bytes_ = torch.empty(4 * GIB if large else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(bytes_)
    size = 8192 if large else 64
    dtype = torch.bfloat16 if large else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    found = {}
    for name, action, work in (
        ("copy", partial(target.copy_, bytes_), 2 * bytes_.numel()),
        ("product", partial(torch.mm, left, right), 2 * size**3),
    ):
        timed(action, device)
        found[name] = work / median(timed(action, device) for _ in range(10))
    return found


def gpu_lines(about: dict[str, Any]) -> list[str]:
    """What the header says of the GPU."""
    found = about["ceilings"]
    return [
        f"driver {about['driver']}, CUDA {about['versions']['cuda'] or 'none'}, cuDNN "
        f"{about['cudnn']}; TF32 in convolutions {about['tf32_convolutions']}, in products "
        f"{about['tf32_products']}",
        f"measured: copy {found['copy'] / 1e12:.2f} TB/s, bf16 product "
        f"{found['product'] / 1e12:.0f} TFLOP/s",
    ]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the settings that the numbers belong to."""
    device = torch.device(options.device)
    driver = ""
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # the table matters more
            driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
    return {
        **header(),
        "command": sys.argv,
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cudnn": torch.backends.cudnn.version() or "none",
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "ceilings": ceilings(device),
        "images": [round(options.scale * count) for count in (TRAIN, TEST)],
    }


def rows_of(record: dict[str, Any], images: Sequence[int]) -> list[tuple[str, ...]]:
    """The rows of the table for an arm."""
    name, arm = record["model"], record["arm"]
    model = MODELS.get(name, Model())
    if "error" in record:
        return [(name, arm, record["error"], *["-"] * 9)]
    if arm == "plain":
        return _plain_rows(record, model, images)
    fewer = record.get("steps", 0) < record.get("of_steps", 0)
    bf16 = "bf16" in arm
    peak = record.get("peak_memory")
    speed = record.get("images_per_second", sum(images) / record["epoch"])
    warned = " (no graph: see gpu.json)" if record.get("warnings") else ""
    return [
        (
            name,
            arm + warned,
            f"{'~' if fewer else ''}{record['epoch']:.3f}",
            f"<= {model.target:g}" if bf16 and model.target else "-",
            f"{record['first']:.1f}",
            f"{record['start']:.1f}" if "steps" in record else "-",
            f"{record['capture']:.1f}" if record.get("capture") is not None else "-",
            f"{speed:,.0f}",
            f"{model.floor / record['epoch']:.0%}" if bf16 and model.floor else "-",
            f"{peak / GIB:.1f}" if peak else "-",
            "-",
            "-",
        )
    ]


def _plain_rows(
    record: dict[str, Any], model: Model, images: Sequence[int]
) -> list[tuple[str, ...]]:
    seconds = record["seconds"]
    whole = images[0] / record["images"]
    rows = []
    for arm, times in seconds.items():
        if arm != "ours":
            epoch = whole * median(times)
            gain = str(ratio(times, seconds["ours"]))
            wanted = f">= {model.gain:g}" if model.gain else "-"
            rows.append(
                (record["model"], arm, f"{'~' if whole > 1 else ''}{epoch:.3f}", *["-"] * 4,
                 f"{sum(images) / epoch:,.0f}", "-", "-", gain, wanted)
            )  # fmt: skip
    return rows


def profile_text(record: dict[str, Any]) -> str:
    """The kernels of a profile as a table."""
    if "error" in record:
        return f"{record['model']}, {record['arm']}: {record['error']}"
    total = sum(time for _, _, time in record["kernels"]) or 1.0
    rows = [("% of busy time", "ms a step", "calls a step", "kernel")]
    for name, count, microseconds in record["kernels"][:KERNELS]:
        each = microseconds / record["steps"] / 1e3
        rows.append(
            (f"{microseconds / total:.1%}", f"{each:.3f}", f"{count / record['steps']:.1f}",
             name[:100])
        )  # fmt: skip
    calls = sum(count for _, count, _ in record["kernels"]) / record["steps"]
    notes = [
        f"{record['steps']} steps, {1e3 * record['seconds'] / record['steps']:.2f} ms each under "
        f"the profiler, {calls:,.0f} kernels a step, device idle {record['idle']:.0%} of the time"
    ]
    title = f"{record['model']}, {record['arm']}"
    return Result(title, rows, notes, {}, lambda axes: None).text()


def run(options: argparse.Namespace) -> None:
    """Measure; print each arm as it comes, and the table last."""
    make_output(options.output)
    about = describe(options)
    lines = [*header_lines(about, torch.get_num_threads()), *gpu_lines(about)]
    print("\n".join(lines), flush=True)
    path = options.output / ("gpu-profile.json" if options.profile else "gpu.json")
    records: list[dict[str, Any]] = []
    try:
        for record in measure_all(plan(options), options):
            records.append(record)
            write_text(path, json.dumps({"header": about, "arms": records}, indent=1))
            short = {k: v for k, v in record.items() if k != "kernels"}
            print(json.dumps(short), flush=True)
    finally:
        if options.profile:
            print("\n" + "\n\n".join(map(profile_text, records)))
        else:
            rows = [row for record in records for row in rows_of(record, about["images"])]
            table = Result("one GPU", [HEAD, *rows], NOTES, {}, lambda axes: None)
            print("\n".join(["", *lines, "", table.text()]))
        print(path, flush=True)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure, report; returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the table is printed first
    run(parse(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
