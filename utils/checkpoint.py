"""Checkpoints: what a run saves, how it is written, and what is read from older scripts.

A file holds the keys that users of bearpaw-style scripts know (``epoch`` is the next epoch to
train, ``state_dict``, ``acc``, ``best_acc``, ``optimizer``) and more beside them; only tensors,
numbers, strings, lists and dicts, so that ``torch.load(weights_only=True)`` reads it.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from models import identify
from utils.comm import Comm
from utils.errors import UserError
from utils.files import write_atomically
from utils.position import Position
from utils.provenance import versions

FORMAT = 1
LATEST = "checkpoint.pth.tar"
BEST = "model_best.pth.tar"


class Saver:
    """Saves the state of a run.

    Args:
        folder: the run folder.
        comm: the engine.
        model: the raw model.
        optimizer: as ``comm.wrap`` returned it.
        about: what does not change during a run: architecture, data set, options.
    """

    def __init__(
        self,
        folder: Path,
        comm: Comm,
        model: nn.Module,
        optimizer: Optimizer,
        about: dict[str, Any],
    ) -> None:
        self.folder = folder
        self.comm = comm
        self.model = model
        self.optimizer = optimizer
        self.about = {"format": FORMAT, **about, "workers": comm.size, "versions": versions()}

    def save(self, position: Position, is_best: bool) -> None:
        """Save at a position; every rank must call it, rank 0 writes."""
        self.comm.average_buffers(self.model)  # one sum over the workers
        if not self.comm.is_main:
            return
        state = {
            **self.about,
            "epoch": position.epoch,
            "step": position.step,
            "step_sums": position.sums,
            "acc": position.acc,
            "best_acc": position.best_acc,
            "best_epoch": position.best_epoch,
            "state_dict": {k: v.contiguous() for k, v in self.model.state_dict().items()},
            "optimizer": _with_plain_rate(self.optimizer.state_dict()),
        }
        save(self.folder, state, is_best)


def _with_plain_rate(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's state with the learning rate as a number, wherever it was in a tensor."""
    groups = [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def save(folder: Path, state: dict[str, Any], is_best: bool) -> None:
    """Write the newest checkpoint, and the best one too where is_best.

    The previous file stays until the new one is complete.
    """
    write_atomically(folder / LATEST, lambda file: torch.save(state, file))
    if is_best:
        with (folder / LATEST).open("rb") as source:
            write_atomically(folder / BEST, lambda file: shutil.copyfileobj(source, file))


def load(path: Path, flag: str = "--resume", trust: bool = False) -> dict[str, Any]:
    """Read a checkpoint, of this suite or of an older script of the family.

    Nothing in the file is executed unless ``trust`` says that it may be. A bare state dict counts
    as a checkpoint without history.

    Returns:
        The file's dict; ``state_dict`` in it has the raw model's names (no ``module.``).

    Raises:
        UserError: no such file, damaged, needs code to be read, or of a later format.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if "weights_only" in str(error) or "Weights only" in str(error):
            why = (
                "damaged, or reading it would run code in it: --trust-checkpoint allows that for "
                "a file that you know"
            )
        raise UserError(
            f"{flag} {path}: not a readable checkpoint ({why}); name another file"
        ) from error
    if isinstance(state, dict) and state and all(isinstance(v, Tensor) for v in state.values()):
        state = {"state_dict": state}
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise UserError(f"{flag} {path}: holds no 'state_dict'; name a training checkpoint")
    if state.get("format", 0) > FORMAT:
        raise UserError(
            f"{flag} {path}: written in format {state['format']}, this version reads up to "
            f"{FORMAT}; use a newer version"
        )
    state["state_dict"] = {
        key.removeprefix("module."): value for key, value in state["state_dict"].items()
    }
    return state


def load_model(model: nn.Module, state: dict[str, Any], path: Path, wanted: str) -> None:
    """Load the weights after checking that they belong to this network.

    Args:
        model: the raw model.
        state: as ``load`` returned it.
        path: of the file, for the message.
        wanted: what the command line asks for, in words.

    Raises:
        UserError: the file holds another network; says which.
    """
    weights = state["state_dict"]
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Files written before torch 0.4.1 count no batches; the counter plays no part.
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = {name: tuple(t.shape) for name, t in weights.items() if isinstance(t, Tensor)}
    if {k: v for k, v in shapes.items() if k not in counters} != {
        k: v for k, v in own.items() if k not in counters
    }:
        raise UserError(
            f"--resume {path}: holds {_describe(shapes)}, not {wanted}; "
            "give the matching -a, model flags and -d, or another file"
        )
    # Every name but the counters is known to be there, so strict would only reject old files.
    model.load_state_dict(weights, strict=False)


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    found = identify(shapes)
    if found is None:
        return "another network"
    arch, arguments = found
    return describe_model(arch, arguments)


def describe_model(arch: str, arguments: dict[str, Any]) -> str:
    """A network in words: ``resnet (depth 20, num_classes 10)``."""
    return f"{arch} ({', '.join(f'{name} {value}' for name, value in arguments.items())})"


def load_optimizer(optimizer: Optimizer, state: dict[str, Any], path: Path) -> bool:
    """Restore the optimizer's momentum; its settings stay those of the command line.

    Returns:
        False where the file has no optimizer state.

    Raises:
        UserError: the state does not fit the parameters.
    """
    saved = state.get("optimizer")
    if not saved:
        return False
    settings = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        # Checked here because load_state_dict accepts buffers of any shape and fails in step().
        fits = all(
            value.shape == parameters[int(index)].shape
            for index, entry in saved["state"].items()
            for value in entry.values()
            if isinstance(value, Tensor) and value.dim()
        )
        if fits:
            optimizer.load_state_dict(saved)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"--resume {path}: its optimizer state is damaged: {error}") from error
    if not fits:
        raise UserError(
            f"--resume {path}: its optimizer state belongs to another network; name another file"
        )
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.dim():
                # The fused update goes through momentum and parameter side by side in memory.
                entry[name] = torch.empty_like(parameter).copy_(value)
    return True
