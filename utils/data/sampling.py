"""The images that a step trains on, their order, their crops and their flips.

Everything here is a pure function of (seed, epoch) and never of the number of workers: step k of
an epoch trains on positions [k * batch, (k + 1) * batch) of one permutation, and the crop and flip
of image i come from one draw an epoch, indexed by i. A worker only chooses which part of a batch
it computes.

The draws use NumPy's RandomState, the one generator whose streams NumPy has frozen for good
(NEP 19): a seed means the same training on every version.
"""

import hashlib

import numpy as np

# Pixels that a random crop may reach beyond the image, as in all published recipes.
PAD = 4

# One of them ends a stream's key, so that streams for different purposes never overlap.
_PERMUTATION, _AUGMENTATION, _SPLIT = 0, 1, 2


def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of one epoch: a permutation of range(count), (count,) int64."""
    stream = np.random.RandomState([seed, epoch, _PERMUTATION])
    return stream.permutation(count).astype(np.int64)


def crops_and_flips(count: int, seed: int, epoch: int, pad: int) -> np.ndarray:
    """Draw the augmentation of one epoch, row i for image i.

    Returns:
        (count, 3) int64: vertical offset and horizontal offset of the crop, each uniform in
        0 .. 2 * pad, and 1 for a mirrored image, else 0 (half of them).
    """
    stream = np.random.RandomState([seed, epoch, _AUGMENTATION])
    offsets = stream.randint(0, 2 * pad + 1, size=(count, 2))
    flips = stream.randint(0, 2, size=(count, 1))
    return np.concatenate([offsets, flips], axis=1).astype(np.int64)


def split(count: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the training images and of the validation images, each sorted.

    The split does not depend on the seed, so that runs with different seeds can be compared.
    """
    order = np.random.RandomState([0, 0, _SPLIT]).permutation(count).astype(np.int64)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def batch_slices(count: int, batch: int, least: int) -> list[tuple[int, int]]:
    """Return the global batches of an epoch as (start, stop) positions in the permutation.

    Args:
        count: The number of training images.
        batch: The images of a global batch.
        least: The images that a batch needs, one for each backward pass of each worker. A last
            batch with fewer is dropped.
    """
    slices = [(start, min(start + batch, count)) for start in range(0, count, batch)]
    if slices and slices[-1][1] - slices[-1][0] < least:
        slices.pop()
    return slices


def shard(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part [first, last) of the positions [start, stop) that one rank computes.

    Shards are contiguous, cover the batch and differ by one image at most.
    """
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def step_seed(seed: int, epoch: int, step: int) -> int:
    """Return the seed of the draws inside the network (dropout) in one step, on all workers.

    Each step has its own seed, so that a resumed run needs no saved generator state. The seed is
    hashed, so that no two steps share a stream.
    """
    key = f"{seed}/{epoch}/{step}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
