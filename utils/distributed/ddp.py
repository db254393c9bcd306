"""The engine of cifar.py: PyTorch DistributedDataParallel over NCCL between GPUs, Gloo elsewhere.

utils/distributed/horovod.py has the same methods in the same order; no other file knows an engine.
"""

import inspect
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.config.schema import GradientSyncConfig
from utils.distributed.comm import Comm, is_single_process
from utils.errors import UserError
from utils.launch.processes import end_with_parent

# Training never reads batch-norm buffers, so broadcasting them at each forward is waste; see
# Comm.averaged_buffers. torch 2.15 has renamed the argument.
NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)

# The limit of waits whose length depends on a download and not on the workers.
UNLIMITED = timedelta(days=7)


class DDPComm(Comm):
    """torch.distributed: NCCL between GPUs, Gloo between CPU processes."""

    def __init__(self, timeout: float) -> None:
        """Connect to the other workers, as the launcher's environment says."""
        self.rank, self.world_size, self.local_rank, self.local_world_size = read_launch_env()
        super().__init__()
        # NCCL refuses a GPU that two ranks share (CIFAR_SHARE_GPU).
        own_gpu = self.local_world_size <= torch.cuda.device_count()
        backend = "nccl" if self.device.type == "cuda" and own_gpu else "gloo"
        self.name = f"DistributedDataParallel, {backend}"
        # DDP's documentation asks for 11 steps. What Gloo sends goes through the host, which
        # cannot be captured.
        self.graph_warm_up_steps = 11 if backend == "nccl" else 0
        # A supervisor looks for stalled workers after the timeout, and can say which; this is for
        # runs without one.
        limit = timedelta(seconds=timeout + 15)
        if backend == "nccl":
            prepare_nccl()
        # NCCL that knows its device connects here, in every version of torch, and never for the
        # first time inside a graph.
        own = self.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=limit, device_id=own)
        self._control_group: Any = dist.new_group(backend="gloo", timeout=limit)
        self._unlimited_group: Any = dist.new_group(backend="gloo", timeout=UNLIMITED)
        self._gradient_group = _bare_gloo_group(limit) if backend == "gloo" else None

    @classmethod
    def join(cls, timeout: float) -> Comm:
        """Return the engine of this job: the serial one without a launcher or with one rank."""
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return Comm()
        end_with_parent()  # No worker outlives a launcher that is killed.
        _, world_size, _, _ = read_launch_env()
        return Comm() if is_single_process(world_size) else cls(timeout)

    @classmethod
    def rank_from_env(cls) -> int:
        """Return the rank that torchrun gave to this process; 0 without one."""
        rank = os.environ.get("RANK", "")
        return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, sync: GradientSyncConfig
    ) -> tuple[nn.Module, Optimizer]:
        """Wrap the model in DistributedDataParallel, whose hooks all-reduce during backward."""
        model, optimizer = super().prepare(model, optimizer, sync)
        wrapped = DistributedDataParallel(  # Broadcasts rank 0's parameters.
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            process_group=self._gradient_group,
            **NO_BUFFER_BROADCAST,
        )
        if sync.compression == "fp16":
            wrapped.register_comm_hook(None, fp16_compress_hook)
        return wrapped, optimizer

    def warm_up_buckets(self, dry_run: Callable[[], None]) -> None:
        """Let DDP assign the gradients to their final buckets.

        After the first backward DDP puts the gradients into other buckets, in the order in which
        they came. Where in a bucket a number lies decides in which order three or more workers add
        it up.
        """
        if self.world_size > 2:
            dry_run()

    def discard_backward(self, model: nn.Module) -> None:
        """Reset DDP's reducer, or the next forward pass would warn of gradients that never came."""
        if isinstance(model, DistributedDataParallel):
            model.reducer._reset_state()

    def no_sync(self, model: nn.Module) -> AbstractContextManager:
        """Return DDP's own context in which backward accumulates and sends nothing."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over the workers, in place, and return it."""
        dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by rank 0's, in place, and return it."""
        dist.broadcast(tensor, src=0)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the workers' values, however long the slowest worker takes."""
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._unlimited_group)
        return int(highest)

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        """Start an ``all_reduce_max``; return a function that waits for it and gives the result."""
        highest = torch.tensor(value)
        work = dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._control_group, async_op=True)

        def wait() -> int:
            work.wait()
            return int(highest)

        return wait

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether an error of Gloo or NCCL says that another worker is gone."""
        phrases = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
        return any(phrase in str(error) for phrase in phrases)

    def close(self) -> None:
        """Destroy the process group."""
        if self.device.type == "cuda":
            # A graph that has been dropped is gone when its last replay is over, not before.
            torch.cuda.synchronize(self.device)
        dist.destroy_process_group()


def prepare_nccl() -> None:
    """Set the variables that NCCL, and torch's part of it, read when they start."""
    errors = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if os.environ.get(errors, "1") == "1":
        # 1 is torchrun's choice: at a failure NCCL's watchdog cleans up before it ends the process,
        # and so waits for graphs. 3 ends the process at once.
        os.environ[errors] = "3"
    # The ranks may exchange addresses of buffers while they capture, and one that cannot capture
    # would be waited for there.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def read_launch_env() -> tuple[int, int, int, int]:
    """Return rank, world size, local rank and local world size as torchrun's environment has them.

    Raises:
        UserError: Only a part of the variables is there, or they make no sense.
    """
    fix = "start with torchrun or launcher.sh, or unset RANK and WORLD_SIZE to train alone"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: os.environ.get(name, "") for name in names}
    if missing := [name for name, value in found.items() if not value]:
        given = " ".join(f"{name}={value}" for name, value in found.items() if value)
        raise UserError(f"{given}: set in the environment without {', '.join(missing)}; {fix}")
    found["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
    for name, value in found.items():
        if name != "MASTER_ADDR" and not (value.isascii() and value.isdecimal()):
            raise UserError(f"{name}={value!r}: no whole number in the environment; {fix}")
    rank, world_size, local_rank, local_world_size = (
        int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if rank >= world_size or local_rank >= local_world_size:
        raise UserError(
            f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} "
            f"LOCAL_WORLD_SIZE={local_world_size}: ranks in the environment count from 0 to the "
            f"size less one; {fix}"
        )
    return rank, world_size, local_rank, local_world_size


def _bare_gloo_group(limit: timedelta) -> Any:
    """Return a group for gradients where that of everything else is wrapped; else None.

    With TORCH_DISTRIBUTED_DEBUG=DETAIL torch wraps each group to compare the collectives of all
    workers. The logger of DDP takes a wrapped Gloo group for a bare one, reads beyond its end, and
    may crash the process (torch 2.15).
    """
    if dist.get_debug_level() != dist.DebugLevel.DETAIL:
        return None
    dist.set_debug_level(dist.DebugLevel.INFO)
    group = dist.new_group(backend="gloo", timeout=limit)
    dist.set_debug_level_from_env()
    return group
