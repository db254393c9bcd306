"""Results of whole runs, kept in docs/results/<recipe>/<data set>/seed<N>/ and shown as a table.

python -m tools.results add RUN_FOLDER     copies log.txt and metrics.jsonl, makes result.json
python -m tools.results table              prints the table that tools/readme.py puts into documents
python -m tools.results state RUN_FOLDER   says how far a run has come; exit code 1 before its end
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.config.args import build_parser, parse_args
from utils.config.recipes import Recipe, load_recipes
from utils.config.schema import MODEL_FLAGS
from utils.errors import UserError, command
from utils.files import ROOT, write_text

FOLDER = ROOT / "docs" / "results"
COPIED = ("log.txt", "metrics.jsonl")
NONE_YET = "No whole run has been published yet."
LEGEND = (
    "Test error in per cent. Last: after the last epoch. Best: of the best test epoch, as bearpaw "
    "prints it. Minutes: of training."
)
RE_ENCODED = (
    "`folder`: the images as JPEG files, a re-encoding of the originals; the error on the original "
    "pixels may differ a little."
)

# Options that say where files are and what is reported. They change no result.
_WITHOUT_EFFECT = {
    "help", "version", "dataset", "data", "data_url", "data_archive", "data_md5", "workers",
    "checkpoint", "resume", "save_every", "overwrite", "trace", "tensorboard", "check_replicas",
    "gpu_id", "local_rank", "trust_checkpoint", "timeout", "graph", "resident", "memory_format",
}  # fmt: skip


def read_run(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what args.json and metrics.jsonl of a run folder hold.

    There are no rows of metrics before the end of the first epoch.

    Raises:
        UserError: The folder holds no run.
    """
    try:
        about = json.loads((folder / "args.json").read_text())
        metrics = folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return about, [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no run folder ({error}); name one that holds args.json"
        ) from error


def flags_beside(recipe: Recipe, options: Mapping[str, Any]) -> list[str]:
    """Return the flags by which a run differs from its recipe, but for those without effect.

    Args:
        recipe: The recipe.
        options: The options of the run.
    """
    usual = parse_args(recipe.flags).options()
    words: list[str] = []
    for action in build_parser()._actions:
        value = options.get(action.dest, usual.get(action.dest))
        if action.dest in _WITHOUT_EFFECT or value == usual[action.dest]:
            continue
        words.append(min((s for s in action.option_strings if s.startswith("--")), key=len))
        if action.nargs != 0:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def summary(folder: Path, images: str | None) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        folder: The run folder.
        images: The data set whose published figures a folder of images is compared with.

    Raises:
        UserError: There is no run, or none of a recipe, or it is not trained to its end, or it has
            no test accuracy.
    """
    from utils.checkpoint.run_dir import run_name  # Imports torch, which the state does not need.

    about, rows = read_run(folder)
    options = about["options"]
    arguments = {name: options[name] for name in MODEL_FLAGS if options[name] is not None}
    name = run_name(options["arch"], arguments)
    recipe = load_recipes().get(name)
    if recipe is None:
        raise UserError(f"{folder}: {name} is no recipe; ./launcher.sh --list shows them")
    if len(rows) < options["epochs"]:
        raise UserError(
            f"{folder}: {len(rows)} of {options['epochs']} epochs are trained; finish the run "
            "with --resume auto"
        )
    if options["val_split"]:
        raise UserError(
            f"{folder}: --val-split {options['val_split']}: its log has no test accuracy; "
            "publish a run without"
        )
    accuracies = [row["valid_top1"] for row in rows]
    machine = {key: value for key, value in about["machine"].items() if key != "host"}
    return {
        "recipe": name,
        "dataset": options["dataset"],
        "compared_with": images or options["dataset"],
        "seed": options["seed"],
        "epochs": len(rows),
        "last_accuracy": accuracies[-1],
        "best_accuracy": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)) + 1,
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 2),
        "flags": flags_beside(recipe, options),
        "command": about["command"],
        "engine": about["engine"],
        "workers": about["workers"],
        "versions": about["versions"],
        "git_commit": about["git_commit"],
        "machine": machine,
    }


def add(run: Path, results: Path, images: str | None, overwrite: bool) -> Path:
    """Publish a run and return its folder among the results.

    Args:
        run: The run folder.
        results: The folder of all results.
        images: The data set whose published figures a folder of images is compared with.
        overwrite: Whether to replace a result of the same recipe, data set and seed.

    Raises:
        UserError: As ``summary``, or there is such a result already.
    """
    found = summary(run, images)
    folder = results / found["recipe"] / found["dataset"] / f"seed{found['seed']}"
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; --overwrite replaces it")
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(run / name, folder / name)
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"
    write_text(folder / "result.json", text)
    return folder


def table(results: Path = FOLDER) -> str:
    """Return our results beside the published figures of others, in the order of the recipes."""
    recipes = load_recipes()
    found = [json.loads(path.read_text()) for path in results.glob("*/*/seed*/result.json")]
    if not found:
        return NONE_YET
    order = list(recipes)
    found.sort(key=lambda r: (order.index(r["recipe"]), r["dataset"], r["seed"]))
    lines = [
        "| `-m` | data set | last | best | authors | bearpaw | seed | minutes | command |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result, recipes[result["recipe"]]) for result in found]
    folders = any(result["dataset"] == "folder" for result in found)
    return "\n".join([*lines, "", LEGEND, *([RE_ENCODED] if folders else [])])


def _row(result: Mapping[str, Any], recipe: Recipe) -> str:
    """Return the table's row of a result."""
    errors = [f"{100 - result[key]:.2f}" for key in ("last_accuracy", "best_accuracy")]
    published = [
        _published(figures, result["compared_with"]) for figures in (recipe.authors, recipe.bearpaw)
    ]
    device = ", ".join(result["machine"]["gpus"][: result["workers"]]) or "CPU"
    flags = shlex.join(result["flags"])
    command = f"-m {recipe.name} -d {result['dataset']}" + (f" -- {flags}" if flags else "")
    cells = [
        recipe.name, result["dataset"], *errors, *published, str(result["seed"]),
        f"{result['minutes']:.1f} ({device})", f"`{command}`",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _published(figures: str, dataset: str) -> str:
    """Return the one for a data set of the figures "CIFAR-10 / CIFAR-100"."""
    if figures == "-" or dataset not in ("cifar10", "cifar100"):
        return "-"
    return figures.split(" / ")[dataset == "cifar100"]


def state(run: Path) -> tuple[str, bool]:
    """Return how far a run has come, in words, and whether it is at its end."""
    if not (run / "args.json").exists():
        return "not begun", False
    about, rows = read_run(run)
    epochs = about["options"]["epochs"]
    text = f"{len(rows)} of {epochs} epochs"
    if rows:
        best = max(row["valid_top1"] for row in rows)
        text += f", last {rows[-1]['valid_top1']:.2f}, best {best:.2f} %"
    return text, len(rows) >= epochs


@command
def main() -> int:
    """Run the command line of the module's docstring and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("add", help="publish a run that is trained to its end")
    one.add_argument("run", type=Path, metavar="RUN_FOLDER")
    one.add_argument("--overwrite", action="store_true", help="replace what is published")
    one.add_argument(
        "--images", choices=("cifar10", "cifar100"),
        help="for -d folder: which images these are, to compare with published figures",
    )  # fmt: skip
    commands.add_parser("table", help="print the table")
    how_far = commands.add_parser("state", help="how far a run has come")
    how_far.add_argument("run", type=Path, metavar="RUN_FOLDER")
    options = parser.parse_args()
    if options.command == "add":
        print(add(options.run, options.results, options.images, options.overwrite))
    elif options.command == "table":
        print(table(options.results))
    else:
        text, whole = state(options.run)
        print(text)
        return 0 if whole else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
