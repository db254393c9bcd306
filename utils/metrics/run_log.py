"""What a run reports: log.txt, metrics.jsonl, TensorBoard when asked, and the progress bar."""

import importlib.util
import json
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from progress.bar import Bar

from utils.errors import UserError
from utils.files import write_text
from utils.log import say
from utils.metrics.meter import Metrics
from utils.metrics.step_times import StepTimes

LOG_COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")


class RunLog:
    """log.txt (tab separated, a row an epoch), metrics.jsonl and TensorBoard events of a run.

    Both files are written whole and renamed, an epoch's row is there or not. A disk that is full
    costs rows until the next epoch, which writes them all.

    Args:
        folder: the run folder, or None for a log that writes nothing (ranks other than 0).
        epochs_done: rows to keep of an earlier part of the run; later ones are cut off, because
            the epochs after the checkpoint are trained again.
        tensorboard: also write TensorBoard events.
    """

    def __init__(self, folder: Path | None, epochs_done: int, tensorboard: bool = False) -> None:
        self.folder = folder
        self.writer: Any = None
        if folder is None:
            return
        header = "\t".join(LOG_COLUMNS)
        self.table = _kept_lines(folder / "log.txt", 1 + epochs_done) or [header]
        self.lines = _kept_lines(folder / "metrics.jsonl", epochs_done)
        self._write(folder)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional and slow to import

            self.writer = SummaryWriter(str(folder), purge_step=epochs_done)

    def epoch(
        self, epoch: int, rate: float, train: Metrics, valid: Metrics, seconds: float
    ) -> None:
        """Add an epoch, counted from 1."""
        if self.folder is None:
            return
        row = (rate, train.loss, valid.loss, train.top1, valid.top1)
        self.table.append("\t".join(f"{value:.6f}" for value in row))
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
        self.lines.append(json.dumps(record))
        try:
            self._write(self.folder)
            self._add_events(record, epoch)
        except OSError as error:
            say(f"warning: the log in {self.folder} cannot be written ({error.strerror}); "
                "the next epoch tries again")  # fmt: skip

    def _write(self, folder: Path) -> None:
        for name, lines in (("log.txt", self.table), ("metrics.jsonl", self.lines)):
            write_text(folder / name, "".join(line + "\n" for line in lines))

    def _add_events(self, record: dict[str, Any], epoch: int) -> None:
        if self.writer:
            for name, value in record.items():
                if name != "epoch":
                    self.writer.add_scalar(name.replace("_", "/", 1), value, epoch)
            self.writer.flush()

    def close(self) -> None:
        """Close the TensorBoard file; the others are never left open."""
        if self.writer:
            self.writer.close()


def check_tensorboard() -> None:
    """Raise UserError where --tensorboard is asked for and its package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "--tensorboard: the package tensorboard is missing; install it with "
            "'pip install tensorboard' or leave the flag out"
        )


def _kept_lines(path: Path, count: int) -> list[str]:
    return path.read_text().splitlines()[:count] if path.exists() else []


class ProgressBar:
    """One line of progress over the steps of an epoch.

    On a terminal a bar redrawn a few times a second; elsewhere a plain line now and then, so
    that log files stay readable. A disabled bar does nothing.
    """

    def __init__(self, title: str, steps: int, enabled: bool) -> None:
        self.title = title
        self.steps = steps
        self.enabled = enabled
        self.started = time.perf_counter()
        self.on_terminal = enabled and sys.stdout.isatty()
        self.interval = 0.2 if self.on_terminal else 30.0
        self.shown = self.started
        self.bar = _Line(title, max=steps, file=sys.stdout) if self.on_terminal else None

    def due(self, step: int) -> bool:
        """True when it is time to show step (counted from 1): then ``show`` it."""
        if not self.enabled:
            return False
        return time.perf_counter() - self.shown >= self.interval or (
            self.on_terminal and step == self.steps
        )

    def show(self, step: int, metrics: Metrics, times: StepTimes) -> None:
        """Draw the line for a step, counted from 1."""
        self.shown = now = time.perf_counter()
        total = now - self.started
        eta = total / step * (self.steps - step)
        parts = [
            f"Data: {sum(times.data[-step:]) / step:.3f}s",
            f"Batch: {total / step:.3f}s",
            f"Total: {timedelta(seconds=int(total))}",
            f"ETA: {timedelta(seconds=int(eta))}",
            f"Loss: {metrics.loss:.4f}",
            f"top1: {metrics.top1: .4f}",
            f"top5: {metrics.top5: .4f}",
        ]
        count = f"({step}/{self.steps})"
        if self.bar:
            self.bar.draw(step, count, parts)
        else:
            say(f"{self.title} {count} {' | '.join(parts)}")

    def finish(self) -> None:
        """End the line."""
        if self.bar:
            self.bar.finish()


class _Line(Bar):
    """A progress bar that never wraps: in a narrow terminal the bar goes first, then the times."""

    def draw(self, index: int, count: str, parts: list[str]) -> None:
        room = shutil.get_terminal_size().columns - len(self.message) - len(count) - 3
        while len(" | ".join(parts)) > room and len(parts) > 1:
            parts = parts[1:]
        text = f"{count} {' | '.join(parts)}"
        self.width = max(0, min(24, room - len(text) + len(count) - 3))
        self.bar_prefix, self.bar_suffix = (" |", "| ") if self.width > 3 else (" ", "")
        self.width = self.width if self.width > 3 else 0
        self.suffix = text.replace("%", "%%")
        self.index = index
        self.update()

    def writeln(self, line: str) -> None:
        super().writeln(line[: shutil.get_terminal_size().columns - 1])
