"""Putting the content of a checkpoint back into a network and its optimizer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.checkpoint.format import describe_shapes, is_plain
from utils.checkpoint.resume import LoadedCheckpoint
from utils.distributed.comm import Comm, set_float_buffers
from utils.errors import UserError


def restore_training_state(
    loaded: LoadedCheckpoint, model: nn.Module, optimizer: Optimizer, comm: Comm
) -> None:
    """Restore what only training needs: momentum and each worker's batch-norm statistics.

    Raises:
        UserError: The optimizer's state does not fit the parameters.
    """
    load_optimizer(optimizer, loaded.content, loaded.path)
    load_buffers(model, loaded.content, comm)


def load_model(
    model: nn.Module, content: dict[str, Any], path: Path, wanted: str, flag: str = "--resume"
) -> None:
    """Load the weights after checking that they belong to this network.

    Args:
        model: The raw network.
        content: What the file holds, as ``format.load`` returned it.
        path: The file, for the message.
        wanted: What the command line asks for, in words.
        flag: What has named the file, for the message.

    Raises:
        UserError: The file holds another network; it says which.
    """
    weights = content["state_dict"]
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Files written before torch 0.4.1 count no batches; the counter plays no part.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = {name: tuple(t.shape) for name, t in weights.items() if isinstance(t, Tensor)}
    if {k: v for k, v in shapes.items() if k not in counters} != {
        k: v for k, v in own.items() if k not in counters
    }:
        ask = "-a, model flags and -d" if flag == "--resume" else "model and arguments"
        raise UserError(
            f"{flag} {path}: holds {describe_shapes(shapes)}, not {wanted}; "
            f"give the matching {ask}, or another file"
        )
    # Every name but the counters is known to be there, so strict would only reject old files.
    model.load_state_dict(weights, strict=False)


def load_buffers(model: nn.Module, content: dict[str, Any], comm: Comm) -> None:
    """Give each worker its own batch-norm statistics again.

    Where the number of workers has changed all continue from the average, which the weights hold.
    """
    rows = content.get("buffers")
    if isinstance(rows, Tensor) and len(rows) == comm.world_size:
        set_float_buffers(model, rows[comm.rank])


def load_optimizer(optimizer: Optimizer, content: dict[str, Any], path: Path) -> bool:
    """Restore the optimizer's momentum; its settings stay those of the command line.

    Momentum that is there already stays at its place in memory, which a CUDA graph goes on to use.
    What the file does not have becomes zero.

    Returns:
        False where the file has no optimizer state.

    Raises:
        UserError: The state does not fit the parameters.
    """
    in_place = {
        (parameter, name): value
        for parameter, entry in optimizer.state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    saved = content.get("optimizer")
    if not saved:
        for value in in_place.values():
            value.zero_()
        return False
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    _load_checked(optimizer, saved, path)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    _copy_in_place(optimizer, in_place)
    return True


def _load_checked(optimizer: Optimizer, saved: dict[str, Any], path: Path) -> None:
    """Load a state dict whose tensors fit the parameters.

    Optimizer.load_state_dict accepts buffers of any shape, and the update fails later.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        fits = all(
            is_plain(value) and value.shape == parameters[int(index)].shape
            for index, entry in saved["state"].items()
            for value in entry.values()
            if isinstance(value, Tensor) and value.dim()
        )
        if fits:
            optimizer.load_state_dict(saved)
    except Exception as error:  # Whatever another structure brings about.
        raise UserError(f"--resume {path}: its optimizer state is damaged: {error}") from error
    if not fits:
        raise UserError(
            f"--resume {path}: its optimizer state belongs to another network; name another file"
        )


def _copy_in_place(optimizer: Optimizer, in_place: dict[tuple[Tensor, Any], Tensor]) -> None:
    """Copy what has been loaded to where tensors have been before; the others become zero."""
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                place = in_place.pop((parameter, name), None)
                if place is None and value.dim():
                    # The fused update goes through momentum and parameter side by side in memory.
                    place = torch.empty_like(parameter)
                if place is not None:
                    entry[name] = place.copy_(value)
    for (parameter, name), place in in_place.items():
        optimizer.state[parameter][name] = place.zero_()
