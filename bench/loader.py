"""The images per second of the augmentation alone, on one thread: ours and torchvision's."""

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch.utils.data import DataLoader

from bench.common import Result, Settings, draw_ratios, measure, ratio, timed
from bench.plain import Images, train_transform
from utils.data import sampling
from utils.data.datasets import load_dataset
from utils.data.image_set import ImageSet
from utils.data.sampling import PAD

IMAGES = 10_240
ROUNDS = 4
BATCH = 128
TARGET = 6.0  # Our speed over that of torchvision without worker processes.
CPU = torch.device("cpu")


def run(settings: Settings) -> Result:
    """Pass over the training set, augmented, round by round in both ways.

    The floor is our pass without augmentation: bytes to floats, and normalised.
    """
    count = settings.images(IMAGES, BATCH)
    data = load_dataset(settings.dataset, settings.data, train_size=count, test_size=1)
    sets = {
        pad: ImageSet(
            data.train_images, data.train_labels, data.mean, data.std, device=CPU, pad=pad
        )
        for pad in (PAD, 0)
    }
    plain = Images(data.train_images, data.train_labels, train_transform(data.mean, data.std))
    variants: dict[str, Callable[[], float]] = {
        "ours": partial(timed, lambda: _augmented(sets[PAD]), CPU),
        "floor": partial(timed, lambda: _as_they_are(sets[0]), CPU),
    }
    workers = (0, settings.loaders)
    for number in workers:
        variants[_name(number)] = partial(timed, partial(_through_loader, plain, number), CPU)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for variant in variants.values():
            variant()  # The first pass pays for memory.
        seconds = measure(variants, settings.rounds or ROUNDS)
    finally:
        torch.set_num_threads(threads)

    ratios = {_name(number): ratio(seconds[_name(number)], seconds["ours"]) for number in workers}
    rows = [("pipeline", "images/s", "% of floor", "ours is faster by", "target")]
    for name, times in seconds.items():
        target = f">= {TARGET:g}" if name == _name(0) else "-"
        rows.append(
            (
                name,
                f"{count / median(times):,.0f}",
                ratio(seconds["floor"], times).percent(),
                str(ratios[name]) if name in ratios else "-",
                target,
            )
        )
    return Result(
        f"loader: crop, flip and normalise {count:,} images in batches of {BATCH}, one thread",
        rows,
        ["floor: the same images as they are, converted and normalised"],
        {"images": count, "batch": BATCH, "seconds": seconds},
        lambda axes: draw_ratios(axes, ratios, {_name(0): TARGET}, "ours is faster by"),
    )


def _name(workers: int) -> str:
    return f"torchvision, {workers} workers"


def _augmented(images: ImageSet) -> None:
    """Make the batches of an epoch as TrainLoop.train_epoch does."""
    order = torch.from_numpy(sampling.permutation(len(images), 0, 0))
    augmentation = torch.from_numpy(sampling.crops_and_flips(len(images), 0, 0, PAD))
    for start, stop in sampling.batch_slices(len(images), BATCH, 1):
        images.batch(order[start:stop], augmentation)


def _as_they_are(images: ImageSet) -> None:
    for start, stop in sampling.batch_slices(len(images), BATCH, 1):
        images.batch(torch.arange(start, stop))


def _through_loader(images: Images, workers: int) -> None:
    for _ in DataLoader(images, batch_size=BATCH, shuffle=True, num_workers=workers):
        pass
