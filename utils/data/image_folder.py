"""A folder of images, train/<class>/**/* and test/<class>/**/*, as arrays.

The images of a class may lie in subfolders at any depth. Symbolic links are followed wherever they
lead, to files and to folders: many data sets are trees of links into one large store. Nothing is
written where they lead, and a link that leads nowhere or back to a folder above is an error. No
image is missing unnoticed: one in a format that is not read is an error, and what is left out, such
as hidden files and those without an image's suffix, is counted and named. Names of classes are
compared and kept in Unicode's form NFC, whatever form the file system has. Of an animation the
first frame counts.
"""

import hashlib
import os
import stat
import sys
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, TiffImagePlugin
from progress.bar import Bar

from utils import log
from utils.data.cifar_archive import Arrays
from utils.errors import UserError, one_line, reason_of

SIZE = 32
# The formats are few because a file's name does not decide how it is read, and Pillow knows 40
# formats, some by programs that it starts.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
# Images of other programs, which Pillow, or an older one, does not know.
_FOREIGN_SUFFIXES = {".avif", ".heic", ".heif", ".jxl", ".pfm", ".svg"}
_KINDS = ", ".join(FORMATS).lower()
# What Pillow opens, and what holds measurements, pages or films.
_NO_IMAGES = {".bufr", ".eps", ".gbr", ".grib", ".h5", ".hdf", ".iim", ".mpeg", ".mpg", ".ps"}
_PARTS = ("train", "test")
_LAYOUT = "a folder data set holds train/<class>/* and test/<class>/*"
# The number is part of fingerprints: what another version has decoded is decoded again.
_VERSION = b"2"


@dataclass(frozen=True)
class Listing:
    """The image files of a folder data set.

    Attributes:
        classes: The names, sorted; labels count in this order.
        train: The file and label of each training image, sorted by class and path.
        test: The file and label of each test image, sorted by class and path.
        fingerprint: A digest that changes with any file's name, size or time.
    """

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    fingerprint: str


def list_images(root: Path) -> Listing:
    """Find the images of a folder data set, and print a line about what is left out.

    Raises:
        UserError: A part, the classes or the images are missing, cannot be read, or test has
            other classes. Or an image has a format that is not read.
    """
    survey = _Survey(root)
    try:
        train_folders, test_folders = (survey.list_classes(part) for part in _PARTS)
        classes = tuple(sorted(train_folders))
        for name, folder in test_folders.items():
            if name not in train_folders:
                raise UserError(
                    f"--data {root}: {folder} is a class that train/ lacks; "
                    "add images to train on, or remove it"
                )
        digest = hashlib.sha256(b"\0".join([_VERSION, *map(os.fsencode, classes)]))
        parts = []
        for folders in (train_folders, test_folders):
            found = [
                (path, status, label)
                for label, name in enumerate(classes)
                if name in folders
                for path, status in survey.list_files(folders[name])
            ]
            for path, status, _ in found:
                digest.update(os.fsencode(path))
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            parts.append([(root / path, label) for path, _, label in found])
        tested = {label for _, label in parts[1]}
        survey.untested = [name for label, name in enumerate(classes) if label not in tested]
        if not tested:
            raise UserError(f"--data {root}: no images in test/ ({_KINDS}); {_LAYOUT}")
        survey.report()
    except OSError as error:
        raise UserError(
            f"--data {root}: {error.filename} cannot be read ({error.strerror}); "
            "repair or remove it"
        ) from error
    return Listing(classes, parts[0], parts[1], digest.hexdigest())


class _Survey:
    """A walk through a folder data set that notes what it leaves out.

    Paths are strings below the root, with slashes.

    Attributes:
        left_out: Paths of what is no image or is hidden.
        beside: What lies in neither train/ nor test/.
        unlabelled: Paths of the images that lie beside the folders of classes.
        untested: The classes without test images.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.left_out: list[str] = []
        self.beside: list[str] = []
        self.unlabelled: list[str] = []
        self.untested: list[str] = []
        suffixes = Image.registered_extensions()
        self._read = {suffix for suffix, kind in suffixes.items() if kind in FORMATS}
        opened = {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN}
        self._images = opened - _NO_IMAGES | _FOREIGN_SUFFIXES

    def list_classes(self, part: str) -> dict[str, str]:
        """Return the folder of each class of a part."""
        if not (self.root / part).is_dir():
            raise UserError(f"--data {self.root}: no folder {part!r} in it; {_LAYOUT}")
        folders: dict[str, str] = {}
        for path, status in self._list_entries(part):
            if not stat.S_ISDIR(status.st_mode):
                is_image = _suffix_of(path) in self._images
                (self.unlabelled if is_image else self.left_out).append(path)
                continue
            if not path.isprintable():
                raise UserError(f"--data {self.root}: class {path} cannot be printed; rename it")
            name = unicodedata.normalize("NFC", path.removeprefix(f"{part}/"))
            if name in folders:
                raise UserError(
                    f"--data {self.root}: {folders[name]!a} and {path!a} are the same "
                    "name in two forms of Unicode; move the images of both into one folder"
                )
            folders[name] = path
        if not folders:
            raise UserError(f"--data {self.root}: no class folders in {part}/; {_LAYOUT}")
        return folders

    def list_files(self, folder: str) -> list[tuple[str, os.stat_result]]:
        """Return the images at any depth below the folder of a class, sorted by path."""
        found = []
        part = folder.split("/")[0]
        above = {_identity_of(os.stat(self.root / path)) for path in (".", part, folder)}
        pending = [(folder, above)]
        while pending:
            place, above = pending.pop()
            for path, status in self._list_entries(place):
                if not stat.S_ISDIR(status.st_mode):
                    if self._is_image(path, status):
                        found.append((path, status))
                    continue
                if _identity_of(status) in above:
                    raise UserError(
                        f"--data {self.root}: {path} leads back to a folder above it; remove it"
                    )
                pending.append((path, above | {_identity_of(status)}))
        if not found and part == _PARTS[0]:
            raise UserError(f"--data {self.root}: no images in {folder} ({_KINDS}); {_LAYOUT}")
        return sorted(found)

    def report(self) -> None:
        """Print what is left out; what is hidden beside the parts is no part of the data."""
        names = os.listdir(self.root)
        self.beside = [name for name in names if name[0] != "." and name not in _PARTS]
        for say, names, what in (
            (log.warning, self.unlabelled, "images left out, as they lie in no folder of a class"),
            (log.note, self.left_out, "left out, as hidden or no image"),
            (log.note, self.beside, "left out, as they are in neither train/ nor test/"),
            (log.note, self.untested, "classes without test images"),
        ):
            if names:
                some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
                say(one_line(f"--data {self.root}: {what}: {len(names):,} ({some})"))

    def _list_entries(self, folder: str) -> list[tuple[str, os.stat_result]]:
        """Return the paths of what is in a folder and not hidden, sorted, and what they lead to.

        Raises:
            OSError: A link leads nowhere, or something cannot be read.
        """
        names = sorted(os.listdir(self.root / folder))
        self.left_out.extend(f"{folder}/{name}" for name in names if name[0] == ".")
        paths = (f"{folder}/{name}" for name in names if name[0] != ".")
        return [(path, os.stat(self.root / path)) for path in paths]

    def _is_image(self, path: str, status: os.stat_result) -> bool:
        """Return whether a file is to be read; one that only its format keeps out is an error."""
        suffix = _suffix_of(path)
        if suffix not in self._images:
            self.left_out.append(path)
            return False
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{self.root / path}: not a file; remove it")
        if suffix not in self._read:
            raise UserError(
                f"{self.root / path}: images of this format are not read; convert it to "
                f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, or remove it"
            )
        return True


def _suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def read_images(listing: Listing, threads: int) -> Arrays:
    """Decode all images in parallel; images of another size are resized, with a warning.

    Raises:
        UserError: A file, which the message names, is no image.
    """
    files = [path for path, _ in listing.train + listing.test]
    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    log.info(f"decoding {len(files):,} images, once")
    draws = log.draws_progress()
    bar = Bar("decode", max=len(files), file=sys.stdout, check_tty=True)
    resized = 0
    # Pillow's warnings are of no use, since read_image decides by itself. Filters of warnings
    # belong to the process and not to a thread, so they are set here.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        try:
            for i, (pixels, changed) in enumerate(pool.map(read_image, files, chunksize=64)):
                images[i] = pixels
                resized += changed
                if draws and i % 500 == 499:
                    bar.goto(i + 1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if draws:
        bar.goto(len(files))
        bar.finish()
    if resized:
        log.warning(f"{resized:,} of {len(files):,} images were not {SIZE}x{SIZE}: resized")
    labels = np.array([label for _, label in listing.train + listing.test], np.int64)
    cut = len(listing.train)
    return Arrays(images[:cut], labels[:cut], images[cut:], labels[cut:], listing.classes)


def read_image(path: Path) -> tuple[np.ndarray, bool]:
    """Return an image, (32, 32, 3) uint8, and whether it had another size.

    Raises:
        UserError: The file is no image of FORMATS, is damaged, has more pixels than Pillow takes
            for sensible, or values whose black and white cannot be known.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
                raise ValueError(f"{pixels:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            if not _has_known_scale(image):
                raise UserError(
                    f"{path}: its values are signed, floats or of an unusual range, so which of "
                    "them is white cannot be known; save it with 8 bits per channel"
                )
            rgb = _to_eight_bits(image).convert("RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's documents do not say which a damaged file brings about.
        why = reason_of(error).replace(repr(str(path)), "it")
        raise UserError(f"{path}: not a readable image ({why}); replace or remove it") from error
    changed = rgb.size != (SIZE, SIZE)
    if changed:
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(rgb), changed


def _has_known_scale(image: Image.Image) -> bool:
    """Return whether black and white are the least and the greatest value that the bits allow.

    Pillow has 16 bits of PNG and PPM in mode I or I;16, depending on its version. In a TIFF mode I
    has 32 or signed bits, and I;16 may have 12, or 0 for white, of which Pillow takes no notice.
    """
    if image.format != "TIFF":
        return image.mode != "F"
    tags = image.tag_v2  # type: ignore[attr-defined]
    if 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ()):  # signed
        return False
    if image.mode.startswith("I;16"):
        zero_is_black = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 1
        return zero_is_black and tags.get(TiffImagePlugin.BITSPERSAMPLE) == (16,)
    return image.mode not in ("F", "I")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow would clip when it converts to RGB."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image
