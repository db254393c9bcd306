"""The five likeliest classes of each image, by a checkpoint.

python tools/predict.py CHECKPOINT IMAGE...
"""

import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

import argparse
from pathlib import Path

import numpy as np
import torch

from tools.network import load_network
from utils.data.image_folder import read_image
from utils.data.image_set import ImageSet
from utils.errors import command


@command
def main() -> int:
    """Print the likeliest classes of the images of the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="read a file even if that runs code in it"
    )
    options = parser.parse_args()
    network = load_network(options.checkpoint, options.trust_checkpoint)
    print(f"{options.checkpoint}: {network.name}; {network.origin}")
    pixels = np.stack([read_image(path)[0] for path in options.images])
    labels = np.zeros(len(pixels), np.int64)  # They are not known, and not used.
    images = ImageSet(pixels, labels, network.mean, network.std, device=torch.device("cpu"))
    with torch.inference_mode():
        batch, _ = images.batch(torch.arange(len(images)))
        probabilities = network.model(batch).softmax(1)
    best = probabilities.topk(min(5, len(network.classes)), dim=1)
    for path, values, indices in zip(options.images, *best, strict=True):
        print(path)
        for value, index in zip(values.tolist(), indices.tolist(), strict=True):
            print(f"  {100 * value:6.2f} %  {network.classes[index]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
