"""Train a CIFAR-10/100 classifier with PyTorch DistributedDataParallel.

One process:     python cifar.py -a resnet --depth 20
Two workers:     python -m torch.distributed.launch --nproc_per_node=2 cifar.py -a alexnet
The same:        torchrun --nproc_per_node=2 cifar.py -a alexnet
From a recipe:   ./launcher.sh -m alexnet -n 2 -d cifar10 -f dist

This file holds what is particular to the engine: how workers meet and how they communicate. The
program itself is utils/engine.py, shared with cifar_horovod.py.
"""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there under PYTHONSAFEPATH

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.distributed.comm import Comm, Exchange, is_alone
from utils.engine import leave, main
from utils.errors import UserError
from utils.launch.supervisor import end_with_parent

# Training never reads batch-norm buffers, so broadcasting them at each forward is waste; see
# Comm.averaged_buffers. torch 2.15 has renamed the argument.
NO_BUFFER_BROADCAST: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)

# For waits whose length depends on a download and not on the workers.
PATIENCE = timedelta(days=7)


class TorchComm(Comm):
    """torch.distributed: NCCL between GPUs, Gloo between CPU processes."""

    def __init__(self, timeout: float = 600.0) -> None:
        self.rank, self.size, self.local_rank, self.local_size = read_place()
        super().__init__(timeout)
        # NCCL refuses a GPU that two ranks share (CIFAR_SHARE_GPU).
        own_gpu = self.local_size <= torch.cuda.device_count()
        backend = "nccl" if self.device.type == "cuda" and own_gpu else "gloo"
        self.name = f"DistributedDataParallel, {backend}"
        # DDP's documentation asks for 11 steps. What Gloo sends goes through the host, which
        # cannot be captured.
        self.graph_warm_up = 11 if backend == "nccl" else 0
        # A supervisor looks for stalled workers after the timeout, and can say which; this is for
        # runs without one.
        limit = timedelta(seconds=timeout + 15)
        if backend == "nccl":
            prepare_nccl()
        # NCCL that knows its device connects here, in every version of torch, and never for the
        # first time inside a graph.
        own = self.device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=limit, device_id=own)
        self.control: Any = dist.new_group(backend="gloo", timeout=limit)
        self.patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)

    @classmethod
    def join(cls, timeout: float = 600.0) -> Comm:
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return Comm(timeout)  # without a launcher
        end_with_parent()  # no worker outlives a launcher that is killed
        _, size, _, _ = read_place()
        return Comm(timeout) if is_alone(size) else cls(timeout)

    @classmethod
    def launched_rank(cls) -> int:
        rank = os.environ.get("RANK", "")
        return int(rank) if rank.isdecimal() and "WORLD_SIZE" in os.environ else 0

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, exchange: Exchange
    ) -> tuple[nn.Module, Optimizer]:
        model, optimizer = super().wrap(model, optimizer, exchange)
        wrapped = DistributedDataParallel(  # broadcasts rank 0's parameters
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **NO_BUFFER_BROADCAST,
        )
        if exchange.compression == "fp16":
            wrapped.register_comm_hook(None, fp16_compress_hook)
        return wrapped, optimizer

    def settle(self, rehearse: Callable[[], None]) -> None:
        # After the first backward DDP puts the gradients into other buckets, in the order in which
        # they came. Where in a bucket a number lies decides in which order three or more workers
        # add it up.
        if self.size > 2:
            rehearse()

    def start_anew(self, model: nn.Module) -> None:
        if isinstance(model, DistributedDataParallel):
            # Or the next forward pass would complain of gradients that have never come.
            model.reducer._reset_state()

    def accumulating(self, model: nn.Module) -> AbstractContextManager:
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, src=0)
        return tensor

    def max_(self, value: int) -> int:
        highest = torch.tensor(value)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.patient)
        return int(highest)

    def max_later(self, value: int) -> Callable[[], int]:
        highest = torch.tensor(value)
        work = dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def wait() -> int:
            work.wait()
            return int(highest)

        return wait

    def lost_peer(self, error: BaseException) -> bool:
        words = ("Connection closed by peer", "Connection reset by peer", "ncclRemoteError")
        return any(text in str(error) for text in words)

    def close(self) -> None:
        if self.device.type == "cuda":
            # A graph that has been dropped is gone when its last replay is over, not before.
            torch.cuda.synchronize(self.device)
        dist.destroy_process_group()


def prepare_nccl() -> None:
    """Set what NCCL and torch's part of it read from the environment when they start."""
    errors = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if os.environ.get(errors, "1") == "1":
        # torchrun's choice: at a failure NCCL's watchdog cleans up before it ends the process, and
        # so waits for graphs. 3 ends the process at once.
        os.environ[errors] = "3"
    # The ranks may exchange addresses of buffers while they capture, and one that cannot capture
    # would be waited for there.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def read_place() -> tuple[int, int, int, int]:
    """Rank, size, local rank and local size, as the launcher has left them in the environment.

    Raises:
        UserError: only a part of it is there, or it makes no sense.
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
    rank, size, local_rank, local_size = (
        int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    if rank >= size or local_rank >= local_size:
        raise UserError(
            f"RANK={rank} WORLD_SIZE={size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size}: "
            f"ranks in the environment count from 0 to the size less one; {fix}"
        )
    return rank, size, local_rank, local_size


if __name__ == "__main__":
    leave(main(TorchComm))
