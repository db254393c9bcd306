"""The whole training step as one CUDA graph.

Small and deep networks on a GPU wait for the host to launch their kernels. A captured step (batch,
forward, loss, backward, update, sums of loss and accuracy) is launched as one. What changes from
step to step lies in tensors that stay at their place: the indices of the batch, its crops and
flips, the learning rate.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.augment import ImageSet
from utils.comm import Comm
from utils.metrics import Meter
from utils.step import Step

Work = Callable[[], None]


class Recorder(Protocol):
    """What StepGraph needs from CUDA; a test brings its own."""

    def warm_up(self, work: Work) -> None:
        """Do the work as it will be recorded, without recording it."""

    def record(self, work: Work) -> Work:
        """Record the work, without doing it, and return what does it."""


class CudaRecorder:
    """Records CUDA graphs, as PyTorch's notes on CUDA semantics describe it."""

    def __init__(self, device: torch.device) -> None:
        self.side = torch.cuda.Stream(device)

    def warm_up(self, work: Work) -> None:
        """Do the work on a side stream: what it allocates there stays out of the graph's way."""
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        with torch.cuda.stream(self.side):
            work()
        current.wait_stream(self.side)

    def record(self, work: Work) -> Work:
        """Capture the work into a graph; returns its replay."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                work()
        except RuntimeError:
            # A capture that fails leaves its stream in force and the generator in its hands
            # (torch 2.11 and older); what goes on without a graph needs both.
            torch.cuda.set_stream(stream)
            generator = torch.cuda.default_generators[stream.device_index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay


def wants_graph(
    choice: str, comm: Comm, passes: int, home: torch.device, on_nan: str
) -> tuple[bool, str]:
    """Whether to record the step, and why not where that was asked for.

    Args:
        choice: --graph: "auto" records where there is one worker, "on" wherever it can work.
        comm: the engine.
        passes: backward passes of a step.
        home: where the training set lives; the gather of a batch is a part of the graph.
        on_nan: --on-nan; "skip" decides on each step after its backward pass.
    """
    obstacles = [
        (comm.device.type != "cuda", "it needs a GPU"),
        (not comm.graph_warm_up, f"{comm.name} cannot be captured"),
        (home != comm.device, "the images stay in main memory (--resident)"),
        (passes > 1, "--backward-passes-per-step seeds each pass anew"),
        (on_nan == "skip", "--on-nan skip looks at every step"),
    ]
    why = next((text for wrong, text in obstacles if wrong), "")
    wanted = choice == "on" or (choice == "auto" and comm.size == 1)
    return wanted and not why, why if choice == "on" else ""


class StepGraph:
    """Trains on batches of one size: eagerly at first, then by replaying what was recorded.

    Args:
        step: does one step; its optimizer's learning rate is a tensor on the device.
        images: the training set.
        meter: adds up loss and accuracy.
        share, global_batch: images of a step that the graph takes, on this worker and on all.
        warm_up: steps before the recording. They count: they train as all others do.
        recorder: records.
        say: prints a line.

    Attributes:
        failed: whether the recording has failed; the run then goes on without it.
    """

    def __init__(
        self,
        step: Step,
        images: ImageSet,
        meter: Meter,
        share: int,
        global_batch: int,
        warm_up: int,
        recorder: Recorder,
        say: Callable[[str], Any],
    ) -> None:
        self.step = step
        self.images = images
        self.meter = meter
        self.left = warm_up
        self.recorder = recorder
        self.say = say
        self.failed = False
        self._replay: Work | None = None
        self._size = (share, global_batch)
        device = images.device
        self._index = torch.zeros(share, dtype=torch.int64, device=device)
        self._augmentation = torch.zeros(len(images), 3, dtype=torch.int64, device=device)
        self._epoch: Tensor | None = None

    def takes(self, share: int, global_batch: int) -> bool:
        """Whether a step of this size is one of the graph's; the last of an epoch may not be."""
        return not self.failed and self._size == (share, global_batch)

    def __call__(self, index: Tensor, augmentation: Tensor, seed: int) -> Tensor:
        """Train on a batch.

        Args:
            index: (share,) positions in the set.
            augmentation: (N, 3), of the epoch.
            seed: of the step.

        Returns:
            The loss summed over the share; the next call overwrites it.
        """
        self._index.copy_(index)
        if self._epoch is not augmentation:
            self._augmentation.copy_(augmentation)
            self._epoch = augmentation
        if self.left == 0 and self._replay is None:
            self._record()
        torch.manual_seed(seed)
        if self.left > 0:
            self.left -= 1
            self.recorder.warm_up(self._train)
        else:
            (self._replay or self._train)()
        return self._loss

    def _record(self) -> None:
        self.step.optimizer.zero_grad()  # backward must make its gradients in the graph's memory
        try:
            self._replay = self.recorder.record(self._train)
        except RuntimeError as error:
            self.failed = True
            first: BaseException = error  # the end of a capture fails too, and says less
            while first.__context__:
                first = first.__context__
            why = str(first).strip().splitlines()[0]
            self.say(f"warning: --graph: the step cannot be captured ({why}); going on without")

    def _train(self) -> None:
        images, labels = self.images.batch(self._index, self._augmentation)
        self._loss, output = self.step(images, labels, self._size[1], seed=None)
        self.meter.update(self._loss, output, labels)
