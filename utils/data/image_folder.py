"""A folder of images, train/<class>/* and test/<class>/*, as arrays.

Symbolic links are followed wherever they lead, to files and to the folders of classes: many
data sets are trees of links into one large store. Nothing is written where they lead, and a link
that leads nowhere is an error, so that no class or image is missing unnoticed. Files that are
hidden or have no image's suffix are left out. Of an animation the first frame counts.
"""

import hashlib
import os
import stat
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from progress.bar import Bar

from utils import log
from utils.data.cifar_archive import Arrays
from utils.errors import UserError, reason_of

SIZE = 32
# The formats are few because a file's name does not decide how it is read, and Pillow knows 40
# formats, some by programs that it starts.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
_LAYOUT = "a folder data set holds train/<class>/* and test/<class>/*"


@dataclass(frozen=True)
class Listing:
    """The image files of a folder data set.

    Attributes:
        classes: The names, sorted; labels count in this order.
        train: The file and label of each training image, sorted by class and name.
        test: The file and label of each test image, sorted by class and name.
        fingerprint: A digest that changes with any file's name, size or time.
    """

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    fingerprint: str


def list_images(root: Path) -> Listing:
    """Find the images of a folder data set.

    Raises:
        UserError: A part, the classes or the images are missing, cannot be read, or test has
            other classes.
    """
    try:
        classes = _list_classes(root, "train")
        for name in _list_classes(root, "test"):
            if name not in classes:
                raise UserError(
                    f"--data {root}: test/{name} is a class that train/ lacks; "
                    "both must have the same classes"
                )
        digest = hashlib.sha256(b"\0".join(map(os.fsencode, classes)))
        train, test = (_list_files(root, part, classes, digest) for part in ("train", "test"))
    except OSError as error:
        raise UserError(
            f"--data {root}: {error.filename} cannot be read ({error.strerror}); "
            "repair or remove it"
        ) from error
    return Listing(classes, train, test, digest.hexdigest())


def _list_entries(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Return the names in a folder that are not hidden, sorted, and what they lead to.

    Raises:
        OSError: A link leads nowhere, or something cannot be read.
    """
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    return [(name, os.stat(folder / name)) for name in names]


def _list_classes(root: Path, part: str) -> tuple[str, ...]:
    folder = root / part
    if not folder.is_dir():
        raise UserError(f"--data {root}: no folder {part!r} in it; {_LAYOUT}")
    names = [name for name, status in _list_entries(folder) if stat.S_ISDIR(status.st_mode)]
    if not names:
        raise UserError(f"--data {root}: no class folders in {part}/; {_LAYOUT}")
    for name in names:
        if not name.isprintable():
            raise UserError(f"--data {root}: class {part}/{name} cannot be printed; rename it")
    return tuple(names)


def _list_files(
    root: Path, part: str, classes: tuple[str, ...], digest: Any
) -> list[tuple[Path, int]]:
    """Return the file and label of each image, and take them into the digest."""
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = []
    for label, name in enumerate(classes):
        folder = root / part / name
        if not folder.is_dir():
            continue  # A class may have no test images.
        images = [e for e in _list_entries(folder) if os.path.splitext(e[0])[1].lower() in suffixes]
        if not images:
            kinds = ", ".join(FORMATS).lower()
            raise UserError(f"--data {root}: no images in {part}/{name} ({kinds}); {_LAYOUT}")
        for file, status in images:
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{folder / file}: not a file; remove it")
            digest.update(os.fsencode(f"{part}/{name}/{file}"))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
            found.append((folder / file, label))
    return found


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
        UserError: The file is no image of FORMATS, is damaged, or has more pixels than Pillow takes
            for sensible.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
                raise ValueError(f"{pixels:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            rgb = _to_eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow's documents do not say which a damaged file brings about.
        why = reason_of(error).replace(repr(str(path)), "it")
        raise UserError(f"{path}: not a readable image ({why}); replace or remove it") from error
    changed = rgb.size != (SIZE, SIZE)
    if changed:
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(rgb), changed


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow would clip when it converts to RGB."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image
