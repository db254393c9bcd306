"""Images in memory as uint8, and batches of them: crop, flip, normalise.

One gather takes a whole batch of random crops out of the padded images; nothing is done image by
image, and on a GPU nothing leaves the device. The distribution is that of torchvision's
RandomCrop(32, padding=4), RandomHorizontalFlip, ToTensor, Normalize.

Images that a GPU has no room for stay in main memory: the gather is then done there, one copy a
batch takes its bytes to the GPU, and the rest is done on it, with the same bits as a result. The
host gathers the next batch while the GPU is still busy with this one, since it waits for nothing.
Data larger than main memory is out of scope.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.distributed.comm import Comm


class ImageSet:
    """A labelled set of images, and batches of them on one device.

    Attributes:
        device: of the batches.
        home: where the images live, and indices into them.
        memory_format: of the batches; set it to change it.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        mean, std: per channel, of pixels scaled to 0..1.
        device: of the batches.
        resident: keep the images on that device, too; else in main memory.
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
        resident: bool = True,
        dtype: torch.dtype = torch.float32,
        pad: int = 0,
        pad_mode: str = "zero",
    ) -> None:
        self.device = device
        self.home = device if resident else torch.device("cpu")
        planes = np.moveaxis(images, 3, 1)  # (N, 3, H, W)
        if pad:
            border = [(0, 0), (0, 0), (pad, pad), (pad, pad)]
            planes = np.pad(planes, border, mode="constant" if pad_mode == "zero" else "reflect")
        padded = torch.from_numpy(np.ascontiguousarray(planes)).to(self.home)
        count, height, width = images.shape[:3]
        per_image, per_plane, per_row, per_pixel = padded.stride()
        # Every crop of every image as a view: no memory of its own, so that one index into the
        # first three dimensions (image, top, left) gathers a batch of crops.
        self.windows = padded.as_strided(
            (count, 2 * pad + 1, 2 * pad + 1, 3, height, width),
            (per_image, per_row, per_pixel, per_plane, per_row, per_pixel),
        )
        self.memory_format = torch.contiguous_format
        self.labels = torch.from_numpy(labels).to(self.home)
        # (pixel / 255 - mean) / std as one multiplication and one addition
        mean64, std64 = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * std64)).to(device, dtype)
        self.shift = (-mean64 / std64).to(device, dtype)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, augmentation: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at the given positions.

        Args:
            index: (B,) int64 on the set's home.
            augmentation: (N, 3) int64 on the set's home, the rows of ``order.crops_and_flips`` for
                the whole set; None takes every image as it is (only for a set without padding).

        Returns:
            (B, 3, H, W) normalised images and (B,) labels, both on the set's device.
        """
        if augmentation is None:
            crops = self._sent(self.windows[index, 0, 0])
        else:
            top, left, flip = augmentation[index].unbind(1)
            crops = self._sent(self.windows[index, top, left])
            mirrored = self._sent(flip).view(-1, 1, 1, 1) > 0
            crops = torch.where(mirrored, crops.flip(3), crops)
        images = crops.to(self.scale.dtype, memory_format=self.memory_format)
        images.mul_(self.scale).add_(self.shift)
        return images, self._sent(self.labels[index])

    def _sent(self, part: Tensor) -> Tensor:
        """A part of a batch, from the set's home to its device.

        Out of page-locked memory the copy waits for its turn on the device and the host does not;
        PyTorch gives that memory to nobody else before the copy is done.
        """
        if self.home == self.device:
            return part
        return part.pin_memory().to(self.device, non_blocking=True)


def keep_on_device(choice: str, bytes_: int, comm: Comm) -> bool:
    """Whether images live where the batches are made; the same on every rank.

    Args:
        choice: --resident: "auto" keeps them on a GPU where they take a quarter of its free memory
            at most; the CPU always does.
        bytes_: of all sets, padded.
        comm: the engine.
    """
    if comm.device.type == "cpu":
        return True
    if choice != "auto":
        return choice == "on"
    free, _ = torch.cuda.mem_get_info(comm.device)
    return not comm.max_(int(4 * bytes_ > free))  # where one GPU has no room, none keeps them
