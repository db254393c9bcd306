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

_factories: dict[str, Factory] = {}
_identifiers: dict[str, Identify] = {}


class ModelError(ValueError):
    """An unknown model, or an argument that a model does not take or cannot have.

    Attributes:
        argument: name of the factory's argument, or "arch".
        value: what was asked for.
        why: what is wrong with it, and what would be right.
    """

    def __init__(self, argument: str, value: object, why: str) -> None:
        super().__init__(f"{argument}={value!r}: {why}")
        self.argument = argument
        self.value = value
        self.why = why


def register(name: str, identify: Identify | None = None) -> Callable[[Factory], Factory]:
    """Decorator: make a factory known under a name.

    Args:
        name: what ``-a`` takes.
        identify: given the names and shapes of a state dict, the factory's arguments if the
            network is of this architecture, else None.

    Raises:
        ValueError: the name is taken.
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
    """All names, sorted."""
    return sorted(_factories)


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments of a model besides num_classes, with the model's own defaults.

    Raises:
        ModelError: no such model.
    """
    if name not in _factories:
        near = difflib.get_close_matches(name.lower(), _factories, n=3) or list_models()
        raise ModelError("arch", name, f"unknown; choose from {', '.join(near)}")
    parameters = inspect.signature(_factories[name]).parameters
    return {key: p.default for key, p in parameters.items() if key != "num_classes"}


def create_model(name: str, num_classes: int = 10, **arguments: Any) -> nn.Module:
    """A freshly initialised network, (B, 3, 32, 32) to (B, num_classes).

    Raises:
        ModelError: unknown model, an argument it does not take, or a value it cannot have.
    """
    known = model_arguments(name)
    for argument, value in arguments.items():
        if argument not in known:
            takes = ", ".join(known) or "no arguments"
            raise ModelError(argument, value, f"{name} does not take it (it takes {takes})")
    return _factories[name](num_classes=num_classes, **arguments)


def identify(shapes: Shapes) -> tuple[str, dict[str, Any]] | None:
    """Which network a state dict belongs to, from names and shapes alone.

    Returns:
        The name and the arguments, num_classes included, such that ``create_model`` builds it;
        what shapes cannot tell (dropout) is left out. None for an unknown network.
    """
    for name, match in _identifiers.items():
        try:
            arguments = match(shapes)
            if arguments is not None and _fits(name, arguments, shapes):
                return name, arguments
        except (KeyError, IndexError, TypeError, ZeroDivisionError, ModelError):
            continue  # names or shapes that this family does not have
    return None


def _fits(name: str, arguments: dict[str, Any], shapes: Shapes) -> bool:
    with torch.device("meta"):
        own = create_model(name, **arguments).state_dict()
    counters = {key for key in own if key.endswith("num_batches_tracked")}
    wanted = {key: tuple(t.shape) for key, t in own.items() if key not in counters}
    return wanted == {key: tuple(s) for key, s in shapes.items() if key not in counters}


def check_depth(depth: int, step: int, offset: int, what: str) -> int:
    """The blocks per stage of a network with ``depth = step * n + offset`` layers.

    Raises:
        ModelError: no such n; names the nearest valid depths.
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
    """How many numbered modules a state dict has under a prefix such as ``layer1.``."""
    return len({k[len(prefix) :].split(".")[0] for k in shapes if k.startswith(prefix)})
