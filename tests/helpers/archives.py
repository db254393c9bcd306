"""Small archives in CIFAR's layout, for the tests of data."""

import hashlib
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

FOLDER = "cifar-10-batches-py"


def batch(count: int, seed: int, key: str = "labels", classes: int = 10) -> bytes:
    """Return a batch file."""
    random = np.random.RandomState(seed)
    content = {
        b"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
        key.encode(): random.randint(0, classes, count).tolist(),
    }
    return pickle.dumps(content, protocol=2)


def members_of_cifar10(count: int = 20, **changes: bytes) -> dict[str, bytes]:
    """Return the files of an archive with ``count`` images in each batch; changes by name."""
    members = {f"data_batch_{i}": batch(count, i) for i in range(1, 6)}
    members["test_batch"] = batch(count + 10, 9)
    members["batches.meta"] = pickle.dumps({b"label_names": [b"a"] * 10}, protocol=2)
    return {**members, **changes}


def write_archive(
    path: Path, members: dict[str, bytes], folder: str = FOLDER, mode: str = "w:gz"
) -> str:
    """Write an archive; return its md5."""
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return md5_of(path)


def md5_of(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def small_cifar10(path: Path, **changes: bytes) -> str:
    """Write an archive with 100 images to train and 30 to test; return its md5."""
    return write_archive(path, members_of_cifar10(**changes))
