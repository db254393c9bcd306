"""Folders of images: right pixels in a stable order, and an error that names the file."""

import ctypes
import gzip
import itertools
import os
import struct
import subprocess
import sys
import unicodedata
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cifar import run
from helpers.process import environment
from utils.data.datasets import load_dataset
from utils.data.image_folder import list_images, read_image
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
        f"note: --data {images}: left out, as hidden or no image: 2 "
        "(train/cat/.hidden.png, train/cat/notes.txt)",
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


def test_images_in_subfolders_of_a_class_are_read(images, tmp_path):
    """As in tiny-imagenet, train/<class>/images/*, and by torchvision's ImageFolder."""
    folder = images / "train" / "cat"
    for name in ("1/b.png", "1/a/x.png", "day.png/0.png", "1.x.png"):
        save(folder / name, Image.new("RGB", (32, 32)))
    store = tmp_path / "store"
    (images / "train" / "dog").rename(store)
    for name in ("near", "far/off"):  # both lead to the same place, and no way leads back
        link = images / "train" / "dog" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(store)
    (images / "train" / "dog" / "empty").mkdir()
    listing = list_images(images)
    names = [(str(path.relative_to(images / "train")), label) for path, label in listing.train]
    assert names == [
        *((f"cat/{name}.png", 0) for name in ("0", "1", "1.x", "1/a/x", "1/b", "2", "day.png/0")),
        *((f"dog/{name}.png", 1) for name in ("far/off/0", "far/off/1", "far/off/2")),
        *((f"dog/{name}.png", 1) for name in ("near/0", "near/1", "near/2")),
    ]
    assert len(load_folder(images).train_labels) == len(names)


def test_what_is_left_out_is_counted_and_named(images, capsys):
    for name in ("DS_Store", "_0.png", "thumbs/0.png"):
        save(images / "train" / "cat" / "sub" / f".{name}", Image.new("RGB", (9, 9)), format="PNG")
    (images / "train" / "Thumbs.db").write_text("")
    (images / "test" / "dog" / "without suffix").write_text("")
    (images / "labels\n.csv").write_text("")
    (images / ".git").mkdir()
    for name in ("train/x.png", "train/y.heic", "test/x.JPG"):
        (images / name).write_text("")
    (images / "train" / "cat" / "sub" / "4.png").hardlink_to(images / "train" / "cat" / "0.png")
    for name in ("ant", "bee"):
        save(images / "train" / name / "0.png", Image.new("RGB", (32, 32)))
    for expected in (["decoding 11 images, once"], []):  # decoded, then from the cache
        load_folder(images)
        assert capsys.readouterr().out.splitlines() == [
            f"warning: --data {images}: images left out, as they lie in no folder of a class: 3 "
            "(test/x.JPG, train/x.png, train/y.heic)",
            f"note: --data {images}: left out, as hidden or no image: 5 (test/dog/without suffix, "
            "train/Thumbs.db, train/cat/sub/.DS_Store, ...)",
            f"note: --data {images}: left out, as they are in neither train/ nor test/: 1 "
            "(labels\\n.csv)",
            f"note: --data {images}: classes without test images: 2 (ant, bee)",
            *expected,
        ]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_the_form_of_a_class_name_in_unicode_plays_no_part(images, form):
    """A copy made by macOS has NFD, where most others have NFC."""
    name, other = (unicodedata.normalize(f, "z\u00e9bu \u304c") for f in (form, "NFD"))
    assert name != other or form == "NFD"
    (images / "train" / "cat").rename(images / "train" / name)
    (images / "test" / "cat").rename(images / "test" / other)
    data = load_folder(images)
    assert data.classes == ("dog", unicodedata.normalize("NFC", name))
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_images[1, 0, 0].tolist() == [150, 0, 7]


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
    pipe.symlink_to("/dev/zero")
    assert f"{pipe}: not a file" in complaint(images)


@pytest.mark.parametrize(
    "name", ["a.heic", "b.HEIF", "c.avif", "d.jxl", "e.svg", "f.jp2", "g.ico", "sub/h.tga", "i.psd"]
)
def test_an_image_in_a_format_that_is_not_read_is_named(images, name):
    path = images / "test" / "dog" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    line = complaint(images)
    assert line == (
        f"{path}: images of this format are not read; convert it to PNG, JPEG, GIF, BMP, PPM, TIFF "
        "or WEBP, or remove it"
    )


@pytest.mark.parametrize("target", [".", "..", "../..", "../dog", "sub/sub"])
def test_links_in_a_circle_are_named(images, target):
    sub = images / "train" / "cat" / "sub"
    (images / "train" / "dog" / "back").symlink_to(images / "train" / "cat")
    (sub / "sub").mkdir(parents=True)
    loop = images / "train" / "cat" / "loop"
    loop.symlink_to(target)
    (sub / "sub" / "loop").symlink_to("../../loop")
    line = complaint(images)
    assert line.startswith(f"--data {images}: train/cat/")
    assert line.endswith(" leads back to a folder above it; remove it")


def test_two_folders_of_one_class_are_named_visibly(images):
    for form in ("NFC", "NFD"):
        (images / "test" / unicodedata.normalize(form, "z\u00e9bu")).mkdir()
    line = complaint(images)
    assert r"'test/ze\u0301bu' and 'test/z\xe9bu' are the same name" in line


def tiff(values: np.ndarray, **tags: int) -> bytes:
    """An uncompressed TIFF of 32x32 pixels; tags by name where they are not the usual ones."""
    samples = values.size // 1024
    bits, photometric = 8 * values.dtype.itemsize, 2 if samples > 1 else 1
    usual = {"width": 32, "height": 32, "bits": bits, "compression": 1, "photometric": photometric,
             "offset": 0, "samples": samples, "rows": 32, "bytes": values.nbytes,
             "format": {"u": 1, "i": 2, "f": 3}[values.dtype.kind]}  # fmt: skip
    numbers = (256, 257, 258, 259, 262, 273, 277, 278, 279, 339)
    start = 8 + 2 + 12 * len(numbers) + 4
    usual["offset"] = start + 2 * samples
    entries = b""
    for number, (name, value) in zip(numbers, {**usual, **tags}.items(), strict=True):
        if name == "bits" and samples > 1:
            entries += struct.pack("<HHII", number, 3, samples, start)
        else:
            entries += struct.pack("<HHII", number, 4 if value > 65535 else 3, 1, value)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(numbers))
    return head + entries + bytes(4) + struct.pack("<H", bits) * samples + values.tobytes()


def netpbm(kind: str, most: object, values: np.ndarray) -> bytes:
    return f"{kind}\n32 32\n{most}\n".encode() + values.tobytes()


GREYS = np.full((32, 32), 51200)


@pytest.mark.parametrize(
    ("name", "content"),
    {
        "float.tiff": tiff(np.full((32, 32), 0.5, np.float32)),
        "float white is zero.tiff": tiff(np.full((32, 32), 0.5, np.float32), photometric=0),
        "signed 8 bit.tiff": tiff(np.full((32, 32), -5, np.int8)),
        "signed 16 bit.tiff": tiff(np.full((32, 32), 100, np.int16)),
        "signed 32 bit.tiff": tiff(np.full((32, 32), 100, np.int32)),
        "32 bit.tiff": tiff(GREYS.astype(np.uint32)),
        "12 bit.tiff": tiff(np.zeros(1536, np.uint8), bits=12, samples=1, photometric=1),
        "16 bit white is zero.tiff": tiff(GREYS.astype(np.uint16), photometric=0),
        "float.pfm": netpbm("Pf", -1.0, np.full((32, 32), 0.5, np.float32)),
    }.items(),
    ids=itertools.count(),
)
def test_values_of_unknown_scale_are_refused(images, name, content):
    """Pillow would cut them to 0..255, which makes most of them black or white."""
    path = images / "train" / "dog" / name
    path.write_bytes(content)
    line = complaint(images)
    assert line.startswith(f"{path}: its values are signed, floats or of an unusual range")
    assert line.endswith("save it with 8 bits per channel")


@pytest.mark.parametrize(
    ("name", "content", "pixel"),
    [
        ("16 bit.tiff", tiff(GREYS.astype("<u2")), [200] * 3),
        ("16 bit colour.tiff", tiff(np.tile([51200, 25600, 0], 1024).astype("<u2")), [200, 100, 0]),
        ("16 bit.pgm", netpbm("P5", 65535, GREYS.astype(">u2")), [200] * 3),
        ("12 bit.pgm", netpbm("P5", 4095, (GREYS >> 4).astype(">u2")), [200] * 3),
        ("16 bit.ppm", netpbm("P6", 65535, np.full(3072, 51200).astype(">u2")), [199] * 3),
        ("1 bit.tiff", Image.new("1", (32, 32), 1), [255] * 3),
        ("white is zero.tiff", tiff(np.full((32, 32), 55, np.uint8), photometric=0), [200] * 3),
        ("palette.tiff", Image.new("RGB", (32, 32), (9, 8, 7)).quantize(2), [9, 8, 7]),
        ("alpha.png", Image.new("LA", (32, 32), (200, 3)), [200] * 3),
        ("cmyk.tiff", Image.new("CMYK", (32, 32), (0, 255, 255, 0)), [255, 0, 0]),
        ("grey lab.tiff", tiff(np.tile([137, 0, 0], 1024).astype(np.uint8), photometric=8),
         [128] * 3),
        ("red lab.tiff", tiff(np.tile([138, 81, 70], 1024).astype(np.uint8), photometric=8),
         [254, 0, 0]),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_other_kinds_of_pixels_keep_their_colour(tmp_path, name, content, pixel):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    pixels, _ = read_image(path)
    assert np.abs(pixels.astype(int) - pixel).max() <= 5


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
    save(images / "train" / "bird" / "0.png", Image.new("RGB", (32, 32)))
    load_folder(images)  # A class may have no test images, whether its folder is there or not.
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
