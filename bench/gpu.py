"""The command behind bench/gpu.sh: seconds an epoch on one GPU, against targets and a plain script.

All variants run in one worker process (bench/gpu_worker.py), which is ended and started anew where
a variant fails or takes too long. After each variant gpu.json is written; the table comes last,
also when the command is told to end.
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
from typing import Any, NamedTuple

import torch

from bench.common import Result, header, header_lines, process_environment, ratio, timed
from bench.gpu_worker import TEST, TRAIN
from utils.config.arg_types import ArgumentParser
from utils.config.recipes import find_recipe
from utils.errors import UserError, command
from utils.files import make_output, write_text

GIB = 2**30
# Seconds: in all, for one variant, and until the worker has its images.
BUDGET, VARIANT_BUDGET, START_BUDGET = 510, 90, 120
LEAST = 5  # The seconds below which no variant is begun.
KERNELS = 25  # The rows of a profile.


class Model(NamedTuple):
    """A row of the plan.

    Attributes:
        floor: The seconds of an epoch that bf16 cannot go below on an H200, from FLOPs, bytes and
            launches; None where nobody has counted.
        target: The seconds of an epoch in bf16 that are aimed at.
        gain: The plain script's time over ours in fp32 that is aimed at; None compares nothing.
        fraction: The part of the images that is enough for this comparison.
    """

    floor: float | None = None
    target: float | None = None
    gain: float | None = None
    fraction: float = 1.0


MODELS = {
    "alexnet": Model(0.03, 0.1, gain=10),
    "vgg19_bn": Model(0.15, 0.3, gain=10),
    "resnet110": Model(0.9, 1.3, gain=3, fraction=0.25),
    "wrn28_10": Model(2.0, 5),
    "resnext29_8x64d": Model(2.8, 6),
    "densenet_bc_100_12": Model(1.2, 2),
    "resnet1202": Model(9.3, 13),
}
# The first of a precision pays for the choice of algorithms, as a run of its own would.
VARIANTS = ("bf16 graph", "fp32 graph", "bf16", "fp32")

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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        UserError: There is no such flag, value or recipe, or no GPU.
    """
    parser = ArgumentParser(prog="bench/gpu.sh", allow_abbrev=False, add_help=False)
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
    """A variant of a model, to be measured."""

    model: str
    variant: str

    def __str__(self) -> str:
        """Return the job as the worker process takes it."""
        return f"{self.model}:{self.variant}:{MODELS.get(self.model, Model()).fraction}"

    def failed(self, error: str) -> dict[str, Any]:
        """Return the record of a job that has not been measured."""
        return {"model": self.model, "arm": self.variant, "error": error}


def plan(options: argparse.Namespace) -> list[Job]:
    """Return what is to be measured, in this order."""
    jobs, last = [], []
    for name in options.models:
        variants = [*VARIANTS, *(["bf16 graph compiled"] if options.compile else [])]
        if MODELS.get(name, Model()).gain:
            variants.append("plain")
            last.append(Job(name, "script bf16"))
        jobs += [Job(name, variant) for variant in variants]
    jobs += last
    if options.profile:
        jobs = [Job(options.profile, f"profile {variant}") for variant in VARIANTS]
    if options.device == "cpu":  # It computes bf16 slowly, if at all.
        jobs = [Job(name, variant.replace("bf16", "fp32")) for name, variant in jobs]
    return list(dict.fromkeys(jobs))


class Worker:
    """The process that measures; it gives its output line by line."""

    def __init__(self, jobs: Sequence[Job], options: argparse.Namespace) -> None:
        """Start the process."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
        command = [sys.executable, "-m", "bench.gpu_worker", *map(str, jobs)]
        command += ["--loaders", *options.loaders, "--scale", str(options.scale)]
        self.process = subprocess.Popen(
            command,
            # Taken down after a profile, CUPTI may not start again beside graphs. torch's profiler
            # sees to that for the graphs that torch.compile makes, not for ours.
            env=process_environment(torch.get_num_threads(), TEARDOWN_CUPTI="0", **hidden),
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
        """Return the next line; None at the end.

        Raises:
            queue.Empty: None has come in this time.
        """
        return self.lines.get(timeout=max(0.0, seconds))

    def end(self) -> None:
        """End the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):  # It has ended.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def measure_all(jobs: Sequence[Job], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a record of every job, in order; one with an "error" where it was not measured."""
    ends = time.monotonic() + options.budget
    left = list(jobs)
    while left and ends - time.monotonic() > LEAST:
        worker = Worker(left, options)
        try:
            yield from _records(worker, left, ends)
        finally:
            worker.end()
    for job in left:
        yield job.failed("did not fit into the time")


def _records(worker: Worker, left: list[Job], ends: float) -> Iterator[dict[str, Any]]:
    """Yield the records of one worker; take their jobs off the list, a failed one included."""
    limit = START_BUDGET
    while left:
        rest = ends - time.monotonic()
        try:
            line = worker.line(min(rest, limit))
        except queue.Empty:
            if rest > limit:
                yield left.pop(0).failed(f"took more than {limit} s")
            return
        if line is None:
            lost = left[:1] if limit == VARIANT_BUDGET else left  # All where it did not even start.
            for job in list(lost):
                left.remove(job)
                yield job.failed("the process has failed")
            return
        record = json.loads(line)
        limit = VARIANT_BUDGET
        if "model" in record:
            left.pop(0)
            yield record
            if "error" in record or record.get("warnings"):
                return  # The worker has ended.


def ceilings(device: torch.device) -> dict[str, float]:
    """Return the bytes/s of a copy, read and written, and the FLOP/s of a bf16 product."""
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
    """Return what the header says of the GPU."""
    found = about["ceilings"]
    return [
        f"driver {about['driver']}, CUDA {about['versions']['cuda'] or 'none'}, cuDNN "
        f"{about['cudnn']}; TF32 in convolutions {about['tf32_convolutions']}, in products "
        f"{about['tf32_products']}",
        f"measured: copy {found['copy'] / 1e12:.2f} TB/s, bf16 product "
        f"{found['product'] / 1e12:.0f} TFLOP/s",
    ]


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, the versions and the settings that the numbers belong to."""
    device = torch.device(options.device)
    driver = ""
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # The table matters more.
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
    """Return the rows of the table for a variant."""
    name, variant = record["model"], record["arm"]
    model = MODELS.get(name, Model())
    if "error" in record:
        return [(name, variant, record["error"], *["-"] * 9)]
    if variant == "plain":
        return _plain_rows(record, model, images)
    fewer = record.get("steps", 0) < record.get("of_steps", 0)
    bf16 = "bf16" in variant
    peak = record.get("peak_memory")
    speed = record.get("images_per_second", sum(images) / record["epoch"])
    warned = " (no graph: see gpu.json)" if record.get("warnings") else ""
    return [
        (
            name,
            variant + warned,
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
    for variant, times in seconds.items():
        if variant != "ours":
            epoch = whole * median(times)
            gain = str(ratio(times, seconds["ours"]))
            wanted = f">= {model.gain:g}" if model.gain else "-"
            rows.append(
                (record["model"], variant, f"{'~' if whole > 1 else ''}{epoch:.3f}", *["-"] * 4,
                 f"{sum(images) / epoch:,.0f}", "-", "-", gain, wanted)
            )  # fmt: skip
    return rows


def profile_text(record: dict[str, Any]) -> str:
    """Return the kernels of a profile as a table."""
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
    """Measure; print each variant as it comes, and the table last."""
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
    """Parse, measure and report; return the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # The table is printed first.
    run(parse(argv))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
