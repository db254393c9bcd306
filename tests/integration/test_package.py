"""What makes this a package: requirements and their lock, version, metadata, line ends."""

import re
import sys

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from utils.files import ROOT
from utils.version import VERSION

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # of mypy

# What the lock is for.
KIND = {
    "python_version": "3.11", "python_full_version": "3.11.0", "sys_platform": "linux",
    "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
}  # fmt: skip


def requirements(name):
    """Return the requirements of a file that hold there, by name."""
    found = {}
    for line in (ROOT / name).read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or Marker(str(requirement.marker)).evaluate(KIND):
                found[plain(requirement.name)] = requirement.specifier
    return found


def plain(name):
    """Return the name of a package as the index spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    """Return the versions by name, of a file whose entries have digests and nothing else."""
    text = (ROOT / "requirements.lock").read_text()
    entry = re.compile(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n", re.M)
    rest = re.sub(r"^ *#.*\n", "", entry.sub("", text), flags=re.M)
    assert rest == "", "entries without a digest, or other lines"
    return {plain(name): version for name, version, _ in entry.findall(text)}


def test_the_lock_and_the_constraints_agree():
    versions = locked()
    wrong = {
        name: (versions.get(name), str(wanted))
        for name, wanted in requirements("constraints.txt").items()
        if versions.get(name) not in wanted
    }
    assert wrong == {}, "the command at the head of requirements.lock makes it anew"


def test_the_lock_says_how_it_is_made():
    """The command asks for the kind of machine that the tests of this file assume."""
    head = (ROOT / "requirements.lock").read_text().split("\n")[1]
    assert head.startswith("#    uv pip compile --generate-hashes --python-version 3.11 ")
    for word in ("linux", "requirements.txt", "requirements-dev.txt", "constraints.txt"):
        assert word in head


def test_the_lock_names_no_index():
    assert "://" not in (ROOT / "requirements.lock").read_text()


def test_the_lock_has_all_that_is_required():
    versions = locked()
    for name in ("requirements.txt", "requirements-dev.txt"):
        for package, wanted in requirements(name).items():
            assert versions[package] in wanted, package


def test_the_constraints_pin_all_that_is_required():
    pinned = requirements("constraints.txt")
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert set(requirements(name)) <= set(pinned)


@pytest.fixture(scope="module")
def metadata():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_same_everywhere(metadata):
    assert metadata["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "utils.version.VERSION"}
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\d\S+)", changes, re.M)[1] == VERSION
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (\S+)$", citation, re.M)[1] == VERSION


@pytest.mark.parametrize("command", [["cifar.py"], ["utils/launch/cli.py"]], ids=" ".join)
def test_the_commands_say_their_version(run, command):
    result = run([sys.executable, *command, "--version"])
    assert (result.returncode, result.stdout) == (0, f"CIFAR all-reduce {VERSION}\n")


def test_the_extras_are_those_of_the_tests(metadata):
    extras = metadata["project"]["optional-dependencies"]
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert extras["dev"] == [line for line in lines if line and line[0] != "#"]
    assert {*extras["export"], *extras["tensorboard"]} <= set(extras["dev"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="these files are no clone")
def test_scripts_keep_their_line_ends_in_a_checkout_of_windows(run, tmp_path):
    files = ["launcher.sh", "setup.sh", ".ci/run", "recipes.tsv", "tools/horovod-0.28.1.patch"]
    git = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf"]
    result = run([*git, "checkout-index", f"--prefix={tmp_path}/", "--", *files])
    assert result.returncode == 0, result.stderr
    for name in files:
        assert b"\r" not in (tmp_path / name).read_bytes(), name
