"""The recipes of recipes.tsv: their names and spellings."""

import difflib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import ROOT

FILE = ROOT / "recipes.tsv"
COLUMNS = ("recipe", "flags", "parameters", "authors", "bearpaw")

# Test error in per cent on CIFAR-10 / CIFAR-100, "-" where nothing is published.
_ERRORS = re.compile(r"-|\d+\.\d+ / (-|\d+\.\d+)")


@dataclass(frozen=True)
class Recipe:
    """A line of recipes.tsv.

    Attributes:
        name: The name that ``launcher.sh -m`` takes.
        flags: The flags for cifar.py.
        parameters: The number of parameters of the network for 10 classes.
        authors: The authors' test error on CIFAR-10 / CIFAR-100 in per cent, "-" for none.
        bearpaw: The test error that bearpaw/pytorch-classification publishes, likewise.
    """

    name: str
    flags: tuple[str, ...]
    parameters: int
    authors: str
    bearpaw: str


def load_recipes(path: Path = FILE) -> dict[str, Recipe]:
    """Return all recipes by name, in the file's order.

    Raises:
        UserError: A line is wrong; it names the line and the column.
    """
    recipes: dict[str, Recipe] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        recipe = _read_line(line, where)
        if recipe.name in recipes:
            raise UserError(f"{where}: {recipe.name} stands there twice")
        recipes[recipe.name] = recipe
    return recipes


def _read_line(line: str, where: str) -> Recipe:
    fields = line.split("\t")
    if len(fields) != len(COLUMNS):
        wanted = ", ".join(COLUMNS)
        raise UserError(f"{where}: {len(fields)} columns; give {wanted}, one tab between two")
    name, flags, parameters, authors, bearpaw = fields
    try:
        words = tuple(shlex.split(flags))
    except ValueError:
        words = ()
    fits = {
        "recipe": (name, re.fullmatch(r"[a-z][a-z0-9_]*", name), "give a-z, 0-9 and _"),
        "flags": (flags, words[:1] == ("-a",), "give the flags for cifar.py, -a MODEL first"),
        "parameters": (parameters, parameters.isdecimal(), "give a whole number"),
        "authors": (authors, _ERRORS.fullmatch(authors), "give '-' or such as '8.75 / -'"),
        "bearpaw": (bearpaw, _ERRORS.fullmatch(bearpaw), "give '-' or such as '8.75 / -'"),
    }
    for column, (value, good, fix) in fits.items():
        if not good:
            raise UserError(f"{where}: {column} {value!r}; {fix}")
    return Recipe(name, words, int(parameters), authors, bearpaw)


def _plain(name: str) -> str:
    """Return a name without what people write differently: resnet-110, ResNet_110, resnet110."""
    return re.sub(r"[-_ ]", "", name.lower())


def _parts(name: str) -> list[str]:
    """Return a name's words and numbers: wrn28_10_drop is wrn, 28, 10, drop."""
    return re.findall(r"[a-z]+|\d+", name.lower())


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name or one of its spellings.

    Raises:
        UserError: There is no such recipe; it names the closest, or those of a family.
    """
    recipes = load_recipes()
    spellings = {_plain(known): recipe for known, recipe in recipes.items()}
    if _plain(name) in spellings:
        return spellings[_plain(name)]
    parts = _parts(name)
    family = [known for known in recipes if parts and _parts(known)[: len(parts)] == parts]
    if family:
        raise UserError(f"-m {name}: {name} has the recipes {', '.join(family)}; name one of them")
    near = difflib.get_close_matches(_plain(name), spellings, n=3, cutoff=0.5)
    close = ", ".join(spellings[plain].name for plain in near)
    fix = f"did you mean {close}?" if near else "./launcher.sh --list shows them all"
    raise UserError(f"-m {name!r}: no such recipe; {fix}")


def listing() -> str:
    """Return the recipes as a table of aligned text that says what its columns are."""
    rows = [("recipe", "parameters", "authors", "bearpaw", "flags")]
    for recipe in load_recipes().values():
        count = f"{recipe.parameters / 1e6:.2f} M"
        rows.append((recipe.name, count, recipe.authors, recipe.bearpaw, shlex.join(recipe.flags)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    lines.append("authors, bearpaw: published test error in % on CIFAR-10 / CIFAR-100\n")
    return "\n".join(lines)
