"""The baseline: a plain training script, as people write it.

    python -m bench.plain -a alexnet -d synthetic10 --epochs 2
    python -m torch.distributed.launch --nproc_per_node=2 -m bench.plain -a alexnet

Images pass through torchvision's transforms one by one in the worker processes of a DataLoader,
the loss is read after each step, DistributedDataParallel has its defaults and every rank
evaluates the whole test set. Flags, data and network are those of cifar.py. The last line is
JSON: the seconds of each epoch (training and evaluation), the parameters and the accuracy.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from progress.bar import Bar
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from utils import log
from utils.config.args import build_parser
from utils.config.schema import MODEL_FLAGS, Config, TrainConfig
from utils.data.datasets import Dataset
from utils.errors import UserError, command
from utils.runtime.exit_codes import exit_process
from utils.training import build

# The flags of cifar.py that this script has too.
KNOWN = {
    *MODEL_FLAGS, "arch", "dataset", "data", "workers", "train_size", "test_size", "epochs",
    "train_batch", "test_batch", "lr", "schedule", "gamma", "momentum", "weight_decay", "seed",
    "checkpoint", "overwrite", "local_rank",
}  # fmt: skip


class Images(TorchDataset):
    """Images in memory, transformed one at a time.

    Args:
        images: (N, 32, 32, 3) uint8.
        labels: (N,) integers.
        transform: Makes a tensor of a PIL image.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: transforms.Compose
    ) -> None:
        """Keep the images; nothing is transformed yet."""
        self.images = images
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a transformed image and its label."""
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train_transform(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Return what crops and flips an image at random and makes a normalised tensor of it."""
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *test_transform(mean, std).transforms,
        ]
    )


def test_transform(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Return what makes a normalised tensor of an image."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


class AverageMeter:
    """The mean of what it is given."""

    def __init__(self) -> None:
        """Start from nothing."""
        self.total = 0.0
        self.count = 0

    def update(self, value: float, count: int = 1) -> None:
        """Add ``count`` values by their mean."""
        self.total += value * count
        self.count += count

    @property
    def average(self) -> float:
        """The mean of all values so far."""
        return self.total / max(self.count, 1)


def accuracy(output: Tensor, labels: Tensor) -> list[Tensor]:
    """Return top-1 and top-5 accuracy in per cent, of (B, classes) logits and (B,) labels."""
    best = output.topk(min(5, output.shape[1]), dim=1).indices
    hits = best.eq(labels.view(-1, 1))
    return [100.0 * hits[:, :k].any(dim=1).float().mean() for k in (1, 5)]


def one_pass(
    title: str,
    loader: DataLoader,
    model: nn.Module,
    device: torch.device,
    optimizer: Optimizer | None,
    show: bool,
) -> tuple[float, float, float]:
    """Train, or without an optimizer evaluate, on all of a loader's batches.

    Returns:
        Mean loss, top-1 and top-5 accuracy in per cent.
    """
    criterion = nn.CrossEntropyLoss()
    data_time, batch_time = AverageMeter(), AverageMeter()
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    bar = Bar(title, max=len(loader), file=sys.stdout) if show else None
    end = time.time()
    for images, labels in loader:
        data_time.update(time.time() - end)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        output = model(images)
        loss = criterion(output, labels)
        first, fifth = accuracy(output.detach(), labels)
        losses.update(loss.item(), len(images))
        top1.update(first.item(), len(images))
        top5.update(fifth.item(), len(images))
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        batch_time.update(time.time() - end)
        end = time.time()
        if bar:
            bar.suffix = (
                f"({bar.index + 1}/{len(loader)}) Data: {data_time.average:.3f}s | "
                f"Batch: {batch_time.average:.3f}s | Loss: {losses.average:.4f} | "
                f"top1: {top1.average:.4f} | top5: {top5.average:.4f}"
            )
            bar.next()
    if bar:
        bar.finish()
    return losses.average, top1.average, top5.average


def parse(argv: Sequence[str] | None) -> Config:
    """Return the configuration of a command line.

    Raises:
        UserError: cifar.py has no such flag or network, or this script has no such flag.
    """
    parser = build_parser()
    parser.set_defaults(workers=2)
    options = vars(parser.parse_args(argv))
    for name, value in options.items():
        if name not in KNOWN and value != parser.get_default(name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the plain script has no such flag"
            )
    config = Config.from_options(options)
    with torch.device("meta"):  # A wrong network is found before anything else.
        build.network(config.model, classes=10)
    return config


def loaders(
    data: Dataset, train: TrainConfig, processes: int, world_size: int | None
) -> tuple[DataLoader, DataLoader]:
    """Return training and test images in batches.

    Args:
        data: The images.
        train: Says how large the batches are.
        processes: The worker processes of each loader.
        world_size: The ranks that the training images are shared out to; None for all to one.
    """
    train_set = Images(data.train_images, data.train_labels, train_transform(data.mean, data.std))
    test_set = Images(data.test_images, data.test_labels, test_transform(data.mean, data.std))
    sampler: DistributedSampler | None = DistributedSampler(train_set) if world_size else None
    gpu = torch.cuda.is_available()
    train_loader = DataLoader(
        train_set, batch_size=train.train_batch // (world_size or 1), shuffle=sampler is None,
        sampler=sampler, num_workers=processes, pin_memory=gpu,
    )  # fmt: skip
    test_loader = DataLoader(
        test_set, batch_size=train.test_batch, shuffle=False, num_workers=processes,
        pin_memory=gpu,
    )  # fmt: skip
    return train_loader, test_loader


def sgd(model: nn.Module, train: TrainConfig) -> Optimizer:
    """Return the optimizer with PyTorch's own choice of kernels."""
    return SGD(
        model.parameters(), lr=train.lr, momentum=train.momentum, weight_decay=train.weight_decay
    )


class Epoch(NamedTuple):
    """What an epoch has brought; accuracies in per cent."""

    rate: float
    train_loss: float
    train_top1: float
    loss: float
    top1: float
    top5: float
    seconds: float

    def line(self) -> str:
        """Return the epoch as the script prints it."""
        return (
            f"train loss {self.train_loss:.4f} top1 {self.train_top1:.2f} | "
            f"valid loss {self.loss:.4f} top1 {self.top1:.2f} top5 {self.top5:.2f} | "
            f"{self.seconds:.1f} s"
        )

    def row(self) -> str:
        """Return the epoch as a row of log.txt."""
        values = (self.rate, self.train_loss, self.loss, self.train_top1, self.top1)
        return "\t".join(f"{value:.6f}" for value in values) + "\n"


def connect() -> tuple[int, int | None, torch.device]:
    """Return the rank, the number of ranks, None without a launcher, and the device."""
    distributed = "WORLD_SIZE" in os.environ
    rank = int(os.environ.get("RANK", 0))
    log.set_rank(rank)
    gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl" if gpu else "gloo")
    return rank, int(os.environ["WORLD_SIZE"]) if distributed else None, device


def run(config: Config) -> None:
    """Train as the configuration says."""
    rank, world_size, device = connect()
    train = config.train
    torch.manual_seed(train.seed)
    torch.backends.cudnn.benchmark = True
    data = build.dataset(config.data)
    train_loader, test_loader = loaders(data, train, config.data.workers, world_size)

    torch.manual_seed(train.seed)
    raw = build.network(config.model, len(data.classes)).to(device)
    model: nn.Module = raw
    if world_size:
        model = DistributedDataParallel(
            raw, device_ids=[device.index] if device.type == "cuda" else None
        )
    optimizer = sgd(model, train)
    epochs: list[Epoch] = []
    for number in range(train.epochs):
        rate = train.lr * train.gamma ** sum(number >= m for m in train.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if rank == 0:
            print(f"\nEpoch: [{number + 1} | {train.epochs}] LR: {rate:f}")
        started = time.perf_counter()
        if isinstance(train_loader.sampler, DistributedSampler):
            train_loader.sampler.set_epoch(number)
        model.train()
        train_loss, train_top1, _ = one_pass(
            "train", train_loader, model, device, optimizer, rank == 0
        )
        model.eval()
        with torch.no_grad():
            valid = one_pass("valid", test_loader, model, device, None, rank == 0)
        seconds = time.perf_counter() - started
        epochs.append(Epoch(rate, train_loss, train_top1, *valid, seconds))
        if rank == 0:
            print(epochs[-1].line())
        if rank == 0 and config.run.checkpoint:
            save(Path(config.run.checkpoint), epochs, raw, optimizer)
    if rank == 0:
        record = {
            "epoch_seconds": [epoch.seconds for epoch in epochs],
            "parameters": sum(p.numel() for p in raw.parameters()),
            "top1": epochs[-1].top1,
        }
        print(json.dumps(record))
    if world_size:
        dist.destroy_process_group()


def save(folder: Path, epochs: Sequence[Epoch], model: nn.Module, optimizer: Optimizer) -> None:
    """Write the checkpoint, the best one too if this is it, and a row of log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as file:
        file.write(epochs[-1].row())
    top1 = epochs[-1].top1
    state = {
        "epoch": len(epochs), "state_dict": model.state_dict(), "acc": top1,
        "best_acc": max(epoch.top1 for epoch in epochs), "optimizer": optimizer.state_dict(),
    }  # fmt: skip
    torch.save(state, folder / "checkpoint.pth.tar")
    if all(top1 > before.top1 for before in epochs[:-1]):
        shutil.copyfile(folder / "checkpoint.pth.tar", folder / "model_best.pth.tar")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; return the exit code."""
    run(parse(argv))
    return 0


if __name__ == "__main__":
    exit_process(main())
