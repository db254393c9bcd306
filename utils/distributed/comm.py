"""Comm is all that training may ask of an engine; the base class is the serial engine.

The contract is small and closed. Outside utils/distributed/ only the two scripts name an engine.
Every rank calls every method that communicates, in the same order; rank 0 alone prints and writes.
"""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.config.schema import GradientSyncConfig
from utils.errors import BAD_INPUT, FAILED, PeerFailed, UserError
from utils.launch.heartbeat import JOB_VARIABLE, RESTARTS_VARIABLE
from utils.launch.processes import giver_of_variables, identity

# By this variable torchrun tells its workers how often it has started them again.
TORCHRUN_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


class Comm:
    """The serial engine: rank 0 of 1. Subclasses replace what communicates.

    Attributes:
        rank: The number of this worker.
        world_size: The number of workers.
        local_rank: The number of this worker among those of its node.
        local_world_size: The number of workers on this node.
        device: The device on which this worker computes.
        name: The name of the engine and its transport, for the run summary.
        elastic: Whether workers may come and go; then only the engine can tell whether all is well.
        graph_warm_up_steps: The steps to train before one is captured as a CUDA graph; 0 where the
            engine's collectives cannot be captured.
        supports_any_layout: False where gradients must be contiguous to be all-reduced.
    """

    name = "serial"
    rank = 0
    world_size = 1
    local_rank = 0
    local_world_size = 1
    elastic = False
    graph_warm_up_steps = 3
    supports_any_layout = True
    device: torch.device

    def __init__(self) -> None:
        """Select this worker's device."""
        self.device = select_device(self.local_rank, self.local_world_size)

    @classmethod
    def join(cls, timeout: float) -> "Comm":
        """Return the engine of this job.

        A subclass returns the serial engine where the job has one rank, whatever launched it: one
        replica has no gradients to average, so an engine would cost and gain nothing.

        Args:
            timeout: The seconds that a worker waits for the others in a collective.
        """
        return cls()

    @classmethod
    def rank_from_env(cls) -> int:
        """Return the rank that the launcher gave to this process, before any connection."""
        return 0

    def may_be_restarted(self) -> bool:
        """Return whether this job may have been started before; only rank 0's answer counts."""
        return launcher_may_have_restarted()

    @cached_property
    def job(self) -> str:
        """What tells this job from all others, in all its restarts; only rank 0's counts."""
        return launcher_job()

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def run(self, program: Callable[[], None]) -> None:
        """Run the program; an elastic engine runs it again whenever its workers have changed."""
        program()

    def check_host_updates(self) -> None:
        """Let an elastic engine take in new workers; every rank calls this after a save."""

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, sync: GradientSyncConfig
    ) -> tuple[nn.Module, Optimizer]:
        """Return model and optimizer such that forward, backward, step use the mean gradient.

        At ``optimizer_step`` every parameter's gradient is the average over the workers of what
        their backward passes have accumulated. Parameters and buffers start as rank 0's.

        Args:
            model: The raw network on this worker's device.
            optimizer: Its optimizer.
            sync: How gradients are averaged.

        Raises:
            UserError: The engine cannot average in this way.
        """
        if sync.adasum:
            raise UserError(
                "--adasum: needs 2, 4, 8, ... workers of cifar_horovod.py, with Horovod built and "
                "run with MPI; leave it out"
            )
        return model, optimizer

    def warm_up_buckets(self, dry_run: Callable[[], None]) -> None:
        """Call ``dry_run``, a step without effect, if the engine's first step differs from later.

        The order in which an engine adds gradients must not depend on where a run was interrupted.
        """

    def discard_backward(self, model: nn.Module) -> None:
        """Forget a backward pass that has failed half-way; every rank must call this.

        Args:
            model: The network as ``prepare`` returned it.
        """

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        """Return the context of a backward pass that only accumulates gradients."""
        return nullcontext()

    def optimizer_step(self, optimizer: Optimizer, allowed: Callable[[], bool]) -> bool:
        """Update the parameters if, once the gradients are averaged, ``allowed`` returns True.

        Returns:
            What ``allowed`` returned, which is the same on all workers because gradients are.
        """
        if not allowed():
            return False
        optimizer.step()
        return True

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over the workers, in place, and return it."""
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by rank 0's, in place, and return it."""
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the workers' values, however long the slowest worker takes."""
        return value

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        """Start an ``all_reduce_max``; return a function that waits for it and gives the result."""
        return lambda: value

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return (world_size, N): the (N,) tensor of every worker; one all-reduce."""
        rows = tensor.new_zeros(self.world_size, len(tensor))
        rows[self.rank] = tensor
        return self.all_reduce_sum_(rows)

    def broadcast_bytes(self, make: Callable[[], bytes]) -> bytes:
        """Return on every worker what ``make`` returns on rank 0; two all-reduces and a broadcast.

        Raises:
            PeerFailed: On the other ranks, when ``make`` has failed on rank 0.
        """
        content = b""
        if self.is_main_process:
            try:
                content = make()
            except BaseException as error:
                self.all_reduce_max(_exit_code(error))
                raise
        if code := self.all_reduce_max(0):
            raise PeerFailed(code)
        size = self.all_reduce_max(len(content))
        shared = torch.zeros(size, dtype=torch.uint8)
        if self.is_main_process and size:
            shared = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return self.broadcast_(shared.to(self.device)).cpu().numpy().tobytes()

    def barrier(self) -> None:
        """Return when every worker has come here, however long the slowest takes."""
        self.all_reduce_max(0)

    @contextmanager
    def local_rank_zero_first(self) -> Iterator[None]:
        """Run the block on the first worker of each node, then on the others.

        This is for work that leaves something on disk, such as a download: the others find it done.

        Raises:
            PeerFailed: The block has failed on another worker.
        """
        for first in (True, False):
            if (self.local_rank == 0) == first:
                try:
                    yield
                except BaseException as error:
                    self.all_reduce_max(_exit_code(error))
                    raise
            if code := self.all_reduce_max(0):
                raise PeerFailed(code)

    @contextmanager
    def averaged_buffers(self, model: nn.Module) -> Iterator[Tensor]:
        """Inside, floating-point buffers (batch-norm statistics) are the average over the workers.

        Training does not read them and the engines never synchronise them. Afterwards each worker
        has its own again, so that an evaluation or a save changes nothing in the training. One
        all-reduce serves all buffers together.

        Yields:
            (world_size, N): the buffers of every worker, flat.
        """
        buffers = float_buffers(model)
        if not buffers:
            yield torch.zeros(self.world_size, 0)
            return
        own = torch.cat([buffer.detach().reshape(-1) for buffer in buffers])
        rows = self.all_gather(own)
        set_float_buffers(model, rows.sum(0).div_(self.world_size))
        try:
            yield rows
        finally:
            set_float_buffers(model, own)

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether an error only says that another worker is gone."""
        return False

    def close(self) -> None:
        """End the communication; no method may be called afterwards."""


def float_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a network that hold statistics and not counts."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def set_float_buffers(model: nn.Module, flat: Tensor) -> None:
    """Copy (N,) numbers, all float buffers one after the other, into a network."""
    buffers = float_buffers(model)
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _exit_code(error: BaseException) -> int:
    return BAD_INPUT if isinstance(error, UserError) else FAILED


def launcher_restart_count() -> int:
    """Return how often launcher.sh or torchrun has started this job again, by the environment."""
    names = [RESTARTS_VARIABLE, *([TORCHRUN_VARIABLE] if _is_started_by_torchrun() else [])]
    counts = (os.environ.get(name, "") for name in names)
    return sum(int(count) for count in counts if count.isdecimal())


def launcher_may_have_restarted() -> bool:
    """Return whether launcher.sh or torchrun may have started this job before.

    torchrun does not count a restart where a worker on another machine has failed, or a machine has
    come, so only the id of the job tells there.
    """
    by_torchrun_alone = _is_started_by_torchrun() and JOB_VARIABLE not in os.environ
    return by_torchrun_alone or launcher_restart_count() > 0


def launcher_job() -> str:
    """Return 32 hexadecimal digits that are the same in all restarts of this job and in no other.

    The supervisor of launcher.sh has drawn an id. torchrun alone is one process, which stays while
    it starts its workers again. What nobody starts again is a new job each time.
    """
    name = os.environ.get(JOB_VARIABLE, "")
    if not name and _is_started_by_torchrun():
        name = identity(giver_of_variables("TORCHELASTIC_"))
    return hashlib.sha256(os.fsencode(name or secrets.token_hex())).hexdigest()[:32]


def _is_started_by_torchrun() -> bool:
    # Without a rank torchrun's variable is another job's.
    return "RANK" in os.environ and TORCHRUN_VARIABLE in os.environ


def is_single_process(world_size: int) -> bool:
    """Return whether a job of this many ranks needs no engine.

    With CIFAR_KEEP_DDP in the environment it gets one all the same. That is for tests, which can
    meet NCCL on a machine with a single GPU in no other way.
    """
    return world_size == 1 and not os.environ.get("CIFAR_KEEP_DDP")


def select_device(local_rank: int, local_world_size: int) -> torch.device:
    """Return the GPU of this local rank, or the CPU on a machine without GPUs.

    With CIFAR_SHARE_GPU in the environment workers share GPUs. That is for tests; it gains nothing.

    Raises:
        UserError: There are GPUs, but fewer than workers on this node.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return torch.device("cpu")
    if local_world_size > gpus and not os.environ.get("CIFAR_SHARE_GPU"):
        raise UserError(
            f"{local_world_size} workers for {gpus} GPU(s) on this node: start at most {gpus} "
            "workers, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank % gpus)
    return torch.device("cuda", local_rank % gpus)
