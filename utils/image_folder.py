"""A folder of images, train/<class>/* and test/<class>/*, as arrays."""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from progress.bar import Bar

from utils.cifar_archive import Arrays
from utils.errors import UserError

SIZE = 32
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
        UserError: a part, the classes or the images are missing, or test has other classes.
    """
    classes = _classes(root, "train")
    for name in _classes(root, "test"):
        if name not in classes:
            raise UserError(
                f"--data {root}: test/{name} is a class that train/ lacks; "
                "both must have the same classes"
            )
    digest = hashlib.sha256("\0".join(classes).encode())
    train, test = (_files(root, part, classes, digest) for part in ("train", "test"))
    return Listing(classes, train, test, digest.hexdigest())


def _classes(root: Path, part: str) -> tuple[str, ...]:
    folder = root / part
    if not folder.is_dir():
        raise UserError(f"--data {root}: no folder {part!r} in it; {_LAYOUT}")
    names = sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
    )
    if not names:
        raise UserError(f"--data {root}: no class folders in {part}/; {_LAYOUT}")
    return tuple(names)


def _files(root: Path, part: str, classes: tuple[str, ...], digest: Any) -> list[tuple[Path, int]]:
    readable = set(Image.registered_extensions())
    found = []
    for label, name in enumerate(classes):
        folder = root / part / name
        if not folder.is_dir():
            continue  # a class without test images
        entries = sorted(
            (entry for entry in os.scandir(folder) if entry.name[0] != "."), key=lambda e: e.name
        )
        images = [e for e in entries if os.path.splitext(e.name)[1].lower() in readable]
        if not images:
            raise UserError(f"--data {root}: no images in {part}/{name}; {_LAYOUT}")
        for entry in images:
            try:
                about = entry.stat()
            except OSError as error:
                raise UserError(
                    f"--data {root}: {part}/{name}/{entry.name} cannot be read "
                    f"({error.strerror}); replace or remove it"
                ) from error
            digest.update(f"{part}/{name}/{entry.name}\0{about.st_size}\0{about.st_mtime_ns}\0"
                          .encode())  # fmt: skip
            found.append((Path(entry.path), label))
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
    show = notify is print and sys.stdout.isatty()
    bar = Bar("decode", max=len(files), file=sys.stdout, check_tty=True)
    resized = 0
    with ThreadPoolExecutor(threads) as pool:
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
    """(32, 32, 3) uint8, and whether the image had another size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                rgb = _eight_bits(image).convert("RGB")
    except (
        OSError, UnidentifiedImageError, SyntaxError, ValueError,
        Image.DecompressionBombError, Image.DecompressionBombWarning,
    ) as error:  # fmt: skip
        why = str(error).splitlines()[0].replace(str(path), "it")
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
