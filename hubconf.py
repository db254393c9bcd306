"""The models for torch.hub: fresh, with a checkpoint's weights, or with published ones.

torch.hub.load("path/to/this/folder", "resnet", source="local", depth=110)
torch.hub.load("path/to/this/folder", "resnet", source="local", depth=20,
               checkpoint="checkpoints/cifar10/resnet20/model_best.pth.tar")
torch.hub.load("path/to/this/folder", "alexnet", source="local", dataset="cifar10", trained=True)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from models import create_model, list_models
from tools.published import find_weights as _find_weights
from utils.checkpoint.format import describe_model as _describe_model
from utils.checkpoint.format import load as _load
from utils.checkpoint.format import parse as _parse
from utils.checkpoint.restore import load_model as _load_model
from utils.checkpoint.run_dir import run_name as _run_name
from utils.errors import UserError as _UserError

dependencies = ["torch", "numpy"]

_DOCSTRING = """Return the model {name}.

Args:
    num_classes: The number of classes; by default 10, or as many as ``dataset`` has.
    checkpoint: The path of a checkpoint whose weights the model gets.
    dataset: With ``trained``: the data set that the published weights were trained on.
    trained: Load the published weights; docs/results lists them. The model then has an attribute
        ``pretrained_cfg``, a dict with ``mean`` and ``std`` per channel, of pixels scaled to 0..1,
        the names of the ``classes``, the test ``accuracy`` in per cent, and where the weights come
        from.
    seed: With ``trained``: the seed of the run; by default the lowest that is published.
    arguments: Those of the model, such as ``depth``.

Raises:
    UserError: The weights are not published, are not the published ones, or do not fit; or
        arguments exclude each other; or the package safetensors is missing.
    ModelError: The model does not take the arguments.
"""


def _entry(name: str) -> Callable[..., nn.Module]:
    """Return the function that torch.hub lists and calls under the name of a model."""

    def build(
        num_classes: int | None = None,
        checkpoint: str | None = None,
        dataset: str | None = None,
        trained: bool = False,
        seed: int | None = None,
        **arguments: Any,
    ) -> nn.Module:
        if trained:
            if dataset is None or checkpoint:
                raise _UserError("trained=True: name a dataset, and no checkpoint")
            return _trained(name, dataset, seed, num_classes, arguments)
        if dataset is not None or seed is not None:
            raise _UserError("dataset and seed: go with trained=True; add it, or leave them out")
        classes = 10 if num_classes is None else num_classes
        model = create_model(name, num_classes=classes, **arguments)
        if checkpoint:
            path = Path(checkpoint)
            wanted = _describe_model(name, {**arguments, "num_classes": classes})
            state = _load(path, flag="checkpoint", trust=None)
            _load_model(model, state, path, wanted, flag="checkpoint")
        return model

    build.__name__ = name
    build.__doc__ = _DOCSTRING.format(name=name)
    return build


def _trained(
    name: str, dataset: str, seed: int | None, num_classes: int | None, arguments: dict[str, Any]
) -> nn.Module:
    """Return a model with published weights, which are read only if their digest fits."""
    recipe = _run_name(name, arguments)
    path, result, content = _find_weights(recipe, dataset, seed)
    about = result["weights"]
    classes = len(about["classes"])
    if num_classes not in (None, classes):
        raise _UserError(f"num_classes={num_classes}: {dataset} has {classes}; leave it out")
    model = create_model(name, num_classes=classes, **arguments)
    wanted = _describe_model(name, {**arguments, "num_classes": classes})
    state = _parse(content, path, "trained=True:", trust=False)
    _load_model(model, state, path, wanted, flag="trained=True:")
    cfg = {key: about[key] for key in ("accuracy", "classes", "mean", "std", "sha256")}
    origin = {key: result[key] for key in ("recipe", "dataset", "seed", "flags")}
    # By setattr it would have to be a tensor or a module for mypy.
    model.__dict__["pretrained_cfg"] = {**origin, **cfg}
    return model


globals().update({name: _entry(name) for name in list_models()})
