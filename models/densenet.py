"""DenseNet-BC for 32x32 images.

G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, "Densely Connected Convolutional Networks",
arXiv 1608.06993.

Three dense blocks at 32x32, 16x16 and 8x8; every layer adds ``growth_rate`` channels through a
1x1 bottleneck of four times that width (B), and transitions divide the channels by
``compression_rate`` (C). depth = 6n + 4. Parameters for 10 classes: 100 layers, growth 12
769,162; 190 layers, growth 40 25,624,430.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models._blocks import conv1x1, conv3x3, initialise
from models._checkpointing import checkpointed
from models._dropout import dropout
from models._registry import ModelError, Shapes, blocks_in, check_depth, check_drop, register


class DenseLayer(nn.Module):
    """Bottleneck and 3x3 convolution, which append growth_rate channels to their input."""

    def __init__(self, channels: int, growth_rate: int, drop: float) -> None:
        """Build the layer for so many channels in."""
        super().__init__()
        self.drop = drop
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv1x1(channels, 4 * growth_rate)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.conv2 = conv3x3(4 * growth_rate, growth_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input and the new channels behind it."""
        out = self.conv1(functional.relu(self.bn1(x)))
        out = self.conv2(functional.relu(self.bn2(out)))
        out = dropout(out, self.drop, self.training)
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    """A 1x1 convolution and a pool, between two blocks."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        """Build the transition from so many channels to so many."""
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = conv1x1(channels_in, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return fewer channels, and the averages of 2x2 pixels."""
        return functional.avg_pool2d(self.conv1(functional.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """Three dense blocks with transitions between them; (B, 3, 32, 32) to logits."""

    def __init__(
        self,
        layers: int,
        growth_rate: int,
        compression_rate: int,
        drop: float,
        num_classes: int,
        checkpoint_activations: bool,
    ) -> None:
        """Build the network.

        Args:
            layers: The layers of each dense block.
            growth_rate: The channels that a layer adds.
            compression_rate: The number that transitions divide the channels by.
            drop: The dropout probability.
            num_classes: The number of logits.
            checkpoint_activations: Whether backward computes the activations of a layer again.
        """
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        grown = layers * growth_rate
        channels = 2 * growth_rate
        self.conv1 = conv3x3(3, channels)
        self.dense1 = _dense_block(layers, channels, growth_rate, drop)
        self.trans1 = Transition(channels + grown, (channels + grown) // compression_rate)
        channels = (channels + grown) // compression_rate
        self.dense2 = _dense_block(layers, channels, growth_rate, drop)
        self.trans2 = Transition(channels + grown, (channels + grown) // compression_rate)
        channels = (channels + grown) // compression_rate
        self.dense3 = _dense_block(layers, channels, growth_rate, drop)
        self.bn = nn.BatchNorm2d(channels + grown)
        self.fc = nn.Linear(channels + grown, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images. Shapes are for 100 layers and growth 12."""
        x = self.conv1(x)  # (B, 24, 32, 32)
        x = self.trans1(self._run(self.dense1, x))  # (B, 108, 16, 16)
        x = self.trans2(self._run(self.dense2, x))  # (B, 150, 8, 8)
        x = self._run(self.dense3, x)  # (B, 342, 8, 8)
        x = functional.relu(self.bn(x))
        return self.fc(x.mean((2, 3)))

    def _run(self, block: nn.Sequential, x: Tensor) -> Tensor:
        for layer in block:
            keep = not (self.checkpoint_activations and self.training)
            x = layer(x) if keep else checkpointed(layer, x)
        return x


def _dense_block(layers: int, channels: int, growth_rate: int, drop: float) -> nn.Sequential:
    return nn.Sequential(
        *(DenseLayer(channels + i * growth_rate, growth_rate, drop) for i in range(layers))
    )


def identify(shapes: Shapes) -> dict[str, Any] | None:
    """Return the arguments of the DenseNet with these tensors; dropout leaves no trace."""
    channels_out, channels_in = shapes["trans1.conv1.weight"][:2]
    return {
        "depth": 6 * blocks_in(shapes, "dense1.") + 4,
        "growth_rate": shapes["dense1.0.conv2.weight"][0],
        "compression_rate": channels_in // channels_out,
        "num_classes": shapes["fc.bias"][0],
    }


@register("densenet", identify)
def densenet(
    num_classes: int = 10,
    depth: int = 100,
    growth_rate: int = 12,
    compression_rate: int = 2,
    drop: float = 0.0,
    checkpoint_activations: bool = False,
) -> nn.Module:
    """Return a DenseNet-BC of 6n + 4 layers.

    Args:
        num_classes: The number of logits.
        depth: The number of layers.
        growth_rate: The channels that a layer adds.
        compression_rate: The number that transitions divide the channels by.
        drop: The dropout probability.
        checkpoint_activations: Whether backward computes the activations of a layer again.

    Raises:
        ModelError: The depth breaks the rule, a rate is below 1, or ``drop`` is no probability.
    """
    for argument, value in (("growth_rate", growth_rate), ("compression_rate", compression_rate)):
        if value < 1:
            raise ModelError(argument, value, "give 1 or more")
    check_drop(drop)
    layers = check_depth(depth, 6, 4, "a DenseNet-BC")
    return DenseNet(
        layers, growth_rate, compression_rate, drop, num_classes, checkpoint_activations
    )
