"""Files of other scripts: where their weights are, and what they have other words for.

docs/foreign-files.md lists what is read. Every reading that goes beyond bearpaw's own layout is
said in ``read_as``, so that a user sees what a number was taken for.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models import SHORTCUT, identify
from utils.checkpoint.fields import check_fields, number

# The keys under which scripts save, in the order in which they are looked for.
WEIGHTS = ("state_dict", "model_state_dict", "net", "model", "model_state", "weights")
OPTIMIZER = ("optimizer", "optimizer_state_dict", "optim", "optimizer_state")
ACC = ("acc", "acc1", "prec1", "test_acc", "val_acc", "accuracy")
BEST_ACC = (
    "best_acc", "best_prec1", "best_acc1", "best_top1", "best_accuracy", "best_val_acc",
    "best_prec",
)  # fmt: skip

_ABOUT_IMAGES = ("dataset", "classes", "mean", "std")

# What DataParallel, DistributedDataParallel and torch.compile put into names, wherever the wrapped
# module is: features.module.0.weight is features.0.weight of a network that is partly parallel.
_WRAPPERS = frozenset({"module", "_orig_mod"})
# The names that akamaster/pytorch_resnet_cifar10 has for the same layers.
_RENAMED = {"linear": "fc", "shortcut": "downsample"}


def find_weights(state: Any) -> tuple[dict[str, Any], str] | None:
    """Return the weights of a file and the key that they stand under; None where there are none.

    Args:
        state: What the file holds: a dict with weights under one of the keys of WEIGHTS, or the
            weights themselves, whose key is "". A network that was pickled whole, which only a
            trusted file can hold, counts as its weights.
    """
    if isinstance(state, nn.Module):
        return state.state_dict(), ""
    if not isinstance(state, dict):
        return None
    if state and all(isinstance(value, Tensor) for value in state.values()):
        return state, ""
    for key in WEIGHTS:
        value = state.get(key)
        weights = value.state_dict() if isinstance(value, nn.Module) else value
        # A script may keep something else under these keys, such as the name of its model.
        if isinstance(weights, dict) and any(isinstance(v, Tensor) for v in weights.values()):
            return weights, key
    empty = state.get(WEIGHTS[0])
    return (empty, WEIGHTS[0]) if isinstance(empty, dict) else None


def plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights by the names of the raw network, without what wrappers have put before them.

    Names that would then be the same stay as they are.
    """
    parts = {
        name: [part for part in name.split(".") if part not in _WRAPPERS]
        for name in weights
        if name != "n_averaged"  # The counter of torch.optim.swa_utils.AveragedModel.
    }
    ways = [parts]
    # A network inside another module: all names begin with that module's own.
    if len({words[0] for words in parts.values() if words}) == 1:
        ways.append({name: words[1:] for name, words in parts.items()})
    for way in [*ways]:
        if any(word in _RENAMED for words in way.values() for word in words):
            ways.append({k: [_RENAMED.get(w, w) for w in words] for k, words in way.items()})
    plain, *others = (_renamed(weights, way) for way in ways)
    return next((names for names in others if _is_known(names)), plain)


def _renamed(weights: Mapping[str, Any], way: Mapping[str, list[str]]) -> dict[str, Any]:
    found = {".".join(words): weights[name] for name, words in way.items()}
    return found if len(found) == len(way) else dict(weights)


def _is_known(weights: Mapping[str, Any]) -> bool:
    """Return whether weights are those of a network of this suite, shortcuts apart."""
    shapes = {name: tuple(v.shape) for name, v in weights.items() if isinstance(v, Tensor)}
    return bool(identify(shapes) or identify(shapes, but_for=SHORTCUT))


def in_our_words(state: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what a file of another script says, by the keys of this suite.

    Only what such a script may mean as we do is taken: its ``step``, for example, need not be a
    step of the epoch.

    Args:
        state: What the file holds.
        key: The key that its weights stand under.

    Returns:
        A new dict. ``read_as`` in it says in words what was taken for what.
    """
    said = [f"weights from {key!r}"] if key not in ("", "state_dict") else []
    found = {"epoch": state["epoch"]} if "epoch" in state else {}
    found |= {name: state[name] for name in _ABOUT_IMAGES if _is_sensible(name, state.get(name))}
    values = ((name, _number_of(state.get(name))) for name in (*ACC, *BEST_ACC))
    accuracies = {name: value for name, value in values if value is not None}
    # Some scripts keep fractions; bearpaw's, which has both keys, keeps per cent.
    known_unit = key == "state_dict" and {"acc", "best_acc"} <= accuracies.keys()
    measured = [value for value in accuracies.values() if value]
    fractions = not known_unit and bool(measured) and all(0 < v <= 1 for v in measured)
    fractions = fractions and any(value < 1 for value in measured)
    known = accuracies | {name: state[name] for name in OPTIMIZER if _is_optimizer(state.get(name))}
    for own, names in (("optimizer", OPTIMIZER), ("acc", ACC), ("best_acc", BEST_ACC)):
        name = next((name for name in names if name in known), None)
        if name is None:
            continue
        found[own] = known[name]
        if name != own:
            said.append(f"{own} from {name!r}")
        if name in accuracies and fractions:
            found[own] = 100 * known[name]
            said.append(f"{own} {known[name]:g} as {found[own]:.2f} %")
    # A script that keeps one accuracy keeps its best one: it saves where that has risen.
    if "best_acc" not in found and "acc" in found:
        found["best_acc"] = found["acc"]
        said.append("acc as the best one")
    return {**found, "read_as": said}


def _number_of(value: Any) -> float | None:
    """Return a number; None for what is none, such as a list of them all."""
    try:
        return number(value)
    except Exception:  # A foreign object can raise anything when it is read.
        return None


def _is_optimizer(value: Any) -> bool:
    """Return whether a value is the state of an optimizer, and not its name or its settings."""
    return isinstance(value, dict) and value.keys() >= {"state", "param_groups"}


def _is_sensible(name: str, value: Any) -> bool:
    """Return whether a data set, classes or statistics of another script are such as ours."""
    try:
        check_fields({name: value})
    except ValueError:
        return False
    return value is not None and (name in ("dataset", "classes") or max(value) <= 1)
