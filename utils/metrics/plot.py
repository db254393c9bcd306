"""Curves of one run (log.png), or of several runs over each other.

``python -m utils.plot checkpoints/cifar10/*/log.txt -o compare.png``
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

from utils.errors import UserError
from utils.files import write_atomically
from utils.metrics.run_log import LOG_COLUMNS

PANELS = (("loss", "Train Loss", "Valid Loss"), ("accuracy, %", "Train Acc.", "Valid Acc."))


def read_log(path: Path) -> dict[str, list[float]]:
    """Return the columns of a log.txt by name.

    Raises:
        UserError: The file is missing or is no such log.
    """
    try:
        names, *rows = [line.strip().split("\t") for line in path.read_text().splitlines()]
        columns = zip(*[[float(value) for value in row] for row in rows], strict=True)
        table = dict(zip(names, map(list, columns), strict=True)) if rows else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a log.txt of a run: {error}") from error
    if rows and not set(LOG_COLUMNS) <= set(table):
        raise UserError(f"{path}: not a log.txt of a run: its columns are {', '.join(names)}")
    return table


def draw(runs: Mapping[str, dict[str, list[float]]], picture: Path) -> None:
    """Draw loss and accuracy over epochs, a colour a run, training dashed; replaces the file."""
    # Imported here because it is slow, and through Figure because pyplot wants a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (label, train, valid) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for number, (name, table) in enumerate(runs.items()):
            epochs = range(1, len(table.get(train, [])) + 1)
            prefix = f"{name} " if len(runs) > 1 else ""
            style = {"color": f"C{number}", "marker": "." if len(epochs) < 30 else ""}
            axes.plot(epochs, table.get(train, []), "--", label=prefix + "train", **style)
            axes.plot(epochs, table.get(valid, []), "-", label=prefix + "valid", **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=100))


def main() -> int:
    """Overlay the logs that the command line names and return the exit code."""
    parser = argparse.ArgumentParser(description="Overlay the curves of several runs.")
    parser.add_argument("logs", nargs="+", type=Path, help="log.txt files")
    parser.add_argument("-o", "--output", type=Path, default=Path("compare.png"))
    arguments = parser.parse_args()
    try:
        runs = {str(path.parent.name): read_log(path) for path in arguments.logs}
    except UserError as error:
        parser.error(str(error))
    draw(runs, arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
