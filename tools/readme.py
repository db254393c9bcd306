"""Write into the documents what is generated: tables, and the usage of the launcher.

python -m tools.readme           rewrites the tables
python -m tools.readme --check   says which file is out of date; the exit code is then 1
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from tools import published
from utils.config.args import build_parser
from utils.config.recipes import Recipe, load_recipes
from utils.errors import command
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
    for figures, group in groupby(load_recipes().values(), _published):
        recipes = list(group)
        names = ", ".join(recipe.name for recipe in recipes)
        sizes = sorted(recipe.parameters / 1e6 for recipe in recipes)
        size = f"{sizes[0]:.2f}" + (f" - {sizes[-1]:.2f}" if len(sizes) > 1 else "")
        lines.append(f"| {names} | {size} M | {' | '.join(figures)} |")
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
    "results": lambda: published.summary_table(published.load_results().values()),
    "runs": lambda: published.runs_table(published.load_results()),
}


# What the tables say in README.zh-CN.md.
CHINESE = {
    "| parameters | authors | bearpaw |": "| 参数量 | 论文作者 | bearpaw |",
    published.NONE_YET: "尚未发布完整训练的结果。",
    "| data set | n | last | best | authors | bearpaw | workers, engine | hardware |": (
        "| 数据集 | n | 最终 | 最佳 | 论文作者 | bearpaw | 进程数和引擎 | 硬件 |"
    ),
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


def wanted_files() -> dict[Path, str]:
    """Return every file that is made here, in part or as a whole, with what it should hold."""
    texts = {ROOT / name: (ROOT / name).read_text() for name in FILES}
    made = {
        path: updated(text, CHINESE if path.name == "README.zh-CN.md" else {})
        for path, text in texts.items()
    }
    cards = {
        folder / "README.md": published.card(folder, result)
        for folder, result in published.load_results().items()
    }
    return made | cards


@command
def main() -> int:
    """Rewrite the tables, or check them, and return the exit code."""
    parser = argparse.ArgumentParser(description="Write the tables and cards of the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing, report only")
    check = parser.parse_args().check
    stale = []
    for path, wanted in wanted_files().items():
        if not path.exists() or path.read_text() != wanted:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(wanted)
    if stale and check:
        print(f"out of date: {', '.join(stale)}; python -m tools.readme rewrites the tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
