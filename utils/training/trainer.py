"""From epoch to epoch: train, validate, log, save, and take up signals."""

import math
import time

from utils import log
from utils.checkpoint.manager import CheckpointManager
from utils.checkpoint.train_state import TrainState
from utils.config.schema import GradientSyncConfig, RunConfig, TrainConfig
from utils.data.image_set import ImageSet
from utils.distributed.consistency import check_replicas
from utils.distributed.signals import NOT_FINITE, NOTHING, STOP, SignalHandler
from utils.errors import Interrupted, NotFinite, TrainingError
from utils.launch.heartbeat import Heartbeat
from utils.metrics.picture import try_drawing
from utils.metrics.plot import draw
from utils.metrics.run_log import RunLog
from utils.training.evaluation import Evaluator
from utils.training.loop import TrainLoop
from utils.training.nonfinite import NonFinitePolicy

# The steps between two checks of the loss where a check would hold up the device.
_LOSS_CHECK_EVERY = 50


class Trainer:
    """Trains a run from its state to its end.

    Args:
        loop: Trains an epoch.
        evaluator: Scores the network after each epoch.
        validation: The set that it is scored on.
        state: How far the run has come.
        checkpoints: Saves the run.
        run_log: Writes a row for each epoch.
        heartbeat: Learns of everything that this worker begins.
        train: Says how many epochs there are, and what becomes of numbers that are not finite.
        sync: Says how often replicas are compared, and which silence is a stall.
        run: Says how often the run is saved inside an epoch.
    """

    def __init__(
        self,
        loop: TrainLoop,
        evaluator: Evaluator,
        validation: ImageSet,
        state: TrainState,
        checkpoints: CheckpointManager,
        run_log: RunLog,
        heartbeat: Heartbeat,
        train: TrainConfig,
        sync: GradientSyncConfig,
        run: RunConfig,
    ) -> None:
        """Keep the collaborators; nothing is trained yet."""
        self.loop = loop
        self.comm = loop.comm
        self.evaluator = evaluator
        self.validation = validation
        self.state = state
        self.checkpoints = checkpoints
        self.run_log = run_log
        self.heartbeat = heartbeat
        self.epochs = train.epochs
        self.sync = sync
        self.save_every = run.save_every
        self.nonfinite = NonFinitePolicy(train.on_nan, loop.plan, state, checkpoints)

    def fit(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: On all ranks; the run cannot continue, or has not been saved.
            Interrupted: A signal has asked for it; everything is saved.
        """
        self.signals = SignalHandler(self.comm)  # From here on signals mean: save and stop.
        if not self.comm.elastic:
            self.heartbeat.register(self.comm.rank, self.sync.timeout)
        try:
            while self.state.epoch < self.epochs:
                try:
                    self._fit_epoch()
                except NotFinite as error:
                    self.nonfinite.rewind(error)
        except Interrupted:
            self._check_saved()
            log.info(
                f"\ninterrupted after epoch {self.state.epoch}, step {self.state.step}: "
                "saved; --resume auto goes on from there"
            )
            raise
        finally:
            self.signals.close()
        self._check_saved()

    def _fit_epoch(self) -> None:
        """Train, validate, log and save one epoch, or the rest of one."""
        state, steps = self.state, len(self.loop.plan.batch_slices)
        epoch = state.epoch
        # As if the steps that an earlier start has done had been trained just now.
        self.epoch_started = time.perf_counter() - state.step_seconds
        rate = self.loop.plan.learning_rate(epoch, steps - 1)
        log.info(f"\nEpoch: [{epoch + 1} | {self.epochs}] LR: {rate:.6f}")
        train = self.loop.train_epoch(state, self._after_step, self.nonfinite.skip_step)
        train_seconds = self._seconds_of_epoch()
        if not math.isfinite(train.loss):
            raise NotFinite(None, steps - 1)
        if not self.sync.no_exchange:
            check_replicas(self.comm, self.evaluator.model)  # A broadcast of checksums.
        try:
            valid = self.evaluator(self.validation, after_batch=self._after_evaluated_batch)
        except Interrupted:
            self._save_inside_epoch(steps, train_seconds)
            raise
        self.heartbeat.beat("saving")
        is_best = state.advance(valid.top1)
        log.info(
            f"train loss {train.loss:.4f} top1 {train.top1:.2f} | "
            f"valid loss {valid.loss:.4f} top1 {valid.top1:.2f} top5 {valid.top5:.2f} | "
            f"{self._seconds_of_epoch():.1f} s, {train.images / train_seconds:,.0f} images/s"
        )
        self.run_log.epoch(epoch + 1, rate, train, valid, train_seconds)
        self.checkpoints.save(state, is_best)
        if self.comm.is_main_process:
            folder = self.checkpoints.folder
            try_drawing(lambda: draw({folder.name: self.run_log.columns()}, folder / "log.png"))

    def _after_step(self, done: int) -> None:
        """Do what happens inside an epoch, on every rank, after ``done`` steps of it."""
        self.heartbeat.beat(f"step {done + 1} of epoch {self.state.epoch + 1}")
        self.nonfinite.step_done()
        every = self.sync.check_replicas
        if every and done % every == 0:
            check_replicas(self.comm, self.evaluator.model)
        # Where gradients are not checked the loss tells, now and then.
        unchecked = self.loop.step.on_nan is None and not self.sync.no_exchange
        check = unchecked and done % _LOSS_CHECK_EVERY == 0
        if check and not math.isfinite(self.loop.meter.local().loss):
            self.signals.request(NOT_FINITE)
        request = self.signals.poll()  # An all-reduce that overlaps with the next step.
        if request == NOT_FINITE:
            raise NotFinite(None, done - 1)
        steps = len(self.loop.plan.batch_slices)
        due = self.save_every and done % self.save_every == 0 and done < steps
        if due or request != NOTHING:
            self._save_inside_epoch(done, self._seconds_of_epoch())
        if request == STOP:
            raise Interrupted

    def _after_evaluated_batch(self) -> None:
        self.heartbeat.beat(f"evaluation after epoch {self.state.epoch + 1}")
        if self.signals.poll() == STOP:  # A request to save is met in a moment anyway.
            raise Interrupted

    def _seconds_of_epoch(self) -> float:
        """Return the time that the epoch has taken up to now, over all starts of the run."""
        return time.perf_counter() - self.epoch_started

    def _save_inside_epoch(self, done: int, seconds: float) -> None:
        """Save after ``done`` steps of the epoch, which have taken ``seconds``."""
        self.state.step, self.state.step_seconds = done, seconds
        self.state.metric_sums = self.loop.meter.all_gather(self.comm)
        try:
            self.checkpoints.save(self.state, is_best=False)
        except NotFinite as error:
            error.step = done - 1
            raise

    def _check_saved(self) -> None:
        """Raise TrainingError on all ranks where the last save has failed.

        It is also a barrier: nobody ends before rank 0 has saved.
        """
        if self.comm.all_reduce_max(int(self.checkpoints.failed)):
            raise TrainingError(
                f"{self.checkpoints.path}: could not be written; what is there is an older state"
            )
