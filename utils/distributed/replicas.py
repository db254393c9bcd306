"""Whether all workers still hold the same parameters."""

import torch
from torch import Tensor, nn

from utils.distributed.comm import Comm
from utils.errors import TrainingError


def check_replicas(comm: Comm, model: nn.Module) -> None:
    """Compare a checksum of every parameter with rank 0's; every rank must call it.

    Data-parallel training is right only as long as the replicas are equal bit for bit; hardware
    faults, an uninitialised tensor or a missed broadcast make them differ without any error.

    Raises:
        TrainingError: on all ranks; names a rank and a tensor that differ.
    """
    if comm.size == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    own = torch.stack([_checksum(parameter) for parameter in model.parameters()])
    differs = (comm.broadcast_(own.clone()) != own).nonzero().flatten().tolist()  # rank 0's
    # One number that carries both the rank and its first tensor that differs.
    found = comm.max_(comm.rank * len(names) + differs[0] + 1 if differs else 0)
    if found:
        rank, tensor = divmod(found - 1, len(names))
        raise TrainingError(
            f"rank {rank} holds other values of {names[tensor]} than rank 0: the replicas have "
            "come apart; --resume auto goes back to the last checkpoint"
        )


def _checksum(parameter: Tensor) -> Tensor:
    """A sum over the bits of the values: int64, exact, and independent of the order of adding."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[parameter.element_size()]
    return parameter.detach().contiguous().view(words).sum(dtype=torch.int64)
