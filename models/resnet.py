"""ResNet for 32x32 images.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", arXiv 1512.03385,
section 4.2.

Three stages of 16, 32 and 64 channels at 32x32, 16x16 and 8x8. Basic blocks: depth = 6n + 2;
bottleneck blocks, four times as wide: depth = 9n + 2. Where a stage changes the shape the shortcut
is a 1x1 convolution with batch norm (option B; the paper's CIFAR networks have option A, without
parameters). Parameters for 10 classes: depth 20 272,474, depth 110 1,730,714, depth 1202 19.4 M,
depth 164 with bottlenecks 1,704,154.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models._blocks import blocks_per_stage, conv1x1, conv3x3, identify_residual, initialise
from models._checkpointing import checkpointed
from models._registry import Shapes, register


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build a block; the stride divides the size."""
        super().__init__()
        self.conv1 = conv3x3(channels_in, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(channels_in, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return functional.relu(out + self.downsample(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; the output is four times as wide."""

    expansion = 4

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        """Build a block; the stride divides the size."""
        super().__init__()
        self.conv1 = conv1x1(channels_in, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, 4 * width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(channels_in, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return functional.relu(out + self.downsample(x))


def _shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    """Return the identity, or a projection where the shape changes."""
    if stride == 1 and channels_in == channels_out:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))


class ResNet(nn.Module):
    """Three stages of residual blocks; (B, 3, 32, 32) to logits."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: int,
        num_classes: int,
        checkpoint_activations: bool,
    ) -> None:
        """Build the network.

        Args:
            block: The kind of block.
            blocks: The blocks of each stage.
            num_classes: The number of logits.
            checkpoint_activations: Whether backward computes the activations of a block again.
        """
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(block, blocks, 16, 16, 1)
        self.layer2 = self._stage(block, blocks, 16 * block.expansion, 32, 2)
        self.layer3 = self._stage(block, blocks, 32 * block.expansion, 64, 2)
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
        x = functional.relu(self.bn1(self.conv1(x)))  # (B, 16, 32, 32)
        x = self._run(self.layer1, x)  # (B, 16, 32, 32)
        x = self._run(self.layer2, x)  # (B, 32, 16, 16)
        x = self._run(self.layer3, x)  # (B, 64, 8, 8)
        return self.fc(x.mean((2, 3)))

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        for block in stage:
            keep = not (self.checkpoint_activations and self.training)
            x = block(x) if keep else checkpointed(block, x)
        return x


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the ResNet with these tensors."""
    return identify_residual(shapes)


@register("resnet", identify)
def resnet(
    num_classes: int = 10,
    depth: int = 20,
    block_name: str = "BasicBlock",
    checkpoint_activations: bool = False,
) -> nn.Module:
    """Return a ResNet of 6n + 2 layers, or 9n + 2 with block_name="bottleneck".

    Args:
        num_classes: The number of logits.
        depth: The number of layers.
        block_name: The kind of block: "BasicBlock" or "bottleneck".
        checkpoint_activations: Whether backward computes the activations of a block again.

    Raises:
        ModelError: The depth breaks the rule, or there is no such block.
    """
    blocks, bottleneck = blocks_per_stage(depth, block_name, "a ResNet")
    block = Bottleneck if bottleneck else BasicBlock
    return ResNet(block, blocks, num_classes, checkpoint_activations)
