"""AlexNet for 32x32 images.

A. Krizhevsky, I. Sutskever, G. Hinton, "ImageNet Classification with Deep Convolutional Neural
Networks", 2012; widths of A. Krizhevsky, "One weird trick", arXiv 1404.5997.

For 32x32 images the first convolution keeps its 11x11 window and stride 4 with padding 5, pools
are 2x2, and one linear layer takes the place of three. There is no batch norm and no dropout.
Parameters for 10 classes: 2,472,266.
"""

from typing import Any

from torch import Tensor, nn

from models._registry import Shapes, register


class AlexNet(nn.Module):
    """Five convolutions and one linear layer; (B, 3, 32, 32) to (B, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        """Build the layers."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # (B, 64, 4, 4)
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # (B, 192, 2, 2)
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),  # (B, 256, 1, 1)
        )
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = self.features(x).mean((2, 3))  # (B, 256)
        return self.classifier(x)


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the AlexNet with these tensors, None for another network."""
    if tuple(shapes["features.0.weight"]) != (64, 3, 11, 11):
        return None
    return {"num_classes": shapes["classifier.bias"][0]}


@register("alexnet", identify)
def alexnet(num_classes: int = 10) -> nn.Module:
    """Return AlexNet, which takes no arguments."""
    return AlexNet(num_classes)
