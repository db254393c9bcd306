"""The progress over the steps of an epoch: a bar on a terminal, a line now and then elsewhere."""

import shutil
import sys
import time
from datetime import timedelta

from progress.bar import Bar

from utils import log
from utils.metrics.meter import Metrics
from utils.metrics.step_times import StepTimes


class ProgressBar:
    """One line of progress over the steps of an epoch.

    On a terminal a bar is redrawn a few times a second. Elsewhere a plain line comes now and then,
    so that log files stay readable. A disabled bar does nothing.

    Args:
        title: The word before the line.
        steps: The number of steps.
        enabled: Whether anything is shown: on rank 0 only.
    """

    def __init__(self, title: str, steps: int, enabled: bool) -> None:
        """Start the clock."""
        self.title = title
        self.steps = steps
        self.enabled = enabled
        self.started = time.perf_counter()
        self.on_terminal = enabled and log.draws_progress()
        self.interval = 0.2 if self.on_terminal else 30.0
        self.shown = self.started
        self.bar = _Line(title, max=steps, file=sys.stdout) if self.on_terminal else None

    def due(self, step: int) -> bool:
        """Return whether it is time to ``show`` a step, counted from 1."""
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
            log.info(f"{self.title} {count} {' | '.join(parts)}")

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
