"""ResNeXt for 32x32 images.

S. Xie, R. Girshick, P. Dollar, Z. Tu, K. He, "Aggregated Residual Transformations for Deep Neural
Networks", arXiv 1611.05431, section 5.2.

Three stages of bottleneck blocks at 32x32, 16x16 and 8x8, whose 3x3 convolutions are split into
``cardinality`` groups of 64, 128 and 256 channels. depth = 9n + 2. Parameters for 10 classes:
29 layers, 8x64d 34,426,698; 16x64d 68,155,210.
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from models._registry import ModelError, Shapes, blocks_in, check_depth, register


class Bottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions and a shortcut."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int, cardinality: int, group_width: int
    ) -> None:
        """Build a block; the 3x3 convolution has ``cardinality`` groups of ``group_width``."""
        super().__init__()
        width = cardinality * group_width
        self.conv_reduce = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(width)
        self.conv_conv = nn.Conv2d(
            width, width, 3, stride=stride, padding=1, groups=cardinality, bias=False
        )
        self.bn = nn.BatchNorm2d(width)
        self.conv_expand = nn.Conv2d(width, channels_out, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if channels_in != channels_out:
            self.shortcut.add_module(
                "shortcut_conv", nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            )
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut(x) + residual(x))."""
        out = functional.relu(self.bn_reduce(self.conv_reduce(x)))
        out = functional.relu(self.bn(self.conv_conv(out)))
        out = self.bn_expand(self.conv_expand(out))
        return functional.relu(out + self.shortcut(x))


class ResNeXt(nn.Module):
    """Three stages of aggregated residual blocks; (B, 3, 32, 32) to logits."""

    def __init__(self, blocks: int, cardinality: int, widen_factor: int, num_classes: int) -> None:
        """Build the network.

        Args:
            blocks: The blocks of each stage.
            cardinality: The groups of the 3x3 convolutions.
            widen_factor: The width of the stages, as a multiple of 64, 128 and 256 channels.
            num_classes: The number of logits.
        """
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        widths = [64, 64 * widen_factor, 128 * widen_factor, 256 * widen_factor]
        self.stage_1 = _stage("stage_1", blocks, widths[0], widths[1], 1, cardinality, 64)
        self.stage_2 = _stage("stage_2", blocks, widths[1], widths[2], 2, cardinality, 128)
        self.stage_3 = _stage("stage_3", blocks, widths[2], widths[3], 2, cardinality, 256)
        self.classifier = nn.Linear(widths[3], num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images. Shapes are for widen_factor 4."""
        x = functional.relu(self.bn_1(self.conv_1_3x3(x)))  # (B, 64, 32, 32)
        x = self.stage_1(x)  # (B, 256, 32, 32)
        x = self.stage_2(x)  # (B, 512, 16, 16)
        x = self.stage_3(x)  # (B, 1024, 8, 8)
        return self.classifier(x.mean((2, 3)))


def _stage(
    name: str,
    blocks: int,
    channels_in: int,
    channels_out: int,
    stride: int,
    cardinality: int,
    group_width: int,
) -> nn.Sequential:
    """Return the blocks of a stage; each has its name, as in published checkpoints."""
    stage = OrderedDict[str, nn.Module]()
    for i in range(blocks):
        stage[f"{name}_bottleneck_{i}"] = Bottleneck(
            channels_in if i == 0 else channels_out,
            channels_out,
            stride if i == 0 else 1,
            cardinality,
            group_width,
        )
    return nn.Sequential(stage)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(module.bias)


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the ResNeXt with these tensors."""
    first = "stage_1.stage_1_bottleneck_0."
    width, group_width = shapes[first + "conv_conv.weight"][:2]
    return {
        "depth": 9 * blocks_in(shapes, "stage_1.") + 2,
        "cardinality": width // group_width,
        "widen_factor": shapes[first + "conv_expand.weight"][0] // 64,
        "num_classes": shapes["classifier.bias"][0],
    }


@register("resnext", identify)
def resnext(
    num_classes: int = 10, depth: int = 29, cardinality: int = 8, widen_factor: int = 4
) -> nn.Module:
    """Return a ResNeXt of 9n + 2 layers.

    Args:
        num_classes: The number of logits.
        depth: The number of layers.
        cardinality: The groups of the 3x3 convolutions, of 64 channels in the first stage.
        widen_factor: The width of the stages, as a multiple of 64, 128 and 256 channels.

    Raises:
        ModelError: The depth breaks the rule, or a number is below 1.
    """
    for argument, value in (("cardinality", cardinality), ("widen_factor", widen_factor)):
        if value < 1:
            raise ModelError(argument, value, "give 1 or more")
    return ResNeXt(check_depth(depth, 9, 2, "a ResNeXt"), cardinality, widen_factor, num_classes)
