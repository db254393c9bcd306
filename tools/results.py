"""Publish whole runs in docs/results/<recipe>/<data set>/seed<N>/, and ask about runs and images.

python tools/results.py add RUN_FOLDER    publishes a run that is trained to its end
python tools/results.py state RUN_FOLDER  says how far a run has come; exit code 1 before its end
python tools/results.py images -d cifar10 prints the digests of a data set's images
python tools/results.py table             prints the table of what is published

``add`` copies the log, draws the curves, makes result.json and the model card, and keeps weights
where they are small: rounded to half precision, if they then score the same.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tools.published import (
    FOLDER,
    card,
    load_results,
    read_result,
    result_folder,
    summary_table,
)
from utils.config.args import DATASETS, build_parser, parse_args
from utils.config.recipes import Recipe, load_recipes
from utils.config.schema import MODEL_FLAGS, WITHOUT_EFFECT, Config
from utils.errors import UserError, command, reason_of, require_packages

COPIED = ("log.txt", "metrics.jsonl")

# The data set has a name of its own in result.json, and the others are no options of a run.
_LEFT_OUT = {"dataset", "help", "version"} | WITHOUT_EFFECT
# What a row must say, and what args.json says of the origin of a run.
_NEEDED_OF_A_ROW = ("epoch", "valid_top1", "seconds")
_ORIGIN = ("engine", "workers", "versions", "git_commit", "machine")


def read_args(folder: Path) -> dict[str, Any]:
    """Return what args.json of a run folder holds.

    Raises:
        UserError: There is no such file, or it is not one that a run has written.
    """
    path = folder / "args.json"
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        starts = [about, *about.get("earlier", [])]
        if all(isinstance(start["options"], dict) for start in starts):
            return about
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({reason_of(error)}); name the folder of a run"
        ) from error
    except (AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: has no options of a run; name the folder of a run")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs that metrics.jsonl of a run folder holds, up to the first damaged line.

    There are none before the end of the first epoch.
    """
    rows: list[dict[str, Any]] = []
    try:
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            if not all(isinstance(row[key], int | float) for key in _NEEDED_OF_A_ROW):
                break
            rows.append(row)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return rows


def accuracies(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last and the best accuracy of the rows of metrics, with the epoch of the best."""
    best = max(rows, key=lambda row: row["valid_top1"])
    return {
        "last_accuracy": rows[-1]["valid_top1"],
        "best_accuracy": best["valid_top1"],
        "best_epoch": best["epoch"],
    }


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
        if action.dest in _LEFT_OUT or value == usual[action.dest]:
            continue
        words.append(min((s for s in action.option_strings if s.startswith("--")), key=len))
        if action.nargs != 0:
            words += map(str, value if isinstance(value, list) else [value])
    return words


def summary(
    folder: Path, options: Mapping[str, Any], compared_with: str | None = None
) -> dict[str, Any]:
    """Return what result.json says of a run, but for images and weights.

    Args:
        folder: The run folder.
        options: All options of the run.
        compared_with: The data set whose published figures a folder of images is compared with.

    Raises:
        UserError: The run is of no recipe, or not trained to its end, or not in one way, or has no
            test accuracy, or does not say where it comes from.
    """
    from utils.runtime.provenance import shareable  # It imports torch, too.

    about, rows = read_args(folder), read_rows(folder)
    name = _recipe_name(folder, options)
    _check_rows(folder, rows, options["epochs"])
    if compared_with and options["dataset"] != "folder":
        raise UserError(f"--images {compared_with}: is for runs on -d folder; leave it out")
    if options["val_split"]:
        raise UserError(
            f"{folder}: --val-split {options['val_split']}: its log has no test accuracy; "
            "publish a run without"
        )
    if missing := [key for key in ("command", *_ORIGIN) if about.get(key) is None]:
        raise UserError(f"{folder}/args.json: lacks {missing[0]!r}; publish another run")
    recipe = load_recipes()[name]
    starts = [*about.get("earlier", []), about]
    _check_one_way(folder, recipe, starts)
    origins = [_origin(start) for start in starts]
    earlier = [one for one in origins if one != origins[-1]]
    return {
        "recipe": name,
        "dataset": options["dataset"],
        "compared_with": compared_with or options["dataset"],
        "seed": options["seed"],
        "epochs": len(rows),
        **accuracies(rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 2),
        "flags": flags_beside(recipe, _spelled_as_in(recipe, options)),
        "command": shareable(about["command"]),
        **origins[-1],
        "earlier": [one for k, one in enumerate(earlier) if one not in earlier[:k]],
    }


def _check_rows(folder: Path, rows: Sequence[Mapping[str, Any]], epochs: int) -> None:
    """Raise a UserError where the rows of a log are not those of all epochs."""
    numbers = [row["epoch"] for row in rows]
    if len(rows) < epochs and epochs not in numbers:
        raise UserError(
            f"{folder}: {len(rows)} of {epochs} epochs are trained; finish the run with "
            "--resume auto"
        )
    if numbers != list(range(1, epochs + 1)):
        raise UserError(
            f"{folder}/metrics.jsonl: has not each of {epochs} epochs once, as when a run has "
            "begun in another folder; publish a run with its whole log"
        )


def _check_one_way(folder: Path, recipe: Recipe, starts: Sequence[Mapping[str, Any]]) -> None:
    """Raise a UserError where the starts of a run, oldest first, are not of one training."""
    ways = []
    for number, start in enumerate(starts):
        options = {**parse_args([]).options(), **start["options"]}
        if not start["options"]:
            raise UserError(
                f"{folder}: has begun with the weights of {start.get('file')}; publish a run that "
                "was trained from scratch"
            )
        if options["start_epoch"] is not None and (number or options["start_epoch"]):
            raise UserError(
                f"{folder}: --start-epoch {options['start_epoch']}: its epochs are not those of "
                "one training; publish a run without"
            )
        options = _spelled_as_in(recipe, options)
        del options["epochs"]  # More of them make no other training.
        words = flags_beside(recipe, options)
        if options["batch_per_worker"] is not None or options["adasum"]:
            words += ["-n", str(start.get("workers"))]
        ways.append(shlex.join(words) or "its recipe alone")
    for way, start in zip(ways, starts, strict=True):
        if way != ways[-1]:
            raise UserError(
                f"{folder}: was trained with {way} first, then with {ways[-1]}; publish a run that "
                "was trained in one way"
            )
        if not _same_images(start, starts[-1]):
            raise UserError(
                f"{folder}: had other images first, or the same in another order; "
                "publish a run that was trained in one way"
            )


def _same_images(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two starts had the same images in the same order, as far as they say so."""
    if one.get("images") and other.get("images"):
        return bool(one["images"] == other["images"])
    names = [
        (start["options"].get("dataset"), str(start["options"].get("data_md5") or "").lower())
        for start in (one, other)
    ]
    return names[0] == names[1]


def _spelled_as_in(recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options in which flags of the model that mean the recipe's are spelled as there.

    A flag that is left out means the model's default.
    """
    from models import ModelError, model_arguments

    usual = parse_args(recipe.flags).options()

    def meaning(said: Mapping[str, Any], name: str) -> Any:
        try:
            return model_arguments(said["arch"]).get(name) if said[name] is None else said[name]
        except ModelError:  # No recipe has this network.
            return None

    same = [name for name in MODEL_FLAGS if meaning(options, name) == meaning(usual, name)]
    return {**options, **{name: usual[name] for name in same}, "start_epoch": None}


def _origin(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return where a start of a run has taken place; older versions did not say all of it."""
    machine = start.get("machine")
    if isinstance(machine, dict):
        machine = {key: value for key, value in machine.items() if key != "host"}
    known = {key: start.get(key) for key in (*_ORIGIN, "memory_format")}
    return {**known, "machine": machine}


def _recipe_name(folder: Path, options: Mapping[str, Any]) -> str:
    """Return the name of the recipe whose network a run has trained.

    Raises:
        UserError: There is none.
    """
    # They import torch, which the state does not need.
    from models import ModelError
    from utils.checkpoint.run_dir import run_name

    arguments = {name: options[name] for name in MODEL_FLAGS if options[name] is not None}
    try:
        name = run_name(options["arch"], arguments)
    except ModelError as error:
        raise UserError(f"{folder}: -a {options['arch']}: {error.why}") from error
    if name not in load_recipes():
        raise UserError(f"{folder}: {name} is no recipe; ./launcher.sh --list shows them")
    return name


def add(
    run: Path,
    results: Path,
    data: Mapping[str, str],
    *,
    compared_with: str | None = None,
    note: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Publish a run and return its folder among the results.

    Args:
        run: The run folder.
        results: The folder of all results.
        data: Options that say where the images of the run are now; the others are the run's.
        compared_with: The data set whose published figures a folder of images is compared with.
        note: What the model card is to say beside the figures; None for what that of a result that
            is replaced says.
        overwrite: Whether to replace a result of the same recipe, flags, data set and seed.

    Raises:
        UserError: As ``summary``, or there is such a result already, or the images cannot be had
            or are others than the run's, or a file is damaged, or the folder cannot be written to.
    """
    require_packages("add", "safetensors")
    # An older run does not know all options of today.
    options = {**parse_args([]).options(), **read_args(run)["options"]}
    found = summary(run, options, compared_with)
    folder = result_folder(results, found)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder}: exists already; --overwrite replaces it")
    # Only these need torch and matplotlib.
    from tools.weights import choose_weights
    from utils.metrics.plot import draw, read_log
    from utils.training import build

    log = read_log(run / "log.txt")
    if len(next(iter(log.values()), [])) != found["epochs"]:
        raise UserError(f"{run}/log.txt: has not the epochs of metrics.jsonl; publish another run")
    # The recorded address of a mirror may have lost what opens it, and is somebody else's.
    config = Config.from_options({**options, "data_url": [], **data})
    dataset = build.dataset(config.data)
    found["images"] = dataset.content_digests()
    if options["data_md5"]:  # The run's. Today's images may come from another archive.
        found["images"]["archive_md5"] = options["data_md5"]
    logged = {
        "best": (found["best_accuracy"], found["best_epoch"]),
        "last": (found["last_accuracy"], found["epochs"]),
    }
    kept = choose_weights(run, config, dataset, logged)
    found["weights"] = kept[0] if kept else None
    found["note"] = _note_of(folder) if note is None else note
    text = json.dumps(found, indent=2, sort_keys=True) + "\n"

    def write(new: Path) -> None:
        for name in COPIED:
            shutil.copyfile(run / name, new / name)
        draw({run.name: log}, new / "log.png")
        if kept:
            (new / kept[0]["file"]).write_bytes(kept[1])
        (new / "result.json").write_text(text)
        (new / "README.md").write_text(card(folder, json.loads(text)))

    try:
        _replace_folder(folder, write)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({reason_of(error)}); name another place with --results"
        ) from error
    return folder


def _note_of(folder: Path) -> str:
    """Return the note of the result in a folder; none where there is no such result."""
    try:
        return str(read_result(folder / "result.json")["note"])
    except UserError:
        return ""


def _replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Put a folder that ``write`` fills in the place of one that may be there, or leave that."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as hidden:
        new, old = Path(hidden, "new"), Path(hidden, "old")
        new.mkdir()
        write(new)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise


def state(run: Path) -> tuple[str, bool]:
    """Return how far a run has come, in words, and whether it is at its end."""
    if not (run / "args.json").exists():
        return "not begun", False
    epochs, rows = read_args(run)["options"].get("epochs", 0), read_rows(run)
    text = f"{len(rows)} of {epochs} epochs"
    if rows:
        text += ", last {last_accuracy:.2f}, best {best_accuracy:.2f} %".format(**accuracies(rows))
    return text, 0 < epochs <= len(rows)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("add", help="publish a run that is trained to its end")
    one.add_argument("run", type=Path, metavar="RUN_FOLDER")
    one.add_argument("--overwrite", action="store_true", help="replace what is published")
    one.add_argument("--note", help="what the model card is to say beside the figures")
    one.add_argument(
        "--images", choices=("cifar10", "cifar100"),
        help="for -d folder: which images these are, to compare with published figures",
    )  # fmt: skip
    how_far = commands.add_parser("state", help="how far a run has come")
    how_far.add_argument("run", type=Path, metavar="RUN_FOLDER")
    digests = commands.add_parser("images", help="the digests of a data set's images")
    digests.add_argument("-d", dest="dataset", choices=DATASETS, default="cifar10")
    for one_with_data in (one, digests):
        one_with_data.add_argument("--data", metavar="DIR", help="where the images are now")
        one_with_data.add_argument("--data-archive", metavar="FILE", help="their archive")
        one_with_data.add_argument("--data-md5", metavar="HEX", help="the md5 of the archive")
    commands.add_parser("table", help="print the table")
    return parser.parse_args()


@command
def main() -> int:
    """Run the command line of the module's docstring and return the exit code."""
    options = _parse_args()
    if options.command == "table":
        print(summary_table(load_results(options.results).values()))
        return 0
    if options.command == "state":
        text, whole = state(options.run)
        print(text)
        return 0 if whole else 1
    names = ("data", "data_archive", "data_md5")
    data = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.command == "images":
        from utils.training import build

        config = parse_args(["-d", options.dataset])
        for name, digest in build.dataset(replace(config.data, **data)).content_digests().items():
            print(f"{name} {digest}")
        return 0
    folder = add(
        options.run, options.results, data,
        compared_with=options.images, note=options.note, overwrite=options.overwrite,
    )  # fmt: skip
    print(f"{folder}\npython tools/readme.py brings the tables up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
