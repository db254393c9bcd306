"""Which classes are taken for which: --per-class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.distributed.comm import Comm
from utils.files import write_atomically


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
        line = f"{title}  {100 * right / max(total, 1):6.2f} %  ({right} of {total})"
        counts[row] = 0
        if int(counts.sum()):
            worst = int(counts.argmax())
            line += f", most often taken for {names[worst]} ({int(counts[worst])})"
        return line

    def draw(self, names: Sequence[str], picture: Path) -> None:
        """Draw the matrix, each row in per cent of its class."""
        from matplotlib.figure import Figure  # Slow to import.

        counts = self.counts.cpu().double()
        shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
        size = 4 + 0.12 * len(names)
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=100)
        figure.colorbar(image, label="% of the class")
        ticks = range(len(names))
        font = max(3, 10 - len(names) // 14)
        axes.set_xticks(ticks, names, rotation=90, fontsize=font)
        axes.set_yticks(ticks, names, fontsize=font)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        write_atomically(picture, lambda file: figure.savefig(file, format="png", dpi=120))
