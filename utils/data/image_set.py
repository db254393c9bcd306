"""Images in memory as uint8, and batches of them that are cropped, flipped and normalised.

One gather takes a whole batch of random crops out of the padded images; nothing is done image by
image, and on a GPU nothing leaves the device. The distribution is that of torchvision's
RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize.

Images that a GPU has no room for stay in main memory: the gather is then done there, one copy a
batch takes its bytes to the GPU, and the rest is done on it, with the same bits as a result. The
host gathers the next batch while the GPU is still busy with this one, since it waits for nothing.
Data larger than main memory are out of scope.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.distributed.comm import Comm


class ImageSet:
    """A labelled set of images, and batches of them on one device.

    Attributes:
        device: The device of the batches.
        storage_device: The device of the images, and of indices into them.
        memory_format: The memory format of the batches; set it to change it.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        on_device: bool = True,
        dtype: torch.dtype = torch.float32,
        pad: int = 0,
        pad_mode: str = "zero",
    ) -> None:
        """Pad the images and keep them on the storage device.

        Args:
            images: (N, H, W, 3) uint8.
            labels: (N,) int64.
            mean: The mean per channel, of pixels scaled to 0..1.
            std: The standard deviation per channel, of pixels scaled to 0..1.
            device: The device of the batches.
            on_device: Keep the images on that device, too, and not in main memory.
            dtype: The dtype of the batches.
            pad: The border in pixels that crops may reach into; 0 for a set that is not augmented.
            pad_mode: "zero" (black, as torchvision pads) or "reflect".
        """
        self.device = device
        self.storage_device = device if on_device else torch.device("cpu")
        planes = np.moveaxis(images, 3, 1)  # (N, 3, H, W)
        if pad:
            border = [(0, 0), (0, 0), (pad, pad), (pad, pad)]
            planes = np.pad(planes, border, mode="constant" if pad_mode == "zero" else "reflect")
        padded = torch.from_numpy(np.ascontiguousarray(planes)).to(self.storage_device)
        count, height, width = images.shape[:3]
        per_image, per_plane, per_row, per_pixel = padded.stride()
        # The view has every crop of every image and no memory of its own, so that one index into
        # the first three dimensions (image, top, left) gathers a batch of crops.
        self.windows = padded.as_strided(
            (count, 2 * pad + 1, 2 * pad + 1, 3, height, width),
            (per_image, per_row, per_pixel, per_plane, per_row, per_pixel),
        )
        self.memory_format = torch.contiguous_format
        self.labels = torch.from_numpy(labels).to(self.storage_device)
        # One multiplication and one addition make (pixel / 255 - mean) / std.
        mean64, std64 = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std64)).to(device, dtype)
        self.shift = (-mean64 / std64).to(device, dtype)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def batch(self, index: Tensor, augmentation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the images and labels at the given positions.

        Args:
            index: (B,) int64 on the storage device.
            augmentation: (N, 3) int64 on the storage device, ``sampling.crops_and_flips`` of the
                whole set; None takes every image as it is (only for a set without padding).

        Returns:
            (B, 3, H, W) normalised images and (B,) labels, both on the set's device.
        """
        if augmentation is None:
            crops = self._to_device(self.windows[index, 0, 0])
        else:
            top, left, flip = augmentation[index].unbind(1)
            crops = self._to_device(self.windows[index, top, left])
            mirrored = self._to_device(flip).view(-1, 1, 1, 1) > 0
            crops = torch.where(mirrored, crops.flip(3), crops)
        images = crops.to(self.scale.dtype, memory_format=self.memory_format)
        images.mul_(self.scale).add_(self.shift)
        return images, self._to_device(self.labels[index])

    def _to_device(self, part: Tensor) -> Tensor:
        """Copy a part of a batch from the storage device to the device of the batches.

        Out of page-locked memory the copy waits for its turn on the device and the host does not;
        PyTorch gives that memory to nobody else before the copy is done.
        """
        if self.storage_device == self.device:
            return part
        return part.pin_memory().to(self.device, non_blocking=True)


class Splits(NamedTuple):
    """The sets of a run; without --val-split the test set is the validation set, too."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def fits_on_device(choice: str, bytes_: int, comm: Comm) -> bool:
    """Return whether images live where the batches are made; the same on every rank.

    Args:
        choice: The value of --resident: "auto" keeps images on a GPU where they take a quarter of
            its free memory at most. The CPU always keeps them.
        bytes_: The size of all sets, padded.
        comm: The engine.
    """
    if comm.device.type == "cpu":
        return True
    if choice != "auto":
        return choice == "on"
    free, _ = torch.cuda.mem_get_info(comm.device)
    # Where one GPU has no room, none keeps the images.
    return not comm.all_reduce_max(int(4 * bytes_ > free))
