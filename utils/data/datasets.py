"""The data sets, as uint8 arrays in memory."""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from utils.data import synthetic
from utils.data.cache import Statistics, load_or_build
from utils.data.cifar_archive import ARCHIVES, Archive, Arrays, read_archive, read_folder
from utils.data.download import download, md5_of
from utils.data.image_folder import list_images, read_images
from utils.errors import UserError

SERVER = "https://www.cs.toronto.edu/~kriz/"

# The statistics of the training images. The deviations 0.2023 0.1994 0.2010 that many projects use
# are means of deviations within single images: --stats legacy.
TRUE_STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "synthetic10": synthetic.STATISTICS,
    "synthetic100": synthetic.STATISTICS,
}
LEGACY_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: The name as given to ``-d``.
        classes: The names in the order of the labels.
        train_images: (N, 32, 32, 3) uint8.
        train_labels: (N,) int64.
        test_images: (M, 32, 32, 3) uint8.
        test_labels: (M,) int64.
        mean: The mean per channel to normalise with, of pixels scaled to 0..1.
        std: The standard deviation per channel to normalise with, of pixels scaled to 0..1.
        statistics_from: Whose mean and std these are, in words.
        classes_from: Whose names and numbers of classes these are, in words.
        folder: Where the images of a folder data set are; "" for others.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    statistics_from: str = "of the data set"
    classes_from: str = "of the data set"
    folder: str = ""

    @cached_property
    def checksums(self) -> list[int]:
        """CRC-32 of the training images and labels and of the test images and labels, as ordered.

        Two trainings that have the same ones, and the same seed, draw the same batches.
        """
        arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
        return [zlib.crc32(np.ascontiguousarray(array).data) for array in arrays]

    def fingerprint(self) -> dict[str, object]:
        """Return a named digest of the contents, which all ranks must have in common."""
        shapes = self.train_images.shape, self.test_images.shape
        return {"set of images": (self.checksums, shapes, self.classes, self.mean, self.std)}

    def content_digests(self) -> dict[str, str]:
        """Return a SHA-256 each of the training and of the test images with their labels.

        The order of the images plays no part: an archive that has the official images in another
        order has the same digests. Each image is hashed with its label, and the sorted hashes are
        hashed together.
        """

        def digest(images: np.ndarray, labels: np.ndarray) -> str:
            hashes = sorted(
                hashlib.sha256(int(label).to_bytes(8, "little") + image.tobytes()).digest()
                for image, label in zip(images, labels, strict=True)
            )
            return hashlib.sha256(b"".join(hashes)).hexdigest()

        return {
            "train": digest(self.train_images, self.train_labels),
            "test": digest(self.test_images, self.test_labels),
        }


def load_dataset(
    name: str,
    root: str | Path,
    *,
    urls: Sequence[str] = (),
    archive: str | Path | None = None,
    md5: str | None = None,
    stats: str = "true",
    train_size: int | None = None,
    test_size: int | None = None,
    threads: int = 4,
) -> Dataset:
    """Load a data set, downloading or decoding it once.

    Args:
        name: One of DATASETS in utils/config/args.py.
        root: The folder of archives and caches; for "folder" that of the images.
        urls: Mirrors of the archive, tried before the official server.
        archive: An archive on disk; nothing is downloaded then.
        md5: The digest of the archive, where it is not the official one.
        stats: "true" or "legacy".
        train_size: How many training images to take, the same ones in every run; None for all.
        test_size: How many test images to take, the same ones in every run; None for all.
        threads: How many threads decode images.

    Raises:
        UserError: The data cannot be had, or is not what it should be.
    """
    root = Path(root)
    if name.startswith("synthetic"):
        data = _generate_synthetic(int(name.removeprefix("synthetic")), train_size, test_size)
        statistics = TRUE_STATISTICS[name]
    else:
        if name == "folder":
            data, statistics = _load_folder(root, threads)
        else:
            data = _load_cifar(ARCHIVES[name], root, urls, archive, md5)
            statistics = TRUE_STATISTICS[name]
        data = _take_subset(data, train_size, test_size)
    source = "of the data set"
    if stats == "legacy":
        statistics, source = LEGACY_STATISTICS, "by --stats legacy"
    mean, std = statistics
    folder = str(root) if name == "folder" else ""
    return Dataset(
        name, mean=mean, std=std, statistics_from=source, folder=folder, **data._asdict()
    )


def _generate_synthetic(classes: int, train_size: int | None, test_size: int | None) -> Arrays:
    train_size = _check_size("--train-size", train_size, 50_000)
    test_size = _check_size("--test-size", test_size, 10_000)
    return Arrays(
        *synthetic.generate(classes, train=True, count=train_size),
        *synthetic.generate(classes, train=False, count=test_size),
        synthetic.class_names(classes),
    )


def _take_subset(data: Arrays, train_size: int | None, test_size: int | None) -> Arrays:
    """Return the first images after a fixed shuffle, so that a subset has all classes."""
    train, test = (
        np.random.RandomState(0).permutation(len(labels))[: _check_size(flag, size, len(labels))]
        if size
        else slice(None)
        for flag, size, labels in (
            ("--train-size", train_size, data.train_labels),
            ("--test-size", test_size, data.test_labels),
        )
    )
    return Arrays(
        data.train_images[train],
        data.train_labels[train],
        data.test_images[test],
        data.test_labels[test],
        data.classes,
    )


def _check_size(flag: str, size: int | None, available: int) -> int:
    if size is not None and size > available:
        raise UserError(f"{flag} {size}: the set has {available} images; give a smaller number")
    return available if size is None else size


def _load_folder(root: Path, threads: int) -> tuple[Arrays, Statistics]:
    listing = list_images(root)
    return load_or_build(root, "folder", listing.fingerprint, lambda: read_images(listing, threads))


def _load_cifar(
    known: Archive,
    root: Path,
    urls: Sequence[str],
    archive: str | Path | None,
    md5: str | None,
) -> Arrays:
    md5 = (md5 or known.md5).lower()
    given = Path(archive) if archive else None
    if given:
        if not given.is_file():
            why = "is a folder; --data names the one above it" if given.is_dir() else "no such file"
            raise UserError(f"--data-archive {given}: {why}")
        _check_md5(f"--data-archive {given}", given, md5, "name another file")

    def build() -> Arrays:
        if given:
            return read_archive(given, known)
        path = root / known.file
        if path.exists():
            _check_md5(str(path), path, md5, "remove it to download it again")
        elif (extracted := read_folder(root / known.folder, known)) is not None:
            return extracted
        else:
            _check_not_extracted(root, known)
            addresses = [u + known.file if u.endswith("/") else u for u in urls]
            download([*addresses, SERVER + known.file], path, md5)
        return read_archive(path, known)

    data, _ = load_or_build(root, known.file.split(".")[0], md5, build)
    return data


def _check_not_extracted(root: Path, known: Archive) -> None:
    """Raise a UserError where the folder of the data is the one that torchvision extracts."""
    names = (*known.train, *known.test, known.meta[0])
    if sum((root / name).is_file() for name in names) > 1:
        path = Path(os.path.abspath(root))
        rename = "" if path.name == known.folder else f", and let this one be named {known.folder}"
        raise UserError(
            f"--data {root}: is the extracted folder {known.folder} itself; name the folder above "
            f"it, --data {path.parent}{rename}"
        )


def _check_md5(what: str, path: Path, md5: str, remedy: str) -> None:
    try:
        found = md5_of(path)
    except OSError as error:
        raise UserError(
            f"{what}: cannot be read ({error.strerror}); name another file with --data-archive, "
            "or another folder with --data"
        ) from error
    if found != md5:
        raise UserError(
            f"{what}: its md5 is {found}, not {md5}; {remedy}, or accept it with --data-md5 {found}"
        )
