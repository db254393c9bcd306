"""Names of architectures and the factories behind them."""

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

Factory = Callable[..., nn.Module]
Shapes = Mapping[str, Sequence[int]]
Identify = Callable[[Shapes], dict[str, Any] | None]

# In the names of the tensors of a residual network's shortcuts.
SHORTCUT = ".downsample."

_factories: dict[str, Factory] = {}
_identifiers: dict[str, Identify] = {}


class ModelError(ValueError):
    """An unknown model, or an argument that a model does not take or cannot have.

    Attributes:
        argument: The name of the factory's argument, or "arch".
        value: The value that was asked for.
        why: What is wrong with it, and what would be right.
    """

    def __init__(self, argument: str, value: object, why: str) -> None:
        """Create an error whose message names all three."""
        super().__init__(f"{argument}={value!r}: {why}")
        self.argument = argument
        self.value = value
        self.why = why


def register(name: str, identify: Identify | None = None) -> Callable[[Factory], Factory]:
    """Return a decorator that makes a factory known under a name.

    Args:
        name: The name that ``-a`` takes.
        identify: Takes the names and shapes of a state dict and returns the factory's arguments if
            the network is of this architecture, else None.

    Raises:
        ValueError: The name is taken.
    """

    def add(factory: Factory) -> Factory:
        if name in _factories:
            raise ValueError(
                f"model {name!r} is registered twice: in {_factories[name].__module__} "
                f"and in {factory.__module__}"
            )
        _factories[name] = factory
        if identify is not None:
            _identifiers[name] = identify
        return factory

    return add


def list_models() -> list[str]:
    """Return all names, sorted."""
    return sorted(_factories)


def model_arguments(name: str) -> dict[str, Any]:
    """Return the arguments of a model besides num_classes, with the model's own defaults.

    Raises:
        ModelError: There is no such model.
    """
    if name not in _factories:
        near = ", ".join(difflib.get_close_matches(name.lower(), _factories, n=3))
        fix = f"did you mean {near}?" if near else f"choose one of {', '.join(list_models())}"
        raise ModelError("arch", name, f"unknown; {fix}")
    parameters = inspect.signature(_factories[name]).parameters
    return {key: p.default for key, p in parameters.items() if key != "num_classes"}


def create_model(name: str, num_classes: int = 10, **arguments: Any) -> nn.Module:
    """Return a freshly initialised network, (B, 3, 32, 32) to (B, num_classes).

    Args:
        name: The name of the architecture.
        num_classes: The number of logits.
        arguments: The arguments of its factory; the others have the model's own defaults.

    Raises:
        ModelError: There is no such model, or it does not take an argument or cannot have its
            value.
    """
    known = model_arguments(name)
    for argument, value in arguments.items():
        if argument not in known:
            takes = ", ".join(known) or "no arguments"
            raise ModelError(argument, value, f"{name} does not take it (it takes {takes})")
    return _factories[name](num_classes=num_classes, **arguments)


def identify(shapes: Shapes, but_for: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Return which network a state dict belongs to, by names and shapes alone.

    Args:
        shapes: The names and shapes.
        but_for: Part of a name; the network's tensors with it in their names must be missing.

    Returns:
        The name and the arguments, num_classes included, with which ``create_model`` builds it.
        What shapes cannot tell (dropout) is left out. None for an unknown network.
    """
    for name, match in _identifiers.items():
        try:
            arguments = match(shapes)
            if arguments is not None and _fits(name, arguments, shapes, but_for):
                return name, arguments
        except (KeyError, IndexError, TypeError, ZeroDivisionError, ModelError):
            continue  # This family does not have such names or shapes.
    return None


def _fits(name: str, arguments: dict[str, Any], shapes: Shapes, but_for: str | None) -> bool:
    """Return whether a model has exactly these names and shapes, counters of batches apart."""
    with torch.device("meta"):
        own = create_model(name, **arguments).state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    wanted = {
        key: tuple(tensor.shape)
        for key, tensor in own.items()
        if key not in counters and not (but_for and but_for in key)
    }
    return wanted == {key: tuple(s) for key, s in shapes.items() if key not in counters}


def check_depth(depth: int, step: int, offset: int, what: str) -> int:
    """Return n, the blocks per stage of a network with ``depth = step * n + offset`` layers.

    Args:
        depth: The number of layers.
        step: The layers of n = 1 more.
        offset: The layers outside the blocks.
        what: The network in words, for the message.

    Raises:
        ModelError: There is no such n; it names the nearest valid depths.
    """
    blocks, rest = divmod(depth - offset, step)
    if rest == 0 and blocks >= 1:
        return blocks
    near = sorted({step * max(1, n) + offset for n in (blocks, blocks + 1)})
    raise ModelError(
        "depth",
        depth,
        f"{what} needs depth = {step}n + {offset} (nearest: {', '.join(map(str, near))})",
    )


def check_drop(drop: float) -> None:
    """Raise ModelError unless 0 <= drop < 1."""
    if not 0 <= drop < 1:
        raise ModelError("drop", drop, "a dropout probability is at least 0 and below 1")


def blocks_in(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered modules a state dict has under a prefix such as ``layer1.``."""
    return len({k[len(prefix) :].split(".")[0] for k in shapes if k.startswith(prefix)})
