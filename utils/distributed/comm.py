"""Comm: what the training loop may ask of an engine. The base class is the serial engine.

The contract is small and closed. Below the two scripts nothing knows an engine by name: the loop
asks a Comm, and cifar.py and cifar_horovod.py each bring one. Every rank calls every method that
communicates, in the same order; rank 0 alone prints and writes.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import BAD_INPUT, FAILED, PeerFailed, UserError


@dataclass(frozen=True)
class Exchange:
    """How gradients travel.

    Attributes:
        compression: "none", or "fp16" to send half the bytes at half precision.
        passes: backward passes whose gradients are added up before they are sent.
        adasum: combine by Adasum (arXiv 2006.02924) instead of the average.
    """

    compression: str = "none"
    passes: int = 1
    adasum: bool = False


class Comm:
    """The serial engine: rank 0 of 1. Subclasses replace what communicates.

    Args:
        timeout: seconds that a worker waits for the others in a collective.

    Attributes:
        rank, size: this worker's number and how many there are.
        local_rank, local_size: the same among the workers of this node.
        device: where this worker computes.
        name: of the engine and its transport, for the start-up lines.
        elastic: whether workers may come and go; then nobody but the engine watches them.
        graph_warm_up: steps to train before a CUDA graph of one; 0 where that cannot be captured.
        sends_any_layout: False where gradients must be contiguous to be exchanged.
    """

    name = "serial"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    elastic = False
    graph_warm_up = 3
    sends_any_layout = True
    device: torch.device

    def __init__(self, timeout: float = 600.0) -> None:
        self.device = pick_device(self.local_rank, self.local_size)

    @classmethod
    def join(cls, timeout: float = 600.0) -> "Comm":
        """The engine of this job.

        A subclass answers with the serial one where the job has one rank, whatever launched it: one
        replica has nobody to exchange anything with, so an engine would cost and gain nothing.
        """
        return cls(timeout)

    @classmethod
    def launched_rank(cls) -> int:
        """The rank that the launcher has given to this process, known before any connection."""
        return 0

    def restarts(self) -> int:
        """How often this job has been started again after a failure."""
        return restarts_by_launcher()

    @property
    def is_main(self) -> bool:
        """True on the one rank that prints and writes."""
        return self.rank == 0

    def run(self, program: Callable[[], None]) -> None:
        """Run the program; an elastic engine runs it again whenever its workers have changed."""
        program()

    def may_regroup(self) -> None:
        """Called by every rank after a save: an elastic engine may take in new workers now."""

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, exchange: Exchange
    ) -> tuple[nn.Module, Optimizer]:
        """Model and optimizer such that forward, backward, step train with the mean gradient.

        When the update happens every parameter's gradient is the average over the workers of
        what their backward passes have added up. Parameters and buffers start as rank 0's.

        Raises:
            UserError: the engine has no such exchange.
        """
        if exchange.adasum:
            raise UserError(
                "--adasum: needs 2, 4, 8, ... workers of cifar_horovod.py, with Horovod built and "
                "run with MPI; leave it out"
            )
        return model, optimizer

    def settle(self, rehearse: Callable[[], None]) -> None:
        """Call ``rehearse``, a step without effect, if the engine's first step differs from later.

        The order in which an engine adds up must not depend on where a run was interrupted.
        """

    def start_anew(self, model: nn.Module) -> None:
        """Forget a backward pass that has failed half-way; every rank must call it.

        Args:
            model: as ``wrap`` returned it.
        """

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        """The context of a backward pass that is not the last of its step."""
        return nullcontext()

    def update(self, optimizer: Optimizer, allowed: Callable[[], bool]) -> bool:
        """Update the parameters if, once the gradients are averaged, ``allowed`` says so.

        Returns:
            What ``allowed`` has said, which is the same on all workers: their gradients are.
        """
        if not allowed():
            return False
        optimizer.step()
        return True

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over the workers, in place, and return it."""
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by rank 0's, in place, and return it."""
        return tensor

    def max_(self, value: int) -> int:
        """The largest of the workers' values; waits however long the slowest worker takes."""
        return value

    def max_later(self, value: int) -> Callable[[], int]:
        """Like ``max_``, without waiting: what is returned waits, and gives the result."""
        return lambda: value

    def rows(self, own: Tensor) -> Tensor:
        """(size, N): the (N,) tensor of every worker, on every worker. One sum over the workers."""
        rows = own.new_zeros(self.size, len(own))
        rows[self.rank] = own
        return self.sum_(rows)

    def from_main(self, make: Callable[[], bytes]) -> bytes:
        """What ``make`` returns on rank 0, on every worker: two broadcasts.

        Raises:
            PeerFailed: on the others, when it has failed on rank 0.
        """
        content = b""
        if self.is_main:
            try:
                content = make()
            except BaseException as error:
                self.max_(_code_of(error))
                raise
        if code := self.max_(0):
            raise PeerFailed(code)
        size = self.max_(len(content))
        shared = torch.zeros(size, dtype=torch.uint8)
        if self.is_main and size:
            shared = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.broadcast_(shared.to(self.device)).cpu().numpy().tobytes()

    def barrier(self) -> None:
        """Return when every worker has come here, however long the slowest takes."""
        self.max_(0)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on the first worker of each node, then on the others.

        For work that leaves something on disk, such as a download: the others find it done.

        Raises:
            PeerFailed: when the block has failed on another worker.
        """
        for first in (True, False):
            if (self.local_rank == 0) == first:
                try:
                    yield
                except BaseException as error:
                    self.max_(_code_of(error))
                    raise
            if code := self.max_(0):
                raise PeerFailed(code)

    @contextmanager
    def averaged_buffers(self, model: nn.Module) -> Iterator[Tensor]:
        """Inside, floating-point buffers (batch-norm statistics) are the average over the workers.

        Training does not read them and the engines never synchronise them. Afterwards each worker
        has its own again, so that an evaluation or a save changes nothing in the training. One
        sum for all buffers together.

        Yields:
            (size, N): the buffers of every worker, flat.
        """
        buffers = float_buffers(model)
        if not buffers:
            yield torch.zeros(self.size, 0)
            return
        own = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        rows = self.rows(own)
        set_float_buffers(model, rows.sum(0).div_(self.size))
        try:
            yield rows
        finally:
            set_float_buffers(model, own)

    def lost_peer(self, error: BaseException) -> bool:
        """Whether an error only says that another worker is gone."""
        return False

    def close(self) -> None:
        """Leave the group. Nothing may be asked of the engine afterwards."""


def float_buffers(model: nn.Module) -> list[Tensor]:
    """The buffers of a network that hold statistics and not counts."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def set_float_buffers(model: nn.Module, flat: Tensor) -> None:
    """Copy (N,) numbers, all float buffers one after the other, into a network."""
    buffers = float_buffers(model)
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _code_of(error: BaseException) -> int:
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def restarts_by_launcher() -> int:
    """How often launcher.sh or torchrun has started this job again, as the environment says."""
    names = ["CIFAR_RESTARTS"]
    if "RANK" in os.environ:  # without it torchrun's variable is another job's
        names.append("TORCHELASTIC_RESTART_COUNT")
    counts = (os.environ.get(name, "") for name in names)
    return sum(int(count) for count in counts if count.isdecimal())


def is_alone(size: int) -> bool:
    """Whether a job of so many ranks needs no engine.

    With CIFAR_KEEP_DDP in the environment it gets one all the same: for tests, which meet NCCL on a
    machine with a single GPU in no other way.
    """
    return size == 1 and not os.environ.get("CIFAR_KEEP_DDP")


def pick_device(local_rank: int, local_size: int) -> torch.device:
    """The GPU of this local rank, or the CPU on a machine without GPUs.

    With CIFAR_SHARE_GPU in the environment workers share GPUs: for tests, it gains nothing.

    Raises:
        UserError: there are GPUs, but fewer than workers on this node.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return torch.device("cpu")
    if local_size > gpus and not os.environ.get("CIFAR_SHARE_GPU"):
        raise UserError(
            f"{local_size} workers for {gpus} GPU(s) on this node: start at most {gpus} workers, "
            "or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)
