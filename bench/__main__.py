"""The command behind ./launcher.sh --bench; writes bench.json and bench.png."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import allreduce, epoch, loader, scaling, step
from bench.common import Result, Settings, header, header_lines
from utils.config.arg_types import ArgumentParser
from utils.config.args import DATASETS
from utils.config.recipes import find_recipe
from utils.errors import BAD_INPUT, FAILED, UserError, command
from utils.files import make_output, write_text
from utils.metrics.picture import draw_picture, try_drawing

BENCHMARKS = {
    "loader": loader.run,
    "step": step.run,
    "epoch": epoch.run,
    "scaling": scaling.run,
    "allreduce": allreduce.run,
}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, measure and report; return the exit code."""
    try:
        options = parse(argv)
        measure_all(options)
    except subprocess.CalledProcessError as error:
        print(f"error: this arm has failed: {' '.join(error.cmd)}", file=sys.stderr)
        return error.returncode if error.returncode == BAD_INPUT else FAILED
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line.

    Raises:
        UserError: There is no such flag, value, benchmark or recipe.
    """
    parser = ArgumentParser(prog="bench", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "name", nargs="?", default="all", metavar="BENCHMARK", choices=[*BENCHMARKS, "all"],
        help=", ".join(BENCHMARKS) + " or all (default)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("bench-results"), metavar="DIR",
        help="folder for bench.json and bench.png (default: bench-results)",
    )  # fmt: skip
    parser.add_argument(
        "-d", "--dataset", default="synthetic10", choices=DATASETS, metavar="DATASET",
        help="as of cifar.py (default: synthetic10)",
    )  # fmt: skip
    parser.add_argument("--data", default="data", metavar="DIR", help="as of cifar.py")
    parser.add_argument(
        "--models",
        metavar="A,B",
        help="recipes for step, epoch and scaling (default: each its own)",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="turns of each arm (default: each its own)"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N",
        help="of a process that trains alone (default: one a core)",
    )  # fmt: skip
    parser.add_argument(
        "-j", "--loaders", type=int, default=2, metavar="N",
        help="worker processes of the plain script's DataLoader (default: 2)",
    )  # fmt: skip
    parser.add_argument(
        "--scale", type=float, metavar="X",
        help="factor on the images of each run; 0.1 for a quick look (default: 1; for all what "
        "this machine does in less than ten minutes)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    for flag, value in (
        ("--rounds", options.rounds),
        ("--threads", options.threads),
        ("--loaders", options.loaders),
    ):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: give a whole number of 1 or more")
    if options.scale is not None and not 0 < options.scale <= 4:
        raise UserError(f"--scale {options.scale:g}: give a number above 0 and up to 4")
    if options.models is not None:
        names = options.models.split(",")
        options.models = tuple(find_recipe(name).name for name in names)
    return options


def measure_all(options: argparse.Namespace) -> None:
    """Run the benchmarks; after each one print its table and write what there is so far."""
    make_output(options.output)
    found = header()
    scale = options.scale or (step.pace(options.threads) if options.name == "all" else 1.0)
    settings = Settings(
        options.dataset, options.data, options.rounds, options.models, options.threads,
        options.loaders, scale,
    )  # fmt: skip
    about = {**found, "command": sys.argv, "settings": asdict(settings)}
    print("\n".join(header_lines(about, settings.threads, scale)))
    results: dict[str, Result] = {}
    seconds: dict[str, float] = {}
    for name in BENCHMARKS if options.name == "all" else [options.name]:
        started = time.perf_counter()
        results[name] = BENCHMARKS[name](settings)
        seconds[name] = time.perf_counter() - started
        print(f"\n{results[name].text()}\n({seconds[name]:.0f} s)\n", flush=True)
        write(options.output, about, results, seconds)
    print(f"{options.output / 'bench.json'}  {options.output / 'bench.png'}")


def write(
    folder: Path,
    about: Mapping[str, Any],
    results: Mapping[str, Result],
    seconds: Mapping[str, float],
) -> None:
    """Write bench.json and bench.png; warn where the picture cannot be drawn."""
    benchmarks = {
        name: {
            "title": result.title,
            "table": result.rows,
            "notes": result.notes,
            "raw": result.raw,
            "seconds": seconds[name],
        }
        for name, result in results.items()
    }
    text = json.dumps({"header": about, "benchmarks": benchmarks}, indent=1)
    write_text(folder / "bench.json", text)

    def fill(figure: Any) -> None:
        for axes, (name, result) in zip(
            figure.subplots(len(results), squeeze=False)[:, 0], results.items(), strict=True
        ):
            result.draw(axes)
            axes.set_title(name)

    try_drawing(lambda: draw_picture(folder / "bench.png", fill, (10, 3.5 * len(results))))


if __name__ == "__main__":
    raise SystemExit(main())
