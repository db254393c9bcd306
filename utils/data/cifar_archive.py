"""The official CIFAR-10 and CIFAR-100 archives (Krizhevsky 2009, "Learning Multiple Layers of
Features from Tiny Images"), read in memory: nothing is extracted, and no code in them is run."""

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from utils.errors import UserError

_MOST_BYTES = 512 << 20  # an archive unpacks to 187 MB, or to 268 if Python 3 has pickled it
_MOST_HEADERS = 1 << 20  # bytes; it has ten members
_MOST_OPCODES = 1 << 19  # in a batch, which has 50,000 names and twice as many labels


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

    Whatever the file holds, reading it takes a bounded time and memory and writes nothing.

    Returns:
        (N, 32, 32, 3) uint8 and (N,) int64, twice, and the names.

    Raises:
        UserError: not such an archive.
    """
    with _explained(path, archive):
        content = _members(path, archive)
        return _arrays(content, archive)


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
    with _explained(folder, archive):
        return _arrays(content, archive)


@contextmanager
def _explained(path: Path, archive: Archive) -> Iterator[None]:
    """Make whatever a damaged or hostile file brings about an error that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--data-archive {path}: {error}; use the official archive") from error
    except Exception as error:  # tarfile and pickle do not say which they raise
        why = str(error) or type(error).__name__
        raise UserError(
            f"--data-archive {path}: not a readable {archive.file} ({why}); "
            "use the official archive"
        ) from error


# --- the tar file --------------------------------------------------------------------------------


class _Headers:
    """An unpacked tar file for tarfile, which reads only headers from it, and not too many.

    A few MB may unpack to many GB, and tarfile believes whatever length a header gives for the
    next one, and whatever length it gives for what is skipped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.tell = file.tell
        self.left = _MOST_HEADERS

    def seek(self, position: int) -> int:
        if position > _MOST_BYTES:
            raise UserError("unpacks to more than any such archive")
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise UserError("has more headers than an official one")
        self.left -= size
        return self.file.read(size)


def _members(path: Path, archive: Archive) -> dict[str, bytes]:
    """The content of the wanted files, by name."""
    wanted = {*archive.train, *archive.test, archive.meta[0]}
    found: dict[str, bytes] = {}
    with _unpacked(path) as file:
        headers: Any = _Headers(file)
        for member in tarfile.open(fileobj=headers, mode="r:"):  # noqa: SIM115 (nothing to close)
            if not 0 <= member.size <= _MOST_BYTES - member.offset_data:
                raise UserError(
                    f"{member.name} in it has {member.size:,} bytes, more than any such archive"
                )
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            if folder != archive.folder or name not in wanted:
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{member.name} in it is no plain file")
            if name in found:
                raise UserError(f"{member.name} is in it twice")
            file.seek(member.offset_data)
            found[name] = file.read(member.size)
            if len(found[name]) < member.size:
                raise UserError(f"{member.name} in it is cut short")
        while file.read(1 << 20):  # to the end, where gzip and xz compare checksums
            if file.tell() > _MOST_BYTES:
                raise UserError("unpacks to more than any such archive")
    if missing := sorted(wanted - set(found)):
        raise UserError(f"lacks {archive.folder}/{missing[0]}")
    return found


def _unpacked(path: Path) -> Any:
    """The tar file in a compressed file, or the file itself."""
    with path.open("rb") as file:
        start = file.read(6)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if start.startswith(magic):
            return opener(path)
    return path.open("rb")


# --- the batches ---------------------------------------------------------------------------------


def _arrays(content: dict[str, bytes], archive: Archive) -> Arrays:
    """Arrays of the files, which are taken out: all together they are large."""
    names = _class_names(_unpickle(content[archive.meta[0]])[archive.names])
    train, test = (
        [_batch(content.pop(name), archive, len(names)) for name in part]
        for part in (archive.train, archive.test)
    )
    images = [np.concatenate([batch[0] for batch in part]) for part in (train, test)]
    labels = [np.concatenate([batch[1] for batch in part]) for part in (train, test)]
    return images[0], labels[0], images[1], labels[1], names


def _class_names(names: Any) -> tuple[str, ...]:
    if type(names) is not list or not all(type(name) is bytes for name in names):
        raise ValueError("the names of the classes are no list of names")
    decoded = tuple(name.decode() for name in names)
    if not all(name.isprintable() for name in decoded):
        raise ValueError("the name of a class cannot be printed")
    return decoded


def _batch(content: bytes, archive: Archive, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 32, 32, 3) uint8 and (N,) int64."""
    batch = _unpickle(content)
    pixels, numbers = batch[b"data"], batch[archive.labels]
    if type(pixels) is not _Pixels or type(numbers) is not list:
        raise ValueError("a batch holds no array of pixels or no list of labels")
    if not all(type(number) is int and 0 <= number < classes for number in numbers):
        raise ValueError(f"a label is none of 0 to {classes - 1}")
    images = pixels.array.reshape(-1, 3, 32, 32)
    if not len(images) == len(numbers) > 0:
        raise ValueError(f"a batch has {len(images)} images and {len(numbers)} labels")
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), np.array(numbers, np.int64)


def _unpickle(content: bytes) -> dict[bytes, Any]:
    unpickler: Any = _BatchUnpickler(content)
    loaded = unpickler.load()
    unpickler.memo.clear()  # it holds all that was read, and the unpickler itself
    if not isinstance(loaded, dict):
        raise ValueError("a batch is no dict")
    return {key.encode() if isinstance(key, str) else key: value for key, value in loaded.items()}


class _BatchUnpickler(pickle._Unpickler):
    """Builds uint8 arrays and plain containers, nothing else: a pickle can otherwise run any code.

    Python's own unpickler in C is faster, but reserves as much memory as a damaged file names.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        # Sets and old dicts would hash whatever they are given; bytearrays reserve memory.
        refused = (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.BYTEARRAY8)
        table = {c: load for c, load in self.dispatch.items() if bytes([c]) not in refused}
        self.dispatch = _Opcodes(table | {pickle.EMPTY_DICT[0]: _load_dict})  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for what a batch asks for; numpy itself gets nothing to interpret."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return _Pixels
        elif (module, name) == ("numpy", "ndarray"):
            return None  # only named, as the kind of array
        elif (module, name) == ("numpy", "dtype"):
            return _PixelType
        elif (module, name) == ("_codecs", "encode"):
            return self._encode_latin1
        raise UserError(f"a batch in it asks for {module}.{name}, which no CIFAR batch needs")

    def _encode_latin1(self, text: str, encoding: str = "latin1") -> bytes:
        """How Python 3 writes bytes into old pickles; only ever with latin1."""
        if encoding != "latin1":
            raise UserError(f"a batch in it asks for the encoding {encoding!r}")
        return text.encode("latin1")


def _load_dict(unpickler: Any) -> None:
    unpickler.append(_Dict())


class _Opcodes(dict):
    """How the unpickler loads each opcode, for as many of them as a batch may need."""

    left = _MOST_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UserError("a batch in it has more entries than an official one")
        return super().__getitem__(code)


class _Dict(dict):
    """Has strings for keys: to hash a deeply nested tuple overflows the stack of the process."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (bytes, str):
            raise ValueError("a key in a batch is no string")
        super().__setitem__(key, value)


class _PixelType:
    """Stands for numpy's dtype of bytes."""

    __slots__ = ()

    def __init__(self, code: Any, *_: Any) -> None:
        if code not in ("u1", b"u1"):
            raise ValueError("an array in a batch is none of bytes")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Pixels:
    """Stands for an array of bytes: ``array``."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if type(kind) is not _PixelType:
            raise ValueError("an array in a batch is none of bytes")
        order: Any = "F" if fortran else "C"
        self.array = np.frombuffer(content, np.uint8).reshape(shape, order=order)
