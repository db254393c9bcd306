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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from progress.bar import Bar

from utils.data.cifar_archive import Arrays
from utils.log import say
from utils.errors import UserError

SIZE = 32
# Few, because a file's name does not decide how it is read, and Pillow knows 40 formats, some by
# programs that it starts.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")
_LAYOUT = "a folder data set holds train/<class>/* and test/<class>/*"

Notify = Callable[[str], Any]


@dataclass(frozen=True)
class Listing:
    """The image files of a folder data set.

    Attributes:
        classes: names, sorted; labels count in this order.
        train, test: (file, label), sorted by class and name.
        fingerprint: changes with any file's name, size or time.
    """

    classes: tuple[str, ...]
    train: list[tuple[Path, int]]
    test: list[tuple[Path, int]]
    fingerprint: str


def list_images(root: Path) -> Listing:
    """Find the images.

    Raises:
        UserError: a part, the classes or the images are missing, cannot be read, or test has
            other classes.
    """
    try:
        classes = _classes(root, "train")
        for name in _classes(root, "test"):
            if name not in classes:
                raise UserError(
                    f"--data {root}: test/{name} is a class that train/ lacks; "
                    "both must have the same classes"
                )
        digest = hashlib.sha256(b"\0".join(map(os.fsencode, classes)))
        train, test = (_files(root, part, classes, digest) for part in ("train", "test"))
    except OSError as error:
        raise UserError(
            f"--data {root}: {error.filename} cannot be read ({error.strerror}); "
            "repair or remove it"
        ) from error
    return Listing(classes, train, test, digest.hexdigest())


def _entries(folder: Path) -> list[tuple[str, os.stat_result]]:
    """Names in a folder that are not hidden, sorted, and what they lead to.

    Raises:
        OSError: a link leads nowhere, or something cannot be read.
    """
    names = sorted(name for name in os.listdir(folder) if name[0] != ".")
    return [(name, os.stat(folder / name)) for name in names]


def _classes(root: Path, part: str) -> tuple[str, ...]:
    folder = root / part
    if not folder.is_dir():
        raise UserError(f"--data {root}: no folder {part!r} in it; {_LAYOUT}")
    names = [name for name, about in _entries(folder) if stat.S_ISDIR(about.st_mode)]
    if not names:
        raise UserError(f"--data {root}: no class folders in {part}/; {_LAYOUT}")
    for name in names:
        if not name.isprintable():
            raise UserError(f"--data {root}: class {part}/{name} cannot be printed; rename it")
    return tuple(names)


def _files(root: Path, part: str, classes: tuple[str, ...], digest: Any) -> list[tuple[Path, int]]:
    suffixes = {s for s, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = []
    for label, name in enumerate(classes):
        folder = root / part / name
        if not folder.is_dir():
            continue  # a class without test images
        images = [e for e in _entries(folder) if os.path.splitext(e[0])[1].lower() in suffixes]
        if not images:
            kinds = ", ".join(FORMATS).lower()
            raise UserError(f"--data {root}: no images in {part}/{name} ({kinds}); {_LAYOUT}")
        for file, about in images:
            if not stat.S_ISREG(about.st_mode):
                raise UserError(f"{folder / file}: not a file; remove it")
            digest.update(os.fsencode(f"{part}/{name}/{file}"))
            digest.update(f"\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
            found.append((folder / file, label))
    return found


def read_images(listing: Listing, threads: int, notify: Notify) -> Arrays:
    """Decode all images, in parallel; images of another size are resized, with a warning.

    Returns:
        (N, 32, 32, 3) uint8 and (N,) int64 for training, the same for test, and the classes.

    Raises:
        UserError: names a file that is no image.
    """
    files = [path for path, _ in listing.train + listing.test]
    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    notify(f"decoding {len(files):,} images, once")
    show = notify is say and sys.stdout.isatty()
    bar = Bar("decode", max=len(files), file=sys.stdout, check_tty=True)
    resized = 0
    # Pillow's warnings: read_image decides by itself. Filters belong to the process, not a thread.
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore")
        try:
            for i, (pixels, changed) in enumerate(pool.map(read_image, files, chunksize=64)):
                images[i] = pixels
                resized += changed
                if show and i % 500 == 499:
                    bar.goto(i + 1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if show:
        bar.goto(len(files))
        bar.finish()
    if resized:
        notify(f"warning: {resized:,} of {len(files):,} images were not {SIZE}x{SIZE}: resized")
    labels = np.array([label for _, label in listing.train + listing.test], np.int64)
    cut = len(listing.train)
    return images[:cut], labels[:cut], images[cut:], labels[cut:], listing.classes


def read_image(path: Path) -> tuple[np.ndarray, bool]:
    """(32, 32, 3) uint8, and whether the image had another size.

    Raises:
        UserError: no image of FORMATS, damaged, or of more pixels than Pillow takes for sensible.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > (Image.MAX_IMAGE_PIXELS or pixels):
                raise ValueError(f"{pixels:,} pixels are more than {Image.MAX_IMAGE_PIXELS:,}")
            rgb = _eight_bits(image).convert("RGB")
    except Exception as error:  # Pillow does not say which a damaged file brings about
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        why = why.replace(repr(str(path)), "it")
        raise UserError(f"{path}: not a readable image ({why}); replace or remove it") from error
    changed = rgb.size != (SIZE, SIZE)
    if changed:
        rgb = rgb.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(rgb), changed


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey when it converts to RGB; scale it instead."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image
