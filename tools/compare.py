"""Train the same recipe with one process, DistributedDataParallel and Horovod, and compare.

    ./launcher.sh --compare -m resnet20 -n 2 -d synthetic10 -- --epochs 1 --train-size 2560

Prints a table and writes compare.json and compare.png. Same seed, same data, same global batch:
the loss of every step and the final parameters differ by rounding only (batch norm over shares
apart: add --sync-bn to compare networks that have it). The time of communication is what the same
workers save when they exchange nothing.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from utils.checkpoint import format as checkpoint
from utils.config.recipes import find_recipe
from utils.errors import BAD_INPUT, FAILED, command
from utils.files import ROOT, make_output, write_atomically, write_text

ENGINES = ("one process", "dist", "horovod")


@command
def main() -> int:
    """Parse, run every arm, report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", dest="model", required=True, metavar="MODEL", help="a recipe")
    parser.add_argument("-n", dest="workers", type=int, default=2, metavar="WORKERS")
    parser.add_argument("-d", dest="dataset", default="synthetic10", metavar="DATASET")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("compare"), metavar="DIR",
        help="folder for compare.json and compare.png (default: compare)",
    )  # fmt: skip
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: flags for cifar.py")
    options = parser.parse_args()
    try:
        recipe = find_recipe(options.model)
        make_output(options.output)  # before minutes of training, not after them
        arms = run_arms(recipe.name, recipe.flags, options)
    except subprocess.CalledProcessError as error:
        print(f"error: this arm has failed: {' '.join(error.cmd)}", file=sys.stderr)
        return error.returncode if error.returncode == BAD_INPUT else FAILED
    summary = summarise(arms)
    summary["command"] = sys.argv
    text = json.dumps({"summary": summary, "arms": [a["trace"] for a in arms.values()]}, indent=1)
    write_text(options.output / "compare.json", text)
    draw(arms, summary, options.output / "compare.png")
    print(table(summary))
    print(f"{options.output / 'compare.json'}  {options.output / 'compare.png'}")
    return 0


def run_arms(recipe: str, flags: tuple[str, ...], options: argparse.Namespace) -> dict[str, Any]:
    """Run every engine that is there; returns traces and final parameters by engine.

    Raises:
        subprocess.CalledProcessError: an arm has failed; it has said why.
    """
    arms: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ENGINES:
            if engine == "horovod" and importlib.util.find_spec("horovod") is None:
                print("Horovod is not installed (./setup.sh --horovod): comparing the other two")
                continue
            arms[engine] = _run(engine, recipe, flags, options, Path(folder))
            if engine != "one process":
                apart = _run(engine, recipe, flags, options, Path(folder), "--no-exchange")
                arms[engine]["apart"] = apart["trace"]
    return arms


def _run(
    engine: str,
    recipe: str,
    flags: tuple[str, ...],
    options: argparse.Namespace,
    folder: Path,
    *more: str,
) -> dict[str, Any]:
    run, trace = folder / "run", folder / "trace.json"
    last = [*options.flags, *more, "-c", str(run), "--overwrite", "--trace", str(trace)]
    if engine == "one process":
        command = [sys.executable, str(ROOT / "cifar.py"), *flags, "-d", options.dataset]
        command += ["--data", str(ROOT / "data"), *last]
    else:
        command = [str(ROOT / "launcher.sh"), "-m", recipe, "-n", str(options.workers)]
        command += ["-d", options.dataset, "-f", engine, "--", *last]
    print(f"-- {engine}{' without exchange' if more else ''}", flush=True)
    # The arm's own report would bury the comparison; its errors go to the screen.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    state = checkpoint.load(run / checkpoint.LATEST)["state_dict"]
    return {"trace": json.loads(trace.read_text()), "state": state}


def summarise(arms: dict[str, Any]) -> dict[str, Any]:
    """Speeds, time shares and differences from the one process, by engine."""
    base = arms["one process"]
    result: dict[str, Any] = {"torch": str(torch.__version__), "engines": {}}
    for engine, arm in arms.items():
        trace = arm["trace"]
        # The first step pays for memory and connections.
        data, compute = median(trace["data_seconds"][1:]), median(trace["compute_seconds"][1:])
        alone = median(arm["apart"]["compute_seconds"][1:]) if "apart" in arm else compute
        losses = [abs(a - b) for a, b in zip(trace["loss"], base["trace"]["loss"], strict=True)]
        worst = max(range(len(losses)), key=losses.__getitem__)
        step = data + compute
        result["engines"][engine] = {
            "workers": trace["workers"],
            "steps": len(losses),
            "images_per_second": trace["global_batch"][0] / step,
            "share_data": data / step,
            "share_compute": min(alone, compute) / step,
            "share_communication": max(0.0, compute - alone) / step,
            "largest_loss_difference": losses[worst],
            "at_step": worst,
            "largest_parameter_difference": max(
                float((tensor.double() - base["state"][name].double()).abs().max())
                for name, tensor in arm["state"].items()
                if tensor.is_floating_point()
            ),
        }
    return result


def table(summary: dict[str, Any]) -> str:
    """The summary as aligned text."""
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


def draw(arms: dict[str, Any], summary: dict[str, Any], picture: Path) -> None:
    """Loss per step, its difference from the one process, and where the time goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    loss, difference, time = figure.subplots(1, 3)
    base = arms["one process"]["trace"]["loss"]
    for style, (engine, arm) in zip(("-", "--", ":"), arms.items(), strict=False):
        losses = arm["trace"]["loss"]
        loss.plot(losses, style, label=engine)
        if engine != "one process":
            gaps = [abs(a - b) for a, b in zip(losses, base, strict=True)]
            difference.semilogy([max(gap, 1e-17) for gap in gaps], label=engine)
    loss.set(xlabel="step", ylabel="loss")
    difference.set(xlabel="step", ylabel="difference from one process")
    left = [0.0] * len(arms)
    for part in ("data", "compute", "communication"):
        shares = [100 * numbers[f"share_{part}"] for numbers in summary["engines"].values()]
        time.barh(list(arms), shares, left=left, label=part)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    time.set(xlabel="share of a step, %")
    for axes in (loss, difference, time):
        axes.legend(fontsize="small")
    write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=100))


if __name__ == "__main__":
    raise SystemExit(main())
