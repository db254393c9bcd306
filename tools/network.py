"""The network of a checkpoint, ready to use: for the tools that train nothing."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models import create_model, identify
from utils.checkpoint import format as checkpoint
from utils.data.datasets import TRUE_STATISTICS
from utils.errors import UserError


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode and what its inputs and outputs mean.

    Attributes:
        model: (B, 3, 32, 32) normalised images to (B, classes) logits.
        classes: their names; numbers where the file has none.
        mean, std: per channel, of pixels scaled to 0..1, to normalise with.
        name: the architecture and its arguments, in words.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def load_network(path: Path) -> Network:
    """The network that a checkpoint holds; files of older scripts are taken for CIFAR's.

    Raises:
        UserError: not a checkpoint, or of an unknown network.
    """
    state = checkpoint.load(path, flag="CHECKPOINT")
    shapes = {name: tuple(tensor.shape) for name, tensor in state["state_dict"].items()}
    found = identify(shapes)
    if found is None:
        raise UserError(
            f"CHECKPOINT {path}: its tensors belong to no network of this suite; name another file"
        )
    arch, arguments = found
    model = create_model(arch, **arguments)
    checkpoint.load_model(model, state, path, arch)
    model.eval()
    count = arguments["num_classes"]
    mean, std = TRUE_STATISTICS["cifar100" if count == 100 else "cifar10"]
    return Network(
        model,
        tuple(state.get("classes", map(str, range(count)))),
        tuple(state.get("mean", mean)),
        tuple(state.get("std", std)),
        checkpoint.describe_model(arch, arguments),
    )
