"""Published results: where they are, the weights that some keep, and how they read.

A result is what result.json in docs/results/<recipe>/<data set>/seed<N>/ holds; tools/results.py
makes it.
"""

import hashlib
import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from utils.config.recipes import load_recipes
from utils.config.schema import MODEL_FLAGS
from utils.data.cifar_archive import ARCHIVES
from utils.errors import UserError, reason_of
from utils.files import ROOT

FOLDER = ROOT / "docs" / "results"
NONE_YET = "No whole run has been published yet."
_MADE = "<!-- made of result.json by tools/results.py and tools/readme.py -->"
# What tables and cards take from a result.
_KEYS = (
    "recipe", "dataset", "compared_with", "seed", "epochs", "last_accuracy", "best_accuracy",
    "best_epoch", "minutes", "flags", "engine", "workers", "versions", "git_commit", "machine",
    "images", "weights", "note",
)  # fmt: skip

Result = Mapping[str, Any]


def load_results(folder: Path = FOLDER) -> dict[Path, Result]:
    """Return the results by their folders, in the order of the recipes, data sets and seeds.

    Raises:
        UserError: A result.json is damaged, or of a recipe that is not there.
    """
    found = {path.parent: read_result(path) for path in folder.glob("*/*/seed*/result.json")}
    order = list(load_recipes())

    def place(item: tuple[Path, Result]) -> tuple[int, list[str], int]:
        result = item[1]
        return order.index(result["recipe"]), _variant(result), result["seed"]

    return dict(sorted(found.items(), key=place))


def read_result(path: Path) -> Result:
    """Return a result.

    Raises:
        UserError: The file is damaged, or of a recipe that is not there.
    """
    try:
        result = json.loads(path.read_text())
        missing = [key for key in _KEYS if key not in result]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); publish it again") from error
    if missing or not isinstance(result, dict) or result["recipe"] not in load_recipes():
        why = f"lacks {missing[0]!r}" if missing else "is of no recipe"
        raise UserError(f"{path}: {why}; publish it again, or remove it")
    return result


def result_folder(results: Path, result: Result) -> Path:
    """Return the folder of a result: flags that are not the recipe's stand in its name."""
    flags = re.sub(r"[^\w.]+", "-", " ".join(_flags_but_seed(result))).strip("-")
    name = f"seed{result['seed']}" + (f"-{flags}" if flags else "")
    return results / result["recipe"] / result["dataset"] / name


def find_weights(
    recipe: str, dataset: str, seed: int | None, folder: Path = FOLDER
) -> tuple[Path, Result, bytes]:
    """Return published weights: the path of their file, the result, and the file's content.

    Args:
        recipe: The name of a recipe.
        dataset: The data set that the network was trained on.
        seed: The seed of the run; None for the lowest that there is. A run with the recipe's flags
            alone goes before one with others.
        folder: The folder of all results.

    Raises:
        UserError: No such weights are published, or the file is not the one that was.
    """
    kept = sorted(folder.glob("*/*/seed*/*.safetensors"))
    places = [(p.parts[-4], p.parts[-3], *_seed_and_flags(p.parts[-2]), p) for p in kept]
    fitting = sorted(place for place in places if place[:2] == (recipe, dataset))
    chosen = [place for place in fitting if seed in (None, place[2])]
    if not chosen:
        asked = f"{recipe} on {dataset}" + ("" if seed is None else f", seed {seed}")
        known = "; ".join(f"{r} on {d}, seed {n}" for r, d, n, *_ in fitting or places)
        raise UserError(f"no weights are published of {asked}; there are {known or 'none'}")
    path = min(chosen, key=lambda place: (place[3], place[2]))[-1]
    result = read_result(path.parent / "result.json")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)}); fetch it again") from error
    about = result["weights"]
    if not isinstance(about, dict) or hashlib.sha256(content).hexdigest() != about.get("sha256"):
        raise UserError(f"{path}: is not the file that was published (its sha256 differs)")
    return path, result, content


def _seed_and_flags(name: str) -> tuple[int, str]:
    """Return seed and flags of the name of a result's folder."""
    match = re.fullmatch(r"seed(\d+)(.*)", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def mean_and_std(values: Sequence[float]) -> str:
    """Return the mean, and for two values or more ± their sample standard deviation."""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def summary_table(results: Iterable[Result]) -> str:
    """Return the table of our results beside the published ones, a row for all seeds of a run."""
    rows = [_summary_row(list(group)) for _, group in groupby(results, _variant)]
    if not rows:
        return NONE_YET
    lines = [
        "| `-m` | data set | n | last | best | authors | bearpaw | workers, engine | hardware |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *rows])


def _summary_row(group: Sequence[Result]) -> str:
    first = group[0]
    flags = _flags_but_seed(first)
    cells = [
        first["recipe"] + (f" `{shlex.join(flags)}`" if flags else ""),
        first["dataset"],
        str(len(group)),
        mean_and_std([100 - result["last_accuracy"] for result in group]),
        mean_and_std([100 - result["best_accuracy"] for result in group]),
        *_published(first),
        " / ".join(dict.fromkeys(map(_engine, group))),
        " / ".join(dict.fromkeys(map(_hardware, group))),
    ]
    return _line(cells)


def runs_table(results: Mapping[Path, Result], folder: Path = FOLDER) -> str:
    """Return the table of single runs, with links to their cards.

    Args:
        results: The results by their folders.
        folder: The folder of the document that the table is for.
    """
    if not results:
        return NONE_YET
    lines = [
        "| run | last | best (epoch) | workers, engine | hardware | minutes | weights | command |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for path, result in results.items():
        last, best = _errors(result)
        name = f"{result['recipe']}, {result['dataset']}, seed {result['seed']}"
        weights = result["weights"]
        cells = [
            f"[{name}]({path.relative_to(folder)}/README.md)",
            last,
            f"{best} ({result['best_epoch']})",
            _engine(result),
            _hardware(result),
            f"{result['minutes']:.1f}",
            f"{100 - weights['accuracy']:.2f}" if weights else "-",
            f"`{command_line(result)}`",
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _errors(result: Result) -> tuple[str, str]:
    return f"{100 - result['last_accuracy']:.2f}", f"{100 - result['best_accuracy']:.2f}"


def _variant(result: Result) -> list[str]:
    """Return what the seeds of one training have in common."""
    return [result[k] for k in ("recipe", "dataset", "compared_with")] + _flags_but_seed(result)


def _flags_but_seed(result: Result) -> list[str]:
    flags = list(result["flags"])
    if "--seed" in flags:
        place = flags.index("--seed")
        del flags[place : place + 2]
    return flags


def _published(result: Result) -> list[str]:
    """Return the figures of the authors and of bearpaw for the data set of a result."""
    recipe = load_recipes()[result["recipe"]]
    return [
        _figure(figures, result["compared_with"]) for figures in (recipe.authors, recipe.bearpaw)
    ]


def _figure(figures: str, dataset: str) -> str:
    """Return the one for a data set of the figures "CIFAR-10 / CIFAR-100"."""
    if figures == "-" or dataset not in ("cifar10", "cifar100"):
        return "-"
    return figures.split(" / ")[dataset == "cifar100"]


def _engine_flag(result: Result) -> str:
    return "horovod" if result["engine"].startswith("Horovod") else "dist"


def _engine(result: Result) -> str:
    return f"{result['workers']}, {_engine_flag(result)}"


def _hardware(result: Result) -> str:
    machine = result["machine"]
    gpus = machine["gpus"][: result["workers"]]
    if not gpus:
        return f"{machine['processor']}, {machine['cores']} cores"
    counts = Counter(gpus)
    return ", ".join(f"{n} x {gpu}" if n > 1 else gpu for gpu, n in counts.items())


def command_line(result: Result) -> str:
    """Return the call of the launcher that trains such a run."""
    words = ["./launcher.sh", "-m", result["recipe"], "-n", str(result["workers"])]
    words += ["-d", result["dataset"], "-f", _engine_flag(result)]
    flags = [*_data(result), *result["flags"]]
    return shlex.join([*words, *(["--", *flags] if flags else [])])


def _data(result: Result) -> list[str]:
    """Return the flag for the place of the images, where every user has another."""
    return ["--data", "DIR"] if result["dataset"] == "folder" else []


def card(folder: Path, result: Result) -> str:
    """Return the model card of a result.

    Args:
        folder: The folder of the result.
        result: The result.
    """
    parts = [
        _MADE,
        f"# {result['recipe']} on {result['dataset']}, seed {result['seed']}",
        "\n".join(["| | |", "|---|---|", *map(_line, _facts(result).items())]),
        "![loss and accuracy over the epochs](log.png)",
        f"```\n{command_line(result)}\n```",
    ]
    md5 = result["images"].get("archive_md5")
    if md5 and md5 not in [archive.md5 for archive in ARCHIVES.values()]:
        parts.append(
            f"The run had the images from an archive of its own: `--data-archive FILE --data-md5 "
            f"{md5}`. The digests above tell whether it holds the same images as yours, in "
            f"whatever order: `python tools/results.py images -d {result['dataset']}`. In another "
            "order the same seed draws other batches, which makes another training, as another "
            "seed does."
        )
    if result["note"]:
        parts.append(result["note"])
    if result["weights"]:
        parts += _weights_part(folder, result)
    return "\n\n".join(parts) + "\n"


def _facts(result: Result) -> dict[str, str]:
    """Return what the table of a card says."""
    last, best = _errors(result)
    published = [
        f"{who} {'none' if figure == '-' else f'{figure} %'}"
        for who, figure in zip(("authors", "bearpaw"), _published(result), strict=True)
    ]
    # Older results do not say in which format they were computed, or how they were continued.
    memory_format = result.get("memory_format")
    earlier = "; ".join(map(_describe_start, result.get("earlier", [])))
    images = result["images"]
    return {
        "test error, last epoch": f"{last} %",
        "test error, best epoch": f"{best} % (epoch {result['best_epoch']}, chosen on the test "
        "set)",
        "published test error": ", ".join(published),
        "training": f"{result['epochs']} epochs, {result['minutes']:.1f} minutes",
        "workers": f"{result['workers']} ({result['engine']})",
        "machine": f"{_hardware(result)}, {result['machine']['system']}",
        **({"memory format": memory_format} if memory_format else {}),
        "code": _code(result),
        **({"earlier starts": earlier} if earlier else {}),
        "images, sha256": f"train `{images['train']}`, test `{images['test']}`",
    }


def _describe_start(start: Result) -> str:
    """Return where an earlier start of a run has taken place, as far as it is known."""
    parts = [
        f"{start['workers'] or 'unknown'} ({start['engine'] or 'unknown engine'})",
        _hardware(start) if start["machine"] else "unknown machine",
        start["memory_format"] or "unknown memory format",
        _code(start),
    ]
    return ", ".join(parts)


def _code(start: Result) -> str:
    versions = ", ".join(
        f"{name} {found}" for name, found in (start["versions"] or {}).items() if found
    )
    return f"commit {start['git_commit'] or 'unknown'}; {versions}"


def _weights_part(folder: Path, result: Result) -> list[str]:
    weights = result["weights"]
    path = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    arguments = "".join(f", {name}={value!r}" for name, value in weights["arguments"].items())
    words = ["python", "cifar.py", "-a", weights["arch"]]
    for name, value in weights["arguments"].items():
        words += [MODEL_FLAGS[name], str(value)]
    words += ["-d", result["dataset"], *_data(result), *_flags_but_seed(result)]
    if "--amp" in words:
        words += ["--amp", "off"]  # The score is one in float32.
    words += ["-e", "--resume", str(path / weights["file"])]
    before = weights["accuracy_before"]
    return [
        "## Weights",
        f"`{weights['file']}` holds the weights after epoch {weights['trained_epochs']}, rounded "
        f"to float16 ({weights['bytes']:,} bytes, sha256 `{weights['sha256']}`). They score "
        f"**{weights['accuracy']:.2f} %** ({weights['correct']:,} of {weights['images']:,} test "
        "images)" + ("." if before is None else f"; before rounding it was {before:.2f} %."),
        # Not marked as Python, whose formatter would lay it out otherwise.
        "```\nimport torch\n\n"
        'model = torch.hub.load("path/to/this/project", '
        f'"{weights["arch"]}", source="local"{arguments},\n'
        f'                       dataset="{result["dataset"]}", trained=True, '
        f"seed={result['seed']}).eval()\n```",
        "It takes (B, 3, 32, 32) RGB images with values from 0 to 1, minus the mean "
        f"{_numbers(weights['mean'])}, divided by the standard deviation "
        f"{_numbers(weights['std'])} of the three channels, and returns "
        f"(B, {len(weights['classes'])}) logits. `model.pretrained_cfg` holds these numbers and "
        "the names of the classes. The training script counts the same on these test images:",
        f"```\n{shlex.join(words)}\n```",
        "The weights are a baseline to compare with. They know nothing but their "
        f"{len(weights['classes'])} classes, in images of 32x32 pixels.",
    ]


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
