"""All workers run the same code, options and data, and still hold the same parameters."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from utils.distributed.comm import Comm
from utils.errors import TrainingError, UserError


def check_consistency(comm: Comm, describe: Callable[[], Mapping[str, object]]) -> None:
    """Compare named values with rank 0's; every rank must call this. One all-reduce.

    Args:
        comm: The engine; a single worker describes nothing.
        describe: Returns the values, under the same names on every rank.

    Raises:
        UserError: On all ranks, when they differ; it names a rank and the value.
    """
    if comm.world_size == 1:
        return
    parts = describe()
    digests = [hashlib.sha256(repr(value).encode()).digest() for value in parts.values()]
    own = torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])
    rows = comm.all_gather(own.to(comm.device)).cpu()
    for rank, row in enumerate(rows):
        differing = (row != rows[0]).nonzero().flatten().tolist()
        if differing:
            name = list(parts)[differing[0]]
            raise UserError(
                f"rank {rank} has another {name} than rank 0: start all workers with the same "
                "code, options and data"
            )


def check_replicas(comm: Comm, model: nn.Module) -> None:
    """Compare a checksum of every parameter with rank 0's; every rank must call this.

    Data-parallel training is right only as long as the replicas are equal bit for bit. Hardware
    faults, an uninitialised tensor or a missed broadcast make them differ without any error.

    Raises:
        TrainingError: On all ranks, when they differ; it names a rank and a tensor.
    """
    if comm.world_size == 1:
        return
    names = [name for name, _ in model.named_parameters()]
    own = torch.stack([_checksum(parameter) for parameter in model.parameters()])
    differs = (comm.broadcast_(own.clone()) != own).nonzero().flatten().tolist()
    # One number carries both the rank and its first tensor that differs.
    found = comm.all_reduce_max(comm.rank * len(names) + differs[0] + 1 if differs else 0)
    if found:
        rank, tensor = divmod(found - 1, len(names))
        raise TrainingError(
            f"rank {rank} holds other values of {names[tensor]} than rank 0: the replicas have "
            "come apart; --resume auto goes back to the last checkpoint"
        )


def _checksum(parameter: Tensor) -> Tensor:
    """Return a sum over the bits of the values: int64, exact, whatever the order of adding."""
    words = {8: torch.int64, 4: torch.int32, 2: torch.int16}[parameter.element_size()]
    return parameter.detach().contiguous().view(words).sum(dtype=torch.int64)
