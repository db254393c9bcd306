"""The official archives: right pixels from a good one, one line about any other, no harm done."""

import gzip
import hashlib
import io
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cifar import run
from helpers.archives import FOLDER, batch, md5_of, members_of_cifar10, small_cifar10, write_archive
from helpers.process import environment
from utils.data import cifar_archive
from utils.data.cifar_archive import ARCHIVES, read_archive, read_folder
from utils.data.datasets import load_dataset
from utils.distributed.comm import Comm
from utils.errors import UserError
from utils.files import ROOT
from utils.runtime.exit_codes import run_worker


def complaint_about(path: Path, root: Path) -> str:
    """What is said about an archive whose md5 the user has accepted."""
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", root, archive=path, md5=md5_of(path))
    assert f"--data-archive {path}: " in str(caught.value)
    assert str(caught.value).isprintable()
    assert not [p for p in root.glob("*") if p.name != ".lock"]
    return str(caught.value)


# --- good archives -------------------------------------------------------------------------------


def test_an_archive_on_disk_gives_the_pixels_that_were_packed(cifar10, tmp_path):
    path, md5 = cifar10
    for attempt in range(2):  # from the archive, then from the cache
        data = load_dataset("cifar10", tmp_path / "data", archive=path, md5=md5)
        assert data.train_images.shape == (100, 32, 32, 3), attempt
        assert data.test_images.shape == (30, 32, 32, 3)
        original = pickle.loads(batch(20, 2), encoding="bytes")
        image = original[b"data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(data.train_images[23], image)
        assert data.train_labels[20:40].tolist() == original[b"labels"]
        assert data.mean == (0.4914, 0.4822, 0.4465)
        assert data.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_an_archive_may_be_packed_otherwise(cifar10, tmp_path, mode):
    other = tmp_path / "other.tar"
    write_archive(other, members_of_cifar10(), mode=mode)
    for one, two in zip(
        *(read_archive(p, ARCHIVES["cifar10"]) for p in (cifar10[0], other)), strict=True
    ):
        assert np.array_equal(one, two)


def test_cifar100_takes_the_fine_labels(tmp_path):
    members = {
        "train": batch(50, 1, "fine_labels", 100),
        "test": batch(10, 2, "fine_labels", 100),
        "meta": pickle.dumps({b"fine_label_names": [b"x"] * 100}, protocol=2),
    }
    path = tmp_path / "small.tar.gz"
    md5 = write_archive(path, members, folder="cifar-100-python")
    data = load_dataset("cifar100", tmp_path, archive=path, md5=md5)
    assert len(data.classes) == 100
    original = pickle.loads(members["train"], encoding="bytes")
    assert data.train_labels.tolist() == original[b"fine_labels"]


def test_a_batch_may_be_pickled_as_python_2_did(tmp_path):
    """As the official ones are: strings are bytes, and numpy has its old names."""
    old = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03"
        b"cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02M\x00\x0c\x86"
        b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xff"
        b"J\xff\xff\xff\xffK\x00tb\x89T\x00\x18\x00\x00" + bytes(range(256)) * 24 + b"tb"
        b"U\x06labelsq\x08]q\x09(K\x03K\x07eU\x09filenamesq\x0a]q\x0b(U\x01aU\x01beu."
    )
    path = tmp_path / "old.tar.gz"
    small_cifar10(path, data_batch_1=old)
    images, labels, *_ = read_archive(path, ARCHIVES["cifar10"])
    assert labels[:2].tolist() == [3, 7]
    assert images[1, 0, :4, 0].tolist() == [0, 1, 2, 3]


PIXELS = np.random.RandomState(0).randint(0, 256, (2, 3072)).astype(np.uint8)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    "labels",
    [
        [3, 9],
        np.array([3, 9]),
        *(np.array([3, 9], kind) for kind in (">i8", "<i4", ">u2", "u1", "i1", "<u8")),
        np.array([[3, 0], [9, 0]])[:, 0],  # not contiguous
        [np.int64(3), np.uint8(9)],
    ],
    ids=str,
)
def test_a_batch_may_be_pickled_as_any_python_does(tmp_path, protocol, labels):
    """With any protocol, and labels as other programs leave them."""
    planes = PIXELS.reshape(2, 3, 32, 32)
    contents = {
        "data_batch_1": {"data": PIXELS, "labels": labels},
        "data_batch_2": {b"data": np.asfortranarray(PIXELS), b"labels": labels},
        "data_batch_3": {"data": planes[::-1], "labels": labels, "batch_label": b"3"},
        "batches.meta": {"label_names": [f"\xe9{i}" for i in range(10)]},
    }
    path = tmp_path / "own.tar.gz"
    small_cifar10(path, **{name: pickle.dumps(c, protocol) for name, c in contents.items()})
    data = read_archive(path, ARCHIVES["cifar10"])
    expected = planes.transpose(0, 2, 3, 1)
    assert np.array_equal(data.train_images[:6], [*expected, *expected, *expected[::-1]])
    assert data.train_labels[:6].tolist() == [3, 9] * 3
    assert data.train_labels.dtype == np.int64
    assert data.classes[9] == "\xe99"


def test_a_large_batch_of_scalars_and_a_buffer_behind_the_frame_are_read(tmp_path):
    """Large buffers stand outside of the frames of protocol 5."""
    path = tmp_path / "own.tar.gz"
    count = 10_000
    content = {"data": np.tile(PIXELS, (count // 2, 1)), "labels": list(np.arange(count) % 10)}
    small_cifar10(path, data_batch_1=pickle.dumps(content, 5))
    data = read_archive(path, ARCHIVES["cifar10"])
    assert data.train_labels[:count].tolist() == [i % 10 for i in range(count)]
    assert np.array_equal(data.train_images[count - 1], data.train_images[1])


def test_the_digests_are_those_that_torchvision_knows():
    from torchvision.datasets import CIFAR10, CIFAR100

    for name, known in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        ours = ARCHIVES[name]
        assert (ours.file, ours.md5, ours.folder) == (
            known.filename,
            known.tgz_md5,
            known.base_folder,
        )
        assert list(ours.train.items()) == [tuple(pair) for pair in known.train_list]
        assert list(ours.test.items()) == [tuple(pair) for pair in known.test_list]
        assert ours.meta == (known.meta["filename"], known.meta["md5"])


# --- others --------------------------------------------------------------------------------------


def test_an_extracted_folder_is_read_if_every_file_is_the_original(tmp_path, capsys):
    members = members_of_cifar10()
    digests = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    known = ARCHIVES["cifar10"]
    archive = replace(
        known,
        train={name: digests[name] for name in known.train},
        test={"test_batch": digests["test_batch"]},
        meta=("batches.meta", digests["batches.meta"]),
    )
    folder = tmp_path / FOLDER
    assert read_folder(folder, archive) is None
    assert capsys.readouterr().out == ""
    folder.mkdir()
    for name, content in members.items():
        (folder / name).write_bytes(content)
    assert len(read_folder(folder, archive).train_labels) == 100
    assert capsys.readouterr().out == ""
    for spoil, why in (
        (lambda path: path.write_bytes(batch(20, 0)), "is not the original, as its md5 is "),
        (lambda path: path.unlink(), "cannot be read (No such file or directory), so the folder"),
    ):
        spoil(folder / "data_batch_3")
        assert read_folder(folder, archive) is None
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"warning: {folder}/data_batch_3 {why}")
        assert line.endswith("an archive of your own needs --data-archive FILE --data-md5 MD5")


@pytest.mark.parametrize("name", [FOLDER, "renamed"])
def test_the_extracted_folder_itself_as_data_is_said(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    for member, content in members_of_cifar10().items():
        (folder / member).write_bytes(content)
    monkeypatch.chdir(folder)
    for root in (folder, "."):
        with pytest.raises(UserError) as caught:
            load_dataset("cifar10", root)
        rename = "" if name == FOLDER else f", and let this one be named {FOLDER}"
        assert str(caught.value) == (
            f"--data {root}: is the extracted folder {FOLDER} itself; name the folder above it, "
            f"--data {tmp_path}{rename}"
        )
    with pytest.raises(UserError, match="is a folder; --data names the one above it"):
        load_dataset("cifar10", tmp_path, archive=folder)


def test_the_wrong_archive_is_refused_with_both_digests_and_what_helps(cifar10, tmp_path):
    path, md5 = cifar10
    shutil.copy(path, tmp_path / ARCHIVES["cifar10"].file)
    for archive, shown, remedy in (
        (path, f"--data-archive {path}", "name another file"),
        (None, str(tmp_path / ARCHIVES["cifar10"].file), "remove it to download it again"),
    ):
        with pytest.raises(UserError) as caught:
            load_dataset("cifar10", tmp_path, archive=archive)
        assert str(caught.value) == (
            f"{shown}: its md5 is {md5}, not {ARCHIVES['cifar10'].md5}; {remedy}, or accept it "
            f"with --data-md5 {md5}"
        )


def damaged(content: bytes) -> dict[str, bytes]:
    middle = len(content) // 2
    return {
        "empty": b"",
        "cut at a third": content[: len(content) // 3],
        "cut at 90 %": content[: len(content) * 9 // 10],
        "one bit": content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :],
        "zeros at its end": content[:middle] + bytes(len(content) - middle),
        "a text": b"<html>404</html>",
        "gzip of a text": gzip.compress(b"hello"),
        "gzip in name only": b"\x1f\x8b" + bytes(100),
        "xz in name only": b"\xfd7zXZ\x00" + bytes(100),
    }


@pytest.mark.parametrize("how", damaged(bytes(9)))
def test_a_damaged_archive_is_bad_input(cifar10, tmp_path, how):
    path, _ = cifar10
    path.write_bytes(damaged(path.read_bytes())[how])
    complaint_about(path, tmp_path / "data")


def test_the_program_says_so_in_one_line_and_writes_nothing(cifar10, tmp_path, capsys):
    path, _ = cifar10
    path.write_bytes(path.read_bytes()[:-1000])
    folder = tmp_path / "run"
    words = ["-d", "cifar10", "--data", tmp_path / "data", "--data-archive", path, "-c", folder]
    words += ["--data-md5", md5_of(path)]
    assert run_worker(Comm, run, [str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --data-archive {path}: ")
    assert not folder.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
)
def test_members_that_are_no_plain_files_are_refused(tmp_path, kind):
    path = tmp_path / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(f"{FOLDER}/data_batch_1")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    assert "plain file" in complaint_about(path, tmp_path / "data")


def test_members_that_point_outside_are_not_written(tmp_path):
    path = tmp_path / "hostile.tar.gz"
    (tmp_path / "in").mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../escaped", str(tmp_path / "absolute"), f"{FOLDER}/../escaped"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    complaint_about(path, tmp_path / "in")
    assert not [p for p in tmp_path.rglob("*") if p.name in ("escaped", "absolute")]


def test_what_is_in_it_twice_or_not_at_all_is_said(tmp_path):
    path = tmp_path / "odd.tar"
    content = members_of_cifar10()
    write_archive(path, {**content, f"../{FOLDER}/test_batch": b"", "../elsewhere": b"a"}, mode="w")
    assert read_archive(path, ARCHIVES["cifar10"])  # another folder is none of our business
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo(f"./{FOLDER}/test_batch"))
    assert "test_batch is in it twice" in complaint_about(path, tmp_path / "data")
    del content["data_batch_3"]
    write_archive(path, content)
    assert f"lacks {FOLDER}/data_batch_3" in complaint_about(path, tmp_path / "data")


def pickled(**content) -> bytes:
    return pickle.dumps({key.encode(): value for key, value in content.items()}, protocol=2)


def with_labels(labels) -> bytes:
    return pickle.dumps({"data": PIXELS, "labels": labels}, protocol=5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"test_batch": pickled(data=PIXELS, labels=[0, 10])}, "a label is none of 0 to 9"),
        ({"test_batch": pickled(data=PIXELS, labels=[0, -1])}, "a label is none"),
        ({"test_batch": pickled(data=PIXELS, labels=[0, 1.5])}, "a label is none"),
        ({"test_batch": pickled(data=PIXELS, labels=[0, [1]])}, "a label is none"),
        ({"test_batch": pickled(data=PIXELS, labels=[0])}, "2 images and 1 labels"),
        ({"test_batch": pickled(data=PIXELS[:0], labels=[])}, "asks for __builtin__.bytes"),
        ({"test_batch": pickled(data=PIXELS.astype(float), labels=[0, 1])}, "none of integers"),
        ({"test_batch": pickled(data=PIXELS.astype(int), labels=[0, 1])}, "no array of pixels"),
        ({"test_batch": pickled(data=PIXELS.reshape(2, 32, 32, 3), labels=[0, 1])}, "the shape"),
        ({"test_batch": pickled(data=[[0] * 3072] * 2, labels=[0, 1])}, "no array of pixels"),
        ({"test_batch": pickled(data=PIXELS[:, :3000], labels=[0, 1])}, "the shape (2, 3000)"),
        ({"test_batch": pickled(labels=[0])}, "data"),
        ({"test_batch": with_labels(np.array([0, 10]))}, "a label is none of 0 to 9"),
        ({"test_batch": with_labels(np.array([0, -1], np.int8))}, "a label is none"),
        ({"test_batch": with_labels(np.array([0, 1 << 63], np.uint64))}, "a label is none"),
        ({"test_batch": with_labels([np.int64(0), np.int64(10)])}, "a label is none"),
        ({"test_batch": with_labels([np.float32(0), np.float32(1)])}, "none of integers"),
        ({"test_batch": with_labels(np.array([0.0, 1.0]))}, "none of integers"),
        ({"test_batch": with_labels(np.array([False, True]))}, "none of integers"),
        ({"test_batch": with_labels(np.array(["a", "b"]))}, "none of integers"),
        ({"test_batch": with_labels(np.array([0, 1], object))}, "none of integers"),
        ({"test_batch": with_labels(np.array([[0], [1]]))}, "labels of a batch are no list"),
        ({"test_batch": with_labels(np.array(1))}, "labels of a batch are no list"),
        ({"test_batch": with_labels(np.arange(3))}, "labels of a batch are no list"),
        ({"test_batch": with_labels(bytes(2))}, "labels of a batch are no list"),
        ({"test_batch": pickle.dumps([1], protocol=2)}, "no dict"),
        ({"batches.meta": pickled(label_names=[b"\x1b[2J"] * 10)}, "cannot be printed"),
        ({"batches.meta": pickled(label_names=["\x1b[2J"] * 10)}, "cannot be printed"),
        ({"batches.meta": pickled(label_names=b"abcdefghij")}, "no list of names"),
        ({"batches.meta": pickled(label_names=[b"a"] * 9 + [1])}, "no list of names"),
    ],
)  # fmt: skip
def test_a_batch_with_other_content_is_refused(tmp_path, changes, said):
    path = tmp_path / "other.tar.gz"
    small_cifar10(path, **changes)
    assert said in complaint_about(path, tmp_path / "data")


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_code_in_a_batch_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "hostile.tar.gz"
    small_cifar10(path, test_batch=pickle.dumps({b"data": Payload(marker)}, protocol=2))
    assert "asks for posix.system" in complaint_about(path, tmp_path / "data")
    assert not marker.exists()


BUFFER = b"\x8c\x13numpy._core.numeric\x8c\x0b_frombuffer\x93"
LABELS_FOLLOW = pickle.dumps({"data": PIXELS}, 5)[11:-1] + b"\x8c\x06labels"


@pytest.mark.parametrize(
    "opcodes",
    {
        "buffer out of band": b"\x97",
        "writable buffer out of band": b"\x97\x98",
        "bytearray beyond the end": b"\x96" + (1 << 40).to_bytes(8, "little") + b"abc",
        "frame beyond the end": b"\x95" + (1 << 40).to_bytes(8, "little"),
        "buffer of nothing known": BUFFER + b"(C\x02ab" + b"N" + b"K\x02\x85\x8c\x01Ct" + b"R",
        "attribute of a stand-in": BUFFER + b"N}\x8c\x0c__defaults__Ns\x86b",
        "state of a stand-in": BUFFER + b"}\x8c\x01aNsb",
        "dict with a tuple as key": b"(" + b")" + b"\x85" * 200_000 + b"Nd",
        "dict without a value": b"(Nd",
        "set": b"\x8f(K\x01\x90",
    }.items(),
    ids=lambda item: item[0],
)
def test_opcodes_of_new_protocols_do_no_harm(tmp_path, opcodes):
    path = tmp_path / "hostile.tar.gz"
    small_cifar10(path, test_batch=b"\x80\x05" + LABELS_FOLLOW + opcodes[1] + b"s.")
    complaint_about(path, tmp_path / "data")


@pytest.mark.parametrize("protocol", [0, 4, 5])
def test_damage_to_a_batch_is_refused_or_leaves_a_batch(tmp_path, protocol):
    stream = random.Random(protocol)
    content = {"data": PIXELS[:1], "labels": np.array([1], ">i4"), "names": [np.int64(1), "a"]}
    good = pickle.dumps(content, protocol).replace(PIXELS[:1].tobytes(), bytes(3072))
    refused = 0
    for _ in range(600):
        damaged = bytearray(good)
        for _ in range(stream.choice((1, 1, 3))):
            # The pixels in the middle are of no interest.
            position = stream.choice((stream.randrange(250), -1 - stream.randrange(250)))
            damaged[position] = stream.choice((stream.randrange(256), damaged[position] ^ 1))
        try:
            images, labels = cifar_archive._read_batch(bytes(damaged), ARCHIVES["cifar10"], 10)
        except MemoryError:
            raise
        except Exception:  # Whatever it is, the error about the archive is made of it.
            refused += 1
            continue
        assert images.shape == (len(labels), 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert 0 <= labels.min() <= labels.max() < 10
    assert refused > 200


# --- bombs ---------------------------------------------------------------------------------------

ZEROS = gzip.compress(bytes(1 << 26), 9)  # 64 MiB in 64 KB; files of gzip may be joined


def bomb(path: Path, kind: str) -> None:
    """Write a few MB that unpack to many GB."""
    info = tarfile.TarInfo({"wanted": f"{FOLDER}/data_batch_1"}.get(kind, "other"))
    info.size = 8 << 30
    if kind == "header":  # of the following header, which tarfile reads by itself
        info.type = tarfile.XHDTYPE
    head = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    if kind == "many":  # empty members
        info.size = 0
        block = gzip.compress(info.tobuf() * (1 << 17), 9)
        path.write_bytes(block * 16)
        return
    if kind == "end":
        head = gzip.compress(bytes(1024))
    if kind == "sparse":
        info.type = tarfile.GNUTYPE_SPARSE
        head = gzip.compress(info.tobuf(tarfile.GNU_FORMAT))
    path.write_bytes(head + ZEROS * 128)


READER = r"""
import re, sys, time
from pathlib import Path
from utils.data.cifar_archive import ARCHIVES, read_archive
from utils.errors import UserError
for name in sys.argv[1:]:
    try:
        read_archive(Path(name), ARCHIVES["cifar10"])
        print("read", name)
    except UserError:
        pass
status = Path("/proc/self/status").read_text()
print(time.process_time(), int(re.search(r"VmHWM:\s+(\d+)", status)[1]) >> 10)
"""


def test_a_bomb_takes_neither_time_nor_memory(tmp_path):
    paths = [tmp_path / kind for kind in ("wanted", "unwanted", "header", "many", "sparse", "end")]
    for path in paths:
        bomb(path, path.name)
    paths.append(tmp_path / "copies")  # of one text as bytes, again and again
    text = b"X" + (1 << 24).to_bytes(4, "little") + bytes(1 << 24) + b"q\x01"
    copies = b"c_codecs\nencode\nq\x00(" + text + b"h\x00h\x01\x85R" * 1000 + b"t."
    small_cifar10(paths[-1], test_batch=b"\x80\x02" + copies)
    for path in paths:
        assert path.stat().st_size < 10 << 20
    result = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    (line,) = result.stdout.splitlines()
    seconds, mebibytes = map(float, line.split())
    assert seconds < 10
    assert mebibytes < 300
