"""Which classes are taken for which: --per-class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.distributed.comm import Comm
from utils.errors import one_line
from utils.metrics.picture import draw_picture, try_drawing


class Confusion:
    """Counts of (true class, predicted class) on one worker.

    Attributes:
        counts: (classes, classes) int64, a row for each true class.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        """Start from zero."""
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def update(self, output: Tensor, labels: Tensor) -> None:
        """Add a batch of (B, classes) logits and (B,) labels."""
        classes = len(self.counts)
        cells = labels * classes + output.argmax(1)
        self.counts += cells.bincount(minlength=classes * classes).view(classes, classes)

    def reduce(self, comm: Comm) -> None:
        """Add up what all workers have counted; one all-reduce."""
        comm.all_reduce_sum_(self.counts)

    def lines(self, names: Sequence[str]) -> list[str]:
        """Return accuracy and most frequent mistake of every class, a line each."""
        width = max(map(len, names))
        return [self._line(row, name.ljust(width), names) for row, name in enumerate(names)]

    def _line(self, row: int, title: str, names: Sequence[str]) -> str:
        counts = self.counts[row].clone()
        total, right = int(counts.sum()), int(counts[row])
        if not total:
            return f"{title}  no images"
        line = f"{title}  {100 * right / total:6.2f} %  ({right} of {total})"
        counts[row] = 0
        if int(counts.sum()):
            worst = int(counts.argmax())
            line += f", most often taken for {names[worst]} ({int(counts[worst])})"
        return line

    def draw(self, names: Sequence[str], picture: Path) -> bool:
        """Draw the matrix, each row in per cent of its class, or warn that it cannot be drawn.

        Returns:
            Whether the picture is there.
        """
        size = 4 + 0.12 * len(names)

        def fill(figure: Any) -> None:
            counts = self.counts.cpu().double()
            shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
            axes = figure.subplots()
            image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=100)
            figure.colorbar(image, label="% of the class")
            ticks, labels = range(len(names)), [one_line(name) for name in names]
            font = max(3, 10 - len(names) // 14)
            axes.set_xticks(ticks, labels, rotation=90, fontsize=font)
            axes.set_yticks(ticks, labels, fontsize=font)
            axes.set_xlabel("predicted")
            axes.set_ylabel("true")

        return try_drawing(lambda: draw_picture(picture, fill, (size + 1, size), dpi=120))
