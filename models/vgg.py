"""VGG for 32x32 images, with and without batch norm.

K. Simonyan, A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv 1409.1556.

For 32x32 images the five pools end at 1x1, and one linear layer takes the place of three. The
number in the name counts the layers of the original. Parameters for 10 classes: vgg11 9.2 M,
vgg13 9.4 M, vgg16 14.7 M, vgg19 20.0 M; batch norm adds some thousands (vgg19_bn: 20,040,522).
"""

import math
from typing import Any

from torch import Tensor, nn

from models._registry import Factory, Shapes, register

WIDTHS = (64, 128, 256, 512, 512)
# The convolutions of each stage, by the number in the name.
STAGES = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each ended by a pool; (B, 3, 32, 32) to logits."""

    def __init__(self, depth: int, batch_norm: bool, num_classes: int) -> None:
        """Build the network.

        Args:
            depth: The number in its name: 11, 13, 16 or 19.
            batch_norm: Whether batch norm follows each convolution.
            num_classes: The number of logits.
        """
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in zip(WIDTHS, STAGES[depth], strict=True):
            for _ in range(convolutions):
                layers.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU(inplace=True))
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        # After the stages: (B, 64, 16, 16), (B, 128, 8, 8), (B, 256, 4, 4), (B, 512, 2, 2) and
        # (B, 512, 1, 1).
        x = self.features(x).mean((2, 3))  # (B, 512)
        return self.classifier(x)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of a VGG; the registry tells the members by their layers."""
    return {"num_classes": shapes["classifier.bias"][0]}


def _member(depth: int, batch_norm: bool) -> Factory:
    """Return the factory of one member of the family."""

    def factory(num_classes: int = 10) -> nn.Module:
        return VGG(depth, batch_norm, num_classes)

    return factory


for _depth in STAGES:
    register(f"vgg{_depth}", identify)(_member(_depth, batch_norm=False))
    register(f"vgg{_depth}_bn", identify)(_member(_depth, batch_norm=True))
