"""Order, augmentation and shards do not depend on the number of workers."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from utils.data import sampling
from utils.data.image_set import ImageSet


def test_the_order_of_an_epoch_is_a_permutation_and_differs_between_epochs_and_seeds():
    first = sampling.permutation(1000, seed=3, epoch=0)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, sampling.permutation(1000, seed=3, epoch=0))
    assert not np.array_equal(first, sampling.permutation(1000, seed=3, epoch=1))
    assert not np.array_equal(first, sampling.permutation(1000, seed=4, epoch=0))


def test_a_seed_means_the_same_order_for_ever():
    assert sampling.permutation(8, seed=1, epoch=2).tolist() == PINNED_ORDER
    assert sampling.crops_and_flips(3, seed=1, epoch=2, pad=4).tolist() == PINNED_CROPS


PINNED_ORDER = [4, 7, 0, 1, 5, 3, 2, 6]
PINNED_CROPS = [[5, 1, 1], [6, 7, 1], [3, 0, 1]]


def test_crops_reach_every_offset_and_half_the_images_are_mirrored():
    draws = sampling.crops_and_flips(20000, seed=0, epoch=0, pad=4)
    for column in (0, 1):
        counts = np.bincount(draws[:, column], minlength=9)
        assert len(counts) == 9
        assert counts.min() > 0.9 * 20000 / 9
    assert 0.48 < draws[:, 2].mean() < 0.52
    assert not np.array_equal(draws, sampling.crops_and_flips(20000, seed=0, epoch=1, pad=4))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7])
def test_shards_cover_every_batch_once_and_differ_by_one_image_at_most(workers):
    trained = []
    for start, stop in sampling.batch_slices(1000, 128, workers):
        shards = [sampling.shard(start, stop, rank, workers) for rank in range(workers)]
        sizes = [last - first for first, last in shards]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1
        trained += [i for first, last in shards for i in range(first, last)]
    assert trained == list(range(1000))


def test_a_last_batch_with_fewer_images_than_workers_is_dropped():
    assert sampling.batch_slices(130, 64, least=2) == [(0, 64), (64, 128), (128, 130)]
    assert sampling.batch_slices(130, 64, least=3) == [(0, 64), (64, 128)]


def test_the_validation_split_is_complete_disjoint_and_independent_of_the_seed():
    kept, held_out = sampling.split(1000, 100)
    assert len(held_out) == 100
    assert sorted([*kept, *held_out]) == list(range(1000))
    assert not np.array_equal(held_out, np.arange(900, 1000))


def test_no_two_steps_share_a_random_stream():
    seeds = {
        sampling.step_seed(seed, epoch, step)
        for seed in range(3)
        for epoch in range(5)
        for step in range(50)
    }
    assert len(seeds) == 3 * 5 * 50


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_augmented_batches_equal_torchvisions_transforms_image_by_image(pad_mode):
    images = np.random.RandomState(0).randint(0, 256, (20, 32, 32, 3)).astype(np.uint8)
    labels = np.arange(20, dtype=np.int64)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    data = ImageSet(images, labels, mean, std, device=torch.device("cpu"), pad=4, pad_mode=pad_mode)
    draws = sampling.crops_and_flips(20, seed=5, epoch=1, pad=4)
    index = torch.tensor([7, 3, 19, 0, 3])
    batch, batch_labels = data.batch(index, torch.from_numpy(draws))
    assert batch_labels.tolist() == index.tolist()
    for position, i in enumerate(index.tolist()):
        top, left, flip = draws[i].tolist()
        image = torch.from_numpy(images[i]).permute(2, 0, 1)
        mode = "constant" if pad_mode == "zero" else "reflect"
        image = reference.pad(image, [4, 4, 4, 4], padding_mode=mode)
        image = reference.crop(image, top, left, 32, 32)
        image = reference.horizontal_flip(image) if flip else image
        wanted = reference.normalize(image.float() / 255, list(mean), list(std))
        torch.testing.assert_close(batch[position], wanted, rtol=1e-5, atol=1e-5)


def test_a_set_without_padding_gives_the_images_as_they_are():
    images = np.random.RandomState(1).randint(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    data = ImageSet(
        images, np.zeros(4, np.int64), (0, 0, 0), (1, 1, 1),
        device=torch.device("cpu"), dtype=torch.float64,
    )  # fmt: skip
    batch, _ = data.batch(torch.arange(4))
    wanted = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    torch.testing.assert_close(batch, wanted)
