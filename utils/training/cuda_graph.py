"""The whole training step as one CUDA graph.

Small and deep networks on a GPU wait for the host to launch their kernels. A captured step (batch,
forward, loss, backward, update, sums of loss and accuracy) is launched as one. What changes from
step to step lies in tensors that stay at their place: the indices of the batch, its crops and
flips, the learning rate. Parameters, momentum, buffers and the meter's sums stay at theirs, too:
whoever restores them copies.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.errors import one_line
from utils.metrics.meter import Meter
from utils.training.step import Step, seed_generators

Work = Callable[[], None]

_REASON = 210  # bytes of a rank's reason for not capturing that the others learn


class Recorder(Protocol):
    """What StepGraph needs from CUDA; a test brings its own.

    Attributes:
        seconds: that the recording has taken.
    """

    seconds: float

    def on_stream(self) -> AbstractContextManager:
        """The context of all that the run does on the device, recorded or not."""

    def record(self, work: Work) -> Work:
        """Record the work, without doing it, and return what does it."""

    def drop(self) -> None:
        """Let go of what has been recorded; it cannot be done again."""


class CudaRecorder:
    """Records CUDA graphs, as PyTorch's notes on CUDA semantics describe it.

    The whole run uses one stream of its own, because the default stream cannot be captured. DDP
    keeps the autograd nodes that accumulate gradients, and a node keeps the stream on which it was
    made. A backward pass on another stream waits at every parameter, is warned of (torch 2.10 and
    later), and may break the capture.
    """

    seconds = 0.0

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Make the recorder's stream the current one."""
        before = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            yield
        before.wait_stream(self.stream)

    def record(self, work: Work) -> Work:
        """Capture the work into a graph; returns its replay. Call it inside ``on_stream``."""
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        started = time.perf_counter()
        try:
            # Only what this thread may not do ends the capture: NCCL's threads look at events.
            with torch.cuda.graph(
                self._graph, pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                work()
        except Exception:
            # With torch 2.11 and older a capture that fails keeps the generator, and its pool of
            # memory open, and what goes on without a graph needs both back. Newer versions have
            # closed the pool already and refuse to do it again.
            device = self.stream.device_index
            generator = torch.cuda.default_generators[device]
            generator.graphsafe_set_state(generator.clone_state())
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(device, pool)
                torch._C._cuda_releasePool(device, pool)
            raise
        self.seconds = time.perf_counter() - started
        return self._graph.replay

    def drop(self) -> None:
        """Destroy the graph now, also where a traceback still refers to it."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


# By the kind of device.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def wants_graph(
    choice: str, comm: Comm, passes: int, home: torch.device, on_nan: str, redraws: bool
) -> tuple[bool, str]:
    """Whether to record the step, and why not where that was asked for.

    Args:
        choice: --graph: "auto" records where there is one worker, "on" wherever it can work.
        comm: the engine.
        passes: backward passes of a step.
        home: where the training set lives; the gather of a batch is a part of the graph.
        on_nan: --on-nan; "skip" decides on each step after its backward pass.
        redraws: whether backward draws dropout masks a second time, from a generator set back.
    """
    obstacles = [
        (comm.device.type not in RECORDERS, "it needs a GPU"),
        (not comm.graph_warm_up, f"{comm.name} cannot be captured"),
        (home != comm.device, "the images stay in main memory (--resident)"),
        (passes > 1, "--backward-passes-per-step seeds each pass anew"),
        (on_nan == "skip", "--on-nan skip looks at every step"),
        (redraws, "--checkpoint-activations draws the masks of --drop again"),
    ]
    why = next((text for wrong, text in obstacles if wrong), "")
    wanted = choice == "on" or (choice == "auto" and comm.size == 1)
    return wanted and not why, why if choice == "on" else ""


class StepGraph:
    """Trains on batches of one size: eagerly at first, then by replaying what was recorded.

    All ranks replay, or none does. Whatever ends the run has to ``drop`` the recording before the
    engine closes: NCCL waits, without a limit, for graphs that refer to a group.

    Args:
        step: does one step; its optimizer's learning rate is a tensor on the device.
        images: the training set.
        meter: adds up loss and accuracy.
        share, global_batch: images of a step that the graph takes, on this worker and on all.
        warm_up: steps before the recording. They count: they train as all others do.
        recorder: records.
        say: prints a line.

    Attributes:
        failed: whether a rank could not record; the run then goes on without, on all of them.
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

    def drop(self) -> None:
        """Let go of the recording; waits for nothing."""
        self._replay = None
        self.recorder.drop()

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
        seed_generators(seed, self.images.device)
        if self.left > 0:
            self.left -= 1
        (self._replay or self._train)()
        return self._loss

    def _record(self) -> None:
        """Record on all ranks, or decide on all of them to go on without."""
        self.step.optimizer.zero_grad()  # backward must make its gradients in the graph's memory
        why = ""
        try:
            self._replay = self.recorder.record(self._train)
        except RuntimeError as error:
            first: BaseException = error  # the end of a capture fails too, and says less
            while first.__context__:
                first = first.__context__
            why = next(iter(str(first).strip().splitlines()), "") or type(first).__name__
            why = one_line(why, _REASON)
        comm = self.step.comm
        rank = comm.max_(comm.rank + 1 if why else 0) - 1
        if rank < 0:
            return
        self.failed = True
        self.drop()
        comm.start_anew(self.step.model)
        # By numbers that fit into int64, which travel apart from what a GPU may have broken off.
        own = why.encode()[:_REASON].ljust(_REASON, b"\0") if comm.rank == rank else bytes(_REASON)
        words = [int.from_bytes(own[k : k + 7], "big") for k in range(0, _REASON, 7)]
        agreed = b"".join(comm.max_(word).to_bytes(7, "big") for word in words).rstrip(b"\0")
        reason = agreed.decode(errors="ignore")  # of a character that is cut
        who = "" if comm.size == 1 else f" on rank {rank}"
        self.say(f"warning: --graph: the step cannot be captured{who} ({reason}); going on without")

    def _train(self) -> None:
        images, labels = self.images.batch(self._index, self._augmentation)
        self._loss, output = self.step(images, labels, self._size[1], seed=None)
        self.meter.update(self._loss, output, labels)
