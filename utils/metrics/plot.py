"""Curves of one run (log.png), or of several runs over each other.

``python -m utils.plot checkpoints/cifar10/*/log.txt -o compare.png``
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils import log
from utils.errors import UserError, command, one_line, reason_of
from utils.files import make_output
from utils.metrics.picture import draw_picture
from utils.metrics.run_log import EPOCHS, logged_epochs, parse_log

PANELS = (("loss", "Train Loss", "Valid Loss"), ("accuracy, %", "Train Acc.", "Valid Acc."))


def read_log(path: Path) -> dict[str, list[float]]:
    """Return the columns of a log.txt by name.

    Raises:
        UserError: The file is missing or is no such log.
    """
    try:
        return parse_log(path.read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a log.txt of a run: {reason_of(error)}") from error


def draw(runs: Mapping[str, dict[str, list[float]]], picture: Path) -> None:
    """Draw loss and accuracy over epochs, a colour a run, training dashed; replaces the file.

    Args:
        runs: The columns of each run's log.txt, by the name of the run. Without a column EPOCHS
            its rows are counted from 1.
        picture: The file.

    Raises:
        UserError: As ``draw_picture``.
    """

    def fill(figure: Any) -> None:
        for axes, (label, train, valid) in zip(figure.subplots(1, 2), PANELS, strict=True):
            for number, (name, table) in enumerate(runs.items()):
                epochs = table.get(EPOCHS, range(1, len(table[train]) + 1))
                prefix = f"{one_line(name)} " if len(runs) > 1 else ""
                if prefix.startswith("_"):  # A legend leaves such labels out.
                    prefix = " " + prefix
                style = {"color": f"C{number}", "marker": "." if len(epochs) < 30 else ""}
                axes.plot(epochs, table[train], "--", label=prefix + "train", **style)
                axes.plot(epochs, table[valid], "-", label=prefix + "valid", **style)
            axes.set_xlabel("epoch")
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")

    draw_picture(picture, fill, (10, 4))


def read_run(path: Path) -> dict[str, list[float]]:
    """Return the columns of a log.txt, and the epochs of its rows as ``EPOCHS``.

    Raises:
        UserError: As ``read_log``.
    """
    table, epochs = read_log(path), [*map(float, logged_epochs(path))]
    # A log of other columns, too, has the ones that are drawn; its rows are counted.
    return {**table, EPOCHS: epochs} if len(epochs) == len(table[PANELS[0][1]]) else table


def run_names(logs: Sequence[Path]) -> list[str]:
    """Return a name for each run: as many last parts of its folder as tell it from the others.

    Args:
        logs: The log of each run, none twice. Where two lie in one folder, the file's name counts.
    """
    paths = [Path(os.path.abspath(path)) for path in logs]
    folders = [path.parent for path in paths]
    parts = [path.parts for path in (folders if len(set(folders)) == len(folders) else paths)]
    return [
        next(
            str(Path(*own[-count:]))
            for count in range(1, len(own) + 1)
            if sum(other[-count:] == own[-count:] for other in parts) == 1
        )
        for own in parts
    ]


@command
def main() -> int:
    """Overlay the logs that the command line names and return the exit code."""
    parser = argparse.ArgumentParser(description="Overlay the curves of several runs.")
    parser.add_argument("logs", nargs="+", type=Path, help="log.txt files")
    parser.add_argument("-o", "--output", type=Path, default=Path("compare.png"))
    arguments = parser.parse_args()
    logs: dict[str, Path] = {}
    for path in arguments.logs:
        first = logs.setdefault(os.path.realpath(path), path)
        if first is not path:
            log.note(f"{path}: is {first}, which is drawn once")
    tables = map(read_run, logs.values())
    runs = dict(zip(run_names([*logs.values()]), tables, strict=True))
    make_output(arguments.output.parent)
    try:
        draw(runs, arguments.output)
    except UserError as error:
        raise UserError(f"-o {error}") from error
    print(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
