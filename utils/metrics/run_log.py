"""What a run leaves of its epochs: log.txt, metrics.jsonl and, when asked, TensorBoard events."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from utils import log
from utils.errors import reason_of
from utils.files import write_text
from utils.metrics.meter import Metrics

LOG_COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")
EPOCHS = "Epoch"  # No column of log.txt, whose rows are counted.
# The same in metrics.jsonl.
_KEYS = ("learning_rate", "train_loss", "valid_loss", "train_top1", "valid_top1")
# What a byte that is no text becomes.
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class RunLog:
    """Writes log.txt (tab separated, a row an epoch), metrics.jsonl and TensorBoard events.

    Both files are written whole and renamed, so an epoch's row is there or not. A disk that is full
    costs rows until the next epoch, which writes them all.

    Of an earlier part of the run it keeps the lines as they are, each epoch once: metrics.jsonl
    says which epochs there are, and rows of log.txt without it are counted. A file that is damaged
    or of another program is renamed, and the log goes on with what can be read of it. Nothing that
    is wrong with a log ends a training.

    Args:
        folder: The run folder, or None for a log that writes nothing (ranks other than 0).
        epochs_done: The last epoch to keep of an earlier part of the run. Later ones are cut off,
            because the epochs after the checkpoint are trained again.
        tensorboard: Whether to write TensorBoard events, too.
    """

    def __init__(self, folder: Path | None, epochs_done: int, tensorboard: bool = False) -> None:
        """Write what is kept of an earlier part of the run."""
        self.folder = folder
        self.tensorboard = tensorboard
        self.writer: Any = None
        # What the first write renames: the word for its new name, and what is wrong with it.
        self.unfit: dict[Path, tuple[str, str]] = {}
        if folder is None:
            return
        records = self._read_records(folder / "metrics.jsonl")
        self.header, rows = self._read_table(folder / "log.txt")
        self.lines = {epoch: line for epoch, (line, _) in records.items()}
        self.rows = {
            **_number_rows(rows, records),
            **{epoch: row for epoch, (_, row) in records.items()},
        }
        # A run that goes back has its rows until it has trained an epoch anew.
        goes_back = max(self.lines or self.rows, default=0) > epochs_done
        self._forget_after(epochs_done)
        if not goes_back:
            self._try("the log", lambda: self._write(folder))

    def epoch(
        self, epoch: int, rate: float, train: Metrics, valid: Metrics, seconds: float
    ) -> None:
        """Add an epoch.

        Args:
            epoch: Its number, counted from 1.
            rate: The learning rate of its last step.
            train: Means over what it was trained on.
            valid: Means over the validation set, afterwards.
            seconds: The time of its training.
        """
        if self.folder is None:
            return
        record = {
            "epoch": epoch,
            "learning_rate": rate,
            "train_loss": train.loss,
            "valid_loss": valid.loss,
            "train_top1": train.top1,
            "valid_top1": valid.top1,
            "train_top5": train.top5,
            "valid_top5": valid.top5,
            "seconds": round(seconds, 3),
            "images_per_second": round(train.images / seconds, 1),
        }
        self._forget_after(epoch - 1)
        self.rows[epoch] = _row_of(record)
        self.lines[epoch] = json.dumps(record)
        folder = self.folder
        self._try("the log", lambda: self._write(folder))
        if self.tensorboard:
            self._try("the events of TensorBoard", lambda: self._add_events(folder, record))

    def columns(self) -> dict[str, list[float]]:
        """Return the columns of log.txt by name, and the epochs of its rows as ``EPOCHS``."""
        return {**parse_log([self.header, *self.rows.values()]), EPOCHS: [*map(float, self.rows)]}

    def close(self) -> None:
        """Close the TensorBoard file; the others are never left open."""
        if self.writer:
            with contextlib.suppress(Exception):  # Each epoch has flushed it.
                self.writer.close()

    def _try(self, what: str, write: Callable[[], None]) -> None:
        """Write, or warn of whatever is wrong; the same warning comes once."""
        try:
            write()
        except Exception as error:
            log.warning_once(
                f"{what} in {self.folder} cannot be written ({reason_of(error)}); "
                "the next epoch tries again"
            )

    def _write(self, folder: Path) -> None:
        for path, (word, why) in list(self.unfit.items()):
            kept = _set_aside(path, word)
            del self.unfit[path]
            log.warning(f"{path}: {why}; it is kept as {kept.name}, and a new one begins")
        for name, header, lines in (
            ("log.txt", [self.header], self.rows),
            ("metrics.jsonl", [], self.lines),
        ):
            write_text(folder / name, "".join(line + "\n" for line in [*header, *lines.values()]))

    def _add_events(self, folder: Path, record: dict[str, Any]) -> None:
        try:
            if self.writer is None:
                from torch.utils.tensorboard import SummaryWriter  # Optional, and slow to import.

                self.writer = SummaryWriter(str(folder), purge_step=record["epoch"])
            for name, value in record.items():
                if name != "epoch":
                    self.writer.add_scalar(name.replace("_", "/", 1), value, record["epoch"])
            self.writer.flush()
        except Exception:
            self.writer = None  # One that has failed would always fail.
            raise

    def _forget_after(self, last: int) -> None:
        """Put the epochs in order and forget those after ``last``."""
        for lines in (self.rows, self.lines):
            kept = {epoch: lines[epoch] for epoch in sorted(lines) if 1 <= epoch <= last}
            lines.clear()
            lines.update(kept)

    def _read(self, path: Path) -> list[str]:
        """Return the lines of a file; none where there is no file, or none that can be read."""
        try:
            return path.read_bytes().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            self.unfit[path] = "damaged", f"cannot be read ({reason_of(error)})"
            return []

    def _read_table(self, path: Path) -> tuple[str, list[str]]:
        """Return the header of a log.txt, and its rows up to the first that is damaged."""
        header, *lines = self._read(path) or ["\t".join(LOG_COLUMNS)]
        # Other scripts of this family end each line with a tab.
        ours = header.rstrip("\t").split("\t") == list(LOG_COLUMNS)
        if not ours and _UNREADABLE not in header:
            self.unfit[path] = "before", "has not the columns of this log"
            lines = []
        rows = [*itertools.takewhile(_is_row, lines)]
        if len(rows) < len(lines) or _UNREADABLE in header:
            line = len(rows) + 2 if ours else 1
            self.unfit[path] = "damaged", f"line {line} is damaged"
        return header if ours else "\t".join(LOG_COLUMNS), rows

    def _read_records(self, path: Path) -> dict[int, tuple[str, str]]:
        """Return the whole lines of a metrics.jsonl with their rows of log.txt, by their epochs.

        Of an epoch that stands there twice it is the last.
        """
        records = {}
        for number, line in enumerate(self._read(path), 1):
            try:
                record = json.loads(line)
                if type(record["epoch"]) is not int or _UNREADABLE in line:
                    raise ValueError(line)
                records[record["epoch"]] = line, _row_of(record)
            except Exception:  # Any JSON may stand there.
                self.unfit.setdefault(path, ("damaged", f"line {number} is damaged"))
        return records


def logged_epochs(path: Path) -> list[int]:
    """Return the epochs of the rows of a log.txt, which metrics.jsonl beside it tells.

    Without rows they are those of metrics.jsonl.
    """
    log_file = RunLog(None, 0)  # It reads, and writes nothing.
    records = log_file._read_records(path.with_name("metrics.jsonl"))
    _, rows = log_file._read_table(path)
    return [*_number_rows(rows, records)] or sorted(records)


def parse_log(lines: Sequence[str]) -> dict[str, list[float]]:
    """Return the columns of the lines of a log.txt by name; further ones are left out.

    Raises:
        ValueError: They are no such log.
    """
    if not lines:
        raise ValueError("it is empty")
    names, *rows = [line.strip().split("\t") for line in lines]
    if not set(LOG_COLUMNS) <= set(names):
        raise ValueError(f"its columns are {', '.join(names)}")
    cells = [dict(zip(names, row, strict=True)) for row in rows]
    return {name: [float(row[name]) for row in cells] for name in LOG_COLUMNS}


def _row_of(record: dict[str, Any]) -> str:
    """Return the row of log.txt for a record of metrics.jsonl."""
    return "\t".join(f"{record[key]:.6f}" for key in _KEYS)


def _is_row(line: str) -> bool:
    try:
        return len([float(value) for value in line.rstrip("\t").split("\t")]) == len(LOG_COLUMNS)
    except ValueError:
        return False


def _number_rows(rows: Sequence[str], records: dict[int, tuple[str, str]]) -> dict[int, str]:
    """Return the rows of log.txt by their epochs.

    The first row that belongs to a record of metrics.jsonl tells; without one they begin with 1.
    """
    epochs = {row: epoch for epoch, (_, row) in sorted(records.items(), reverse=True)}
    found = (epochs[row] - number for number, row in enumerate(rows) if row in epochs)
    return dict(enumerate(rows, max(1, next(found, 1))))


def _set_aside(path: Path, word: str) -> Path:
    """Rename a file, such as log.txt to log.damaged.txt, or log.damaged-2.txt where there is one.

    Returns:
        The new path.
    """
    for number in itertools.count(1):
        more = f"-{number}" if number > 1 else ""
        new = path.with_name(f"{path.stem}.{word}{more}{path.suffix}")
        if not os.path.lexists(new):
            break
    return path.rename(new)
