"""How far a run has come."""

from dataclasses import dataclass, field


@dataclass
class Position:
    """How far training has come.

    Attributes:
        epoch: the epoch to train next or to go on with, counted from 0.
        step: steps of that epoch that are done.
        sums: what each worker's meter has added up in them, a row each; empty for nothing.
        acc: the last validation accuracy, per cent.
        best_acc, best_epoch: the highest so far and its epoch, counted from 1; 0 before the first.
    """

    epoch: int = 0
    step: int = 0
    sums: list[list[float]] = field(default_factory=list)
    acc: float = 0.0
    best_acc: float = 0.0
    best_epoch: int = 0

    def advance(self, acc: float) -> bool:
        """Count the epoch that has just been validated; True if it is the best so far."""
        self.epoch, self.step, self.sums = self.epoch + 1, 0, []
        self.acc = acc
        is_best = self.best_epoch == 0 or acc > self.best_acc
        if is_best:
            self.best_acc, self.best_epoch = acc, self.epoch
        return is_best
