"""The official CIFAR-10 and CIFAR-100 archives (Krizhevsky 2009, "Learning Multiple Layers of
Features from Tiny Images"), read in memory: nothing is extracted, and no code in them is run."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.errors import UserError

_MOST_BYTES = 200 << 20  # the largest member has 155 MB


@dataclass(frozen=True)
class Archive:
    """What is known about an official archive.

    Attributes:
        file, md5: the file's name and digest.
        folder: the folder inside it, and the one that torchvision leaves beside it.
        train, test: the batch files of the two sets, by name, with their md5.
        meta: the file with the names of the classes, and its md5.
        labels, names: the keys of labels and class names.
    """

    file: str
    md5: str
    folder: str
    train: Mapping[str, str]
    test: Mapping[str, str]
    meta: tuple[str, str]
    labels: bytes
    names: bytes


ARCHIVES = {
    "cifar10": Archive(
        file="cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        test={"test_batch": "40351d587109b95175f43aff81a1287e"},
        meta=("batches.meta", "5ff9c542aee3614f3951f8cda6e48888"),
        labels=b"labels",
        names=b"label_names",
    ),
    "cifar100": Archive(
        file="cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train={"train": "16019d7e3df5f24257cddd939b257f8d"},
        test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        meta=("meta", "7973b15100ade9c7d40fb424638fde48"),
        labels=b"fine_labels",
        names=b"fine_label_names",
    ),
}

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


def read_archive(path: Path, archive: Archive) -> Arrays:
    """Images and labels for training and test, and the names of the classes.

    Returns:
        (N, 32, 32, 3) uint8 and (N,) int64, twice, and the names.

    Raises:
        UserError: not such an archive.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            members: dict[str, bytes] = {}
            for member in tar:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == archive.folder and name in _wanted(archive):
                    members[name] = _content(tar, member, path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"--data-archive {path}: not a readable archive ({error}); download it again"
        ) from error
    return _arrays(lambda name: members[name], archive, path)


def read_folder(folder: Path, archive: Archive) -> Arrays | None:
    """The same from the folder that torchvision extracts; None where a file is not the original."""
    expected = {**archive.train, **archive.test, archive.meta[0]: archive.meta[1]}
    content = {}
    for name, md5 in expected.items():
        try:
            content[name] = (folder / name).read_bytes()
        except OSError:
            return None
        if hashlib.md5(content[name], usedforsecurity=False).hexdigest() != md5:
            return None
    return _arrays(lambda name: content[name], archive, folder)


def _wanted(archive: Archive) -> set[str]:
    return {*archive.train, *archive.test, archive.meta[0]}


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    if not member.isreg() or member.size > _MOST_BYTES:
        raise UserError(
            f"--data-archive {path}: {member.name} in it is no plain file of a sensible size; "
            "use the official archive"
        )
    file = tar.extractfile(member)
    return file.read() if file else b""


def _arrays(read: Callable[[str], bytes], archive: Archive, path: Path) -> Arrays:
    try:
        train = [_batch(read(name), archive) for name in archive.train]
        test = [_batch(read(name), archive) for name in archive.test]
        names = tuple(n.decode() for n in _unpickle(read(archive.meta[0]))[archive.names])
    except UserError as error:
        raise UserError(f"--data-archive {path}: {error}; use the official archive") from error
    except Exception as error:  # whatever a damaged pickle can bring about
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"--data-archive {path}: not the layout of {archive.file} ({why}); "
            "use the official archive"
        ) from error
    images = (np.concatenate([part[0] for part in parts]) for parts in (train, test))
    labels = (np.concatenate([part[1] for part in parts]) for parts in (train, test))
    train_images, test_images = images
    train_labels, test_labels = labels
    return train_images, train_labels, test_images, test_labels, names


def _batch(content: bytes, archive: Archive) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(content)
    images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
    labels = np.asarray(batch[archive.labels], dtype=np.int64)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and plain containers, nothing else: a pickle can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np.zeros(0).__reduce__()[0]
        elif module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        elif (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise UserError(f"a batch in it asks for {module}.{name}, which no CIFAR batch needs")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes into old pickles; only ever with latin1."""
    if encoding != "latin1":
        raise UserError(f"a batch in it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _unpickle(content: bytes) -> dict[bytes, Any]:
    loaded = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(loaded, dict):
        raise ValueError("a batch is no dict")
    return {k.encode() if isinstance(k, str) else k: v for k, v in loaded.items()}
