"""How long whole recipes take on one large GPU, cheapest first: python -m tools.cost RECIPE...

This is a prediction, for the order of runs and for planning. It is for an H200 with --amp bf16, and
follows from the number of kernels that a step launches in a CUDA graph and from its floating-point
operations.
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from utils.config.args import parse_args
from utils.config.recipes import Recipe, find_recipe
from utils.errors import command
from utils.training import build

TRAIN_IMAGES = 50_000
KERNEL_SECONDS = 2.2e-6  # The time of one kernel in a graph.
KERNELS_PER_PARAMETER = 3  # A step has this many for each tensor: forward, backward and update.
FLOPS_PER_SECOND = 300e12  # Wide networks reach this.


def minutes(recipe: Recipe) -> float:
    """Return the minutes that the whole recipe takes, evaluation left out."""
    config = parse_args(recipe.flags)
    with torch.device("meta"):
        model = build.network(config.model, classes=10)
        images = torch.empty(2, 3, 32, 32)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(images)
    steps = TRAIN_IMAGES / config.train.train_batch
    kernels = steps * KERNELS_PER_PARAMETER * len(list(model.parameters()))
    # The backward pass has twice the operations of the forward pass.
    operations = TRAIN_IMAGES * 3 * counter.get_total_flops() / len(images)
    epoch_seconds = kernels * KERNEL_SECONDS + operations / FLOPS_PER_SECOND
    return config.train.epochs * epoch_seconds / 60


@command
def main(argv: Sequence[str]) -> int:
    """Print name and minutes of the recipes, one in a line, and return the exit code."""
    found = {recipe.name: minutes(recipe) for recipe in map(find_recipe, argv)}
    for name in sorted(found, key=found.__getitem__):
        print(f"{name} {found[name]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
