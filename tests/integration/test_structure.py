"""The form of the code stays: layers, length of functions, and one configuration."""

import ast
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest

from utils.files import ROOT
from utils.runtime.provenance import code_fingerprint

PACKAGES = ("bench", "models", "tools", "utils")
SOURCES = [*ROOT.glob("*.py"), *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]
LINT_IMPORTS = Path(sysconfig.get_path("scripts")) / "lint-imports"


@pytest.fixture
def project(tmp_path):
    """A copy of what the layers are checked in."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("utils/data/datasets.py", "", ""),
        ("utils/config/schema.py", "from utils.training import build", "The wings of utils/"),
        ("utils/metrics/meter.py", "def f():\n    import utils.checkpoint.format", "The wings"),
        ("utils/training/step.py", "from tools import commands", "Measurements and tools"),
        ("utils/launch/supervisor.py", "import torch", "The launcher answers without torch"),
        ("utils/new_room.py", "", "The wings of utils/"),
    ],
)
def test_an_import_that_points_up_is_refused(run, project, file, line, contract):
    with (project / file).open("a") as source:
        source.write(f"\n\n{line}\n")
    result = run([LINT_IMPORTS, "--no-cache", "--no-logo"], cwd=project)
    assert result.returncode == (1 if contract else 0), result.stdout + result.stderr
    broken = [text for text in result.stdout.splitlines() if " BROKEN" in text]
    if file != "utils/new_room.py":  # It is no broken contract, but a module without a layer.
        assert any(text.startswith(contract) for text in broken) == bool(contract), result.stdout


def test_functions_fit_on_a_screen():
    """Ruff counts statements and arguments; lines are counted here."""
    long = [
        (str(path.relative_to(ROOT)), node.name)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80
    ]
    assert long == []


def test_the_program_fits_on_a_page():
    assert len((ROOT / "cifar.py").read_text().splitlines()) <= 200
    assert len((ROOT / "cifar_horovod.py").read_text().splitlines()) <= 80


def test_configuration_and_launcher_need_no_torch(run):
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for wing in ("config", "launch")
        for path in (ROOT / "utils" / wing).glob("*.py")
    ]
    assert len(modules) > 8
    code = f"import sys, {', '.join(modules)}\nassert not {{'torch', 'numpy'}} & set(sys.modules)"
    result = run([sys.executable, "-c", code])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "name", ["cifar.py", "models/resnet.py", "utils/files.py", "utils/data/sampling.py"]
)
def test_other_code_has_another_fingerprint(tmp_path, name):
    """Also where a file lies deep in a wing; workers with other code must not train together."""
    for path in SOURCES:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    before = code_fingerprint(tmp_path)
    assert before == code_fingerprint(ROOT)
    with (tmp_path / name).open("a") as source:
        source.write("# changed\n")
    assert code_fingerprint(tmp_path) != before


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="these files are no clone")
def test_git_ignores_no_source(run):
    """A pattern for the folders that runs leave must not hide a package of the same name."""
    folders = sorted({path.parent.relative_to(ROOT) for path in SOURCES})
    assert Path("utils/data") in folders
    result = run(["git", "check-ignore", "--no-index", *(f / "new_module.py" for f in folders)])
    assert (result.returncode, result.stdout) == (1, ""), result.stdout + result.stderr
