"""The data sets, as uint8 arrays in memory."""

import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.data import synthetic
from utils.data.cifar_archive import ARCHIVES, Archive, Arrays, read_archive, read_folder
from utils.log import say
from utils.data.download import download, md5_of
from utils.errors import UserError, one_line
from utils.files import clear_leftovers, write_atomically
from utils.data.image_folder import list_images, read_images

DATASETS = ("cifar10", "cifar100", "folder", "synthetic10", "synthetic100")

# Written into cache files; a file with another number is made again.
CACHE_VERSION = 2
SERVER = "https://www.cs.toronto.edu/~kriz/"

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
# Per channel, of the training images' pixels scaled to 0..1. The deviations 0.2023 0.1994 0.2010
# that many projects use are means of deviations within single images: --stats legacy.
TRUE_STATISTICS: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "synthetic10": synthetic.STATISTICS,
    "synthetic100": synthetic.STATISTICS,
}
LEGACY_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))

Notify = Callable[[str], Any]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: as given to ``-d``.
        classes: names in the order of the labels.
        train_images, test_images: (N, 32, 32, 3) uint8.
        train_labels, test_labels: (N,) int64.
        mean, std: per channel, of pixels scaled to 0..1, to normalise with.
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


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
    workers: int = 4,
    notify: Notify = say,
) -> Dataset:
    """Load a data set, downloading or decoding it once.

    Args:
        name: one of DATASETS.
        root: folder of archives and caches; for "folder" that of the images.
        urls: mirrors of the archive, tried before the official server.
        archive: an archive on disk; nothing is downloaded then.
        md5: of the archive, where it is not the official one.
        stats: "true" or "legacy".
        train_size, test_size: a part of the data, the same N images in every run.
        workers: threads that decode images.
        notify: gets lines for the user.

    Raises:
        UserError: the data cannot be had, or is not what it should be.
    """
    root = Path(root)
    if name.startswith("synthetic"):
        data = _synthetic(int(name.removeprefix("synthetic")), train_size, test_size)
        statistics = TRUE_STATISTICS[name]
    else:
        if name == "folder":
            data, statistics = _folder(root, workers, notify)
        else:
            data, _ = _cifar(ARCHIVES[name], root, urls, archive, md5, notify)
            statistics = TRUE_STATISTICS[name]
        data = _part(data, train_size, test_size)
    mean, std = LEGACY_STATISTICS if stats == "legacy" else statistics
    train_images, train_labels, test_images, test_labels, classes = data
    return Dataset(name, classes, train_images, train_labels, test_images, test_labels, mean, std)


def _synthetic(classes: int, train_size: int | None, test_size: int | None) -> Arrays:
    train_size = _checked("--train-size", train_size, 50_000)
    test_size = _checked("--test-size", test_size, 10_000)
    return (
        *synthetic.generate(classes, train=True, count=train_size),
        *synthetic.generate(classes, train=False, count=test_size),
        synthetic.class_names(classes),
    )


def _part(data: Arrays, train_size: int | None, test_size: int | None) -> Arrays:
    """The first images after a fixed shuffle, so that a part has all classes."""
    train_images, train_labels, test_images, test_labels, classes = data
    keep = [
        np.random.RandomState(0).permutation(len(labels))[: _checked(flag, size, len(labels))]
        if size
        else slice(None)
        for flag, size, labels in (
            ("--train-size", train_size, train_labels),
            ("--test-size", test_size, test_labels),
        )
    ]
    return (
        train_images[keep[0]],
        train_labels[keep[0]],
        test_images[keep[1]],
        test_labels[keep[1]],
        classes,
    )


def _checked(flag: str, size: int | None, available: int) -> int:
    if size is not None and size > available:
        raise UserError(f"{flag} {size}: the set has {available} images; give a smaller number")
    return available if size is None else size


def _measured(images: np.ndarray) -> Statistics:
    """Mean and standard deviation per channel, exact: from counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        share = counts / counts.sum()
        middle = float(share @ values)
        mean.append(middle)
        std.append(float(np.sqrt(share @ (values - middle) ** 2)) or 1.0)  # one colour: no scaling
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def _folder(root: Path, workers: int, notify: Notify) -> tuple[Arrays, Statistics]:
    listing = list_images(root)
    return _cached(
        root, "folder", listing.fingerprint, lambda: read_images(listing, workers, notify), notify
    )


def _cifar(
    known: Archive,
    root: Path,
    urls: Sequence[str],
    archive: str | Path | None,
    md5: str | None,
    notify: Notify,
) -> tuple[Arrays, Statistics]:
    md5 = (md5 or known.md5).lower()
    own = Path(archive) if archive else None
    if own and not own.is_file():
        raise UserError(f"--data-archive {own}: no such file")
    if own:
        _check_md5(own, md5)

    def build() -> Arrays:
        path = own or root / known.file
        if own is None and path.exists():
            _check_md5(path, md5)
        elif own is None:
            extracted = read_folder(root / known.folder, known)
            if extracted is not None:
                return extracted
            addresses = [u + known.file if u.endswith("/") else u for u in urls]
            download([*addresses, SERVER + known.file], path, md5, notify)
        return read_archive(path, known)

    return _cached(root, known.file.split(".")[0], md5, build, notify)


def _check_md5(path: Path, md5: str) -> None:
    try:
        found = md5_of(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); name another file with --data-archive, "
            "or another folder with --data"
        ) from error
    if found != md5:
        raise UserError(
            f"{path}: its md5 is {found}, not {md5}; remove it to download it again, "
            f"or accept it with --data-md5 {found}"
        )


def _cached(
    root: Path, name: str, fingerprint: str, build: Callable[[], Arrays], notify: Notify
) -> tuple[Arrays, Statistics]:
    """What build returns and its statistics, from the cache file where there is a good one.

    One process builds while others wait for it. A folder that cannot be written to costs the
    cache, not the run.
    """
    path = root / ".cache" / f"{name}.npz"
    cached = _read_cache(path, fingerprint)
    if cached is not None:
        return cached
    with _locked(root / ".lock", notify):
        cached = _read_cache(path, fingerprint, notify)  # another process may have built it
        if cached is None:
            data = build()
            cached = data, _measured(data[0])
            _write_cache(path, fingerprint, *cached, notify)
    return cached


@contextmanager
def _locked(path: Path, notify: Notify) -> Iterator[None]:
    """Hold a lock that the kernel releases even when this process is killed.

    Where a file cannot be made nothing can be downloaded either, and on a file system without
    locks the md5 still tells what two processes may have done to each other: no lock, then.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                notify(one_line(f"waiting for another process that prepares the data ({path})"))
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def _read_cache(
    path: Path, fingerprint: str, notify: Notify | None = None
) -> tuple[Arrays, Statistics] | None:
    """The arrays, or None where the file is missing, damaged, or made from other data.

    ``notify`` gets a line that says why a file that is there is of no use.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(bytes(file["meta"]))
            if (meta["version"], meta["fingerprint"]) != (CACHE_VERSION, fingerprint):
                raise ValueError("made from other data or by another version")
            arrays = [file[key] for key in _ARRAYS]
            # Checksums are compared at a member's end, so each must have been read to its end.
            if [[a.dtype.str, list(a.shape)] for a in arrays] != meta["arrays"]:
                raise ValueError("damaged")
            mean, std = (tuple(values) for values in meta["statistics"])
            return (*arrays, tuple(meta["classes"])), (mean, std)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever a damaged file can bring about
        if notify:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            notify(one_line(f"note: {path} is made again ({why})"))
        return None


_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


def _write_cache(
    path: Path, fingerprint: str, data: Arrays, statistics: Statistics, notify: Notify
) -> None:
    content = dict(zip(_ARRAYS, data[:4], strict=True))
    meta = {
        "version": CACHE_VERSION,
        "fingerprint": fingerprint,
        "classes": data[4],
        "statistics": statistics,
        "arrays": [[array.dtype.str, array.shape] for array in content.values()],
    }
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    try:
        path.parent.mkdir(exist_ok=True)
        clear_leftovers(path.parent)  # of a process that was killed; this one holds the lock
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **content))
    except OSError as error:
        why = error.strerror or error
        notify(one_line(f"note: {path} cannot be written ({why}): going on without a cache"))
