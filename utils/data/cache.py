"""The cache file of a data set that has been decoded: its arrays and their statistics.

It lies in ``.cache`` beside the data. One process builds it while others wait.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from utils import log
from utils.data.cifar_archive import Arrays
from utils.errors import one_line, reason_of
from utils.files import clear_leftovers, write_atomically

# The number is written into cache files; a file with another number is made again.
CACHE_VERSION = 2

# Mean and standard deviation per channel, of pixels scaled to 0..1.
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

_ARRAY_NAMES = Arrays._fields[:4]


def load_or_build(
    root: Path, name: str, fingerprint: str, build: Callable[[], Arrays]
) -> tuple[Arrays, Statistics]:
    """Return a data set and its statistics, from the cache file where there is a good one.

    One process builds while others wait for it. A folder that cannot be written to costs the
    cache, not the run.

    Args:
        root: The folder of the data.
        name: The stem of the cache file.
        fingerprint: What the arrays are made from; a file with another fingerprint is made again.
        build: Makes the arrays.
    """
    path = root / ".cache" / f"{name}.npz"
    cached = read_cache(path, fingerprint)
    if cached is not None:
        return cached
    with _locked(root / ".lock"):
        why = ""
        try:
            return _parse_cache(path, fingerprint)  # Another process may have built it.
        except (FileNotFoundError, NotADirectoryError):
            pass
        except Exception as error:  # A damaged file can bring about nearly anything.
            why = reason_of(error)
        data = build()
        cached = data, measure_statistics(data.train_images)
        if why:
            log.note(one_line(f"{path} is made again ({why})"))
        write_cache(path, fingerprint, *cached)
        return cached


def measure_statistics(images: np.ndarray) -> Statistics:
    """Return mean and standard deviation per channel, exact: from counts of the 256 values."""
    values = np.arange(256) / 255
    mean, std = [], []
    for channel in range(3):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        frequency = counts / counts.sum()
        center = float(frequency @ values)
        mean.append(center)
        # Images of one colour deviate by 0; they are not scaled.
        std.append(float(np.sqrt(frequency @ (values - center) ** 2)) or 1.0)
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def read_cache(path: Path, fingerprint: str) -> tuple[Arrays, Statistics] | None:
    """Read a cache file.

    Args:
        path: The cache file.
        fingerprint: What the arrays must have been made from.

    Returns:
        The arrays and their statistics, or None where the file is missing, damaged, or made from
        other data.
    """
    try:
        return _parse_cache(path, fingerprint)
    except Exception:  # A damaged file can bring about nearly anything.
        return None


def _parse_cache(path: Path, fingerprint: str) -> tuple[Arrays, Statistics]:
    """Read a cache file, or raise any exception that says why it is of no use."""
    with np.load(path, allow_pickle=False) as file:
        meta = json.loads(bytes(file["meta"]))
        if (meta["version"], meta["fingerprint"]) != (CACHE_VERSION, fingerprint):
            raise ValueError("made from other data or by another version")
        arrays = [file[name] for name in _ARRAY_NAMES]
        # Checksums are compared at a member's end, so each must have been read to its end.
        if [[a.dtype.str, list(a.shape)] for a in arrays] != meta["arrays"]:
            raise ValueError("damaged")
        mean, std = (tuple(values) for values in meta["statistics"])
        return Arrays._make([*arrays, tuple(meta["classes"])]), (mean, std)


def write_cache(path: Path, fingerprint: str, data: Arrays, statistics: Statistics) -> None:
    """Write a cache file, or print a line that says why it cannot be written.

    The caller holds the lock.
    """
    content = dict(zip(_ARRAY_NAMES, data[:4], strict=True))
    meta = {
        "version": CACHE_VERSION,
        "fingerprint": fingerprint,
        "classes": data.classes,
        "statistics": statistics,
        "arrays": [[array.dtype.str, array.shape] for array in content.values()],
    }
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    try:
        path.parent.mkdir(exist_ok=True)
        clear_leftovers(path.parent)  # A process that was killed has left them.
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **content))
    except OSError as error:
        why = reason_of(error)
        log.note(one_line(f"{path} cannot be written ({why}): going on without a cache"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
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
                log.info(one_line(f"waiting for another process that prepares the data ({path})"))
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
