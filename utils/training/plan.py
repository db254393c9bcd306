"""What an epoch consists of: the global batches of its steps and their learning rates.

Nothing here depends on which worker asks.
"""

from dataclasses import dataclass
from typing import Any

from utils.config.schema import TrainConfig
from utils.data import sampling
from utils.errors import UserError
from utils.training.optim import Schedule, scaled_rate


@dataclass(frozen=True)
class EpochPlan:
    """The steps of every epoch.

    Attributes:
        images: The number of training images.
        global_batch: The images of a step over all workers.
        batch_slices: The global batches as positions in an epoch's permutation.
        schedule: The learning rate.
        seed: The seed of order, augmentation and dropout.
        dropped: The images at the end of an epoch that are fewer than the workers need.
    """

    images: int
    global_batch: int
    batch_slices: tuple[tuple[int, int], ...]
    schedule: Schedule
    seed: int
    dropped: int

    @classmethod
    def of(
        cls, train: TrainConfig, accumulation_steps: int, images: int, world_size: int
    ) -> "EpochPlan":
        """Return the plan of a run.

        Args:
            train: How the network is trained.
            accumulation_steps: The backward passes of a step.
            images: The number of training images.
            world_size: The number of workers, which share each batch.

        Raises:
            UserError: There are fewer images in a batch, or in the whole set, than the workers
                need.
        """
        batch = train.train_batch
        if train.batch_per_worker:
            batch = train.batch_per_worker * world_size
        needed = world_size * accumulation_steps
        if batch < needed:
            raise UserError(
                f"--train-batch {batch}: smaller than {needed}, the {world_size} workers times "
                f"--backward-passes-per-step {accumulation_steps}; each pass needs an "
                "image, so give a larger batch or start fewer workers"
            )
        if images < needed:
            raise UserError(
                f"--train-size {images}: {needed} images are the least for {world_size} workers "
                f"times --backward-passes-per-step {accumulation_steps}; give more images"
            )
        tail = images % batch
        rate = scaled_rate(train.lr, batch, train.lr_scaling)
        return cls(
            images=images,
            global_batch=batch,
            batch_slices=tuple(sampling.batch_slices(images, batch, needed)),
            schedule=Schedule(rate, train.schedule, train.gamma, train.warmup_steps, train.warmup),
            seed=train.seed,
            dropped=tail if tail < needed else 0,
        )

    def learning_rate(self, epoch: int, step: int) -> float:
        """Return the learning rate of a step; epoch and step count from 0."""
        return self.schedule.learning_rate(epoch, step, len(self.batch_slices))

    def fingerprint(self, dataset: str) -> dict[str, Any]:
        """Return what decides which images a step trains on; the number of workers does not."""
        return {
            "global batch": self.global_batch,
            "training images": self.images,
            "seed": self.seed,
            "dataset": dataset,
        }
