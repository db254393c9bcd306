"""The whole training step as one CUDA graph.

Small and deep networks on a GPU wait for the host to launch their kernels. A captured step (batch,
forward, loss, backward, update, sums of loss and accuracy) is launched as one. What changes from
step to step lies in tensors that stay at their place: the indices of the batch, its crops and
flips, the learning rate. Parameters, momentum, buffers and the meter's sums stay at theirs, too.
To restore them is to copy into them.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

import torch
from torch import Tensor

from utils import log
from utils.data.image_set import ImageSet
from utils.distributed.comm import Comm
from utils.errors import one_line
from utils.metrics.meter import Meter
from utils.runtime.device import seed_generators
from utils.training.step import Step

Work = Callable[[], None]

_REASON = 210  # The bytes of a rank's reason for not capturing that the others learn.


class Recorder(Protocol):
    """What StepGraph needs from CUDA; a test brings its own.

    Attributes:
        seconds: The time that the recording has taken.
    """

    seconds: float

    def on_stream(self) -> AbstractContextManager:
        """Return the context of all that the run does on the device, recorded or not."""

    def record(self, work: Work) -> Work:
        """Record the work, without doing it, and return what does it."""

    def drop(self) -> None:
        """Destroy what has been recorded; it cannot be replayed any more."""


class CudaRecorder:
    """Records CUDA graphs, as PyTorch's notes on CUDA semantics describe it.

    The whole run uses one stream of its own, because the default stream cannot be captured. DDP
    keeps the autograd nodes that accumulate gradients, and a node keeps the stream on which it was
    made. A backward pass on another stream waits at every parameter, is warned of (torch 2.10 and
    later), and may break the capture.
    """

    seconds = 0.0

    def __init__(self, device: torch.device) -> None:
        """Make the stream; record nothing yet."""
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
        """Capture the work into a graph and return its replay; call this inside ``on_stream``."""
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        started = time.perf_counter()
        try:
            # Only what this thread may not do ends the capture, for NCCL's threads poll events.
            with torch.cuda.graph(
                self._graph, pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                work()
        except Exception:
            # With torch 2.11 and older a capture that fails keeps the generator, and its pool of
            # memory open, and eager training needs both back. Newer versions have
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


# The recorders by the type of device.
RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}


def on_stream(recorder: Recorder | None) -> AbstractContextManager:
    """Return the context of a run: the recorder's stream, or nothing where steps run eagerly."""
    return recorder.on_stream() if recorder else nullcontext()


def resolve_cuda_graph(
    choice: str,
    comm: Comm,
    accumulation_steps: int,
    storage_device: torch.device,
    on_nan: str,
    redraws: bool,
) -> tuple[bool, str]:
    """Return whether to record the step, and why not where that was asked for.

    Args:
        choice: --graph: "auto" records where there is one worker, "on" wherever it can work.
        comm: The engine.
        accumulation_steps: The backward passes of a step.
        storage_device: Where the training set is; the gather of a batch is a part of the graph.
        on_nan: --on-nan; "skip" decides on each step after its backward pass.
        redraws: Whether backward draws dropout masks a second time, from a generator set back.
    """
    obstacles = [
        (comm.device.type not in RECORDERS, "it needs a GPU"),
        (not comm.graph_warm_up_steps, f"{comm.name} cannot be captured"),
        (storage_device != comm.device, "the images stay in main memory (--resident)"),
        (accumulation_steps > 1, "--backward-passes-per-step seeds each pass anew"),
        (on_nan == "skip", "--on-nan skip looks at every step"),
        (redraws, "--checkpoint-activations draws the masks of --drop again"),
    ]
    why = next((text for wrong, text in obstacles if wrong), "")
    wanted = choice == "on" or (choice == "auto" and comm.world_size == 1)
    return wanted and not why, why if choice == "on" else ""


class StepGraph:
    """Trains on batches of one size: eagerly at first, then by replaying what was recorded.

    All ranks replay, or none does. Whatever ends the run has to ``drop`` the recording before the
    engine closes: NCCL waits, without a limit, for graphs that refer to a group.

    Args:
        step: Does one step; its optimizer's learning rate is a tensor on the device.
        images: The training set.
        meter: Adds up loss and accuracy.
        shard: The images of a step that the graph takes on this worker.
        global_batch: The images of that step on all workers.
        warm_up_steps: The steps before the recording, which train as all others do.
        recorder: Records.

    Attributes:
        failure: Why a rank could not record, if so; then all train eagerly. Empty otherwise.
    """

    def __init__(
        self,
        step: Step,
        images: ImageSet,
        meter: Meter,
        shard: int,
        global_batch: int,
        warm_up_steps: int,
        recorder: Recorder,
    ) -> None:
        """Record nothing yet."""
        self.step = step
        self.images = images
        self.meter = meter
        self.warm_up_steps = warm_up_steps
        self.recorder = recorder
        self.failure = ""
        self._replay: Work | None = None
        self._size = (shard, global_batch)
        device = images.device
        self._index = torch.zeros(shard, dtype=torch.int64, device=device)
        self._augmentation = torch.zeros(len(images), 3, dtype=torch.int64, device=device)
        self._epoch: Tensor | None = None

    def drop(self) -> None:
        """Destroy the recording; this waits for nothing."""
        self._replay = None
        self.recorder.drop()

    def takes(self, shard: int, global_batch: int) -> bool:
        """Return whether a step has the graph's size; the last of an epoch may be smaller."""
        return not self.failure and self._size == (shard, global_batch)

    def __call__(self, index: Tensor, augmentation: Tensor, seed: int) -> Tensor:
        """Train on a batch.

        Args:
            index: (shard,) positions in the set.
            augmentation: (N, 3) crops and flips of the epoch.
            seed: The seed of the step.

        Returns:
            The loss summed over the shard; the next call overwrites it.
        """
        self._index.copy_(index)
        if self._epoch is not augmentation:
            self._augmentation.copy_(augmentation)
            self._epoch = augmentation
        if self.warm_up_steps == 0 and self._replay is None:
            self._record()
        seed_generators(seed, self.images.device)
        if self.warm_up_steps > 0:
            self.warm_up_steps -= 1
        (self._replay or self._train)()
        return self._loss

    def _record(self) -> None:
        """Record on all ranks, or decide on all of them to train eagerly."""
        self.step.optimizer.zero_grad()  # Backward must make gradients in the graph's memory.
        reason = ""
        try:
            self._replay = self.recorder.record(self._train)
        except RuntimeError as error:
            first: BaseException = error  # The end of a capture fails too, and tells less.
            while first.__context__:
                first = first.__context__
            reason = next(iter(str(first).strip().splitlines()), "") or type(first).__name__
            reason = one_line(reason, _REASON)
        comm = self.step.comm
        rank = comm.all_reduce_max(comm.rank + 1 if reason else 0) - 1
        if rank < 0:
            return
        self.drop()
        comm.discard_backward(self.step.model)
        where = "" if comm.world_size == 1 else f" on rank {rank}"
        self.failure = f"the step cannot be captured{where} ({self._broadcast(reason, rank)})"
        log.warning(f"--graph: {self.failure}; going on without")

    def _broadcast(self, reason: str, rank: int) -> str:
        """Return a rank's reason on every rank.

        It travels as numbers that fit into int64, apart from what a GPU may have broken off.
        """
        comm = self.step.comm
        own = (
            reason.encode()[:_REASON].ljust(_REASON, b"\0") if comm.rank == rank else bytes(_REASON)
        )
        words = [int.from_bytes(own[k : k + 7], "big") for k in range(0, _REASON, 7)]
        agreed = b"".join(comm.all_reduce_max(word).to_bytes(7, "big") for word in words).rstrip(
            b"\0"
        )
        return agreed.decode(errors="ignore")  # The last character may be cut.

    def _train(self) -> None:
        images, labels = self.images.batch(self._index, self._augmentation)
        self._loss, output = self.step(images, labels, self._size[1], seed=None)
        self.meter.update(self._loss, output, labels)
