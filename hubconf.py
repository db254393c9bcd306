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
from utils.checkpoint import format as _checkpoint

dependencies = ["torch", "numpy"]


def _entry(name: str) -> Callable[..., nn.Module]:
    def build(num_classes: int = 10, checkpoint: str | None = None, **arguments: Any) -> nn.Module:
        model = create_model(name, num_classes=num_classes, **arguments)
        if checkpoint:
            path = Path(checkpoint)
            wanted = _checkpoint.describe_model(name, {**arguments, "num_classes": num_classes})
            state = _checkpoint.load(path, flag="checkpoint")
            _checkpoint.load_model(model, state, path, wanted)
        return model

    build.__name__ = name
    build.__doc__ = f"The model {name}, with the weights of a checkpoint file if one is named."
    return build


globals().update({name: _entry(name) for name in list_models()})
