"""Images on the device as uint8, and batches of them: crop, flip, normalise.

One gather takes a whole batch of random crops out of the padded images; nothing is done image by
image, and on a GPU nothing leaves the device. The distribution is that of torchvision's
RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageSet:
    """A labelled set of images in the memory of one device.

    Attributes:
        memory_format: of the batches; set it to change it.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        mean, std: per channel, of pixels scaled to 0..1.
        device: where the images live and the batches are made.
        dtype: of the batches.
        pad: border in pixels that crops may reach into; 0 for a set that is not augmented.
        pad_mode: "zero" (black, as torchvision pads) or "reflect".
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        pad: int = 0,
        pad_mode: str = "zero",
    ) -> None:
        planes = np.moveaxis(images, 3, 1)  # (N, 3, H, W)
        if pad:
            border = [(0, 0), (0, 0), (pad, pad), (pad, pad)]
            planes = np.pad(planes, border, mode="constant" if pad_mode == "zero" else "reflect")
        padded = torch.from_numpy(np.ascontiguousarray(planes)).to(device)
        count, height, width = images.shape[:3]
        per_image, per_plane, per_row, per_pixel = padded.stride()
        # Every crop of every image as a view: no memory of its own, so that one index into the
        # first three dimensions (image, top, left) gathers a batch of crops.
        self.windows = padded.as_strided(
            (count, 2 * pad + 1, 2 * pad + 1, 3, height, width),
            (per_image, per_row, per_pixel, per_plane, per_row, per_pixel),
        )
        self.memory_format = torch.contiguous_format
        self.labels = torch.from_numpy(labels).to(device)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        mean64, std64 = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std64)).to(device, dtype)
        self.shift = (-mean64 / std64).to(device, dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, augmentation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at the given positions.

        Args:
            index: (B,) int64 on the set's device.
            augmentation: (N, 3) int64, the rows of ``order.crops_and_flips`` for the whole set;
                None takes every image as it is (only for a set without padding).

        Returns:
            (B, 3, H, W) normalised images and (B,) labels.
        """
        if augmentation is None:
            crops = self.windows[index, 0, 0]
        else:
            top, left, flip = augmentation[index].unbind(1)
            crops = self.windows[index, top, left]
            crops = torch.where(flip.view(-1, 1, 1, 1) > 0, crops.flip(3), crops)
        images = crops.to(self.scale.dtype, memory_format=self.memory_format)
        images.mul_(self.scale).add_(self.shift)
        return images, self.labels[index]
