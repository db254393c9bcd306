"""Wide residual network for 32x32 images.

S. Zagoruyko, N. Komodakis, "Wide Residual Networks", arXiv 1605.07146.

The blocks are pre-activated basic ones, ``widen_factor`` times as wide as ResNet's, with dropout
between the two convolutions. depth = 6n + 4. A block that changes the width projects its activated
input.
Parameters for 10 classes: 28 layers, 10 times as wide 36,479,194.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models._blocks import conv1x1, conv3x3, initialise
from models._dropout import dropout
from models._registry import ModelError, Shapes, blocks_in, check_depth, check_drop, register


class WideBlock(nn.Module):
    """Two pre-activated 3x3 convolutions with dropout between them, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, drop: float) -> None:
        """Build a block; the stride divides the size."""
        super().__init__()
        self.drop = drop
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, channels_out, stride)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = conv3x3(channels_out, channels_out)
        # The name is in camel case, as in published checkpoints.
        self.convShortcut = (
            None if channels_in == channels_out else conv1x1(channels_in, channels_out, stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut + residual(x); the shortcut is x or a projection of the activated x."""
        active = functional.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(active)
        out = functional.relu(self.bn2(self.conv1(active)))
        out = dropout(out, self.drop, self.training)
        return shortcut + self.conv2(out)


class Stage(nn.Module):
    """Blocks in a row, under the name that published checkpoints give them."""

    def __init__(
        self, blocks: int, channels_in: int, channels_out: int, stride: int, drop: float
    ) -> None:
        """Build a stage; the first block has the stride."""
        super().__init__()
        first = WideBlock(channels_in, channels_out, stride, drop)
        others = (WideBlock(channels_out, channels_out, 1, drop) for _ in range(blocks - 1))
        self.layer = nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the blocks make of x, one after the other."""
        return self.layer(x)


class WideResNet(nn.Module):
    """Three stages of wide residual blocks; (B, 3, 32, 32) to logits."""

    def __init__(self, blocks: int, widen_factor: int, drop: float, num_classes: int) -> None:
        """Build the network.

        Args:
            blocks: The blocks of each stage.
            widen_factor: The width of the stages, as a multiple of 16, 32 and 64 channels.
            drop: The dropout probability.
            num_classes: The number of logits.
        """
        super().__init__()
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = conv3x3(3, widths[0])
        self.block1 = Stage(blocks, widths[0], widths[1], 1, drop)
        self.block2 = Stage(blocks, widths[1], widths[2], 2, drop)
        self.block3 = Stage(blocks, widths[2], widths[3], 2, drop)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images. Shapes are for widen_factor 10."""
        x = self.conv1(x)  # (B, 16, 32, 32)
        x = self.block1(x)  # (B, 160, 32, 32)
        x = self.block2(x)  # (B, 320, 16, 16)
        x = self.block3(x)  # (B, 640, 8, 8)
        x = functional.relu(self.bn1(x))
        return self.fc(x.mean((2, 3)))


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the wide ResNet with these tensors; dropout leaves no trace."""
    return {
        "depth": 6 * blocks_in(shapes, "block1.layer.") + 4,
        "widen_factor": shapes["fc.weight"][1] // 64,
        "num_classes": shapes["fc.bias"][0],
    }


@register("wrn", identify)
def wrn(
    num_classes: int = 10, depth: int = 28, widen_factor: int = 4, drop: float = 0.0
) -> nn.Module:
    """Return a wide ResNet of 6n + 4 layers.

    Args:
        num_classes: The number of logits.
        depth: The number of layers.
        widen_factor: The width of the stages, as a multiple of 16, 32 and 64 channels.
        drop: The dropout probability.

    Raises:
        ModelError: The depth breaks the rule, the width is below 1, or ``drop`` is no probability.
    """
    if widen_factor < 1:
        raise ModelError("widen_factor", widen_factor, "give 1 or more")
    check_drop(drop)
    return WideResNet(check_depth(depth, 6, 4, "a wide ResNet"), widen_factor, drop, num_classes)
