"""The network of a checkpoint, ready to use, for the tools that train nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models import create_model, identify
from utils.checkpoint.format import describe_model, describe_shapes, load
from utils.checkpoint.restore import load_model
from utils.data.datasets import LEGACY_STATISTICS
from utils.errors import UserError
from utils.training.checkpoint_data import describe_statistics, says_statistics


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode, and what its inputs and outputs mean.

    Attributes:
        model: Takes (B, 3, 32, 32) normalised images and returns (B, classes) logits.
        classes: The names of the classes; numbers where the file has none.
        mean: The mean per channel to normalise with, of pixels scaled to 0..1.
        std: The standard deviation per channel to normalise with, of pixels scaled to 0..1.
        name: The architecture and its arguments, in words.
        origin: What the inputs and outputs are taken for and who says so, in words.
        said: What the file itself says of its data, by the keys of a checkpoint.
    """

    model: nn.Module
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    origin: str
    said: Mapping[str, Any]


def load_network(path: Path, trust: bool) -> Network:
    """Return the network that a checkpoint holds.

    The files of older scripts do not say how their images were normalised. All scripts of this
    family have the legacy statistics, which are taken for them.

    Args:
        path: The checkpoint.
        trust: Whether reading may execute code in the file.

    Raises:
        UserError: The file is no checkpoint, or holds an unknown network.
    """
    state = load(path, flag="CHECKPOINT", trust=trust)
    weights = state["state_dict"].items()
    shapes = {name: tuple(value.shape) for name, value in weights if isinstance(value, Tensor)}
    found = identify(shapes)
    if found is None:
        raise UserError(
            f"CHECKPOINT {path}: holds {describe_shapes(shapes)}, no network of this suite; "
            "name another file"
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
    says = says_statistics(state)
    mean, std = (state["mean"], state["std"]) if says else LEGACY_STATISTICS
    origin = (
        f"{describe_statistics(mean, std)} "
        f"({'of the file' if says else 'assumed, as of older scripts: the file does not say'}); "
        f"{count} classes ({'of the file' if 'classes' in state else 'numbers: it names none'})"
        + (f"; read {', '.join(state['read_as'])}" if state["read_as"] else "")
    )
    name = describe_model(arch, arguments)
    keys = {"dataset", "classes", "mean", "std"}
    said: dict[str, Any] = {key: value for key, value in state.items() if key in keys}
    return Network(model, classes, tuple(mean), tuple(std), name, origin, said)
