"""Write into the documents what is generated: tables, and the usage of the launcher.

python -m tools.readme           rewrites the tables
python -m tools.readme --check   says which file is out of date; the exit code is then 1
"""

import argparse
import sys
from collections.abc import Mapping
from itertools import groupby

from tools import results
from utils.config.args import build_parser
from utils.config.recipes import Recipe, load_recipes
from utils.files import ROOT
from utils.launch.options import USAGE

FILES = (
    "README.md", "README.zh-CN.md", "docs/flags.md", "docs/recipes.md", "docs/results/README.md"
)  # fmt: skip


def recipes_table() -> str:
    """Return the recipes with their parameters, published errors and flags."""
    lines = ["| `-m` | parameters | authors | bearpaw | flags |", "|---|---|---|---|---|"]
    for recipe in load_recipes().values():
        lines.append(
            f"| {recipe.name} | {recipe.parameters:,} | {recipe.authors} | {recipe.bearpaw} "
            f"| `{' '.join(recipe.flags)}` |"
        )
    return "\n".join(lines)


def short_recipes_table() -> str:
    """Return the recipes without flags; neighbours with the same published errors share a row."""
    lines = ["| `-m` | parameters | authors | bearpaw |", "|---|---|---|---|"]
    for published, group in groupby(load_recipes().values(), _published):
        recipes = list(group)
        names = ", ".join(recipe.name for recipe in recipes)
        sizes = sorted(recipe.parameters / 1e6 for recipe in recipes)
        size = f"{sizes[0]:.2f}" + (f" - {sizes[-1]:.2f}" if len(sizes) > 1 else "")
        lines.append(f"| {names} | {size} M | {' | '.join(published)} |")
    return "\n".join(lines)


def _published(recipe: Recipe) -> tuple[str, str]:
    return recipe.authors, recipe.bearpaw


def flags_table() -> str:
    """Return every flag of the parser, group by group."""
    parser = build_parser()
    formatter = parser._get_formatter()
    lines: list[str] = []
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        if actions:
            lines += ["", f"**{group.title}**", "", "| flag | meaning |", "|---|---|"]
            lines += [_flag_row(action, formatter) for action in actions]
    return "\n".join(lines).strip()


def _flag_row(action: argparse.Action, formatter: argparse.HelpFormatter) -> str:
    """Return the row of a flag: its spellings, its value and its help text."""
    flag = ", ".join(action.option_strings)
    if action.nargs != 0:
        metavar = formatter._get_default_metavar_for_optional(action)
        flag += f" {formatter._format_args(action, metavar)}"
    # A bar would end the cell, and what looks like a tag would not be seen.
    meaning = formatter._expand_help(action).replace("<", "&lt;").replace("|", "\\|")
    return f"| `{flag}` | {meaning} |".replace("FILE|auto", "FILE\\|auto")


TABLES = {
    "recipes": recipes_table,
    "recipes-short": short_recipes_table,
    "flags": flags_table,
    "launcher": lambda: f"```\n{USAGE}```",
    "results": results.table,
}


# What the tables say in README.zh-CN.md.
CHINESE = {
    "| parameters | authors | bearpaw |": "| 参数量 | 论文作者 | bearpaw |",
    results.NONE_YET: "尚未发布完整训练的结果。",
}


def updated(text: str, words: Mapping[str, str]) -> str:
    """Return a text with every marked table made anew.

    A table stands between ``<!-- name: begin ... -->`` and ``<!-- name: end -->``.

    Args:
        text: The content of a file, which need not have all tables.
        words: What to replace in the tables.
    """
    for name, table in TABLES.items():
        begin, end = text.find(f"<!-- {name}: begin"), text.find(f"<!-- {name}: end")
        if begin >= 0:
            start = text.index("\n", begin) + 1
            made = table()
            for word, replacement in words.items():
                made = made.replace(word, replacement)
            text = f"{text[:start]}{made}\n{text[end:]}"
    return text


def main() -> int:
    """Rewrite the tables, or check them, and return the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables of the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing, report only")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        wanted = updated(text, CHINESE if name == "README.zh-CN.md" else {})
        if text != wanted:
            stale.append(name)
            if not check:
                path.write_text(wanted)
    if stale and check:
        print(f"out of date: {', '.join(stale)}; python -m tools.readme rewrites the tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
