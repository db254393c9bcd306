"""What becomes of losses and gradients that are not finite: --on-nan."""

from utils import log
from utils.checkpoint.manager import CheckpointManager
from utils.checkpoint.train_state import TrainState
from utils.errors import NotFinite, TrainingError
from utils.training.plan import EpochPlan

# The number of times in a row that a step may be skipped, or a run go back.
_MOST_IN_A_ROW = 10


class NonFinitePolicy:
    """Decides whether a run continues after numbers that are not finite, and where.

    Args:
        on_nan: "stop", "skip" (the step is skipped) or "rewind" (the run goes back to the last
            checkpoint and skips the steps since).
        plan: The steps of an epoch.
        state: How far the run has come.
        checkpoints: The run's checkpoints.
    """

    def __init__(
        self, on_nan: str, plan: EpochPlan, state: TrainState, checkpoints: CheckpointManager
    ) -> None:
        """Start without anything skipped."""
        self.on_nan = on_nan
        self.plan = plan
        self.state = state
        self.checkpoints = checkpoints
        self._rewinds = 0
        self._skipped_in_a_row = 0
        self._has_skipped = False

    def skip_step(self, error: NotFinite) -> None:
        """Let the run continue behind a step that has had no effect.

        Raises:
            NotFinite: The error, where the step may not be skipped.
        """
        self._skipped_in_a_row += 1
        self._has_skipped = True
        if self.on_nan != "skip" or self._skipped_in_a_row > _MOST_IN_A_ROW:
            raise error
        log.warning(
            f"{self._describe(error)}; the step is left out ({self._skipped_in_a_row} in a row)"
        )

    def step_done(self) -> None:
        """Note the end of a step, skipped or not."""
        if not self._has_skipped:
            self._skipped_in_a_row = 0
        self._has_skipped = False

    def rewind(self, error: NotFinite) -> None:
        """Go back to the last checkpoint, and skip the steps up to the one that failed.

        Checkpoints are written at the end of every epoch, so the last one is of the same epoch.

        Raises:
            TrainingError: The run may not go back, or has no checkpoint.
        """
        self._rewinds += 1
        allowed = self.on_nan == "rewind" and self._rewinds <= _MOST_IN_A_ROW
        content = self.checkpoints.read_back()
        if content is None or not allowed:
            raise TrainingError(
                f"{self._describe(error)}; nothing of it is kept"
                + (f", the last good checkpoint is {self.checkpoints.path}" if content else "")
                + "; lower --lr, add --warmup-steps, or see --on-nan"
            ) from None
        log.warning(
            f"{self._describe(error)}; going back to {self.checkpoints.path} (epoch "
            f"{content['epoch'] + 1}, step {content['step']}) and on from step {error.step + 2}"
        )
        self.checkpoints.restore(content)
        self.state.step = error.step + 1
        self.state.metric_sums = content["step_sums"]
        self.state.step_seconds = content.get("step_seconds", 0.0)

    def _describe(self, error: NotFinite) -> str:
        """Return in words where numbers have become useless."""
        steps = len(self.plan.batch_slices)
        rate = self.plan.learning_rate(self.state.epoch, min(error.step, steps - 1))
        rank = "" if error.rank is None else f" on rank {error.rank}"
        return (
            f"epoch {self.state.epoch + 1}, step {error.step + 1} of {steps} (learning rate "
            f"{rate:g}): the loss or gradient is not finite{rank}"
        )
