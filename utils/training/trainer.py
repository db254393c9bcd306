"""Training: epochs of steps, from one good state to the next.

``train_one_epoch`` is the loop over the steps. ``Training`` goes through the epochs: it trains,
validates, logs and saves, takes up signals, and decides what becomes of numbers that are not
finite.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.checkpoint.format import Saver
from utils.checkpoint.train_state import Position
from utils.data import sampling as order
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.distributed.replicas import check_replicas
from utils.distributed.signals import NOT_FINITE, NOTHING, STOP, Interrupt
from utils.errors import Interrupted, NotFinite, TrainingError
from utils.launch.heartbeat import Watch
from utils.metrics.meter import Meter, Metrics
from utils.metrics.plot import draw, read_log
from utils.metrics.run_log import ProgressBar, RunLog
from utils.metrics.step_times import StepTimes
from utils.startup import PAD
from utils.training.cuda_graph import StepGraph
from utils.training.optim import Schedule, set_learning_rate
from utils.training.step import Step

# How many times in a row a step may be left out, or a run go back, before that is no accident.
MOST_NOT_FINITE = 10
# Steps between two looks at the loss where a look would hold up the device.
LOOK_EVERY = 50


def _fail(error: NotFinite) -> NoReturn:
    raise error


def train_one_epoch(
    step: Step,
    graph: StepGraph | None,
    meter: Meter,
    images: ImageSet,
    bounds: list[tuple[int, int]],
    rates: list[float],
    position: Position,
    seed_of_run: int,
    comm: Comm,
    times: StepTimes,
    after_step: Callable[[int], None],
    not_finite: Callable[[NotFinite], None] = _fail,
) -> Metrics:
    """Train one epoch, or the rest of one, on this worker's share of each batch.

    Args:
        step: the optimisation step.
        graph: does the same for steps of its size, if given.
        meter: adds up loss and accuracy.
        images: the whole training set.
        bounds: the global batches as positions in the epoch's permutation.
        rates: the learning rate of each step.
        position: the epoch, the steps of it that are done, and the meter's sums over them.
        seed_of_run: of order, augmentation and dropout.
        comm: the engine.
        times: gets the seconds of each step.
        after_step: called with the number of steps done.
        not_finite: called when a step has been left out because its gradient is not finite;
            raises where that ends the epoch.

    Returns:
        Means over all images that all workers trained on.
    """
    step.model.train()
    epoch = position.epoch
    sequence = _to(order.permutation(len(images), seed_of_run, epoch), images.home)
    augmentation = _to(order.crops_and_flips(len(images), seed_of_run, epoch, PAD), images.home)
    meter.start_from(position.sums, comm)
    bar = ProgressBar("train", len(bounds), comm.is_main)
    for k in range(position.step, len(bounds)):
        start, stop = bounds[k]
        first, last = order.share(start, stop, comm.rank, comm.size)
        index, seed = sequence[first:last], order.step_seed(seed_of_run, epoch, k)
        set_learning_rate(step.optimizer, rates[k])
        times.begin()
        try:
            if graph and graph.takes(len(index), stop - start):
                times.data_ready()
                loss = graph(index, augmentation, seed)
            else:
                batch, labels = images.batch(index, augmentation)
                times.data_ready()
                loss, output = step(batch, labels, stop - start, seed)  # all-reduces the gradients
                meter.update(loss, output, labels)
        except NotFinite as error:
            error.step = k
            not_finite(error)
            loss = torch.zeros((), device=comm.device)
        times.step_done(loss, stop - start)
        if bar.due(k + 1):
            bar.show(k + 1, meter.local(), times)
        after_step(k + 1)
    bar.finish()
    return meter.reduced(comm)  # one sum over the workers


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


@dataclass
class Training:
    """A run from its position to its end.

    Attributes:
        comm: the engine.
        say: prints a line on rank 0.
        watch: learns of everything that this worker begins.
        model: the raw model.
        optimizer: as ``comm.wrap`` returned it.
        step, graph, meter, times: as for ``train_one_epoch``.
        images: the training set.
        validate: scores the model; calls what it is given after each batch.
        bounds: the global batches of an epoch.
        schedule: of the learning rate.
        position: how far the run has come.
        epochs: when it ends.
        seed: of the run.
        saver, log: write what the run leaves in its folder.
        save_every: steps between two saves inside an epoch; None for none.
        check_replicas_every: steps between two comparisons of the workers' parameters inside an
            epoch; None for none.
        exchanges: False where the workers train without each other, for measurements.
        on_nan: "stop", "skip" or "rewind".
        timeout: seconds without a step that are taken for a stall.
    """

    comm: Comm
    say: Callable[[str], Any]
    watch: Watch
    model: nn.Module
    optimizer: Optimizer
    step: Step
    graph: StepGraph | None
    meter: Meter
    times: StepTimes
    images: ImageSet
    validate: Callable[[Callable[[], Any]], Metrics]
    bounds: list[tuple[int, int]]
    schedule: Schedule
    position: Position
    epochs: int
    seed: int
    saver: Saver
    log: RunLog
    save_every: int | None
    check_replicas_every: int | None
    exchanges: bool
    on_nan: str
    timeout: float
    rewinds: int = 0
    left_out: int = 0  # steps in a row
    was_left_out: bool = False

    def run(self) -> None:
        """Train to the end.

        Raises:
            TrainingError: on all ranks; the run cannot go on, or has not been saved.
            Interrupted: a signal has asked for it; everything is saved.
        """
        self.interrupt = Interrupt(self.comm)  # from here on signals mean: save and stop
        if not self.comm.elastic:
            self.watch.begin(self.comm.rank, self.timeout)
        try:
            while self.position.epoch < self.epochs:
                try:
                    self._epoch()
                except NotFinite as error:
                    self._rewind(error)
        except Interrupted:
            self._check_saved()
            self.say(
                f"\ninterrupted after epoch {self.position.epoch}, step {self.position.step}: "
                "saved; --resume auto goes on from there"
            )
            raise
        finally:
            self.interrupt.close()
        self._check_saved()

    def _epoch(self) -> None:
        """Train, validate, log and save one epoch, or the rest of one."""
        position, steps = self.position, len(self.bounds)
        epoch = position.epoch
        started = time.perf_counter()
        rates = [self.schedule.learning_rate(epoch, k, steps) for k in range(steps)]
        self.say(f"\nEpoch: [{epoch + 1} | {self.epochs}] LR: {rates[-1]:.6f}")
        train = train_one_epoch(
            self.step,
            self.graph,
            self.meter,
            self.images,
            self.bounds,
            rates,
            position,
            self.seed,
            self.comm,
            self.times,
            self._after_step,
            self._leave_out,
        )
        train_seconds = time.perf_counter() - started
        if not math.isfinite(train.loss):
            raise NotFinite(None, steps - 1)
        if self.exchanges:
            check_replicas(self.comm, self.model)
        try:
            valid = self.validate(self._after_evaluated_batch)
        except Interrupted:
            self._save_inside(steps)
            raise
        self.watch.beat("saving")
        is_best = position.advance(valid.top1)
        self.say(
            f"train loss {train.loss:.4f} top1 {train.top1:.2f} | "
            f"valid loss {valid.loss:.4f} top1 {valid.top1:.2f} top5 {valid.top5:.2f} | "
            f"{time.perf_counter() - started:.1f} s, {train.images / train_seconds:,.0f} images/s"
        )
        self.log.epoch(epoch + 1, rates[-1], train, valid, train_seconds)
        self.saver.save(position, is_best)
        if self.comm.is_main:
            draw_log(self.saver.folder, self.say)

    def _after_step(self, done: int) -> None:
        """What happens inside an epoch, on every rank, after ``done`` steps of it."""
        self.watch.beat(f"step {done + 1} of epoch {self.position.epoch + 1}")
        if not self.was_left_out:
            self.left_out = 0
        self.was_left_out = False
        if self.check_replicas_every and done % self.check_replicas_every == 0:
            check_replicas(self.comm, self.model)
        blind = self.step.on_nan is None and self.exchanges
        if blind and done % LOOK_EVERY == 0 and not math.isfinite(self.meter.local().loss):
            self.interrupt.wish(NOT_FINITE)
        wish = self.interrupt.poll()  # an all-reduce that overlaps with the next step
        if wish == NOT_FINITE:
            raise NotFinite(None, done - 1)
        due = self.save_every and done % self.save_every == 0 and done < len(self.bounds)
        if due or wish != NOTHING:
            self._save_inside(done)
        if wish == STOP:
            raise Interrupted

    def _after_evaluated_batch(self) -> None:
        self.watch.beat(f"evaluation after epoch {self.position.epoch + 1}")
        if self.interrupt.poll() == STOP:  # a wish to save is met in a moment anyway
            raise Interrupted

    def _save_inside(self, done: int) -> None:
        """Save after ``done`` steps of the epoch."""
        self.position.step, self.position.sums = done, self.meter.rows(self.comm)
        try:
            self.saver.save(self.position, is_best=False)
        except NotFinite as error:
            error.step = done - 1
            raise

    def _leave_out(self, error: NotFinite) -> None:
        """Go on behind a step whose numbers are not finite, where that is wanted."""
        self.left_out += 1
        self.was_left_out = True
        if self.on_nan != "skip" or self.left_out > MOST_NOT_FINITE:
            raise error
        self.say(
            f"warning: {self._describe(error)}; the step is left out ({self.left_out} in a row)"
        )

    def _rewind(self, error: NotFinite) -> None:
        """Go back to the last checkpoint, and leave out the steps up to the one that failed.

        Checkpoints are written at the end of every epoch, so the last one is of the same epoch.
        """
        self.rewinds += 1
        wanted = self.on_nan == "rewind" and self.rewinds <= MOST_NOT_FINITE
        state = self.saver.read_back()
        if state is None or not wanted:
            raise TrainingError(
                f"{self._describe(error)}; nothing of it is kept"
                + (f", the last good checkpoint is {self.saver.path}" if state else "")
                + "; lower --lr, add --warmup-steps, or see --on-nan"
            ) from None
        self.say(
            f"warning: {self._describe(error)}; going back to {self.saver.path} (epoch "
            f"{state['epoch'] + 1}, step {state['step']}) and on from step {error.step + 2}"
        )
        self.saver.restore(state)
        self.position.step = error.step + 1
        self.position.sums = state["step_sums"]

    def _describe(self, error: NotFinite) -> str:
        """Where numbers have become useless, in words."""
        steps = len(self.bounds)
        rate = self.schedule.learning_rate(self.position.epoch, min(error.step, steps - 1), steps)
        rank = "" if error.rank is None else f" on rank {error.rank}"
        return (
            f"epoch {self.position.epoch + 1}, step {error.step + 1} of {steps} (learning rate "
            f"{rate:g}): the loss or gradient is not finite{rank}"
        )

    def _check_saved(self) -> None:
        """Raise TrainingError on all ranks where the last save has failed."""
        if self.comm.max_(int(self.saver.failed)):  # nobody leaves before rank 0 has saved
            raise TrainingError(
                f"{self.saver.path}: could not be written; what is there is an older state"
            )


def draw_log(folder: Path, say: Callable[[str], Any]) -> None:
    """Draw log.png; a disk that is full costs the picture only."""
    try:
        draw({folder.name: read_log(folder / "log.txt")}, folder / "log.png")
    except OSError as error:
        say(f"warning: {folder / 'log.png'} cannot be written ({error.strerror})")
