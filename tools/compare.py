"""Train the same recipe with one process, DistributedDataParallel and Horovod, and compare.

    ./launcher.sh --compare -m resnet20 -n 2 -d synthetic10 -- --epochs 1 --train-size 2560

This prints a table and writes compare.json and compare.png. Seed, data and global batch are the
same, so the loss of every step and the final parameters differ by rounding only. Batch norm over
each worker's shard is the exception: add --sync-bn to compare networks that have it. The time of
communication is what the same workers save when they average nothing.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tools.commands import engine_command
from utils.checkpoint.format import LATEST, load
from utils.config.recipes import Recipe, find_recipe
from utils.errors import BAD_INPUT, FAILED, UserError, command
from utils.files import ROOT, make_output, write_text
from utils.launch.commands import has_horovod
from utils.metrics.picture import draw_picture, try_drawing
from utils.runtime.provenance import shareable

ONE_PROCESS = "one process"
ENGINES = (ONE_PROCESS, "dist", "horovod")


@dataclass(frozen=True)
class Variant:
    """What the training with one engine has left.

    Attributes:
        trace: Loss and times of every step.
        state: The final parameters and buffers.
        trace_without_sync: The same of workers that average nothing; None for one process.
    """

    trace: dict[str, Any]
    state: dict[str, torch.Tensor]
    trace_without_sync: dict[str, Any] | None = None


@command
def main() -> int:
    """Train with every engine, report, and return the exit code."""
    options = _parse_args()
    try:
        recipe = find_recipe(options.model)
        make_output(options.output)  # A folder that cannot be made should not cost minutes.
        variants = run_variants(recipe, options)
    except subprocess.CalledProcessError as error:
        print(f"error: this arm has failed: {' '.join(error.cmd)}", file=sys.stderr)
        return error.returncode if error.returncode == BAD_INPUT else FAILED
    summary = summarise(variants)
    summary["command"] = shareable(sys.argv)
    content = {"summary": summary, "arms": [variant.trace for variant in variants.values()]}
    write_text(options.output / "compare.json", json.dumps(content, indent=1))
    draw(variants, summary, options.output / "compare.png")
    print(table(summary))
    print(f"{options.output / 'compare.json'}  {options.output / 'compare.png'}")
    return 0


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", dest="model", required=True, metavar="MODEL", help="a recipe")
    parser.add_argument("-n", dest="workers", type=int, default=2, metavar="WORKERS")
    parser.add_argument("-d", dest="dataset", default="synthetic10", metavar="DATASET")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("compare"), metavar="DIR",
        help="folder for compare.json and compare.png (default: compare)",
    )  # fmt: skip
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: flags for cifar.py")
    return parser.parse_args()


def run_variants(recipe: Recipe, options: argparse.Namespace) -> dict[str, Variant]:
    """Train with every engine that is there.

    Args:
        recipe: What is trained.
        options: The command line.

    Returns:
        What each training has left, by engine.

    Raises:
        subprocess.CalledProcessError: A training has failed; it has said why.
    """
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            if engine == "horovod" and not has_horovod():
                print("Horovod is not installed (./setup.sh --horovod): comparing the other two")
                continue
            trace, state = _train(engine, recipe, options, Path(folder))
            alone = None
            if engine != ONE_PROCESS:
                alone, _ = _train(engine, recipe, options, Path(folder), "--no-exchange")
            variants[engine] = Variant(trace, state, alone)
    return variants


def _train(
    engine: str, recipe: Recipe, options: argparse.Namespace, folder: Path, *more: str
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Train with an engine and more flags; return the trace and the final state."""
    run, trace = folder / "run", folder / "trace.json"
    last = [*options.flags, *more, "-c", str(run), "--overwrite", "--trace", str(trace)]
    if engine == ONE_PROCESS:
        words = engine_command("serial", 1, str(ROOT / "cifar.py"), *recipe.flags)
        words += ["-d", options.dataset, "--data", str(ROOT / "data"), *last]
    else:
        words = ["bash", str(ROOT / "launcher.sh"), "-m", recipe.name, "-n", str(options.workers)]
        words += ["-d", options.dataset, "-f", engine, "--", *last]
    print(f"-- {engine}{' without exchange' if more else ''}", flush=True)
    # The training's own report would bury the comparison; its errors go to the screen.
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    if not trace.exists():
        raise UserError("--compare: nothing was trained; leave out flags such as -h, --estimate")
    return json.loads(trace.read_text()), load(run / LATEST)["state_dict"]


def summarise(variants: Mapping[str, Variant]) -> dict[str, Any]:
    """Return speeds, the parts of a step's time, and the differences from one process."""
    base = variants[ONE_PROCESS]
    engines = {engine: _summary_of(variant, base) for engine, variant in variants.items()}
    return {"torch": str(torch.__version__), "engines": engines}


def _summary_of(variant: Variant, base: Variant) -> dict[str, Any]:
    trace, alone = variant.trace, variant.trace_without_sync or variant.trace
    data, compute = _usual_seconds(trace, "data"), _usual_seconds(trace, "compute")
    without_sync = _usual_seconds(alone, "compute")
    step = data + compute
    differences = _loss_differences(variant, base)
    worst = max(range(len(differences)), key=differences.__getitem__)
    return {
        "workers": trace["workers"],
        "steps": len(differences),
        "images_per_second": trace["global_batch"][0] / step,
        "share_data": data / step,
        "share_compute": min(without_sync, compute) / step,
        "share_communication": max(0.0, compute - without_sync) / step,
        "largest_loss_difference": differences[worst],
        "at_step": worst,
        "largest_parameter_difference": max(
            float((tensor.double() - base.state[name].double()).abs().max())
            for name, tensor in variant.state.items()
            if tensor.is_floating_point()
        ),
    }


def _usual_seconds(trace: Mapping[str, Any], part: str) -> float:
    """Return the median over the steps, but for the first: it pays for memory and connections."""
    return median(trace[f"{part}_seconds"][1:])


def _loss_differences(variant: Variant, base: Variant) -> list[float]:
    pairs = zip(variant.trace["loss"], base.trace["loss"], strict=True)
    return [abs(one - other) for one, other in pairs]


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as aligned text."""
    rows = [("engine", "workers", "images/s", "data", "compute", "communication",
             "loss differs by", "parameters by")]  # fmt: skip
    for engine, numbers in summary["engines"].items():
        rows.append(
            (
                engine,
                str(numbers["workers"]),
                f"{numbers['images_per_second']:,.0f}",
                f"{numbers['share_data']:.1%}",
                f"{numbers['share_compute']:.1%}",
                f"{numbers['share_communication']:.1%}",
                f"{numbers['largest_loss_difference']:.1e} (step {numbers['at_step']})",
                f"{numbers['largest_parameter_difference']:.1e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def draw(variants: Mapping[str, Variant], summary: Mapping[str, Any], picture: Path) -> None:
    """Draw the loss per step, its difference from one process, and what takes the time.

    A picture that cannot be drawn is a warning.
    """

    def fill(figure: Any) -> None:
        loss, difference, time = figure.subplots(1, 3)
        base = variants[ONE_PROCESS]
        for style, (engine, variant) in zip(("-", "--", ":"), variants.items(), strict=False):
            loss.plot(variant.trace["loss"], style, label=engine)
            if engine != ONE_PROCESS:
                differences = _loss_differences(variant, base)
                difference.semilogy([max(gap, 1e-17) for gap in differences], label=engine)
        loss.set(xlabel="step", ylabel="loss")
        difference.set(xlabel="step", ylabel="difference from one process")
        left = [0.0] * len(variants)
        for part in ("data", "compute", "communication"):
            parts = [100 * numbers[f"share_{part}"] for numbers in summary["engines"].values()]
            time.barh(list(variants), parts, left=left, label=part)
            left = [a + b for a, b in zip(left, parts, strict=True)]
        time.set(xlabel="share of a step, %")
        for axes in (loss, difference, time):
            axes.legend(fontsize="small")

    try_drawing(lambda: draw_picture(picture, fill, (13, 4)))


if __name__ == "__main__":
    raise SystemExit(main())
