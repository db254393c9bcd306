"""Folders of images: right pixels in a stable order, and an error that names the file."""

import ctypes
import gzip
import itertools
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar import run
from helpers.process import environment
from utils.data.datasets import load_dataset
from utils.data.image_folder import read_image
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.files import ROOT
from utils.runtime.exit_codes import run_worker


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def images(tmp_path):
    """Two classes, three training images and one test image each."""
    root = tmp_path / "images"
    for label, name in enumerate(("cat", "dog")):
        for i in range(4):
            part = "test" if i == 3 else "train"
            colour = (50 * i, 100 * label, 7)
            save(root / part / name / f"{i}.png", Image.new("RGB", (32, 32), colour))
    return root


def load_folder(root):
    return load_dataset("folder", root)


def complaint(images) -> str:
    with pytest.raises(UserError) as caught:
        load_folder(images)
    assert str(caught.value).isprintable()
    return str(caught.value)


# --- what is read --------------------------------------------------------------------------------


def test_a_folder_gives_classes_and_pixels_in_a_stable_order(images):
    data = load_folder(images)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert data.train_images[4, 5, 6].tolist() == [50, 100, 7]
    assert data.mean == pytest.approx((50 / 255, 50 / 255, 7 / 255))
    again = load_folder(images)
    assert np.array_equal(again.train_images, data.train_images)
    assert again.std == data.std


def test_every_kind_of_image_becomes_rgb_of_the_right_size(images, capsys):
    folder = images / "train" / "cat"
    save(folder / "a-grey.jpg", Image.new("L", (32, 32), 200))
    save(folder / "b-cmyk.jpg", Image.new("CMYK", (40, 20), (0, 255, 255, 0)))
    save(folder / "c-alpha.png", Image.new("RGBA", (32, 32), (1, 2, 3, 128)))
    save(folder / "d-16bit.png", Image.fromarray(np.full((32, 32), 51200, np.uint16)))
    frames = [Image.new("P", (32, 32), i) for i in range(3)]
    save(folder / "e-animated.gif", frames[0], save_all=True, append_images=frames[1:])
    frames = [Image.new("RGB", (32, 32), (90 * i + 1, 0, 0)) for i in range(3)]
    save(folder / "f-animated.png", frames[0], save_all=True, append_images=frames[1:])
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    save(folder / "g-palette.png", palette, transparency=bytes([128, 64]))
    save(folder / "h-bits.png", Image.new("1", (32, 32), 1))
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_folder(images)
    assert len(data.train_labels) == 14
    grey, cmyk = data.train_images[3], data.train_images[4]
    assert abs(int(grey[0, 0, 0]) - 200) < 4
    assert cmyk[0, 0, 0] > 200
    assert cmyk[0, 0, 1] < 60
    assert data.train_images[6][0, 0].tolist() == [200, 200, 200]
    assert data.train_images[8][0, 0].tolist() == [1, 0, 0], "of an animation the first frame"
    assert data.train_images[9][0, 0].tolist() == [10, 20, 30], "whatever is transparent"
    assert data.train_images[10][0, 0].tolist() == [255, 255, 255]
    assert capsys.readouterr().out.splitlines() == [
        "decoding 16 images, once",
        "warning: 1 of 16 images were not 32x32: resized",
    ]


def test_names_may_hold_anything(images):
    """Line breaks, spaces, bytes that are no UTF-8."""
    folder = images / "train" / "cat"
    for name in (b"a\nb.png", b"\xff\xfe.png", "猫 cat.png".encode(), b" .png"):
        os.link(folder / "0.png", folder / os.fsdecode(name))
    for _ in range(2):  # decoded, then from the cache
        assert len(load_folder(images).train_labels) == 10


def test_links_are_followed_wherever_they_lead(images, tmp_path):
    store = tmp_path / "store"
    (images / "train" / "dog").rename(store)
    (images / "train" / "dog").symlink_to(store)
    (images / "train" / "cat" / "linked.png").symlink_to(store / "2.png")
    data = load_folder(images)
    assert data.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert data.train_images[3, 0, 0].tolist() == [100, 100, 7]
    assert sorted(p.name for p in store.iterdir()) == ["0.png", "1.png", "2.png"]


@pytest.mark.parametrize("classes", [1, 2])
def test_few_images_are_enough_to_train(tmp_path, classes, capsys):
    """One class, or one image of each."""
    for name in ("cat", "dog")[:classes]:
        for part in ("train", "test"):
            save(tmp_path / "images" / part / name / "0.png", Image.new("RGB", (32, 32)))
    words = f"-d folder --data {tmp_path}/images -a alexnet --epochs 1 --train-batch 1".split()
    words += ["-c", str(tmp_path / "run")]
    assert run_worker(Comm, run, words) == 0, capsys.readouterr().err


# --- what is refused -----------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A file of a few bytes that announces an image of any size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b"")


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
%%EndComments
showpage
"""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.png", b"", "cannot identify"),
        ("text.jpg", b"<html>404</html>", "cannot identify"),
        ("cut.png", png(32, 32)[:60], ""),
        ("short.png", png(32, 32), "truncated"),
        ("bomb.png", png(10_000, 9_000), "90,000,000 pixels are more than"),
        ("larger.png", png(60_000, 60_000), "decompression bomb"),
        ("impossible.png", png(0, 32), ""),
        ("postscript.jpg", POSTSCRIPT, "cannot identify"),
        ("packed.png", gzip.compress(png(32, 32)), "cannot identify"),
        ("line\nbreak.png", b"", r"line\nbreak.png"),
        (b"\xff\x1b.png", b"", r"\udcff\x1b.png"),
    ],
    ids=itertools.count(),  # names and bytes are no words
)
def test_a_file_that_is_no_sensible_image_is_named(images, name, content, said):
    bad = images / "train" / "dog" / os.fsdecode(name)
    bad.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = complaint(images)
    assert said in line
    assert line.startswith(f"{bad.parent}/")
    if bad.name.isprintable():
        assert line.startswith(f"{bad}: not a readable image (")


def test_a_bomb_is_refused_outside_of_folders_too(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(10_000, 9_000))
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(UserError, match="90,000,000 pixels"),
    ):
        read_image(tmp_path / "bomb.png")


def test_what_is_no_file_is_not_opened(images):
    pipe = images / "train" / "dog" / "pipe.png"
    os.mkfifo(pipe)  # to open it would wait for ever
    assert f"{pipe}: not a file" in complaint(images)
    pipe.unlink()
    pipe.mkdir()
    assert f"{pipe}: not a file" in complaint(images)
    pipe.rmdir()
    pipe.symlink_to("/dev/zero")
    assert f"{pipe}: not a file" in complaint(images)


def test_what_is_wrong_with_a_folder_is_said(images, tmp_path):
    lost = images / "train" / "dog" / "lost.png"
    lost.symlink_to(tmp_path / "nowhere.png")
    assert f"{lost} cannot be read (No such file or directory)" in complaint(images)
    lost.unlink()
    lost = images / "train" / "lost"
    lost.symlink_to(tmp_path / "nowhere")
    assert f"{lost} cannot be read" in complaint(images)
    lost.unlink()
    lost.symlink_to(lost)
    assert f"{lost} cannot be read (Too many levels of symbolic links)" in complaint(images)
    lost.unlink()
    (images / "test" / "bird").mkdir()
    assert "test/bird" in complaint(images)
    (images / "train" / "bird").mkdir()
    assert "no images in train/bird" in complaint(images)
    (images / "train" / "bird").rename(images / "train" / "bi\nrd")
    assert r"class train/bi\nrd cannot be printed; rename it" in complaint(images)
    (images / "train").rename(images / "training")
    assert "no folder 'train'" in complaint(images)
    (images / "train").mkdir()
    assert "no class folders in train/" in complaint(images)


def test_the_program_says_so_in_one_line_and_writes_nothing(images, tmp_path, capsys):
    (images / "train" / "dog" / "line\nbreak.png").write_bytes(b"")
    words = ["-d", "folder", "--data", str(images), "-c", str(tmp_path / "run")]
    assert run_worker(Comm, run, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(rf"error: {images}/train/dog/line\nbreak.png: not a readable image")
    assert not (tmp_path / "run").exists()
    assert not (images / ".cache").exists()


LOADER = """
import sys
from utils.data.datasets import load_dataset
from utils.errors import UserError
try:
    print(len(load_dataset("folder", sys.argv[1]).train_labels))
except UserError as error:
    print(error)
"""


def drop_powers_of_root() -> None:
    """Let permissions hold for root as well, in a process that is about to start a program."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def load_without_powers(root) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(root)], cwd=ROOT, env=environment(),
        preexec_fn=drop_powers_of_root, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert result.stderr == ""
    return result.stdout.splitlines()


def test_what_may_not_be_read_is_named(images):
    file, folder = images / "train" / "dog" / "0.png", images / "train" / "cat"
    file.chmod(0)
    (line,) = load_without_powers(images)[1:]
    assert line.startswith(f"{file}: not a readable image (Permission denied)")
    folder.chmod(0)
    (line,) = load_without_powers(images)
    assert f"{folder} cannot be read (Permission denied)" in line
    folder.chmod(0o755)


def test_a_cache_that_may_not_be_read_is_made_again(images):
    load_folder(images)
    cache = images / ".cache" / "folder.npz"
    cache.chmod(0)
    _, note, count = load_without_powers(images)
    assert note == f"note: {cache} is made again (Permission denied)"
    assert count == "6"
    assert load_without_powers(images) == ["6"]


def test_a_folder_that_may_not_be_written_to_costs_the_cache_only(images):
    images.chmod(0o555)
    try:
        decoding, note, count = load_without_powers(images)
    finally:
        images.chmod(0o755)
    assert decoding.startswith("decoding")
    cache = images / ".cache" / "folder.npz"
    assert note.startswith(f"note: {cache} cannot be written (Permission denied)")
    assert count == "6"
    assert sorted(p.name for p in images.iterdir()) == ["test", "train"]
