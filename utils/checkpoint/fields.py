"""What the fields of a checkpoint may hold: anybody can write a file, and a run relies on these."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from utils.errors import one_line

# No run has as many epochs or steps, and a float counts this many exactly.
_MOST = 10**9
# The largest mean, and the inverse of the smallest deviation, of pixels scaled to 0..1.
_LARGEST = 1e6


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
                raise ValueError(f"its {name!r} is {shown(value)}, which is no {what}") from error
        found[name] = value
    return found


def shown(value: Any) -> str:
    """Return a value in a few printable words, whatever it is."""
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"a tensor of shape {tuple(value.shape)}"
    try:
        return one_line(repr(value), 60)
    except Exception:  # A list may be nested without end.
        return f"a {type(value).__name__}"


def number(value: Any) -> float:
    """Return a finite number, also of a tensor or an array of one.

    Raises:
        Exception: It is none.
    """
    if isinstance(value, str | bytes | bool):
        raise TypeError
    found = float(value)
    if not math.isfinite(found):
        raise ValueError
    return found


def _count(value: Any) -> int:
    found = number(value)
    if found != int(found) or not 0 <= found <= _MOST:
        raise ValueError
    return int(found)


def _seconds(value: Any) -> float:
    found = number(value)
    if found < 0:
        raise ValueError
    return found


def _rows(value: Any) -> list[list[float]]:
    """Return the sums of each worker; files of format 1 hold one row of them all."""
    _check_type(value, list)
    rows = value if not value or isinstance(value[0], list) else [value]
    found = [[number(item) for item in row] for row in rows]
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
    found = [number(item) for item in value]
    if len(found) != 3 or max(map(abs, found)) > _LARGEST:
        raise ValueError
    return found


def _positive_channels(value: Any) -> list[float]:
    found = _channels(value)
    if min(found) < 1 / _LARGEST:
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


def _plain_dict(value: Any) -> dict[str, Any]:
    """Return a dict of JSON's types, which can be compared and printed."""
    return dict(json.loads(json.dumps(_dict(value))))


def _checksums(value: Any) -> list[int]:
    _check_type(value, list)
    if len(value) != 4:
        raise ValueError
    return [int(number(item)) for item in value]


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
    "acc": ("accuracy", number),
    "best_acc": ("accuracy", number),
    "best_epoch": ("number of an epoch", _count),
    "classes": ("list of names", _names),
    "mean": ("mean of three channels", _channels),
    "std": ("deviation of three channels", _positive_channels),
    "dataset": ("name", _word),
    "network": ("name", _word),
    "job": ("name", _word),
    "workers": ("number of workers", _count),
    "shape": ("dict of plain values", _plain_dict),
    "options": ("dict of plain values", _plain_dict),
    "images": ("list of four checksums", _checksums),
    "buffers": ("table of statistics", _buffers),
    "optimizer": ("state of an optimizer", _dict),
    "versions": ("dict", _dict),
}
