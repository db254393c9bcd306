"""The recipes of recipes.tsv: names, aliases, and the folder name of a run.

For launcher.sh:  python -m utils.recipes find NAME   prints the recipe's name, then its flags
                  python -m utils.recipes list        prints the table
"""

import difflib
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from utils.errors import BAD_INPUT, UserError

FILE = Path(__file__).resolve().parent.parent / "recipes.tsv"
COLUMNS = ("recipe", "flags", "parameters", "authors", "bearpaw")


@dataclass(frozen=True)
class Recipe:
    """A line of recipes.tsv.

    Attributes:
        name: what ``launcher.sh -m`` takes.
        flags: for cifar.py.
        parameters: of the network for 10 classes.
        authors, bearpaw: published test error on CIFAR-10 / CIFAR-100 in per cent, "-" for none.
    """

    name: str
    flags: tuple[str, ...]
    parameters: int
    authors: str
    bearpaw: str


def load_recipes(path: Path = FILE) -> dict[str, Recipe]:
    """All recipes by name, in the file's order.

    Raises:
        ValueError: names the line that is wrong.
    """
    recipes: dict[str, Recipe] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{path}, line {number}: {len(fields)} columns, not {len(COLUMNS)}")
        name, flags, parameters, authors, bearpaw = fields
        if not parameters.isdecimal():
            raise ValueError(f"{path}, line {number}: parameters {parameters!r} is no number")
        if name in recipes:
            raise ValueError(f"{path}, line {number}: {name} stands there twice")
        recipes[name] = Recipe(name, tuple(shlex.split(flags)), int(parameters), authors, bearpaw)
    return recipes


def _plain(name: str) -> str:
    """A name without what people write differently: resnet-110, ResNet_110, resnet110."""
    return re.sub(r"[-_ ]", "", name.lower())


def find_recipe(name: str) -> Recipe:
    """The recipe of a name or one of its spellings.

    Raises:
        UserError: no such recipe; names the closest, or those of a family.
    """
    recipes = load_recipes()
    spellings = {_plain(known): recipe for known, recipe in recipes.items()}
    if _plain(name) in spellings:
        return spellings[_plain(name)]
    member = re.compile(re.escape(_plain(name)) + r"(bc)?\d.*")
    family = [recipe.name for plain, recipe in spellings.items() if member.fullmatch(plain)]
    if family:
        raise UserError(f"-m {name!r}: a family; its recipes are {', '.join(family)}")
    near = difflib.get_close_matches(_plain(name), spellings, n=3, cutoff=0.5)
    close = ", ".join(spellings[plain].name for plain in near)
    fix = f"did you mean {close}?" if near else "./launcher.sh --list shows them all"
    raise UserError(f"-m {name!r}: no such recipe; {fix}")


def run_name(arch: str, arguments: Mapping[str, object]) -> str:
    """The folder name of a run: its recipe's, or one made of what its network differs in.

    Args:
        arch: the architecture.
        arguments: those that are given to its factory.
    """
    from models import model_arguments  # imports torch; the launcher needs none of it
    from utils.options import model_arguments_of, parse_args

    own = model_arguments(arch)

    def network(given: Mapping[str, object]) -> dict[str, object]:
        return {**own, **given, "checkpoint_activations": None}  # which changes no result

    for recipe in load_recipes().values():
        options = parse_args(recipe.flags)
        if options.arch == arch and network(model_arguments_of(options)) == network(arguments):
            return recipe.name
    parts = [f"_{name}_{value}" for name, value in arguments.items() if own.get(name) != value]
    return re.sub(r"[^\w.-]", "_", arch + "".join(parts))


def table() -> str:
    """The recipes as aligned text."""
    rows = [("recipe", "parameters", "authors %", "bearpaw %", "flags")]
    for recipe in load_recipes().values():
        count = f"{recipe.parameters / 1e6:.2f} M"
        rows.append((recipe.name, count, recipe.authors, recipe.bearpaw, shlex.join(recipe.flags)))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def main(argv: list[str]) -> int:
    """The command line that launcher.sh uses."""
    if argv == ["list"]:
        print(table())
        print("published test error on CIFAR-10 / CIFAR-100; see README.md")
        return 0
    try:
        recipe = find_recipe(argv[1])
    except UserError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    print(recipe.name, *recipe.flags, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
