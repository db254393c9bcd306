"""Damaged and hostile files, and what reading them did.

Not a test module: test_fuzz.py starts it, as ``python fuzzing.py KIND FIRST COUNT FOLDER``, so that
a file that kills its reader does not take the tests along. Each case is a function of its number
alone; the number of the one being read stands in FOLDER/case.
"""

import encodings.zlib_codec  # noqa: F401 (torch lets a checkpoint name any encoding)
import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(path) for path in Path(__file__).resolve().parents[1:3]]

from helpers.archives import members_of_cifar10, write_archive
from utils.checkpoint.format import FORMAT, LATEST, load
from utils.checkpoint.manager import save
from utils.checkpoint.weights import pack
from utils.data.cifar_archive import ARCHIVES, read_archive
from utils.errors import UserError

Case = tuple[str, Callable[[], str]]  # its name, and what reads it

LIMIT = 30  # seconds for one case, on a busy machine
MEMORY = 4 << 30  # bytes beyond what the libraries take


# --- damage --------------------------------------------------------------------------------------


def damage(content: bytes, stream: random.Random) -> bytes:
    """The content after one to three accidents."""
    for _ in range(stream.choice((1, 1, 1, 2, 3))):
        content = stream.choice(ACCIDENTS)(content, stream)
    return content


def _range(content: bytes, stream: random.Random) -> tuple[int, int]:
    """The bounds of a part, more often a short than a long one."""
    start = stream.randrange(len(content) + 1)
    return start, min(len(content), start + int(stream.choice((1, 4, 64, 4096)) * stream.random()))


def truncated(content: bytes, stream: random.Random) -> bytes:
    return content[: stream.randrange(len(content) + 1)]


def flipped(content: bytes, stream: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(changed), stream.choice((1, 1, 2, 8)))):
        changed[stream.randrange(len(changed))] ^= 1 << stream.randrange(8)
    return bytes(changed)


def overwritten(content: bytes, stream: random.Random) -> bytes:
    start, end = _range(content, stream)
    filling = stream.choice((bytes, lambda n: b"\xff" * n, stream.randbytes))
    return content[:start] + filling(end - start) + content[end:]


def spliced(content: bytes, stream: random.Random) -> bytes:
    """With a copy of one part over another."""
    start, end = _range(content, stream)
    place = stream.randrange(len(content) + 1)
    return content[:place] + content[start:end] + content[place + end - start :]


def removed(content: bytes, stream: random.Random) -> bytes:
    start, end = _range(content, stream)
    return content[:start] + content[end:]


def inserted(content: bytes, stream: random.Random) -> bytes:
    start, end = _range(content, stream)
    filling = stream.choice((content[start:end], stream.randbytes(end - start)))
    place = stream.randrange(len(content) + 1)
    return content[:place] + filling + content[place:]


def swapped(content: bytes, stream: random.Random) -> bytes:
    """With two halves of a part exchanged."""
    start, end = _range(content, stream)
    middle = (start + end) // 2
    return content[:start] + content[middle:end] + content[start:middle] + content[end:]


ACCIDENTS = (truncated, flipped, flipped, overwritten, spliced, removed, inserted, swapped)


def refused(error: UserError) -> str:
    assert str(error).isprintable(), error
    return "refused"


# --- archives ------------------------------------------------------------------------------------

MEMBERS = members_of_cifar10(count=2)


class Archives:
    """Cases of damaged archives: the packed file, the tar in it, or a batch in that."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "archive.tar.gz"
        write_archive(self.path, MEMBERS)
        self.packed = self.path.read_bytes()
        write_archive(self.path, MEMBERS, mode="w")
        self.tar = self.path.read_bytes().rstrip(b"\0") + bytes(1024)

    def write(self, stream: random.Random) -> None:
        kind = stream.randrange(4)
        if kind == 0:
            self.path.write_bytes(damage(self.packed, stream))
        elif kind == 1:
            self.path.write_bytes(damage(self.tar, stream))
        else:
            members = dict(MEMBERS)
            one, two = stream.sample(sorted(members), 2)
            if kind == 2:
                members[one] = damage(members[one], stream)
            else:
                members[one], members[two] = members[two], members[one]
            write_archive(self.path, members, mode="w")

    def read(self) -> str:
        """Return "refused", or "loaded" what training can use."""
        try:
            *arrays, names = read_archive(self.path, ARCHIVES["cifar10"])
        except UserError as error:
            return refused(error)
        for images, labels in zip(arrays[::2], arrays[1::2], strict=True):
            assert images.dtype == np.uint8
            assert images.shape == (len(labels), 32, 32, 3)
            assert labels.dtype == np.int64
            assert 0 <= labels.min() <= labels.max() < len(names)
        return "loaded"


# --- checkpoints ---------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    """A small one with all that a real one holds."""
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(8, 3 + i) for i in range(4)}
    buffers = {str(i): {"momentum_buffer": torch.randn(8, 3 + i)} for i in range(4)}
    return {
        "format": FORMAT,
        "arch": "resnet",
        "classes": ["cat", "dog"],
        "options": {"lr": 0.1, "schedule": [81, 122], "resume": None, "nesterov": False},
        "epoch": 3,
        "best_acc": 91.25,
        "state_dict": {**weights, "layers.4.num_batches_tracked": torch.tensor(7)},
        "optimizer": {"state": buffers, "param_groups": [{"lr": 0.1, "params": [0, 1, 2, 3]}]},
    }


def records_of(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_records(path: Path, records: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in records.items():
            file.writestr(name, content)


class Checkpoints:
    """Cases of damaged checkpoints: the file, a record in it, or two records exchanged."""

    def __init__(self, folder: Path) -> None:
        save(folder, state(), is_best=False)
        self.path = folder / LATEST
        self.whole = self.path.read_bytes()
        self.records = records_of(self.path)
        self.wanted = load(self.path)

    def write(self, stream: random.Random) -> None:
        kind = stream.randrange(4)
        if kind < 2:
            self.path.write_bytes(damage(self.whole, stream))
            return
        records = dict(self.records)
        one, two = stream.sample(sorted(records), 2)
        if kind == 2:
            if stream.random() < 0.7:
                one = next(name for name in records if name.endswith("data.pkl"))
            records[one] = damage(records[one], stream)
        else:
            records[one], records[two] = records[two], records[one]
        write_records(self.path, records)

    def read(self) -> str:
        """Return "refused", "loaded" as it was saved, or "changed"."""
        try:
            found = load(self.path)
        except UserError as error:
            return refused(error)
        assert type(found) is dict
        if same(found, self.wanted):
            return "loaded"
        return "changed"


def same(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and bool((one == two).all())
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    return type(one) is type(two) and one == two


# --- weights alone -------------------------------------------------------------------------------


ABOUT = {
    "classes": ["cat", "dog"],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "trained_epochs": 3,
}


class Weights:
    """Cases of damaged safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "weights.safetensors"
        self.weights = state()["state_dict"]
        self.whole = pack(self.weights, ABOUT)
        self.path.write_bytes(self.whole)
        self.wanted = load(self.path)

    def write(self, stream: random.Random) -> None:
        self.path.write_bytes(damage(self.whole, stream))

    def read(self) -> str:
        """Return "refused", "loaded" as it was saved, "changed", or "foreign".

        A file whose words are gone, digest included, is one of another program.
        """
        try:
            found = load(self.path)
        except UserError as error:
            return refused(error)
        if "classes" not in found:
            return "foreign"
        return "loaded" if same(found, self.wanted) else "changed"


def hostile_weights(folder: Path, marker: Path) -> Iterator[Case]:
    """Files whose headers lie, and words about weights that are none of ours."""
    cases = Weights(folder)
    for about in (
        {"classes": "cat"}, {"classes": [1, 2]}, {"classes": None}, {"mean": [1.0]},
        {"std": [1, "x", 2]}, {"std": {"a": 1}}, {"state_dict": {}}, {"format": 2},
        {"optimizer": {"state": {}}}, {"memory_format": []}, {"acc": "x"}, {"versions": 3},
        {"dataset": [1]}, {"dataset": "cifar10"}, {"trained_epochs": "x"}, {"std": [1.0, 1.0, 0.0]},
    ):  # fmt: skip
        cases.path.write_bytes(pack(cases.weights, about))
        yield f"{about}", cases.read
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    words = {"cifar-allreduce": '{"classes": ["cat"]}'}
    for name, header in {
        "no digest": {"a": tensor, "__metadata__": words},
        "words that are no JSON": {"a": tensor, "__metadata__": {"cifar-allreduce": "{"}},
        "deep words": {"a": tensor, "__metadata__": {"cifar-allreduce": "[" * 100_000}},
        "a list of words": {"a": tensor, "__metadata__": {"cifar-allreduce": "[1]"}},
        "metadata that is no dictionary": {"a": tensor, "__metadata__": []},
        "a tensor of 1 TB": {"a": {**tensor, "shape": [1 << 38], "data_offsets": [0, 1 << 40]}},
        "a tensor behind the end": {"a": {**tensor, "data_offsets": [8, 16]}},
        "two tensors in one place": {"a": tensor, "b": tensor},
        "an unknown dtype": {"a": {**tensor, "dtype": "X9"}},
        "no tensor": {},
    }.items():
        text = json.dumps(header).encode()
        cases.path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        yield name, cases.read
    assert not marker.exists()


# --- hostile pickles -----------------------------------------------------------------------------


def call(name: str, *arguments: bytes) -> bytes:
    """Opcodes that call a global, such as "os system", with arguments given as opcodes."""
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(arguments) + b"tR"


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def attribute(value: bytes, name: str) -> bytes:
    return call("builtins getattr", value, text(name))


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(b"J" + v.to_bytes(4, "little", signed=True) for v in values) + b"t"


def hostile_values(marker: Path) -> dict[str, bytes]:
    """Opcodes of a value whose making would do harm, by what it is."""
    touch = f"touch {marker}"
    code = f"__import__('os').system({touch!r})"
    module = call("builtins __import__", text("os"))
    array = call("numpy._core.multiarray _reconstruct",
                 b"cnumpy\nndarray\n", numbers(0), text("b"))  # fmt: skip
    kind = call("numpy dtype", text("u1"))
    commands = {
        name: call(name, text(touch))
        for name in ("os system", "posix system", "subprocess getoutput", "os popen",
                     "commands getoutput", "subprocess.os system")
    }  # fmt: skip
    codes = {
        name: call(name, text(code))
        for name in ("builtins eval", "builtins exec", "__builtin__ eval", "timeit timeit",
                     "numpy.lib._utils_impl safe_eval", "torch._dynamo.utils eval",
                     "cProfile run", "doctest debug_script")
    }  # fmt: skip
    imports = {
        name: call(name, text("antigravity"))
        for name in ("builtins __import__", "importlib import_module", "runpy run_module")
    }
    files = {
        name: call(name, text(str(marker)), text("w"))
        for name in ("builtins open", "io open", "_io FileIO", "codecs open", "numpy memmap",
                     "logging FileHandler", "torch.serialization _open_file", "gzip open")
    }  # fmt: skip
    paths = call("pathlib PosixPath", text(str(marker)))
    return {
        **commands, **codes, **imports, **files,
        "a module's name alone": b"cantigravity\ngeekhash\n",
        "subprocess Popen": call("subprocess Popen", b"]" + text("touch") + b"a"
                                 + text(str(marker)) + b"a"),
        "getattr of a module": attribute(module, "system") + b"(" + text(touch) + b"tR",
        "getattr of a class": attribute(b"cnumpy\nndarray\n", "tofile"),
        "pathlib": attribute(paths, "touch") + b")R",
        "map": call("builtins list", call("builtins map", b"cos\nsystem\n",
                                          b"]" + text(touch) + b"a")),
        "functools": call("functools partial", b"cos\nsystem\n", text(touch)) + b")R",
        "operator": call("operator methodcaller", text("system"), text(touch))
                    + b"(" + module + b"tR",
        "dotted name": b"\x80\x04" + text("os") + text("path.os.system") + b"\x93("
                       + text(touch) + b"tR",
        "old instance": b"(" + text(touch) + b"ios\nsystem\n",
        "object": b"(cos\nsystem\n" + text(touch) + b"o",
        "new object": b"csubprocess\nPopen\n(" + text(touch) + b"t\x81",
        "extension": b"\x82\x01",
        "persistent id": b"Pos.system\n",
        "persistent object": text(touch) + b"Q",
        "state of a function": b"c_codecs\nencode\nN}" + text("__defaults__") + b"Ns\x86b",
        "state of a class": b"cnumpy._core.multiarray\n_reconstruct\nN}" + text("__setstate__")
                            + b"cos\nsystem\ns\x86b",
        "state of an array": array + b"(K\x01" + numbers(1 << 30) + kind + b"\x89"
                             + text("abc") + b"tb",
        "array of everything": call("numpy._core.multiarray _reconstruct",
                                    b"cnumpy\nndarray\n", numbers(1 << 30, 1 << 10), text("b")),
        "array of objects": array + b"(K\x01" + numbers(2) + call("numpy dtype", text("O"))
                            + b"\x89]" + text("a") + b"ab" + b"tb",
        "kind with fields": kind + b"(K\x03" + text("|") + b"N" + text("x") + b"\x85}" + text("x")
                            + kind + numbers(1 << 30) + b"\x86s" + numbers(-1)[1:-1]
                            + numbers(-1)[1:-1] + b"K\x00tb",
        "encoding": call("_codecs encode", text("a"), text("zlib")),
        "memo far away": b"Nr\xff\xff\xff\x7f",
        "bytes far away": b"\x8e" + (1 << 60).to_bytes(8, "little"),
        "bytearray far away": b"\x96" + (1 << 35).to_bytes(8, "little"),
        "integer far away": b"\x8b" + (1 << 30).to_bytes(4, "little"),
        "list of itself": b"]q\x01(h\x01h\x01e",
        "depth of lists": b"]" * 20_000 + b"a" * 19_999,
        "set of everything": b"\x8f(" + b"K\x01" * 10 + b"\x90",
        "cut short": b"X\xff\xff\xff\x7fabc",
    }  # fmt: skip


def hostile_archives(folder: Path, marker: Path) -> Iterator[Case]:
    """Archives with such a value in a batch, each with what reads it."""
    cases = Archives(folder)
    content = MEMBERS["test_batch"][:-2]  # without the opcodes that end it
    values = hostile_values(marker)
    batches = {
        **{f"{name}, for a batch": b"\x80\x02" + value + b"." for name, value in values.items()},
        **{f"{name}, for the labels": content + text("labels") + value + b"u."
           for name, value in values.items()},
        **{f"{name}, beside them": content + text("more") + value + b"u."
           for name, value in values.items()},
        # To hash a tuple in a tuple in a tuple ... overflows the stack of the process.
        "depth of a key": content + text("more") + b"}N" + b"\x85" * 200_000 + b"Ns" + b"u.",
        "many lists": content + text("more") + b"](" + b"]" * 600_000 + b"eu.",
    }  # fmt: skip
    for name, batch in batches.items():
        write_archive(cases.path, {**MEMBERS, "test_batch": batch}, mode="w")
        yield name, cases.read


class Payload:
    """Calls what it is told to when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile_checkpoints(folder: Path, marker: Path) -> Iterator[Case]:
    """Checkpoints with such a value, in today's format and in the one before torch 1.6."""
    cases = Checkpoints(folder)
    (pickled,) = (name for name in cases.records if name.endswith("data.pkl"))
    payloads = {
        "os.system": Payload(os.system, f"touch {marker}"),
        "eval": Payload(eval, f"__import__('os').system('touch {marker}')"),
        "getattr": Payload(getattr, Payload(__import__, "os"), "system"),
        "torch.load": Payload(torch.load, str(marker)),
    }
    odd = {
        "a sparse tensor": {"more": torch.eye(3).to_sparse()},
        "a tensor without content": {"more": torch.empty(3, device="meta")},
        "a tensor of 1 TB": {"more": torch.zeros(1).expand(1 << 38)},
        "weights of 1 TB": {"state_dict": {"weight": torch.zeros(1).expand(1 << 38)}},
        "a quantised tensor": {"more": torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8)},
        "numbers for names": {"state_dict": {1: torch.ones(3)}},
        "no weights": {"state_dict": {"weight": [1, 2]}},
        "a word for a number": {"format": "two"},
        "the digest of another": {"digest": "0" * 64},
    }
    for name, changes in odd.items():
        torch.save({**state(), **changes}, cases.path)
        yield f"{name}, without a digest", cases.read
        torch.save({**state(), **changes, "format": 1}, cases.path)
        yield f"{name}, older", cases.read
    for name, payload in payloads.items():
        save(folder, {**state(), "more": payload}, is_best=False)
        yield f"{name}, saved", cases.read
        torch.save({**state(), "more": payload}, cases.path, _use_new_zipfile_serialization=False)
        yield f"{name}, saved in the old format", cases.read
    for name, value in hostile_values(marker).items():
        whole = cases.records[pickled][:-2] + text("more") + value + b"u."
        for place, content in (("alone", b"\x80\x02" + value + b"."), ("beside the state", whole)):
            write_records(cases.path, {**cases.records, pickled: content})
            yield f"{name}, {place}", cases.read
        cases.path.write_bytes(b"\x80\x02" + value + b".")
        yield f"{name}, no archive", cases.read
    write_records(cases.path, {**cases.records, pickled.replace("data.pkl", "constants.pkl"): b""})
    yield "looks like TorchScript", cases.read


# --- watching ------------------------------------------------------------------------------------


class AuditHook:
    """Notes what reading a file must not do, by the interpreter's own audit events."""

    FORBIDDEN = (
        "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "os.remove", "os.rename",
        "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.putenv",
        "subprocess.", "pty.", "shutil.", "socket.", "tempfile.", "webbrowser.", "code.__new__",
        "compile", "exec", "import", "marshal.", "function.__new__",
    )  # fmt: skip

    def __init__(self) -> None:
        self.on = False
        self.found: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            _, mode, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or set(str(mode or "")) & set("wax+"):
                self.found.append(f"open {arguments}")
        elif event == "import":
            if arguments[0] not in sys.modules:
                self.found.append(f"import {arguments[0]}")
        elif event.startswith(self.FORBIDDEN):
            self.found.append(f"{event} {arguments}"[:300])


def read_watched(watch: AuditHook, read: Callable[[], str]) -> str:
    """Read one file within the limit of time; raises AssertionError at what must not be."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    watch.on = True
    try:
        return read()
    finally:
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
        assert not watch.found, watch.found


def run_cases(
    watch: AuditHook, cases: Iterable[Case], note: Callable[[str], Any]
) -> dict[str, Any]:
    """Read each case; what came of them."""
    results: dict[str, int] = {}
    times: dict[str, float] = {}
    changed = []
    for name, read in cases:
        note(name)
        before = time.perf_counter()
        result = read_watched(watch, read)
        times[name] = time.perf_counter() - before
        results[result] = results.get(result, 0) + 1
        if result == "changed":
            changed.append(name)
    return {
        "cases": len(times),
        **results,
        "changed": changed,
        "mean_ms": round(1e3 * sum(times.values()) / len(times), 2),
        "longest_ms": round(1e3 * max(times.values()), 1),
        "longest": max(times, key=times.__getitem__),
    }


def main() -> None:
    """Read the cases of one kind and print what came of them as JSON."""
    kind, first, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    work, marker, case = folder / "work", folder / "marker", folder / "case"
    work.mkdir()
    watch = AuditHook()
    damaged, hostile = {
        "archives": (Archives, hostile_archives),
        "checkpoints": (Checkpoints, hostile_checkpoints),
        "weights": (Weights, hostile_weights),
    }[kind]
    cases = damaged(work)

    def numbered(stem: str, numbers: range) -> Iterator[Case]:
        for number in numbers:
            case.write_text(f"{stem}{number}")
            cases.write(random.Random(f"{stem}{number}"))
            yield f"{stem}{number}", cases.read

    for _, read in numbered("warm-up ", range(30)):  # what libraries import at their first error
        read()
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    report = {
        "damaged": run_cases(watch, numbered("", range(first, first + count)), case.write_text),
        "hostile": run_cases(watch, hostile(work, marker), case.write_text),
    }
    if kind == "checkpoints":
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # a wish that is not for this suite
        report["forced"] = run_cases(watch, hostile(work, marker), case.write_text)
    shutil.rmtree(work)
    status = Path("/proc/self/status").read_text()
    report["peak_MiB"] = int(status.split("VmHWM:")[1].split()[0]) >> 10
    print(json.dumps(report))


if __name__ == "__main__":
    main()
