"""What the fields of a checkpoint may hold: anybody can write a file, and a run relies on these."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from utils.errors import one_line

# More epochs and steps than any run has; the largest float that counts them exactly is far above.
_MOST = 10**9


def check_fields(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a checkpoint that a run or a tool uses, each of its own type.

    Numbers may be tensors of one number, as older scripts save accuracies. A field that is None is
    left out, as one that is missing.

    Raises:
        ValueError: A field holds what no run writes; the message says which.
    """
    found = {}
    for name, value in state.items():
        if not isinstance(name, str) or value is None:
            continue
        if name in _FIELDS:
            what, read = _FIELDS[name]
            try:
                value = read(value)
            except Exception as error:  # A foreign object can raise anything when it is read.
                shown = one_line(_shown(value), 60)
                raise ValueError(f"its {name!r} is {shown}, which is no {what}") from error
        found[name] = value
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)


def _number(value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _count(value: Any) -> int:
    number = _number(value)
    if number != int(number) or not 0 <= number <= _MOST:
        raise ValueError
    return int(number)


def _seconds(value: Any) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError
    return number


def _rows(value: Any) -> list[list[float]]:
    """Return the sums of each worker; files of format 1 hold one row of them all."""
    _check_type(value, list)
    rows = value if not value or isinstance(value[0], list) else [value]
    found = [[_number(number) for number in row] for row in rows]
    if any(len(row) != 4 for row in found):
        raise ValueError
    return found


def _names(value: Any) -> list[str]:
    _check_type(value, list, tuple)
    if not value or not all(isinstance(name, str) and name.isprintable() for name in value):
        raise ValueError
    return list(value)


def _channels(value: Any) -> list[float]:
    _check_type(value, list, tuple)
    found = [_number(number) for number in value]
    if len(found) != 3:
        raise ValueError
    return found


def _positive_channels(value: Any) -> list[float]:
    found = _channels(value)
    if min(found) <= 0:
        raise ValueError
    return found


def _word(value: Any) -> str:
    _check_type(value, str)
    if not value.isprintable():
        raise ValueError
    return value


def _dict(value: Any) -> dict[Any, Any]:
    _check_type(value, dict)
    return value


def _buffers(value: Any) -> Tensor:
    _check_type(value, Tensor)
    if value.dim() != 2:
        raise ValueError
    return value


def _check_type(value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds):
        raise TypeError


_FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "epoch": ("number of epochs", _count),
    "trained_epochs": ("number of epochs", _count),
    "step": ("number of steps", _count),
    "step_sums": ("list of four sums a worker", _rows),
    "step_seconds": ("time", _seconds),
    "acc": ("accuracy", _number),
    "best_acc": ("accuracy", _number),
    "best_epoch": ("number of an epoch", _count),
    "classes": ("list of names", _names),
    "mean": ("mean of three channels", _channels),
    "std": ("deviation of three channels", _positive_channels),
    "dataset": ("name", _word),
    "network": ("name", _word),
    "job": ("name", _word),
    "workers": ("number of workers", _count),
    "shape": ("dict", _dict),
    "buffers": ("table of statistics", _buffers),
    "optimizer": ("state of an optimizer", _dict),
    "versions": ("dict", _dict),
}
