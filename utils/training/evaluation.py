"""Scoring a network on a whole set, exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from utils import log
from utils.checkpoint.resume import LoadedCheckpoint
from utils.config.schema import RunConfig
from utils.data.datasets import Dataset
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.errors import TrainingError
from utils.metrics.confusion import Confusion
from utils.metrics.meter import Meter, Metrics
from utils.metrics.progress import ProgressBar
from utils.metrics.step_times import StepTimes
from utils.runtime.precision import forward_loss
from utils.training.checkpoint_data import describe_scoring, log_read_as


@dataclass(frozen=True)
class Evaluator:
    """Scores a network on whole sets, each worker a part of them.

    Attributes:
        model: The raw network.
        batch: The images of a forward pass.
        amp: "off" or "bf16".
        comm: The engine.
    """

    model: nn.Module
    batch: int
    amp: str
    comm: Comm

    @torch.inference_mode()
    def __call__(
        self,
        images: ImageSet,
        confusion: Confusion | None = None,
        after_batch: Callable[[], Any] = lambda: None,
    ) -> Metrics:
        """Score the network on a set.

        The batches are the same for any number of workers; worker r computes batches r,
        r + world_size, ... Nothing is padded or counted twice, and an image's logits do not depend
        on who computes them. Batch norm uses the average of the workers' statistics, which stay as
        they are.

        Args:
            images: The set.
            confusion: Counts which classes are taken for which, if given.
            after_batch: Called equally often on every worker.

        Returns:
            Means over the set, the same on every worker.

        Raises:
            TrainingError: The workers have not counted every image exactly once.
        """
        comm = self.comm
        self.model.eval()
        batches = torch.arange(len(images), device=images.storage_device).split(self.batch)
        own = batches[comm.rank :: comm.world_size]
        meter = Meter(comm.device)
        times = StepTimes()
        bar = ProgressBar("valid", len(own), comm.is_main_process)
        with comm.averaged_buffers(self.model):  # One all-reduce.
            for k, index in enumerate(own):
                times.begin()
                inputs, labels = images.batch(index)
                times.data_ready()
                loss, output = forward_loss(self.model, inputs, labels, self.amp)
                meter.update(loss, output, labels)
                if confusion:
                    confusion.update(output, labels)
                times.step_done(loss, len(index))
                if bar.due(k + 1):
                    bar.show(k + 1, meter.local(), times)
                after_batch()
            if len(own) < math.ceil(len(batches) / comm.world_size):
                after_batch()  # The others have one batch more.
        bar.finish()
        result = meter.reduced(comm)  # One all-reduce.
        if confusion:
            confusion.reduce(comm)  # Another one.
        if result.images != len(images):
            raise TrainingError(f"evaluated {result.images} images of {len(images)}")
        return result


def evaluate_checkpoint(
    evaluator: Evaluator,
    images: ImageSet,
    loaded: LoadedCheckpoint | None,
    dataset: Dataset,
    run: RunConfig,
) -> None:
    """Score the network of a checkpoint and print what has come out.

    Args:
        evaluator: Scores; the checkpoint's weights are in its network already.
        images: The test set.
        loaded: The checkpoint.
        dataset: The data set, with the statistics and classes of the checkpoint.
        run: Says whether to print each class, and to draw the confusion matrix beside the file.
    """
    comm = evaluator.comm
    confusion = Confusion(len(dataset.classes), comm.device) if run.per_class else None
    result = evaluator(images, confusion)
    if not comm.is_main_process or loaded is None:  # --evaluate always comes with a checkpoint.
        return
    content = loaded.content
    epoch = content.get("epoch", content.get("trained_epochs", "unknown"))
    log.info(f"{loaded.path}, after epoch {epoch}")
    log_read_as(loaded)
    log.info(f"scored on the {describe_scoring(dataset, len(images), 'test')}")
    if confusion:
        log.info("\n".join(confusion.lines(dataset.classes)))
    log.info(
        f"Test Loss: {result.loss:.8f}, Test Acc: {result.top1:.2f} "
        f"({round(result.top1 * result.images / 100)} of {result.images}), top5 {result.top5:.2f}"
    )
    if not math.isfinite(result.loss):
        log.warning(f"{loaded.path}: the loss is not finite: damaged weights or statistics")
    picture = loaded.path.parent / "confusion.png"
    if confusion and confusion.draw(dataset.classes, picture):
        log.info(str(picture))
