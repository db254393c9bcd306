"""Pre-activation ResNet for 32x32 images.

K. He, X. Zhang, S. Ren, J. Sun, "Identity Mappings in Deep Residual Networks", arXiv 1603.05027.

This is resnet.py, but batch norm and ReLU stand before each convolution, so that the sum at the end
of a block goes on unchanged; a last batch norm and ReLU follow the blocks. The shortcut of a block
that changes the shape is a bare 1x1 convolution of the block's input. Basic blocks: depth = 6n + 2;
bottleneck blocks: depth = 9n + 2. Parameters for 10 classes: depth 110 1,730,522, depth 164 with
bottlenecks 1,703,258.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models._blocks import blocks_per_stage, conv1x1, conv3x3, identify_residual, initialise
from models._registry import Shapes, register


class BasicBlock(nn.Module):
    """Two pre-activated 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build a block; the stride divides the size."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.downsample = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut(x) + residual(x)."""
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(functional.relu(self.bn2(out)))
        return out + self.downsample(x)


class Bottleneck(nn.Module):
    """Pre-activated 1x1, 3x3 and 1x1 convolutions and a shortcut; four times as wide."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build a block; the stride divides the size."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv1x1(channels_in, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, 4 * width)
        self.downsample = _shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return shortcut(x) + residual(x)."""
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(functional.relu(self.bn2(out)))
        out = self.conv3(functional.relu(self.bn3(out)))
        return out + self.downsample(x)


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Return the identity, or a projection where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels_in, channels_out, stride))


class PreResNet(nn.Module):
    """Three stages of pre-activated residual blocks; (B, 3, 32, 32) to logits."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: int, num_classes: int
    ) -> None:
        """Build the network.

        Args:
            block: The kind of block.
            blocks: The blocks of each stage.
            num_classes: The number of logits.
        """
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        self.layer1 = self._stage(block, blocks, 16, 16, 1)
        self.layer2 = self._stage(block, blocks, 16 * block.expansion, 32, 2)
        self.layer3 = self._stage(block, blocks, 32 * block.expansion, 64, 2)
        self.bn = nn.BatchNorm2d(64 * block.expansion)
        self.fc = nn.Linear(64 * block.expansion, num_classes)
        initialise(self)

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck],
        blocks: int,
        channels_in: int,
        width: int,
        stride: int,
    ) -> nn.Sequential:
        first = block(channels_in, width, stride)
        others = (block(width * block.expansion, width, 1) for _ in range(blocks - 1))
        return nn.Sequential(first, *others)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images. Shapes are for basic blocks."""
        x = self.conv1(x)  # (B, 16, 32, 32)
        x = self.layer1(x)  # (B, 16, 32, 32)
        x = self.layer2(x)  # (B, 32, 16, 16)
        x = self.layer3(x)  # (B, 64, 8, 8)
        x = functional.relu(self.bn(x))
        return self.fc(x.mean((2, 3)))


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the pre-activation ResNet with these tensors."""
    return identify_residual(shapes)


@register("preresnet", identify)
def preresnet(num_classes: int = 10, depth: int = 20, block_name: str = "BasicBlock") -> nn.Module:
    """Return a pre-activation ResNet of 6n + 2 layers, or 9n + 2 with block_name="bottleneck".

    Args:
        num_classes: The number of logits.
        depth: The number of layers.
        block_name: The kind of block: "BasicBlock" or "bottleneck".

    Raises:
        ModelError: The depth breaks the rule, or there is no such block.
    """
    blocks, bottleneck = blocks_per_stage(depth, block_name, "a pre-activation ResNet")
    return PreResNet(Bottleneck if bottleneck else BasicBlock, blocks, num_classes)
