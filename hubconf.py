"""The models for torch.hub.

torch.hub.load("path/to/this/folder", "resnet", source="local", depth=110)
torch.hub.load("path/to/this/folder", "resnet", source="local", depth=20,
               checkpoint="checkpoints/cifar10/resnet20/model_best.pth.tar")
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from models import create_model, list_models
from utils.checkpoint.format import describe_model as _describe_model
from utils.checkpoint.format import load as _load
from utils.checkpoint.restore import load_model as _load_model

dependencies = ["torch", "numpy"]


def _entry(name: str) -> Callable[..., nn.Module]:
    """Return the function that torch.hub lists and calls under the name of a model."""

    def build(num_classes: int = 10, checkpoint: str | None = None, **arguments: Any) -> nn.Module:
        model = create_model(name, num_classes=num_classes, **arguments)
        if checkpoint:
            path = Path(checkpoint)
            wanted = _describe_model(name, {**arguments, "num_classes": num_classes})
            _load_model(model, _load(path, flag="checkpoint"), path, wanted)
        return model

    build.__name__ = name
    build.__doc__ = f"The model {name}, with the weights of a checkpoint file if one is named."
    return build


globals().update({name: _entry(name) for name in list_models()})
