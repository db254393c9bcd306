"""setup.sh with packages that need no network: a wheel made here."""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from helpers.process import environment, run
from utils.files import ROOT


@pytest.fixture
def project(tmp_path):
    """A copy of setup.sh whose requirement is one tiny package, and pip's view of the world."""
    folder = tmp_path / "pro ject"
    folder.mkdir()
    shutil.copy(ROOT / "setup.sh", folder)
    (folder / "requirements.txt").write_text("# a comment\ntiny-one>=1.0\n")
    (folder / "requirements-dev.txt").write_text("tiny-tool\n")
    (folder / "constraints.txt").write_text("tiny-one==1.1\n")
    return folder


def add_wheel(folder, name, version):
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def setup(project, tmp_path):
    """Call setup.sh where pip finds the wheels of a folder only."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()

    def call(*arguments, script=project / "setup.sh", **changes):
        env = environment(
            **{
                "PIP_NO_INDEX": "1",
                "PIP_FIND_LINKS": str(wheels),
                "PIP_CONFIG_FILE": os.devnull,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                **changes,
            }
        )
        return run([script, *arguments], env=env, cwd=tmp_path)

    call.wheels = wheels
    return call


def test_set_up_from_nothing_and_again(project, setup, tmp_path):
    venv = project / ".venv"
    python = f"{venv}/bin/python\n"
    missing = setup("--find")
    assert (missing.returncode, missing.stdout, missing.stderr) == (1, python, "")
    assert not venv.exists()

    add_wheel(setup.wheels, "tiny_one", "1.1")
    add_wheel(setup.wheels, "tiny_one", "1.2")
    link = tmp_path / "link"
    link.symlink_to(project / "setup.sh")
    done = setup("--which", script=link)
    assert done.returncode == 0, done.stderr
    assert done.stdout == python
    assert "lacks tiny-one>=1.0" in done.stderr
    (package,) = venv.glob("lib/python3*/site-packages/tiny_one-*")
    assert package.name == "tiny_one-1.1.dist-info", "constraints hold"
    again = setup("--which")
    assert (again.returncode, again.stdout, again.stderr) == (0, python, "")
    assert setup("--dev", "--find").returncode == 1

    (project / "requirements.txt").write_text("pip\n")
    active = f"{venv / 'bin'}:{os.environ['PATH']}"
    assert setup("--which", PATH=active).stdout == python, "an active environment is used as it is"


@pytest.mark.slow
def test_a_second_call_completes_an_interrupted_one(project, setup):
    failed = setup("--dev", "--which")
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert "call ./setup.sh again" in failed.stderr.splitlines()[-1]
    add_wheel(setup.wheels, "tiny_one", "1.1")
    assert setup("--which").returncode == 0
    half = project / ".venv" / "half_a_package"
    half.mkdir()
    (project / ".venv" / "unfinished").write_text("")  # as a killed installation leaves it
    assert setup("--find").returncode == 1
    add_wheel(setup.wheels, "tiny_tool", "3")
    assert setup("--dev", "--which").returncode == 0
    assert setup("--dev", "--find").returncode == 0
    assert not half.exists()


def test_what_cannot_work_is_one_line(setup, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("bash", "dirname", "readlink", "env"):
        (programs / name).symlink_to(shutil.which(name))
    nothing = setup("--which", PATH=str(programs))
    old = programs / "python3"
    old.write_text('#!/bin/bash\n[[ $1 != --version ]] || echo "Python 3.8.1"\nexit 1\n')
    old.chmod(0o755)
    for result, words in (
        (setup("--fast"), ["'--fast'", "-h"]),
        (nothing, ["no Python", "install python3"]),
        (setup("--which", PATH=str(programs)), ["Python 3.8.1", "3.10"]),
    ):
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("setup.sh: ")
        for word in words:
            assert word in line
