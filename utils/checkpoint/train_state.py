"""How far a run has come."""

from dataclasses import dataclass, field
from typing import Any

from utils import log
from utils.checkpoint.resume import LoadedCheckpoint
from utils.config.schema import RunConfig, TrainConfig
from utils.errors import UserError


def is_finished(loaded: LoadedCheckpoint, run: RunConfig, train: TrainConfig) -> bool:
    """Return whether a run has nothing left to train, and was asked for no more than to go on.

    The same command once more, as chains of jobs give it, is no mistake.
    """
    asked = run.resume == "auto" and train.start_epoch is None
    return (asked or loaded.own) and loaded.content.get("epoch", 0) >= train.epochs


@dataclass
class TrainState:
    """How far training has come.

    Attributes:
        epoch: The epoch to train next or to continue, counted from 0.
        step: The steps of that epoch that are done.
        metric_sums: What each worker's meter has added up in them, a row each; empty for nothing.
        step_seconds: The time that they have taken.
        acc: The last validation accuracy, in per cent.
        best_acc: The highest validation accuracy so far.
        best_epoch: The epoch of the highest one, counted from 1; 0 before the first, or where the
            file of an older script has named the accuracy and no epoch.
    """

    epoch: int = 0
    step: int = 0
    metric_sums: list[list[float]] = field(default_factory=list)
    step_seconds: float = 0.0
    acc: float = 0.0
    best_acc: float = 0.0
    best_epoch: int = 0

    @classmethod
    def start(
        cls,
        train: TrainConfig,
        loaded: LoadedCheckpoint | None,
        fingerprint: dict[str, Any],
        steps: int,
    ) -> "TrainState":
        """Return where training starts.

        Args:
            train: Says when training ends, and may say where it starts.
            loaded: The checkpoint to continue, if any.
            fingerprint: What the meaning of a step depends on; see ``EpochPlan.fingerprint``.
            steps: The steps of an epoch.

        Raises:
            UserError: The checkpoint has no epochs left to train, or stands inside an epoch of
                another fingerprint, or behind its end.
        """
        if loaded is None:
            return cls(epoch=train.start_epoch or 0)
        content = loaded.content
        found = cls(
            epoch=content.get("epoch", 0),
            step=content.get("step", 0),
            metric_sums=content.get("step_sums", []),
            step_seconds=content.get("step_seconds", 0.0),
            acc=content.get("acc", 0.0),
            best_acc=content.get("best_acc", 0.0),
            best_epoch=content.get("best_epoch", 0),
        )
        if train.start_epoch is not None and not loaded.own:
            found.epoch = train.start_epoch
            found.forget_steps()
        if found.best_epoch > found.epoch:  # It lies after the start, so it is trained again.
            log.note(
                f"the best epoch so far, {found.best_epoch}, is forgotten: it is trained again"
            )
            found.best_acc, found.best_epoch = 0.0, 0
        if found.epoch >= train.epochs:
            raise UserError(
                f"--resume {loaded.path}: has been trained for {found.epoch} epochs and --epochs "
                f"is {train.epochs}; give more --epochs, or --evaluate"
            )
        for name, value in content.get("shape", {}).items() if found.step else ():
            if fingerprint.get(name) != value:
                raise UserError(
                    f"--resume {loaded.path}: stands at step {found.step} of an epoch with {name} "
                    f"{value}, not {fingerprint.get(name)}; finish that epoch with the old flags "
                    "first"
                )
        if found.step > steps:
            raise UserError(
                f"--resume {loaded.path}: stands at step {found.step} of an epoch, which has "
                f"{steps}; name another file"
            )
        return found

    def advance(self, acc: float) -> bool:
        """Count the epoch that has just been validated; return whether it is the best so far."""
        self.epoch += 1
        self.forget_steps()
        self.acc = acc
        is_best = acc > self.best_acc or (self.best_epoch == 0 and self.best_acc == 0)
        if is_best:
            self.best_acc, self.best_epoch = acc, self.epoch
        return is_best

    def forget_steps(self) -> None:
        """Stand at the beginning of the epoch."""
        self.step, self.metric_sums, self.step_seconds = 0, [], 0.0
