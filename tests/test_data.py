"""The data sets: right pixels, one download, clear errors, nothing hostile let in."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from utils import download as download_module
from utils import synthetic
from utils.augment import ImageSet
from utils.cifar_archive import ARCHIVES, read_folder
from utils.data import _measured, load_dataset
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def silent(_: str) -> None:
    pass


# --- the official archives -----------------------------------------------------------------------


def batch(count: int, seed: int, key: str = "labels", classes: int = 10) -> bytes:
    """A batch file in CIFAR's layout."""
    random = np.random.RandomState(seed)
    content = {
        b"data": random.randint(0, 256, (count, 3072)).astype(np.uint8),
        key.encode(): random.randint(0, classes, count).tolist(),
    }
    return pickle.dumps(content, protocol=2)


def archive(path: Path, members: dict[str, bytes], folder: str = "cifar-10-batches-py") -> str:
    """Write a small archive; returns its md5."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def small_cifar10(path: Path, **changes: bytes) -> str:
    members = {f"data_batch_{i}": batch(20, i) for i in range(1, 6)}
    members["test_batch"] = batch(30, 9)
    members["batches.meta"] = pickle.dumps({b"label_names": [b"a"] * 10}, protocol=2)
    return archive(path, {**members, **changes})


@pytest.fixture
def cifar10(tmp_path):
    """A small archive in the official layout, and its md5."""
    path = tmp_path / "small.tar.gz"
    return path, small_cifar10(path)


def test_an_archive_on_disk_gives_the_pixels_that_were_packed(cifar10, tmp_path):
    path, md5 = cifar10
    for attempt in range(2):  # from the archive, then from the cache
        data = load_dataset("cifar10", tmp_path / "data", archive=path, md5=md5, notify=silent)
        assert data.train_images.shape == (100, 32, 32, 3), attempt
        assert data.test_images.shape == (30, 32, 32, 3)
        original = pickle.loads(batch(20, 2), encoding="bytes")
        image = original[b"data"][3].reshape(3, 32, 32).transpose(1, 2, 0)
        assert np.array_equal(data.train_images[23], image)
        assert data.train_labels[20:40].tolist() == original[b"labels"]
        assert data.mean == (0.4914, 0.4822, 0.4465)
        assert data.std == (0.2470, 0.2435, 0.2616)


def test_cifar100_takes_the_fine_labels(tmp_path):
    members = {
        "train": batch(50, 1, "fine_labels", 100),
        "test": batch(10, 2, "fine_labels", 100),
        "meta": pickle.dumps({b"fine_label_names": [b"x"] * 100}, protocol=2),
    }
    path = tmp_path / "small.tar.gz"
    md5 = archive(path, members, folder="cifar-100-python")
    data = load_dataset("cifar100", tmp_path, archive=path, md5=md5, notify=silent)
    assert len(data.classes) == 100
    assert (
        data.train_labels.tolist()
        == pickle.loads(members["train"], encoding="bytes")[b"fine_labels"]
    )


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


def test_a_changed_file_in_an_extracted_folder_is_not_used(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*ARCHIVES["cifar10"].train, "test_batch", "batches.meta"]:
        (folder / name).write_bytes(batch(5, 0))
    assert read_folder(folder, ARCHIVES["cifar10"]) is None


def test_the_wrong_archive_is_refused_with_both_digests(cifar10, tmp_path):
    path, md5 = cifar10
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", tmp_path, archive=path, notify=silent)
    assert md5 in str(caught.value)
    assert ARCHIVES["cifar10"].md5 in str(caught.value)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def test_code_in_a_batch_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    path = tmp_path / "hostile.tar.gz"
    md5 = small_cifar10(path, test_batch=pickle.dumps({b"data": Payload(marker)}, protocol=2))
    with pytest.raises(UserError, match="asks for"):
        load_dataset("cifar10", tmp_path / "data", archive=path, md5=md5, notify=silent)
    assert not marker.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_members_that_are_no_plain_files_are_refused(tmp_path, kind):
    path = tmp_path / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="plain file"):
        load_dataset("cifar10", tmp_path / "data", archive=path, md5=md5, notify=silent)


def test_members_that_point_outside_are_not_written(tmp_path):
    path = tmp_path / "hostile.tar.gz"
    (tmp_path / "in").mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name in ("../../escaped", str(tmp_path / "absolute"), "cifar-10-batches-py/../escaped"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"evil"))
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(UserError):
        load_dataset("cifar10", tmp_path / "in", archive=path, md5=md5, notify=silent)
    assert not [p for p in tmp_path.rglob("*") if p.name in ("escaped", "absolute")]


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_a_truncated_archive_is_bad_input(cifar10, tmp_path, share):
    path, _ = cifar10
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="archive"):
        load_dataset("cifar10", tmp_path / "data", archive=path, md5=md5, notify=silent)


# --- downloading ---------------------------------------------------------------------------------


class Server:
    """A real HTTP server on 127.0.0.1 whose answers a test chooses by path."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.requests: list[tuple[str, str | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.requests.append((self.path, self.headers.get("Range")))
                getattr(server, self.path.strip("/").split("/")[0])(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, handler, content, status=200, length=None, **headers):
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    def good(self, handler):
        wanted = handler.headers.get("Range")
        if not wanted:
            self.answer(handler, self.content)
            return
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        size = len(self.content)
        rest = self.content[start:]
        if rest:
            span = f"bytes {start}-{size - 1}/{size}"
            self.answer(handler, rest, 206, Content_Range=span)
        else:
            self.answer(handler, b"", 416)

    def cut(self, handler):
        """Breaks off in the middle the first time."""
        if len(self.requests) == 1:
            half = self.content[: len(self.content) // 2]
            self.answer(handler, half, length=len(self.content))
        else:
            self.good(handler)

    def missing(self, handler):
        self.answer(handler, b"no", 404)

    def wrong(self, handler):
        self.answer(handler, b"x" * 1000)

    def huge(self, handler):
        self.answer(handler, b"", length=1 << 40)

    def loop(self, handler):
        self.answer(handler, b"", 302, Location=self.url + "/loop")


@pytest.fixture
def server(cifar10, monkeypatch):
    """A server of the small archive; the official address leads nowhere."""
    monkeypatch.setattr("utils.data.SERVER", "http://127.0.0.1:9/")
    monkeypatch.setattr(download_module, "TIMEOUT", 5.0)
    started = Server(cifar10[0].read_bytes())
    yield started
    started.http.shutdown()
    started.http.server_close()


def fetch(server, cifar10, root, *paths):
    urls = [f"{server.url}/{path}" for path in paths]
    return load_dataset("cifar10", root, urls=urls, md5=cifar10[1], notify=silent)


def test_a_download_that_breaks_off_is_continued(server, cifar10, tmp_path):
    assert len(fetch(server, cifar10, tmp_path / "d", "cut/file").train_labels) == 100
    (_, first), (_, second) = server.requests
    assert first is None
    assert second == f"bytes={len(server.content) // 2}-"
    assert not list((tmp_path / "d").glob("*.part"))


def test_a_part_of_an_earlier_process_is_continued(server, cifar10, tmp_path):
    (tmp_path / "d").mkdir()
    part = tmp_path / "d" / "cifar-10-python.tar.gz.part"
    part.write_bytes(server.content[:100])
    fetch(server, cifar10, tmp_path / "d", "good/file")
    assert server.requests == [("/good/file", "bytes=100-")]


def test_the_next_mirror_is_tried(server, cifar10, tmp_path):
    fetch(server, cifar10, tmp_path / "d", "missing/file", "loop/file", "huge/file", "good/")
    assert [path for path, _ in server.requests][-1] == "/good/cifar-10-python.tar.gz"


def test_another_file_than_announced_is_not_kept(server, cifar10, tmp_path):
    with pytest.raises(UserError) as caught:
        fetch(server, cifar10, tmp_path / "d", "wrong/file")
    message = str(caught.value)
    assert cifar10[1] in message
    assert hashlib.md5(b"x" * 1000).hexdigest() in message
    assert not list((tmp_path / "d").glob("cifar*"))


def test_without_network_the_ways_out_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.data.SERVER", "http://127.0.0.1:9/")
    with pytest.raises(UserError) as caught:
        load_dataset("cifar10", tmp_path / "d", notify=silent)
    for way_out in ("--data-url", "--data-archive", "-d folder", "-d synthetic10"):
        assert way_out in str(caught.value)
    assert "\n" not in str(caught.value)


LOADER = """
import sys
from utils import data
data.SERVER = "http://127.0.0.1:9/"
found = data.load_dataset("cifar10", sys.argv[1], urls=[sys.argv[2]], md5=sys.argv[3])
print(len(found.train_labels))
"""


def test_four_processes_at_once_download_once(server, cifar10, tmp_path):
    command = [sys.executable, "-c", LOADER, tmp_path / "d", server.url + "/good/f", cifar10[1]]
    processes = [
        subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert out.splitlines()[-1] == "100"
    assert len(server.requests) == 1


# --- folders of images ---------------------------------------------------------------------------


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


def load_folder(root, **options):
    return load_dataset("folder", root, notify=options.pop("notify", silent), **options)


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


def test_every_kind_of_image_becomes_rgb_of_the_right_size(images):
    folder = images / "train" / "cat"
    save(folder / "a-grey.jpg", Image.new("L", (32, 32), 200))
    save(folder / "b-cmyk.jpg", Image.new("CMYK", (40, 20), (0, 255, 255, 0)))
    save(folder / "c-alpha.png", Image.new("RGBA", (32, 32), (1, 2, 3, 128)))
    save(folder / "d-16bit.png", Image.fromarray(np.full((32, 32), 51200, np.uint16)))
    frames = [Image.new("P", (32, 32), i) for i in range(3)]
    save(folder / "e-animated.gif", frames[0], save_all=True, append_images=frames[1:])
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    lines: list[str] = []
    data = load_folder(images, notify=lines.append)
    assert len(data.train_labels) == 11
    grey, cmyk = data.train_images[3], data.train_images[4]
    assert abs(int(grey[0, 0, 0]) - 200) < 4
    assert cmyk[0, 0, 0] > 200
    assert cmyk[0, 0, 1] < 60
    assert data.train_images[6][0, 0].tolist() == [200, 200, 200]
    assert any("1 of 13 images were not 32x32" in line for line in lines)


def test_a_changed_folder_is_decoded_again_and_a_damaged_cache_is_replaced(images):
    load_folder(images)
    save(images / "train" / "cat" / "9.png", Image.new("RGB", (32, 32), (9, 9, 9)))
    assert len(load_folder(images).train_labels) == 7
    cache = images / ".cache" / "folder.npz"
    for damage in (b"", cache.read_bytes()[:5000], b"x" * 100):
        cache.write_bytes(damage)
        assert len(load_folder(images).train_labels) == 7
    assert [p.name for p in (images / ".cache").iterdir() if p.suffix == ".tmp"] == []


def test_leftovers_of_a_killed_process_are_cleared(images):
    (images / ".cache").mkdir()
    (images / ".cache" / ".folder.npz.123.tmp").write_text("half")
    load_folder(images)
    assert not list((images / ".cache").glob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_costs_the_cache_only(images):
    images.chmod(0o555)
    lines: list[str] = []
    assert len(load_folder(images, notify=lines.append).train_labels) == 6
    assert any("without a cache" in line for line in lines)
    images.chmod(0o755)


def test_a_file_where_the_cache_should_be_costs_the_cache_only(images):
    (images / ".cache").write_text("")
    lines: list[str] = []
    assert len(load_folder(images, notify=lines.append).train_labels) == 6
    assert any("without a cache" in line for line in lines)


def test_what_is_wrong_with_a_folder_is_said(images, tmp_path):
    def complaint():
        with pytest.raises(UserError) as caught:
            load_folder(images)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    bad = images / "train" / "dog" / "bad.png"
    bad.write_bytes((images / "train" / "dog" / "0.png").read_bytes()[:60])
    assert str(bad) in complaint()
    bad.write_bytes(b"")
    assert str(bad) in complaint()
    bad.unlink()
    (bad.parent / "lost.png").symlink_to(tmp_path / "nowhere.png")
    assert "lost.png" in complaint()
    (bad.parent / "lost.png").unlink()
    (images / "test" / "bird").mkdir()
    assert "test/bird" in complaint()
    (images / "train" / "bird").mkdir()
    assert "no images in train/bird" in complaint()
    (images / "train").rename(images / "training")
    assert "no folder 'train'" in complaint()
    (images / "train").mkdir()
    assert "no class folders in train/" in complaint()


def test_a_part_of_the_data_is_the_same_in_every_run(cifar10, tmp_path):
    path, md5 = cifar10
    small, smaller = (
        load_dataset("cifar10", tmp_path, archive=path, md5=md5, train_size=n, test_size=5,
                     notify=silent)
        for n in (50, 20)
    )  # fmt: skip
    assert np.array_equal(small.train_images[:20], smaller.train_images)
    assert len(small.test_labels) == 5
    with pytest.raises(UserError, match="--train-size 101"):
        load_dataset("cifar10", tmp_path, archive=path, md5=md5, train_size=101, notify=silent)


# --- the embedded data set -----------------------------------------------------------------------


def test_synthetic_images_are_the_same_everywhere_and_however_many():
    images, labels = synthetic.generate(10, train=True, count=700)
    more, _ = synthetic.generate(10, train=True, count=1200)
    assert np.array_equal(images, more[:700])
    hundred, fine = synthetic.generate(100, train=True, count=700)
    assert np.array_equal(images, hundred)
    assert np.array_equal(fine % 10, labels)
    test, _ = synthetic.generate(10, train=False, count=700)
    assert not np.array_equal(images, test)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest == "2f8719b6429f1a84de93bb16fa1240d10da6ba522150c10f3f492827064e28cd"


def test_synthetic_statistics_are_those_of_the_images():
    images, _ = synthetic.generate(10, train=True, count=10_000)
    for measured, stated in zip(_measured(images), synthetic.STATISTICS, strict=True):
        assert measured == pytest.approx(stated, abs=0.003)


def accuracy(network: nn.Module, rate: float, epochs: int, count: int) -> float:
    """Train on synthetic10 and test, in per cent."""
    mean, std = synthetic.STATISTICS
    sets = [
        ImageSet(*synthetic.generate(10, train, n), mean, std, device=torch.device("cpu"))
        for train, n in ((True, count), (False, 1000))
    ]
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9)
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        for index in torch.randperm(count).split(64):
            images, labels = sets[0].batch(index)
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        images, labels = sets[1].batch(torch.arange(1000))
        return 100 * (network(images).argmax(1) == labels).float().mean().item()


def test_synthetic10_needs_more_than_a_linear_classifier_and_a_small_network_is_enough():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    assert accuracy(linear, rate=0.002, epochs=5, count=3000) < 60

    def stage(channels_in, channels_out):
        layers = (nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                  nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2))  # fmt: skip
        return nn.Sequential(*layers)

    small = nn.Sequential(
        stage(3, 16), stage(16, 32), stage(32, 64), nn.Flatten(), nn.Linear(1024, 10)
    )
    assert accuracy(small, rate=0.02, epochs=3, count=3000) > 90


def test_the_cache_says_what_it_was_made_from(cifar10, tmp_path):
    path, md5 = cifar10
    load_dataset("cifar10", tmp_path, archive=path, md5=md5, notify=silent)
    with np.load(tmp_path / ".cache" / "cifar-10-python.npz") as file:
        meta = json.loads(bytes(file["meta"]))
    assert meta["fingerprint"] == md5
