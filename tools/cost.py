"""How long whole recipes take on one large GPU, cheapest first: python -m tools.cost RECIPE...

A prediction, for the order of runs and for planning: of an H200 with --amp bf16, from the number
of kernels that a step launches in a CUDA graph and from its floating-point operations.
"""

import sys
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from utils.config.args import model_arguments_of, parse_args
from utils.config.recipes import Recipe, find_recipe
from utils.errors import command

TRAIN = 50_000
KERNEL_SECONDS = 2.2e-6  # of one kernel in a graph
KERNELS = 3  # of a step, to each parameter tensor: forward, backward, update
FLOPS = 300e12  # a second, that wide networks reach


def minutes(recipe: Recipe) -> float:
    """Of the whole recipe, evaluation left out."""
    options = parse_args(recipe.flags)
    with torch.device("meta"):
        model = create_model(options.arch, **model_arguments_of(options))
        image = torch.empty(2, 3, 32, 32)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(image)
    launches = TRAIN / options.train_batch * KERNELS * len(list(model.parameters()))
    work = TRAIN * 3 * counter.get_total_flops() / len(image)  # backward: twice the forward pass
    return options.epochs * (launches * KERNEL_SECONDS + work / FLOPS) / 60


@command
def main(argv: Sequence[str]) -> int:
    """Print name and minutes, a recipe a line."""
    found = {recipe.name: minutes(recipe) for recipe in map(find_recipe, argv)}
    for name in sorted(found, key=found.__getitem__):
        print(f"{name} {found[name]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
