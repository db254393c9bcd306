"""The official CIFAR-10 and CIFAR-100 archives, and others in their layout, read in memory.

Nothing is extracted, and no code in them is run. Batches may be pickled by any Python and with any
protocol, and labels may be an array. The data sets are those of Krizhevsky 2009, "Learning Multiple
Layers of Features from Tiny Images".
"""

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
from typing import IO, Any, NamedTuple

import numpy as np

from utils import log
from utils.errors import UserError, one_line, reason_of

# An archive unpacks to 187 MB, or to 268 MB if Python 3 has pickled its batches.
_MAX_BYTES = 512 << 20
# An archive has ten members.
_MAX_HEADER_BYTES = 1 << 20
# The largest batch has 50,000 names and twice as many labels, each of which may be a numpy scalar.
_MAX_OPCODES = 1 << 20


@dataclass(frozen=True)
class Archive:
    """What is known about an official archive.

    Attributes:
        file: The name of the archive.
        md5: The digest of the archive.
        folder: The folder inside the archive, which is also the one that torchvision extracts.
        train: The batch files of the training set by name, with their md5.
        test: The batch files of the test set by name, with their md5.
        meta: The file with the names of the classes, and its md5.
        labels: The key of the labels in a batch.
        names: The key of the class names in the meta file.
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


class Arrays(NamedTuple):
    """The images and labels of a data set, and the names of its classes.

    Attributes:
        train_images: (N, 32, 32, 3) uint8.
        train_labels: (N,) int64.
        test_images: (M, 32, 32, 3) uint8.
        test_labels: (M,) int64.
        classes: The names in the order of the labels.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]


def read_archive(path: Path, archive: Archive) -> Arrays:
    """Read an archive.

    Whatever the file holds, reading it takes a bounded time and memory and writes nothing.

    Raises:
        UserError: The file is not such an archive.
    """
    with _name_in_errors(path, archive):
        return _read_batches(_read_members(path, archive), archive)


def read_folder(folder: Path, archive: Archive) -> Arrays | None:
    """Read the folder that torchvision extracts, where all files in it are the original ones.

    Returns:
        The arrays, or None where there is no such folder or, as a line then says, a file in it is
        missing or another.

    Raises:
        UserError: A file is the original and cannot be read all the same.
    """
    if not folder.is_dir():
        return None
    expected = {**archive.train, **archive.test, archive.meta[0]: archive.meta[1]}
    content = {}
    for name, md5 in expected.items():
        try:
            content[name] = (folder / name).read_bytes()
            found = hashlib.md5(content[name], usedforsecurity=False).hexdigest()
            why = "" if found == md5 else f"is not the original, as its md5 is {found}, not {md5}"
        except OSError as error:
            why = f"cannot be read ({reason_of(error)})"
        if why:
            log.warning(
                one_line(
                    f"{folder / name} {why}, so the folder is not used; an archive of your own "
                    "needs --data-archive FILE --data-md5 MD5"
                )
            )
            return None
    with _name_in_errors(folder, archive):
        return _read_batches(content, archive)


@contextmanager
def _name_in_errors(path: Path, archive: Archive) -> Iterator[None]:
    """Turn whatever a damaged or hostile file brings about into an error that names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"--data-archive {path}: {error}; use the official archive") from error
    except Exception as error:  # The documents of tarfile and pickle do not name all they raise.
        why = str(error) or type(error).__name__
        raise UserError(
            f"--data-archive {path}: not a readable {archive.file} ({why}); "
            "use the official archive"
        ) from error


# --- the tar file --------------------------------------------------------------------------------


class _HeaderReader:
    """An unpacked tar file for tarfile, which reads only headers from it, and not too many.

    A few MB may unpack to many GB, and tarfile believes whatever length a header gives for the
    next one, and whatever length it gives for what is skipped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.tell = file.tell
        self.left = _MAX_HEADER_BYTES

    def seek(self, position: int) -> int:
        if position > _MAX_BYTES:
            raise UserError("unpacks to more than any such archive")
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left:
            raise UserError("has more headers than an official one")
        self.left -= size
        return self.file.read(size)


def _read_members(path: Path, archive: Archive) -> dict[str, bytes]:
    """Return the content of the wanted files by name."""
    wanted = {*archive.train, *archive.test, archive.meta[0]}
    found: dict[str, bytes] = {}
    with _open_unpacked(path) as file:
        headers: Any = _HeaderReader(file)
        for member in tarfile.open(fileobj=headers, mode="r:"):  # noqa: SIM115 (nothing to close)
            if not 0 <= member.size <= _MAX_BYTES - member.offset_data:
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
        while file.read(1 << 20):  # Gzip and xz compare checksums at the end.
            if file.tell() > _MAX_BYTES:
                raise UserError("unpacks to more than any such archive")
    if missing := sorted(wanted - set(found)):
        raise UserError(f"lacks {archive.folder}/{missing[0]}")
    return found


def _open_unpacked(path: Path) -> Any:
    """Open the tar file in a compressed file, or the file itself."""
    with path.open("rb") as file:
        start = file.read(6)
    for magic, opener in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if start.startswith(magic):
            return opener(path)
    return path.open("rb")


# --- the batches ---------------------------------------------------------------------------------


def _read_batches(content: dict[str, bytes], archive: Archive) -> Arrays:
    """Join the batch files, which are taken out of ``content`` one by one, for they are large."""
    names = _decode_class_names(_unpickle(content[archive.meta[0]])[archive.names])
    train, test = (
        [_read_batch(content.pop(name), archive, len(names)) for name in part]
        for part in (archive.train, archive.test)
    )
    images = [np.concatenate([batch[0] for batch in part]) for part in (train, test)]
    labels = [np.concatenate([batch[1] for batch in part]) for part in (train, test)]
    return Arrays(images[0], labels[0], images[1], labels[1], names)


def _decode_class_names(names: Any) -> tuple[str, ...]:
    if type(names) is not list or not all(type(name) in (bytes, str) for name in names):
        raise ValueError("the names of the classes are no list of names")
    decoded = tuple(name.decode() if type(name) is bytes else name for name in names)
    if not all(name.isprintable() for name in decoded):
        raise ValueError("the name of a class cannot be printed")
    return decoded


def _read_batch(content: bytes, archive: Archive, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of a batch file, (N, 32, 32, 3) uint8, and its labels, (N,) int64."""
    batch = _unpickle(content)
    pixels = batch[b"data"]
    if type(pixels) is not _Array or pixels.array.dtype != np.uint8:
        raise ValueError("a batch holds no array of pixels, which are bytes")
    shape = pixels.array.shape
    if shape[1:] not in ((3072,), (3, 32, 32)):  # Others, such as (N, 32, 32, 3), are in disorder.
        raise ValueError(f"the pixels of a batch have the shape {shape}, not (N, 3072)")
    images = pixels.array.reshape(-1, 3, 32, 32)
    labels = batch[archive.labels]
    if type(labels) is _Array and labels.array.shape == (len(images),):
        labels = labels.array.tolist()
    if type(labels) is not list:
        raise ValueError("the labels of a batch are no list, and no array with one for each image")
    if not len(images) == len(labels) > 0:
        raise ValueError(f"a batch has {len(images)} images and {len(labels)} labels")
    if not all(type(label) is int and 0 <= label < classes for label in labels):
        raise ValueError(f"a label is none of 0 to {classes - 1}")
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), np.array(labels, np.int64)


def _unpickle(content: bytes) -> dict[bytes, Any]:
    unpickler: Any = _BatchUnpickler(content)
    loaded = unpickler.load()
    unpickler.memo.clear()  # The memo holds all that was read, and the unpickler itself.
    if not isinstance(loaded, dict):
        raise ValueError("a batch is no dict")
    batch = {key.encode() if isinstance(key, str) else key: value for key, value in loaded.items()}
    if len(batch) < len(loaded):
        raise ValueError("a batch has a key twice, as text and as bytes")
    return batch


class _BatchUnpickler(pickle._Unpickler):
    """Builds integer arrays and plain containers, for a pickle can otherwise run any code.

    Python's unpickler in C is faster, but it reserves as much memory as a damaged file names.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        table = dict(self.dispatch)
        for code in (pickle.EMPTY_SET, pickle.FROZENSET):  # They would hash whatever is in them.
            del table[code[0]]
        table[pickle.EMPTY_DICT[0]] = _load_empty_dict
        table[pickle.DICT[0]] = _load_dict
        table[pickle.BUILD[0]] = _load_state
        # A bytearray would reserve memory for a length; bytes are as many as there are.
        table[pickle.BYTEARRAY8[0]] = table[pickle.BINBYTES8[0]]
        self.dispatch = _Opcodes(table)  # type: ignore[misc]
        self._encodable = len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in for what a batch asks for; numpy itself gets nothing to interpret."""
        wanted = module.replace("numpy._core.", "numpy.core."), name
        stand_ins = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy.core.multiarray", "scalar"): self._read_scalar,
            ("numpy.core.numeric", "_frombuffer"): self._read_buffer,
            ("numpy", "ndarray"): None,  # A batch only names it, as the kind of an array.
            ("numpy", "dtype"): _Kind,
            ("_codecs", "encode"): self._encode_latin1,
        }
        if wanted not in stand_ins:
            raise UserError(f"a batch in it asks for {module}.{name}, which no CIFAR batch needs")
        return stand_ins[wanted]

    def _read_scalar(self, kind: Any, content: Any) -> int:
        return _array_of(content, kind).item()

    def _read_buffer(self, content: Any, kind: Any, shape: Any, order: Any) -> "_Array":
        array = _Array()
        array.array = _array_of(content, kind).reshape(shape, order=order)
        return array

    def _encode_latin1(self, text: str, encoding: str = "latin1") -> bytes:
        """Read bytes as Python 3 writes them into old pickles, which is only ever with latin1."""
        if encoding != "latin1":
            raise UserError(f"a batch in it asks for the encoding {encoding!r}")
        self._encodable -= len(text)
        if self._encodable < 0:  # A text may be asked for any number of times.
            raise UserError("a batch in it unpacks to more than it holds")
        return text.encode("latin1")


def _load_empty_dict(unpickler: Any) -> None:
    unpickler.append(_Dict())


def _load_dict(unpickler: Any) -> None:
    """Load a dict as protocol 0 has it."""
    entries = unpickler.pop_mark()
    loaded = _Dict()
    for key, value in zip(entries[::2], entries[1::2], strict=True):
        loaded[key] = value
    unpickler.append(loaded)


def _load_state(unpickler: Any) -> None:
    """Set the state of an array or its kind, and the attributes of nothing else."""
    state = unpickler.stack.pop()
    built = unpickler.stack[-1]
    if type(built) not in (_Array, _Kind):
        raise ValueError("a batch sets the state of something else than an array")
    built.__setstate__(state)


class _Opcodes(dict):
    """The table of how the unpickler loads each opcode, for as many of them as a batch may need."""

    left = _MAX_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise UserError("a batch in it has more entries than an official one")
        return super().__getitem__(code)


class _Dict(dict):
    """A dict of strings: to hash a deeply nested tuple overflows the stack of the process."""

    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (bytes, str):
            raise ValueError("a key in a batch is no string")
        super().__setitem__(key, value)


class _Kind:
    """A stand-in for numpy's dtype of an integer, which is then its ``dtype``."""

    __slots__ = ("code", "dtype")

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if type(code) is bytes else code
        if self.code not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):
            raise ValueError("an array in a batch is none of integers")
        self.dtype = np.dtype(self.code)

    def __setstate__(self, state: Any) -> None:
        """Take the byte order out of what numpy has written."""
        order = state[1].decode() if type(state[1]) is bytes else state[1]
        if order not in ("<", ">", "|", "="):
            raise ValueError("an array in a batch has no byte order")
        self.dtype = np.dtype(order + self.code)


class _Array:
    """A stand-in for an array of integers, which is then its ``array``."""

    __slots__ = ("array",)

    def __init__(self, *_: Any) -> None:
        self.array = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        order: Any = "F" if fortran else "C"
        self.array = _array_of(content, kind).reshape(shape, order=order)


def _array_of(content: Any, kind: Any) -> np.ndarray:
    """Return the integers that are in bytes, without a copy."""
    if type(kind) is not _Kind:
        raise ValueError("an array in a batch is none of integers")
    return np.frombuffer(content, kind.dtype)
