"""What a run leaves of its epochs: log.txt, metrics.jsonl and, when asked, TensorBoard events."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import log
from utils.files import write_text
from utils.metrics.meter import Metrics

LOG_COLUMNS = ("Learning Rate", "Train Loss", "Valid Loss", "Train Acc.", "Valid Acc.")


class RunLog:
    """Writes log.txt (tab separated, a row an epoch), metrics.jsonl and TensorBoard events.

    Both files are written whole and renamed, so an epoch's row is there or not. A disk that is full
    costs rows until the next epoch, which writes them all.

    Args:
        folder: The run folder, or None for a log that writes nothing (ranks other than 0).
        epochs_done: The rows to keep of an earlier part of the run. Later ones are cut off, because
            the epochs after the checkpoint are trained again.
        tensorboard: Whether to write TensorBoard events, too.
    """

    def __init__(self, folder: Path | None, epochs_done: int, tensorboard: bool = False) -> None:
        """Write what is kept of an earlier part of the run."""
        self.folder = folder
        self.writer: Any = None
        if folder is None:
            return
        header = "\t".join(LOG_COLUMNS)
        self.table = _first_lines(folder / "log.txt", 1 + epochs_done) or [header]
        self.lines = _first_lines(folder / "metrics.jsonl", epochs_done)
        self._try(lambda: self._write(folder))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # Optional, and slow to import.

            self.writer = SummaryWriter(str(folder), purge_step=epochs_done)

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
        folder = self.folder

        def write() -> None:
            try:
                self._write(folder)
            finally:  # Events of an epoch are written once: the next epoch would not add them.
                self._add_events(record, epoch)

        self._try(write)

    def _try(self, write: Callable[[], None]) -> None:
        """Write, or warn of a disk that is full."""
        try:
            write()
        except OSError as error:
            log.warning(
                f"the log in {self.folder} cannot be written ({error.strerror}); "
                "the next epoch tries again"
            )

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


def _first_lines(path: Path, count: int) -> list[str]:
    return path.read_text().splitlines()[:count] if path.exists() else []
