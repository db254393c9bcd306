"""Writes the tables of the READMEs from what they describe.

python -m tools.readme           rewrites the tables
python -m tools.readme --check   says which file is out of date, exit code 1
"""

import argparse
import sys

from tools import results
from utils.config.args import build_parser
from utils.config.recipes import load_recipes
from utils.files import ROOT

FILES = ("README.md", "README.zh-CN.md", "docs/results/README.md")


def recipes_table() -> str:
    """The recipes with parameters and published errors."""
    lines = ["| `-m` | parameters | authors | bearpaw | flags |", "|---|---|---|---|---|"]
    for recipe in load_recipes().values():
        lines.append(
            f"| {recipe.name} | {recipe.parameters:,} | {recipe.authors} | {recipe.bearpaw} "
            f"| `{' '.join(recipe.flags)}` |"
        )
    return "\n".join(lines)


def flags_table() -> str:
    """Every flag of the parser, group by group."""
    parser = build_parser()
    formatter = parser._get_formatter()
    lines = []
    for group in parser._action_groups:
        actions = [
            a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"
        ]
        if not actions:
            continue
        lines += ["", f"**{group.title}**", "", "| flag | meaning |", "|---|---|"]
        for action in actions:
            names = ", ".join(action.option_strings)
            value = (
                ""
                if action.nargs == 0
                else " "
                + formatter._format_args(
                    action, formatter._get_default_metavar_for_optional(action)
                )
            )
            meaning = formatter._expand_help(action).replace("<", "&lt;").replace("|", "\\|")
            lines.append(f"| `{names}{value}` | {meaning} |".replace("FILE|auto", "FILE\\|auto"))
    return "\n".join(lines).strip()


TABLES = {"recipes": recipes_table, "flags": flags_table, "results": results.table}


def updated(text: str) -> str:
    """The text with every marked table made anew.

    A table stands between ``<!-- name: begin ... -->`` and ``<!-- name: end -->``; a file need not
    have all of them.
    """
    for name, table in TABLES.items():
        begin, end = text.find(f"<!-- {name}: begin"), text.find(f"<!-- {name}: end")
        if begin >= 0:
            start = text.index("\n", begin) + 1
            text = text[:start] + table() + "\n" + text[end:]
    return text


def main() -> int:
    """Rewrite, or check."""
    parser = argparse.ArgumentParser(description="Write the tables of the READMEs.")
    parser.add_argument("--check", action="store_true", help="change nothing, report only")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        if updated(text) != text:
            stale.append(name)
            if not check:
                path.write_text(updated(text))
    if stale and check:
        print(f"out of date: {', '.join(stale)}; python -m tools.readme rewrites the tables")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
