"""The baseline: a plain training script, as people write it.

    python -m bench.plain -a alexnet -d synthetic10 --epochs 2
    python -m torch.distributed.launch --nproc_per_node=2 -m bench.plain -a alexnet

Images pass through torchvision's transforms one by one in the worker processes of a DataLoader,
the loss is read after each step, DistributedDataParallel has its defaults and every rank
evaluates the whole test set. Flags, data and network are those of cifar.py. The last line is
JSON: the seconds of each epoch (training and evaluation), the parameters and the accuracy.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

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

from utils.config.args import MODEL_FLAGS, build_parser
from utils.data.datasets import Dataset, load_dataset
from utils.engine import leave
from utils.errors import UserError, command
from utils.startup import build_model

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
        transform: from a PIL image to a tensor.
    """

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, transform: transforms.Compose
    ) -> None:
        self.images = images
        self.labels = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def train_transform(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Random crop, mirror image, tensor, normalised."""
    return transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            *test_transform(mean, std).transforms,
        ]
    )


def test_transform(mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    """Tensor, normalised."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])


class AverageMeter:
    """The mean of what it is given."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, value: float, count: int = 1) -> None:
        """Add the mean of count values."""
        self.total += value * count
        self.count += count

    @property
    def average(self) -> float:
        """Of all values so far."""
        return self.total / max(self.count, 1)


def accuracy(output: Tensor, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5 accuracy in per cent, from (B, classes) logits and (B,) labels."""
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: a flag that cifar.py does not have, or this script does not.
    """
    parser = build_parser()
    parser.set_defaults(workers=2)
    options = parser.parse_args(argv)
    for name, value in vars(options).items():
        if name not in KNOWN and value != parser.get_default(name):
            raise UserError(
                f"--{name.replace('_', '-')} {value}: the plain script has no such flag"
            )
    return options


def loaders(
    data: Dataset, options: argparse.Namespace, workers: int | None
) -> tuple[DataLoader, DataLoader]:
    """Training and test images in batches; a number of workers shares the former out."""
    train_set = Images(data.train_images, data.train_labels, train_transform(data.mean, data.std))
    test_set = Images(data.test_images, data.test_labels, test_transform(data.mean, data.std))
    sampler: DistributedSampler | None = DistributedSampler(train_set) if workers else None
    gpu = torch.cuda.is_available()
    train_loader = DataLoader(
        train_set, batch_size=options.train_batch // (workers or 1), shuffle=sampler is None,
        sampler=sampler, num_workers=options.workers, pin_memory=gpu,
    )  # fmt: skip
    test_loader = DataLoader(
        test_set, batch_size=options.test_batch, shuffle=False, num_workers=options.workers,
        pin_memory=gpu,
    )  # fmt: skip
    return train_loader, test_loader


def run(options: argparse.Namespace) -> None:
    """Train as the options say."""
    distributed = "WORLD_SIZE" in os.environ
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    gpu = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpu else torch.device("cpu")
    )
    if gpu:
        torch.cuda.set_device(device)
    if distributed:
        dist.init_process_group("nccl" if gpu else "gloo")
    torch.manual_seed(options.seed)
    torch.backends.cudnn.benchmark = True

    data = load_dataset(
        options.dataset, options.data, train_size=options.train_size, test_size=options.test_size,
        workers=options.workers, notify=lambda _: None,
    )  # fmt: skip
    train_loader, test_loader = loaders(data, options, size if distributed else None)

    torch.manual_seed(options.seed)
    raw = build_model(options, len(data.classes)).to(device)
    model: nn.Module = raw
    if distributed:
        model = DistributedDataParallel(raw, device_ids=[device.index] if gpu else None)
    optimizer = SGD(
        model.parameters(), lr=options.lr, momentum=options.momentum,
        weight_decay=options.weight_decay,
    )  # fmt: skip
    folder = Path(options.checkpoint) if options.checkpoint and rank == 0 else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)

    seconds, best = [], 0.0
    top1 = 0.0
    for epoch in range(options.epochs):
        rate = options.lr * options.gamma ** sum(epoch >= m for m in options.schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        if rank == 0:
            print(f"\nEpoch: [{epoch + 1} | {options.epochs}] LR: {rate:f}")
        started = time.perf_counter()
        if isinstance(train_loader.sampler, DistributedSampler):
            train_loader.sampler.set_epoch(epoch)
        model.train()
        train_loss, train_top1, _ = one_pass(
            "train", train_loader, model, device, optimizer, rank == 0
        )
        model.eval()
        with torch.no_grad():
            loss, top1, top5 = one_pass("valid", test_loader, model, device, None, rank == 0)
        seconds.append(time.perf_counter() - started)
        if rank == 0:
            print(f"train loss {train_loss:.4f} top1 {train_top1:.2f} | "
                  f"valid loss {loss:.4f} top1 {top1:.2f} top5 {top5:.2f} | "
                  f"{seconds[-1]:.1f} s")  # fmt: skip
        if folder:
            with (folder / "log.txt").open("a") as log:
                log.write(
                    f"{rate:.6f}\t{train_loss:.6f}\t{loss:.6f}\t{train_top1:.6f}\t{top1:.6f}\n"
                )
            state = {
                "epoch": epoch + 1, "state_dict": raw.state_dict(), "acc": top1,
                "best_acc": max(best, top1), "optimizer": optimizer.state_dict(),
            }  # fmt: skip
            torch.save(state, folder / "checkpoint.pth.tar")
            if epoch == 0 or top1 > best:
                shutil.copyfile(folder / "checkpoint.pth.tar", folder / "model_best.pth.tar")
        best = max(best, top1)
    if rank == 0:
        parameters = sum(p.numel() for p in raw.parameters())
        print(json.dumps({"epoch_seconds": seconds, "parameters": parameters, "top1": top1}))
    if distributed:
        dist.destroy_process_group()


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    run(parse(argv))
    return 0


if __name__ == "__main__":
    leave(main())
