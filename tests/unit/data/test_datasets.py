"""The data sets in memory: parts of them, their cache, the embedded one, and several workers."""

import hashlib
import json
import random
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from utils.data import cache as cache_module
from utils.data import synthetic
from utils.data.cache import measure_statistics, read_cache
from utils.data.datasets import LEGACY_STATISTICS, load_dataset
from utils.data.image_set import ImageSet
from utils.errors import UserError
from utils.files import ROOT


def test_a_part_of_the_data_is_the_same_in_every_run(cifar10, tmp_path):
    path, md5 = cifar10
    small, smaller = (
        load_dataset("cifar10", tmp_path, archive=path, md5=md5, train_size=n, test_size=5)
        for n in (50, 20)
    )
    assert np.array_equal(small.train_images[:20], smaller.train_images)
    assert len(small.test_labels) == 5
    with pytest.raises(UserError, match="--train-size 101"):
        load_dataset("cifar10", tmp_path, archive=path, md5=md5, train_size=101)


def test_the_fingerprint_tells_any_other_contents():
    data = load_dataset("synthetic10", "unused", train_size=20, test_size=10)
    assert data.fingerprint() == replace(data, train_images=data.train_images.copy()).fingerprint()
    darker = data.test_images.copy()
    darker[9, 31, 31, 2] -= 1
    others = (
        replace(data, test_images=darker),
        replace(data, train_labels=data.train_labels[::-1]),
        replace(data, classes=data.classes[::-1]),
        replace(data, std=LEGACY_STATISTICS[1]),
    )
    for other in others:
        assert other.fingerprint() != data.fingerprint()


def test_the_digests_of_the_images_do_not_depend_on_their_order():
    data = load_dataset("synthetic10", "unused", train_size=20, test_size=10)
    digests = data.content_digests()
    assert digests["train"] != digests["test"]
    turned = replace(
        data, train_images=data.train_images[::-1], train_labels=data.train_labels[::-1]
    )
    assert turned.content_digests() == digests
    exchanged = replace(data, train_labels=data.train_labels[::-1])
    darker = data.test_images.copy()
    darker[9, 31, 31, 2] ^= 1
    assert exchanged.content_digests()["train"] != digests["train"]
    assert replace(data, test_images=darker).content_digests()["test"] != digests["test"]
    twice = replace(data, train_images=data.train_images[[0] * 20])
    assert twice.content_digests()["train"] != digests["train"]


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
    for measured, stated in zip(measure_statistics(images), synthetic.STATISTICS, strict=True):
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


# --- the cache -----------------------------------------------------------------------------------


@pytest.fixture
def load(cifar10, tmp_path, capsys):
    """Load the small archive; returns the data and the printed lines."""
    path, md5 = cifar10

    def load():
        capsys.readouterr()
        data = load_dataset("cifar10", tmp_path / "d", archive=path, md5=md5)
        lines = capsys.readouterr().out.splitlines()
        assert all(line.isprintable() for line in lines)
        return data, lines

    return load


@pytest.fixture
def cache(load, tmp_path):
    """The path of a good cache file."""
    load()
    return tmp_path / "d" / ".cache" / "cifar-10-python.npz"


def test_the_cache_says_what_it_was_made_from(cache, cifar10):
    with np.load(cache) as file:
        meta = json.loads(bytes(file["meta"]))
    assert meta["fingerprint"] == cifar10[1]


def rewritten(cache, **changes) -> bytes:
    """The cache with other entries in its description."""
    with np.load(cache) as file:
        content = dict(file)
    meta = {**json.loads(bytes(content["meta"])), **changes}
    content["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(cache.with_suffix(".other.npz"), **content)
    return cache.with_suffix(".other.npz").read_bytes()


@pytest.mark.parametrize(
    "damage",
    {
        "another version": lambda cache: rewritten(cache, version=0),
        "other data": lambda cache: rewritten(cache, fingerprint="0" * 32),
        "other shapes": lambda cache: rewritten(cache, arrays=[]),
        "empty": lambda cache: b"",
        "half written": lambda cache: cache.read_bytes()[:5000],
        "zeros at its end": lambda cache: cache.read_bytes()[:5000] + bytes(5000),
        "a text": lambda cache: b"x" * 100,
        "a pickle": lambda cache: b"\x80\x02]q\x00.",
    }.items(),
    ids=lambda item: item[0],
)
def test_a_cache_that_is_of_no_use_is_made_again(load, cache, damage):
    cache.write_bytes(damage[1](cache))
    data, lines = load()
    (line,) = lines
    assert line.startswith(f"note: {cache} is made again (")
    again, lines = load()
    assert lines == []
    assert np.array_equal(again.train_images, data.train_images)


def test_nothing_is_made_again_of_an_archive_that_is_refused(cache, tmp_path, capsys):
    good = cache.read_bytes()
    foreign = tmp_path / "foreign.tar.gz"
    foreign.write_bytes(b"no archive")
    md5 = hashlib.md5(b"no archive").hexdigest()
    capsys.readouterr()
    with pytest.raises(UserError, match="not a readable cifar-10-python"):
        load_dataset("cifar10", tmp_path / "d", archive=foreign, md5=md5)
    assert capsys.readouterr().out == ""
    assert cache.read_bytes() == good


def flips_in(content: bytes, name: str, count: int):
    """Contents with one bit flipped; some in the header of an array, which decides what is read."""
    stream = random.Random(0)
    with zipfile.ZipFile(name) as file:
        heads = [m.header_offset + 30 + len(m.filename) for m in file.infolist()]
    for number in range(count):
        start, end = 0, len(content)
        if number % 2:
            start = stream.choice(heads)
            end = start + 200
        position = stream.randrange(start, end)
        yield (
            content[:position]
            + bytes([content[position] ^ 1 << stream.randrange(8)])
            + content[position + 1 :]
        )


def test_a_flipped_bit_in_the_cache_is_found(cache, cifar10):
    good, statistics = read_cache(cache, cifar10[1])
    found = 0
    for content in flips_in(cache.read_bytes(), cache, 400):
        cache.write_bytes(content)
        read = read_cache(cache, cifar10[1])
        if read is None:
            found += 1
            continue
        assert read[1] == statistics
        assert read[0][4] == good[4]
        for one, two in zip(read[0][:4], good[:4], strict=True):
            assert one.dtype == two.dtype
            assert np.array_equal(one, two)
    assert found > 300, "the others fell on dates and the like"


def test_a_header_that_names_fewer_images_is_found(cache, cifar10):
    """The reader compares a checksum only where it reads to the end."""
    content = cache.read_bytes()
    assert content.count(b"'shape': (100, 32, 32, 3)") == 1
    cache.write_bytes(content.replace(b"(100, 32, 32, 3)", b"(100, 32, 31, 3)"))
    assert read_cache(cache, cifar10[1]) is None


def test_a_folder_in_the_place_of_the_cache_costs_the_cache_only(load, cache):
    cache.unlink()
    cache.mkdir()
    data, lines = load()
    assert len(data.train_labels) == 100
    assert [line.split(" (")[0] for line in lines] == [
        f"note: {cache} is made again",
        f"note: {cache} cannot be written",
    ]
    assert list(cache.parent.iterdir()) == [cache]


def test_a_file_where_the_cache_should_be_costs_the_cache_only(load, cache):
    shutil.rmtree(cache.parent)
    cache.parent.write_text("")
    data, lines = load()
    assert len(data.train_labels) == 100
    (line,) = lines
    assert line.endswith("going on without a cache")


def test_a_cache_that_vanishes_costs_the_cache_only(load, cache, monkeypatch):
    real = cache_module.write_atomically

    def vanish(path, write):
        shutil.rmtree(path.parent)
        real(path, write)

    monkeypatch.setattr(cache_module, "write_atomically", vanish)
    cache.unlink()
    data, lines = load()
    assert len(data.train_labels) == 100
    (line,) = lines
    assert line == f"note: {cache} cannot be written (No such file or directory): going on " \
                   "without a cache"  # fmt: skip


def test_a_changed_folder_of_images_is_decoded_again(tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / part / "cat" / "0.png")
    load_dataset("folder", tmp_path)
    capsys.readouterr()
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "train" / "cat" / "1.png")
    assert len(load_dataset("folder", tmp_path).train_labels) == 2
    *_, line = capsys.readouterr().out.splitlines()
    assert "(made from other data or by another version)" in line


def test_leftovers_of_a_killed_process_are_cleared(load, cache):
    cache.unlink()
    (cache.parent / f".{cache.name}.123.tmp").write_text("half")
    load()
    assert list(cache.parent.iterdir()) == [cache]


# --- several workers -----------------------------------------------------------------------------

OTHER_DATA = """
import os, sys
sys.path[0] = {root!r}
from cifar import run
from tools.commands import engine_class
from utils.runtime.exit_codes import exit_process, run_worker
from utils.training import build
words = [word for word in sys.argv[1:] if not word.startswith("--local-rank")]
real = build.load_dataset
if os.environ.get("RANK", os.environ.get("HOROVOD_RANK")) == "1":
    build.load_dataset = lambda name, _, **options: real(name, {other!r}, **options)
exit_process(run_worker(engine_class(words[0]), run, words[1:]))
"""


@pytest.mark.parametrize(
    "engine", ["dist", pytest.param("horovod", marks=pytest.mark.slow)], indirect=True
)
def test_data_that_one_worker_lacks_ends_all(launch, tmp_path):
    """On a node whose disk does not hold what that of the others holds."""
    root, empty = tmp_path / "data", tmp_path / "empty"
    empty.mkdir()
    for part in ("train", "test"):
        (root / part / "cat").mkdir(parents=True)
        for name in ("0.png", "1.png"):
            Image.new("RGB", (32, 32)).save(root / part / "cat" / name)
    script = tmp_path / "script.py"
    script.write_text(OTHER_DATA.format(root=str(ROOT), other=str(empty)))
    words = f"-d folder --data {root} -a alexnet --train-batch 2 --epochs 1".split()
    result = launch([*words, "-c", str(tmp_path / "run")], script=script)
    (line,) = [line for line in result.stderr.splitlines() if "error: " in line]
    assert line.split("error: ")[1].startswith(f"--data {empty}: no folder 'train' in it")
    assert "exitcode: 2" in result.stderr or "exit with status code 2" in result.stdout
    assert not (tmp_path / "run").exists()
