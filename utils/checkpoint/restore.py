"""Putting the content of a checkpoint back into a network and its optimizer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils import log
from utils.checkpoint.format import describe_shapes, is_plain
from utils.checkpoint.resume import LoadedCheckpoint
from utils.distributed.comm import Comm, float_buffers, set_float_buffers
from utils.errors import UserError, reason_of

_MOMENTUM = "momentum_buffer"  # The name that torch's SGD has for it.


def restore_training_state(
    loaded: LoadedCheckpoint, model: nn.Module, optimizer: Optimizer, comm: Comm
) -> None:
    """Restore what only training needs: momentum and each worker's batch-norm statistics.

    Raises:
        UserError: The optimizer's state or the statistics do not fit the parameters.
    """
    load_optimizer(optimizer, loaded.content, loaded.path)
    load_buffers(model, loaded.content, loaded.path, comm)


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
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not weights[name].is_floating_point():
            raise UserError(
                f"{flag} {path}: its weights are {weights[name].dtype}, as of a quantised network; "
                "name a file with floating-point weights"
            )
    # Every name but the counters is known to be there, so strict would only reject old files.
    model.load_state_dict(weights, strict=False)


def load_buffers(model: nn.Module, content: dict[str, Any], path: Path, comm: Comm) -> None:
    """Give each worker its own batch-norm statistics again.

    Where the number of workers has changed all continue from the average, which the weights hold.

    Raises:
        UserError: They are those of another network.
    """
    rows = content.get("buffers")
    if rows is None:
        return
    if not is_plain(rows) or rows.shape[1] != sum(b.numel() for b in float_buffers(model)):
        raise UserError(
            f"--resume {path}: its batch-norm statistics belong to another network; "
            "name another file"
        )
    if len(rows) == comm.world_size:
        set_float_buffers(model, rows[comm.rank])


def load_optimizer(optimizer: Optimizer, content: dict[str, Any], path: Path) -> bool:
    """Restore the optimizer's momentum; its settings stay those of the command line.

    Momentum that is there already stays at its place in memory, which a CUDA graph goes on to use.
    What the file does not have becomes zero. That is also so for an optimizer of another kind, or
    of several groups of parameters, whose order cannot be known: a warning says so.

    Returns:
        False where the file has no momentum.

    Raises:
        UserError: The state does not fit the parameters.
    """
    in_place = {
        (parameter, name): value
        for parameter, entry in optimizer.state.items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    momentum = _momentum_of(content.get("optimizer"), path)
    if momentum is None:
        for value in in_place.values():
            value.zero_()
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # Optimizer.load_state_dict accepts buffers of any shape, and the update fails later.
    if len(momentum) != len(parameters) or not all(
        buffer is None or buffer.shape == parameter.shape
        for buffer, parameter in zip(momentum, parameters, strict=True)
    ):
        raise UserError(
            f"--resume {path}: its optimizer state belongs to another network; name another file"
        )
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    saved = optimizer.state_dict()
    saved["state"] = {
        index: {_MOMENTUM: buffer} for index, buffer in enumerate(momentum) if buffer is not None
    }
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    _copy_in_place(optimizer, in_place)
    return True


def _momentum_of(saved: Any, path: Path) -> list[Tensor | None] | None:
    """Return the momentum of each parameter, in their order; None where a file has none.

    torch before 1.6 keyed it by the addresses of the parameters. Their order is that of the ids in
    the only group, whatever these are.

    Raises:
        UserError: It is nothing that an optimizer of torch has saved.
    """
    if not saved:
        return None
    try:
        state, groups = saved["state"], saved["param_groups"]
        ids = [index for group in groups for index in group["params"]]
        entries = [state.get(index, {}) for index in ids]
        if len(set(ids)) < len(ids) or not state.keys() <= set(ids):
            raise ValueError("its entries are not those of its parameters")
        momentum = [entry.get(_MOMENTUM) for entry in entries]
        if not all(b is None or (isinstance(b, Tensor) and is_plain(b)) for b in momentum):
            raise ValueError("momentum that is no tensor")
    except Exception as error:  # Whatever another structure brings about.
        raise UserError(
            f"--resume {path}: its optimizer state is damaged ({reason_of(error)}); "
            "name another file"
        ) from error
    if len(groups) > 1 or any(entry and _MOMENTUM not in entry for entry in entries):
        what = f"has {len(groups)} groups of parameters" if len(groups) > 1 else "is not SGD's"
        log.warning(f"{path}: its optimizer state {what}: momentum starts at zero")
        return None
    return momentum


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
