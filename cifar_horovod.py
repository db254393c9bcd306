"""Train a CIFAR-10/100 classifier with Horovod.

One process:     python cifar_horovod.py -a resnet --depth 20
Two workers:     horovodrun -np 2 -H localhost:2 python cifar_horovod.py -a alexnet
From a recipe:   ./launcher.sh -m alexnet -n 2 -d cifar10 -f horovod

This file holds what is particular to the engine: how workers meet and how they communicate. The
program itself is utils/engine.py, shared with cifar.py.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

# Read by hvd.init. The response cache must hold every tensor of a model, or each step negotiates
# them anew: ResNet-1202 has 3,611 parameters, the default is 1,024. Elastic workers go without: a
# worker that stays keeps its cache, one that comes has none, and they would fuse tensors otherwise.
os.environ.setdefault("HOROVOD_CACHE_CAPACITY", "0" if "HOROVOD_ELASTIC" in os.environ else "8192")
# Gradients travel in the groups below and in no others, so that three or more workers add them up
# in the same order in every run.
os.environ.setdefault("HOROVOD_DISABLE_GROUP_FUSION", "1")

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # not there under PYTHONSAFEPATH

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.distributed.comm import Comm, Exchange, is_alone
from utils.engine import leave, main
from utils.errors import BAD_INPUT, UserError

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
except ImportError:
    print("error: Horovod is not installed here; ./setup.sh --horovod builds it", file=sys.stderr)
    sys.exit(BAD_INPUT)

# Gradients are sent when so many bytes of them are there: as DistributedDataParallel does it.
GROUP_BYTES = 25 << 20


def check_environment() -> None:
    """Raise UserError where only a part is there of what horovodrun leaves in the environment.

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


def _name(kind: str, tensor: Tensor) -> str:
    """What the workers call an exchange: the same each time, so that it stays in the cache.

    Horovod's own names are numbers that a worker counts up from its start, and elastic workers do
    not start together.
    """
    return f"{kind} {tensor.dtype} {tuple(tensor.shape)}"


def in_groups(parameters: Iterable[nn.Parameter]) -> list[list[Tensor]]:
    """Parameters whose gradients are sent together, the last layers' first: see GROUP_BYTES."""
    groups: list[list[Tensor]] = []
    room = 0
    for parameter in reversed(list(parameters)):
        if room < parameter.nbytes:
            groups.append([])
            room = GROUP_BYTES
        groups[-1].append(parameter)
        room -= parameter.nbytes
    return groups


class HorovodComm(Comm):
    """Horovod: NCCL between GPUs where it was built with it, Gloo or MPI between processes.

    ``join`` makes it, once Horovod is running.
    """

    graph_warm_up = 0
    sends_any_layout = False
    adasum = False

    def __init__(self, timeout: float = 600.0) -> None:
        self.elastic = "HOROVOD_ELASTIC" in os.environ
        self.regroupings = 0
        self._take_place()
        super().__init__(timeout)
        self.name = "Horovod, " + ("nccl" if self.device.type == "cuda" else "gloo")

    @classmethod
    def join(cls, timeout: float = 600.0) -> Comm:
        """The engine of this job; of an elastic one, which may grow, never the serial one."""
        check_environment()
        if not torch.cuda.is_available():
            # Horovod's background thread meets the others once in a cycle, whether there is
            # something to send or not. On a machine whose cores compute, a cycle of 1 ms costs
            # them an eighth of their time; steps there take tenths of a second.
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "5")
        hvd.init()
        if hvd.rank() == 0 and "CIFAR_TERMINAL" in os.environ:
            # horovodrun pipes its workers' output; the progress bar needs the terminal itself.
            terminal = os.open(os.environ["CIFAR_TERMINAL"], os.O_WRONLY | os.O_NOCTTY)
            os.dup2(terminal, sys.stdout.fileno())
        if is_alone(hvd.size()) and "HOROVOD_ELASTIC" not in os.environ:
            hvd.shutdown()
            return Comm(timeout)
        return cls(timeout)

    def _take_place(self) -> None:
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()

    @classmethod
    def launched_rank(cls) -> int:
        rank = os.environ.get("HOROVOD_RANK", "")
        return int(rank) if rank.isdecimal() and "HOROVOD_SIZE" in os.environ else 0

    def restarts(self) -> int:
        return super().restarts() + self.regroupings

    def run(self, program: Callable[[], None]) -> None:
        """With Horovod Elastic, the state that survives a change of workers is the checkpoint."""
        if not self.elastic:
            return program()
        self.state = hvd.elastic.TorchState(regroupings=0)

        def begin(state: Any) -> None:
            # A worker that has come later learns here that there is something to go on from.
            self._take_place()
            self.regroupings = state.regroupings
            state.regroupings += 1
            state.save()
            program()

        return hvd.elastic.run(begin)(self.state)

    def may_regroup(self) -> None:
        if self.elastic:
            self.state.check_host_updates()

    def wrap(
        self, model: nn.Module, optimizer: Optimizer, exchange: Exchange
    ) -> tuple[nn.Module, Optimizer]:
        if exchange.adasum and (not hvd.mpi_enabled() or self.size & (self.size - 1)):
            raise UserError(
                "--adasum: needs 2, 4, 8, ... workers, and Horovod built and run with MPI (the "
                "launcher uses Gloo); leave it out"
            )
        self.adasum = exchange.adasum
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)  # buffers included
        optimizer = hvd.DistributedOptimizer(  # its hooks all-reduce during backward
            optimizer,
            named_parameters=model.named_parameters(),
            compression=getattr(hvd.Compression, exchange.compression),
            backward_passes_per_step=exchange.passes,
            op=hvd.Adasum if exchange.adasum else hvd.Average,
            groups=None if exchange.adasum else in_groups(model.parameters()),
        )
        return model, optimizer

    def update(self, optimizer: Optimizer, allowed: Callable[[], bool]) -> bool:
        if not hasattr(optimizer, "skip_synchronize") or self.adasum:
            return super().update(optimizer, allowed)  # Adasum exchanges inside the update
        optimizer.synchronize()  # type: ignore[attr-defined]  # waits for the all-reduce
        with optimizer.skip_synchronize():
            return super().update(optimizer, allowed)

    def sum_(self, tensor: Tensor) -> Tensor:
        return hvd.allreduce_(tensor, op=hvd.Sum, name=_name("sum", tensor))

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return hvd.broadcast_(tensor, root_rank=0, name=_name("broadcast", tensor))

    def max_(self, value: int) -> int:
        return int(hvd.allreduce(torch.tensor(value), op=hvd.Max, name="max"))

    def max_later(self, value: int) -> Callable[[], int]:
        handle = hvd.allreduce_async(torch.tensor(value), op=hvd.Max, name="max_later")
        return lambda: int(hvd.synchronize(handle))

    def lost_peer(self, error: BaseException) -> bool:
        return isinstance(error, HorovodInternalError)

    def close(self) -> None:
        hvd.shutdown()


if __name__ == "__main__":
    leave(main(HorovodComm))
