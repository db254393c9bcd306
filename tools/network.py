"""The network of a checkpoint, ready to use, for the tools that train nothing."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models import create_model, identify
from utils.checkpoint.format import describe_model, load
from utils.checkpoint.restore import load_model
from utils.data.datasets import TRUE_STATISTICS
from utils.errors import UserError


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode, and what its inputs and outputs mean.

    Attributes:
        model: Takes (B, 3, 32, 32) normalised images and returns (B, classes) logits.
        classes: The names of the classes; numbers where the file has none.
        mean: The mean per channel to normalise with, of pixels scaled to 0..1.
        std: The standard deviation per channel to normalise with, of pixels scaled to 0..1.
        name: The architecture and its arguments, in words.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str


def load_network(path: Path) -> Network:
    """Return the network that a checkpoint holds.

    The files of older scripts do not say what their images were; they are taken for CIFAR's.

    Args:
        path: The checkpoint.

    Raises:
        UserError: The file is no checkpoint, or holds an unknown network.
    """
    state = load(path, flag="CHECKPOINT")
    shapes = {name: tuple(tensor.shape) for name, tensor in state["state_dict"].items()}
    found = identify(shapes)
    if found is None:
        raise UserError(
            f"CHECKPOINT {path}: its tensors belong to no network of this suite; name another file"
        )
    arch, arguments = found
    model = create_model(arch, **arguments)
    load_model(model, state, path, arch, flag="CHECKPOINT")
    model.eval()
    count = arguments["num_classes"]
    classes = tuple(state.get("classes", map(str, range(count))))
    if len(classes) != count:
        raise UserError(
            f"CHECKPOINT {path}: names {len(classes)} classes of a network that has {count}; "
            "name another file"
        )
    mean, std = TRUE_STATISTICS["cifar100" if count == 100 else "cifar10"]
    return Network(
        model,
        classes,
        tuple(state.get("mean", mean)),
        tuple(state.get("std", std)),
        describe_model(arch, arguments),
    )
