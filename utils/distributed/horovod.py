"""The engine of cifar_horovod.py: Horovod over NCCL where it was built with it, else Gloo or MPI.

utils/distributed/ddp.py has the same methods in the same order; no other file knows an engine.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# hvd.init reads these two, and they must be set before the import.
# The response cache must hold every tensor of a model, or each step negotiates them anew:
# ResNet-1202 has 3,611 parameters and the default is 1,024. Elastic workers have no cache: a worker
# that stays would keep its entries, one that comes would have none, and the two would fuse tensors
# in different ways.
os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "0" if "HOROVOD_ELASTIC" in os.environ else "8192")
# Gradients travel in the groups below and in no others, so that three or more workers add them up
# in the same order in every run.
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.config.schema import GradientSyncConfig
from utils.distributed.comm import Comm, is_single_process
from utils.errors import BAD_INPUT, UserError
from utils.launch.heartbeat import TERMINAL_VARIABLE

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
except ImportError:
    print("error: Horovod is not installed here; ./setup.sh --horovod builds it", file=sys.stderr)
    sys.exit(BAD_INPUT)

# Gradients are sent when this many bytes of them are there, as DistributedDataParallel does it.
GROUP_BYTES = 25 << 20


class HorovodComm(Comm):
    """Horovod: NCCL between GPUs where it was built with it, Gloo or MPI between processes.

    ``join`` makes it, once Horovod is running.
    """

    graph_warm_up_steps = 0
    supports_any_layout = False
    adasum = False

    def __init__(self) -> None:
        """Read this worker's ranks from Horovod, which must be running."""
        self.elastic = "HOROVOD_ELASTIC" in os.environ
        self.host_updates = 0
        self._read_ranks()
        super().__init__()
        self.name = "Horovod, " + ("nccl" if self.device.type == "cuda" else "gloo")

    @classmethod
    def join(cls, timeout: float) -> Comm:
        """Return the engine of this job; an elastic one may grow and is never the serial one."""
        check_launch_env()
        if not torch.cuda.is_available():
            # Horovod's background thread meets the others once in a cycle, whether there is
            # something to send or not. On a machine whose cores compute, a cycle of 1 ms costs
            # them an eighth of their time; steps there take tenths of a second.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
        hvd.init()
        if hvd.rank() == 0 and TERMINAL_VARIABLE in os.environ:
            # horovodrun pipes its workers' output; the progress bar needs the terminal itself.
            with contextlib.suppress(OSError):  # It may be another user's, or gone by now.
                terminal = os.open(os.environ[TERMINAL_VARIABLE], os.O_WRONLY | os.O_NOCTTY)
                os.dup2(terminal, sys.stdout.fileno())
        if is_single_process(hvd.size()) and "HOROVOD_ELASTIC" not in os.environ:
            hvd.shutdown()
            return Comm()
        return cls()

    def _read_ranks(self) -> None:
        self.rank, self.world_size = hvd.rank(), hvd.size()
        self.local_rank, self.local_world_size = hvd.local_rank(), hvd.local_size()

    @classmethod
    def rank_from_env(cls) -> int:
        """Return the rank that horovodrun gave to this process; 0 without one."""
        rank = os.environ.get("HOROVOD_RANK", "")
        return int(rank) if rank.isdecimal() and "HOROVOD_SIZE" in os.environ else 0

    def may_be_restarted(self) -> bool:
        """Return whether this job may have been started before, or its workers have changed."""
        return self.host_updates > 0 or super().may_be_restarted()

    def run(self, program: Callable[[], None]) -> None:
        """Run the program; with Horovod Elastic, again whenever the workers have changed.

        The state that survives a change of workers is the checkpoint.
        """
        if not self.elastic:
            return program()
        self.state = hvd.elastic.TorchState(host_updates=0, job=self.job)

        def begin(state: Any) -> None:
            # A worker that has come later learns here whose checkpoint there is to continue.
            self._read_ranks()
            self.host_updates, self.job = state.host_updates, state.job
            state.host_updates += 1
            state.save()
            program()

        return hvd.elastic.run(begin)(self.state)

    def check_host_updates(self) -> None:
        """Let Horovod Elastic take in new workers; every rank calls this after a save."""
        if self.elastic:
            self.state.check_host_updates()

    def prepare(
        self, model: nn.Module, optimizer: Optimizer, sync: GradientSyncConfig
    ) -> tuple[nn.Module, Optimizer]:
        """Wrap the optimizer in DistributedOptimizer, whose hooks all-reduce during backward."""
        if sync.adasum and (not hvd.mpi_enabled() or self.world_size & (self.world_size - 1)):
            raise UserError(
                "--adasum: needs 2, 4, 8, ... workers, and Horovod built and run with MPI (the "
                "launcher uses Gloo); leave it out"
            )
        self.adasum = sync.adasum
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # Buffers are included.
        optimizer = hvd.DistributedOptimizer(
            optimizer,
            named_parameters=model.named_parameters(),
            compression=getattr(hvd.Compression, sync.compression),
            backward_passes_per_step=sync.backward_passes_per_step,
            op=hvd.Adasum if sync.adasum else hvd.Average,
            groups=None if sync.adasum else gradient_groups(model.parameters()),
        )
        return model, optimizer

    def optimizer_step(self, optimizer: Optimizer, allowed: Callable[[], bool]) -> bool:
        """Wait for the all-reduce, then update the parameters if ``allowed`` returns True."""
        if not hasattr(optimizer, "skip_synchronize") or self.adasum:
            # Adasum communicates inside the update.
            return super().optimizer_step(optimizer, allowed)
        optimizer.synchronize()  # type: ignore[attr-defined]
        with optimizer.skip_synchronize():
            return super().optimizer_step(optimizer, allowed)

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over the workers, in place, and return it."""
        return hvd.allreduce_(tensor, op=hvd.Sum, name=_tensor_name("sum", tensor))

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by rank 0's, in place, and return it."""
        return hvd.broadcast_(tensor, root_rank=0, name=_tensor_name("broadcast", tensor))

    def all_reduce_max(self, value: int) -> int:
        """Return the largest of the workers' values, however long the slowest worker takes."""
        return int(hvd.allreduce(torch.tensor(value), op=hvd.Max, name="max"))

    def all_reduce_max_async(self, value: int) -> Callable[[], int]:
        """Start an ``all_reduce_max``; return a function that waits for it and gives the result."""
        handle = hvd.allreduce_async(torch.tensor(value), op=hvd.Max, name="max_async")
        return lambda: int(hvd.synchronize(handle))

    def is_peer_failure(self, error: BaseException) -> bool:
        """Return whether an error of Horovod says that another worker is gone."""
        return isinstance(error, HorovodInternalError)

    def close(self) -> None:
        """Shut Horovod down."""
        hvd.shutdown()


def check_launch_env() -> None:
    """Raise UserError where only a part of horovodrun's variables is in the environment.

    hvd.init would end the process, or wait for workers that never come.
    """
    names = ("HOROVOD_RANK", "HOROVOD_SIZE")
    found = {name: os.environ[name] for name in names if name in os.environ}
    whole = len(found) == 2 and all(value.isdecimal() for value in found.values())
    whole = whole and int(found["HOROVOD_RANK"]) < int(found["HOROVOD_SIZE"])
    if found and not (whole and "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ):
        given = " ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{given}: a part only of horovodrun's environment; start with horovodrun or "
            f"launcher.sh, or unset {' and '.join(names)} to train alone"
        )


def gradient_groups(parameters: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    """Return the parameters whose gradients are sent together, the last layers' first.

    See GROUP_BYTES.
    """
    groups: list[list[Tensor]] = []
    room = 0
    for parameter in reversed(list(parameters)):
        if room < parameter.nbytes:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(parameter)
        room -= parameter.nbytes
    return groups


def _tensor_name(operation: str, tensor: Tensor) -> str:
    """Return the name of a collective: the same each time, so that it stays in the cache.

    Horovod's own names are numbers that a worker counts up from its start, and elastic workers do
    not start together.
    """
    return f"{operation} {tensor.dtype} {tuple(tensor.shape)}"
