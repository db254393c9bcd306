"""What the residual networks have in common: convolutions, initialisation, kinds of block."""

import math

from torch import nn

from models._registry import ModelError, Shapes, blocks_in, check_depth

# The step and the offset of the depth rule, by the kind of block.
_KINDS = {"basicblock": (6, 2), "bottleneck": (9, 2)}


def conv3x3(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size, or divides it by the stride."""
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)


def conv1x1(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution."""
    return nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)


def initialise(model: nn.Module) -> None:
    """Draw the weights of convolutions from N(0, 2 / fan_out) (He et al., arXiv 1502.01852)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))


def blocks_per_stage(depth: int, block_name: str, family: str) -> tuple[int, bool]:
    """Return the blocks in each of the three stages, and whether they are bottlenecks.

    Args:
        depth: The number of layers of the network.
        block_name: The kind of block: "BasicBlock" or "bottleneck", in any case.
        family: The network in words, for the message.

    Raises:
        ModelError: There is no such block, or the depth breaks its rule.
    """
    kind = block_name.lower()
    if kind not in _KINDS:
        raise ModelError("block_name", block_name, "choose BasicBlock or bottleneck")
    step, offset = _KINDS[kind]
    what = f"{family} with {'bottleneck' if kind == 'bottleneck' else 'basic'} blocks"
    return check_depth(depth, step, offset, what), kind == "bottleneck"


def identify_residual(shapes: Shapes) -> dict[str, object]:
    """Return the arguments of the resnet or preresnet with these tensors."""
    blocks = blocks_in(shapes, "layer1.")
    bottleneck = "layer1.0.conv3.weight" in shapes
    step, offset = _KINDS["bottleneck" if bottleneck else "basicblock"]
    return {
        "depth": step * blocks + offset,
        "block_name": "bottleneck" if bottleneck else "BasicBlock",
        "num_classes": shapes["fc.bias"][0],
    }
