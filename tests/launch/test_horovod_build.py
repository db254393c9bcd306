"""tools/build_horovod.sh: its steps around a stand-in for pip, and what it has built for real."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
from pathlib import Path

import pytest

from utils.files import ROOT

SCRIPT = ROOT / "tools/build_horovod.sh"
PATCH = ROOT / "tools/horovod-0.28.1.patch"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar-allreduce/horovod"
SDIST = "horovod-0.28.1.tar.gz"

# Does what pip would, for an environment that holds nothing; FAKE_WHEEL says how a build goes.
PIP = """
import os, shutil, sys, sysconfig, tarfile, time
from pathlib import Path

words, site = sys.argv[1:], Path(sysconfig.get_path("purelib"))
with open(os.environ["FAKE_CALLS"], "a") as calls:
    print(*words, file=calls)
if words[0] == "download":
    target = Path(words[words.index("--dest") + 1])
    (target / "horovod-0.28.1").mkdir()
    with tarfile.open(target / "horovod-0.28.1.tar.gz", "w:gz") as archive:
        archive.add(target / "horovod-0.28.1", "horovod-0.28.1")
elif words[0] == "wheel":
    if os.environ.get("FAKE_WHEEL") == "fails":
        print(*(f"line {i} of the compiler" for i in range(100)), sep="\\n")
        sys.exit(1)
    if os.environ.get("FAKE_WHEEL") == "hangs":
        Path(os.environ["FAKE_CALLS"]).with_name("hangs").touch()
        time.sleep(60)
    target = Path(words[words.index("--wheel-dir") + 1])
    target.mkdir()
    (target / f"horovod-0.28.1+{os.environ['HOROVOD_LOCAL_VERSION']}-py3.whl").touch()
elif words[0] == "install" and words[-1].endswith(".whl"):
    version = Path(words[-1]).name.split("-")[1]
    info = site / f"horovod-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Name: horovod\\nVersion: {version}\\n")
    for part in ("torch", "runner"):
        (site / "horovod" / part).mkdir(parents=True, exist_ok=True)
    library = "mpi_lib_v2" + sysconfig.get_config_var("EXT_SUFFIX")
    (site / "horovod/torch" / library).touch()
    shutil.copy(site / "launch.py", site / "horovod/runner/launch.py")
elif words[0] == "uninstall":
    shutil.rmtree(site / "horovod", ignore_errors=True)
"""


class Place:
    """Environments with stand-ins for torch and pip, tools that do nothing, and a cache."""

    def __init__(self, folder: Path, run) -> None:
        self.folder, self._run = folder, run
        self.cache, self.temporary = folder / "cache", folder / "tmp"
        self.tools, self.calls = folder / "bin", folder / "calls"
        self.temporary.mkdir()
        self.tools.mkdir()
        for name in ("c++", "cmake", "make", "patch"):
            self.add_tool(name, "echo 12.2.0")
        self.add_tool("sha256sum", 'read -r digest file; test -f "$file"')
        self.add_tool("nvidia-smi", "exit 1")

    def add_tool(self, name: str, body: str) -> None:
        (self.tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.tools / name).chmod(0o755)

    def environment(self, name="env", torch="2.9.0+cpu", cuda=None) -> Path:
        venv.create(self.folder / name, symlinks=True)
        python = self.folder / name / "bin/python"
        site = next((self.folder / name).glob("lib/python*/site-packages"))
        (site / "pip").mkdir()
        (site / "pip/__main__.py").write_text(PIP)
        (site / "launch.py").write_text("")
        if torch:
            (site / "torch").mkdir()
            (site / "torch/__init__.py").write_text("raise RuntimeError('torch was imported')")
            (site / "torch/version.py").write_text(f"__version__ = {torch!r}\ncuda = {cuda!r}\n")
        return python

    def variables(self, **changes) -> dict[str, str]:
        return {
            "PATH": f"{self.tools}:{os.defpath}",
            "XDG_CACHE_HOME": str(self.cache),
            "TMPDIR": str(self.temporary),
            "FAKE_CALLS": str(self.calls),
            **changes,
        }

    def call(self, python, **changes) -> subprocess.CompletedProcess:
        command = ["/bin/bash", SCRIPT, python]
        return self._run(command, env=self.variables(**changes), timeout=15)

    def builds(self) -> int:
        return len(re.findall(r"^wheel ", self.calls.read_text(), re.MULTILINE))

    def files(self) -> list[str]:
        return sorted(path.name for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def place(tmp_path, run):
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("Python's headers are missing: apt-get install python3-dev")
    if shutil.which("flock") is None:
        pytest.skip("flock is missing: apt-get install util-linux")
    return Place(tmp_path, run)


def test_one_wheel_serves_every_environment_of_its_kind(place):
    first = place.call(place.environment("one"))
    assert first.returncode == 0, first.stderr
    assert "about 4 minutes" in first.stderr
    assert first.stderr.splitlines()[-1].endswith("two workers summed a tensor")

    second = place.call(place.environment("two"))
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("\n") == 1
    assert place.builds() == 1

    place.call(place.environment("other", torch="2.10.0+cpu"))
    assert place.builds() == 2
    assert not list(place.temporary.iterdir())


def test_second_call_does_nothing(place):
    python = place.environment()
    place.call(python)
    before = place.calls.read_text()
    result = place.call(python, PATH=f"{place.folder}/nothing")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(r"build_horovod.sh: Horovod .* is installed already\n", result.stderr)
    assert place.calls.read_text() == before


def test_damaged_copy_is_installed_again(place):
    python = place.environment()
    place.call(python)
    next(python.parent.parent.rglob("mpi_lib_v2*")).unlink()
    assert place.call(python).returncode == 0
    assert list(python.parent.parent.rglob("mpi_lib_v2*"))
    assert place.builds() == 1


def test_two_calls_at_once_build_once(place):
    pythons = [place.environment("one"), place.environment("two")]
    calls = [
        subprocess.Popen(["/bin/bash", SCRIPT, python], env=place.variables()) for python in pythons
    ]
    assert [call.wait(timeout=15) for call in calls] == [0, 0]
    assert place.builds() == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_build_leaves_no_wheel(place, number):
    call = subprocess.Popen(
        ["/bin/bash", SCRIPT, place.environment()],
        env=place.variables(FAKE_WHEEL="hangs"),
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 10
    while not (place.folder / "hangs").exists():
        assert time.monotonic() < end, "the build did not start"
        time.sleep(0.05)
    started = time.monotonic()
    call.send_signal(number)
    assert call.wait(timeout=10) == 128 + number
    assert time.monotonic() - started < 5
    assert place.files() == ["build.log", SDIST, "lock"]
    assert not list(place.temporary.iterdir())
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(place.folder) not in listing.stdout


def test_failed_build_shows_the_end_of_its_log(place):
    result = place.call(place.environment(), FAKE_WHEEL="fails")
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert sum("of the compiler" in line for line in lines) == 30
    log = Path(lines[-1].rpartition(" ")[2])
    assert "line 0 of the compiler" in log.read_text()
    assert place.files() == ["build.log", SDIST, "lock"]
    assert not list(place.temporary.iterdir())


def test_horovod_that_does_not_work_is_taken_out(place):
    python = place.environment()
    launch = next(python.parent.parent.rglob("launch.py"))
    launch.write_text("import sys; sys.exit('no route to localhost')")
    result = place.call(python)
    assert result.returncode == 1
    assert "no route to localhost" in result.stderr
    assert "could not sum" in result.stderr.splitlines()[-1]
    assert not list(python.parent.parent.rglob("mpi_lib_v2*"))


def test_wrong_digest_is_refused(place):
    (place.tools / "sha256sum").unlink()
    result = place.call(place.environment())
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(f"{SDIST}: not the file of the release (sha256)")
    assert place.builds() == 0
    assert place.files() == ["build.log", "lock"]


def test_download_is_tied_to_the_digest(place):
    """pip runs the distribution's setup.py to read its metadata: it must check before that."""
    place.add_tool("env", 'for last; do :; done; cp "$last" "$FAKE_CALLS.requirements"; exit 1')
    result = place.call(place.environment())
    assert result.returncode == 1
    requirement = (place.folder / "calls.requirements").read_text()
    assert re.fullmatch(r"horovod==0\.28\.1 --hash=sha256:[0-9a-f]{64}\n", requirement)


MISSING = {
    "no tool at all": ({"PATH": "/nothing"}, r"apt-get install g\+\+ cmake make patch.*"),
    "no compiler": ({"CXX": "/nothing/c++"}, r"apt-get install g\+\+"),
    "no CUDA in torch": ({"HOROVOD_GPU_OPERATIONS": "NCCL"}, "HOROVOD_GPU_OPERATIONS=NCCL: .*CUDA"),
    "other operations": ({"HOROVOD_GPU_OPERATIONS": "DDL"}, "HOROVOD_GPU_OPERATIONS=DDL: give"),
}


@pytest.mark.parametrize(("changes", "message"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_said_in_one_line(place, changes, message):
    result = place.call(place.environment(), **changes)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1, result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not place.cache.exists()
    assert not list(place.temporary.iterdir())


def test_missing_torch_is_said_in_one_line(place):
    result = place.call(place.environment(torch=None))
    assert result.returncode == 2
    assert re.fullmatch(r".*/env/bin/python: torch is not installed.*\n", result.stderr)


def test_gpu_build_needs_nccl_and_a_toolkit(place):
    python = place.environment(torch="2.9.0+cu126", cuda="12.6")
    wish = {"HOROVOD_GPU_OPERATIONS": "NCCL"}
    assert "HOROVOD_NCCL_HOME" in place.call(python, **wish).stderr
    wish["HOROVOD_NCCL_HOME"] = "/nccl"
    result = place.call(python, **wish, HOROVOD_CUDA_HOME="/nothing")
    assert "HOROVOD_CUDA_HOME: no bin/nvcc in /nothing" in result.stderr


@pytest.fixture
def release(tmp_path):
    """The release's files that the patch changes."""
    if shutil.which("patch") is None:
        pytest.skip("patch is missing: apt-get install patch")
    if not (CACHE / SDIST).is_file():
        pytest.skip(f"no {SDIST} in the cache: ./setup.sh --horovod fetches it")
    names = re.findall(r"^\+\+\+ b/(\S+)", PATCH.read_text(), re.MULTILINE)
    with tarfile.open(CACHE / SDIST) as archive:
        for name in names:
            member = archive.extractfile(f"horovod-0.28.1/{name}")
            assert member is not None
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(member.read())
    return tmp_path


def test_patch_fits_the_release(release, run):
    result = run(["patch", "-p1", "--batch", "--forward", "--fuzz=0", "-i", PATCH], cwd=release)
    assert result.returncode == 0, result.stdout
    assert not re.search("offset|fuzz|FAILED", result.stdout), result.stdout
    assert (
        "global_ranks_.resize(size_)"
        in (release / "horovod/common/gloo/gloo_controller.cc").read_text()
    )
    for path in release.rglob("*"):
        assert not path.is_file() or "distutils" not in path.read_text(errors="replace"), path


def needs_horovod(test):
    """Mark a test that uses the Horovod of this environment."""
    missing = importlib.util.find_spec("horovod") is None
    reason = "Horovod is not installed: ./setup.sh --horovod builds it"
    return pytest.mark.horovod(pytest.mark.skipif(missing, reason=reason)(test))


WORKER = """
import time, torch, horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([hvd.rank() + 1]), op=hvd.Sum)
print(f"rank {hvd.rank()} of {hvd.size()}: {total.item()}")
if hvd.rank() == 1:
    time.sleep(4)
hvd.allreduce(torch.ones(1), name="gradient")
"""


@needs_horovod
def test_two_workers_sum_a_tensor_and_a_stalled_one_is_named(run, tmp_path):
    """One job for both, as its start takes longest. As released the check is mute under Gloo, and
    what stands in the names of variables is run."""
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable, "-m", "horovod.runner.launch", "--gloo", "-np", "2", "-H", "localhost:2",
        "--network-interfaces", "lo", "--disable-cache", sys.executable, tmp_path / "worker.py",
    ]  # fmt: skip
    # Not the caller's environment: horovodrun would put all of it on a command line.
    variables = {"OMP_NUM_THREADS": "1", "HOROVOD_STALL_CHECK_TIME_SECONDS": "1"}
    variables[f"A;touch {tmp_path}/marker;B"] = "x"
    result = run(command, env={"PATH": os.environ["PATH"], **variables})
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"rank .*", result.stdout)) == ["rank 0 of 2: 3", "rank 1 of 2: 3"]
    assert re.search(r"Missing ranks:\s+(\[0\]<stderr>:)?1: \[allreduce.gradient\]", result.stderr)
    assert not (tmp_path / "marker").exists()


@needs_horovod
def test_what_is_installed_is_found_at_once(run, tmp_path):
    from importlib.metadata import version

    if "+cifar." not in version("horovod"):
        pytest.skip("this Horovod was not built by tools/build_horovod.sh")
    # Without a compiler a call that took this Horovod for a wrong one could not build.
    variables = {**os.environ, "CXX": "/nothing/c++", "XDG_CACHE_HOME": str(tmp_path)}
    started = time.monotonic()
    result = run([SCRIPT, sys.executable], env=variables)
    assert "installed already" in result.stderr, result.stderr
    assert time.monotonic() - started < 5
