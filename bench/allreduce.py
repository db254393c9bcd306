"""The seconds of one all-reduce by size, with two workers, and latency + size / bandwidth fitted.

The module is also its own worker: a launcher starts it with the engine's script and a file.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.common import Result, Settings, measure, process_environment
from tools.commands import engine_class, engine_command
from utils import log
from utils.files import write_text
from utils.launch.commands import has_horovod
from utils.runtime.exit_codes import exit_process

WORKERS = 2
SIZES = tuple(2**power for power in range(12, 27, 2))  # The bytes: 4 KiB to 64 MiB.
ROUNDS = 2


class Fit(NamedTuple):
    """The line seconds = latency + size / bandwidth, in seconds and bytes per second."""

    latency: float
    bandwidth: float


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Fit:
    """Fit by least squares of the relative errors, so that small sizes count as much as large."""
    times = np.asarray(seconds)
    terms = np.stack([np.ones(len(times)), np.asarray(sizes, dtype=float)], axis=1)
    latency, per_byte = np.linalg.lstsq(terms / times[:, None], np.ones(len(times)), rcond=None)[0]
    return Fit(float(latency), float(1 / per_byte))


def repeats(size: int, scale: float = 1.0) -> int:
    """Return how often a size is sent, which is the same on all workers."""
    return max(3, round(scale * min(100, max(8, 2**24 // size))))


def run(settings: Settings) -> Result:
    """Measure every engine and transport that the machine has."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    variants = {"gloo": ("dist", "cifar", False)}
    if gpus >= WORKERS:
        variants["nccl"] = ("dist", "cifar", True)
    if has_horovod():
        variants["Horovod"] = ("horovod", "cifar_horovod", False)
    with tempfile.TemporaryDirectory() as folder:
        actions = {
            name: partial(_group, name, *variant, Path(folder, "times.json"), settings)
            for name, variant in variants.items()
        }
        raw = measure(actions, settings.rounds or ROUNDS)

    rows = [
        ("size", *(f"{name}, ms" for name in variants), *(f"{name}, GB/s" for name in variants))
    ]
    medians: dict[str, list[float]] = {name: [] for name in variants}
    for k, size in enumerate(SIZES):
        cells, rates = [], []
        for name in variants:
            times = [t for one in raw[name] for t in one[k]]
            middle = median(times)
            medians[name].append(middle)
            cells.append(f"{1e3 * middle:.2f} ({1e3 * min(times):.2f} - {1e3 * max(times):.2f})")
            rates.append(f"{size / middle / 1e9:.2f}")
        text = f"{size >> 10} KiB" if size < 2**20 else f"{size >> 20} MiB"
        rows.append((text, *cells, *rates))
    fits = {name: fit(SIZES, times) for name, times in medians.items()}
    notes = [
        f"{name}: {1e3 * found.latency:.2f} ms + size / {found.bandwidth / 1e9:.2f} GB/s"
        for name, found in fits.items()
    ]
    if "Horovod" in variants:
        notes.append(
            "Horovod agrees on each new tensor first, and wakes up once in a cycle (5 ms on CPUs)"
        )

    def draw(axes: Any) -> None:
        for number, (name, times) in enumerate(medians.items()):
            milliseconds = [1e3 * t for t in times]
            axes.loglog(SIZES, milliseconds, "o", color=f"C{number}", label=name)
            model = [1e3 * (fits[name].latency + s / fits[name].bandwidth) for s in SIZES]
            axes.loglog(SIZES, model, "-", color=f"C{number}")
        axes.set(xlabel="bytes", ylabel="ms")
        axes.legend(fontsize="small")

    return Result(
        f"allreduce: sum over {WORKERS} workers of one thread, by size",
        rows,
        notes,
        {"sizes": SIZES, "seconds": raw, "fit": {name: f._asdict() for name, f in fits.items()}},
        draw,
    )


def _group(
    name: str, engine: str, script: str, on_gpus: bool, path: Path, settings: Settings
) -> list[list[float]]:
    """Return the seconds of each all-reduce on rank 0, by size."""
    print(f"-- allreduce: {name}", flush=True)
    worker = ["-m", "bench.allreduce", script, str(path), str(settings.scale)]
    hidden = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(
        engine_command(engine, WORKERS, *worker),
        env=process_environment(1, **hidden),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return json.loads(path.read_text())


def work(script: str, path: Path, scale: float) -> None:
    """Send each size several times as one worker; rank 0 writes how long it took."""
    comm = engine_class(script).join(timeout=600)
    log.set_rank(comm.rank)
    found = []
    for size in SIZES:
        tensor = torch.zeros(size // 4, device=comm.device)
        times = []
        for _ in range(2 + repeats(size, scale)):
            started = time.perf_counter()
            comm.all_reduce_sum_(tensor)
            if comm.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found.append(times[2:])  # The first two pay for memory and connections.
    if comm.is_main_process:
        write_text(path, json.dumps(found))
    comm.close()


if __name__ == "__main__":
    # The launcher may put --local-rank before them.
    work(sys.argv[-3], Path(sys.argv[-2]), float(sys.argv[-1]))
    exit_process(0)
