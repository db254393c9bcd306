"""The loop over the steps of an epoch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from utils.checkpoint.train_state import TrainState
from utils.data import sampling
from utils.data.image_set import ImageSet
from utils.errors import NotFinite
from utils.metrics.meter import Meter, Metrics
from utils.metrics.progress import ProgressBar
from utils.metrics.step_times import StepTimes
from utils.training.cuda_graph import Recorder, StepGraph
from utils.training.optim import set_learning_rate
from utils.training.plan import EpochPlan
from utils.training.step import Step


class TrainLoop:
    """Trains epochs on this worker's shard of each global batch.

    Args:
        step: The optimisation step.
        images: The whole training set.
        plan: The steps of an epoch.
        recorder: Records the step as a CUDA graph, if given.
        keep_losses: Whether the loss of each step is kept, and the times are those of the device.

    Attributes:
        meter: Adds up loss and accuracy of the epoch.
        times: The seconds of each step.
        graph: The recorded step, if there is a recorder.
    """

    def __init__(
        self,
        step: Step,
        images: ImageSet,
        plan: EpochPlan,
        recorder: Recorder | None = None,
        keep_losses: bool = False,
    ) -> None:
        """Let the engine warm up its buckets; every rank must make the loop."""
        self.step = step
        self.comm = step.comm
        self.images = images
        self.plan = plan
        self.meter = Meter(self.comm.device)
        self.times = StepTimes(keep_losses)
        self.graph: StepGraph | None = None
        start, stop = plan.batch_slices[0]
        first, last = self._shard(start, stop)
        self.comm.warm_up_buckets(lambda: self._dry_run(last - first, stop - start))
        if recorder:
            warm_up_steps = self.comm.graph_warm_up_steps
            self.graph = StepGraph(
                step, images, self.meter, last - first, stop - start, warm_up_steps, recorder
            )

    def train_epoch(
        self,
        state: TrainState,
        after_step: Callable[[int], None],
        skip_step: Callable[[NotFinite], None],
        batch_slices: Sequence[tuple[int, int]] | None = None,
    ) -> Metrics:
        """Train one epoch, or the rest of one.

        Args:
            state: The epoch, the steps of it that are done, and the meter's sums over them.
            after_step: Called with the number of steps done.
            skip_step: Called when a step has had no effect because its gradient is not finite;
                raises where that ends the epoch.
            batch_slices: Other global batches than the plan's, for measurements.

        Returns:
            Means over all images that all workers trained on.
        """
        slices = self.plan.batch_slices if batch_slices is None else batch_slices
        epoch, seed = state.epoch, self.plan.seed
        order = self._to_storage(sampling.permutation(len(self.images), seed, epoch))
        augmentation = self._to_storage(
            sampling.crops_and_flips(len(self.images), seed, epoch, sampling.PAD)
        )
        rates = [self.plan.learning_rate(epoch, k) for k in range(len(slices))]
        self.step.model.train()
        self.meter.start_from(state.metric_sums, self.comm)
        bar = ProgressBar("train", len(slices), self.comm.is_main_process)
        for k in range(state.step, len(slices)):
            start, stop = slices[k]
            first, last = self._shard(start, stop)
            set_learning_rate(self.step.optimizer, rates[k])
            self.times.begin()
            try:
                step_seed = sampling.step_seed(seed, epoch, k)
                loss = self._train_step(order[first:last], augmentation, stop - start, step_seed)
            except NotFinite as error:
                error.step = k
                skip_step(error)
                loss = torch.zeros((), device=self.comm.device)
            self.times.step_done(loss, stop - start)
            if bar.due(k + 1):
                bar.show(k + 1, self.meter.local(), self.times)
            after_step(k + 1)
        bar.finish()
        return self.meter.reduced(self.comm)  # One all-reduce.

    def _train_step(
        self, index: Tensor, augmentation: Tensor, global_batch: int, seed: int
    ) -> Tensor:
        """Train on the images at the given positions; return the loss summed over them."""
        if self.graph and self.graph.takes(len(index), global_batch):
            self.times.data_ready()
            return self.graph(index, augmentation, seed)
        images, labels = self.images.batch(index, augmentation)
        self.times.data_ready()
        loss, output = self.step(images, labels, global_batch, seed)  # All-reduces the gradients.
        self.meter.update(loss, output, labels)
        return loss

    def _dry_run(self, shard: int, global_batch: int) -> None:
        device = self.images.storage_device
        index = torch.arange(shard, device=device)
        augmentation = torch.zeros(len(self.images), 3, dtype=torch.int64, device=device)
        self.step.dry_run(*self.images.batch(index, augmentation), global_batch)

    def _shard(self, start: int, stop: int) -> tuple[int, int]:
        return sampling.shard(start, stop, self.comm.rank, self.comm.world_size)

    def _to_storage(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.images.storage_device)

    def close(self) -> None:
        """Destroy the CUDA graph; call this before the engine closes, whatever ends the run."""
        if self.graph:
            self.graph.drop()
