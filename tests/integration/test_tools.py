"""The commands of tools/, on real checkpoints and images."""

import ast
import importlib.util
import json
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.process import environment
from helpers.warm import run_warm
from models import create_model
from tools import compare
from utils.checkpoint import format as checkpoint
from utils.data import synthetic
from utils.files import ROOT


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as a run leaves it, of a network that has seen no training."""
    torch.manual_seed(0)
    model = create_model("alexnet")
    path = tmp_path_factory.mktemp("run") / "model.pth.tar"
    mean, std = synthetic.STATISTICS
    state = {
        "format": 1, "epoch": 3, "step": 0, "acc": 61.5, "best_acc": 62.25,
        "classes": list(synthetic.class_names(10)), "dataset": "synthetic10",
        "mean": list(mean), "std": list(std), "workers": 2, "versions": {"torch": "2.6"},
        "state_dict": model.state_dict(), "optimizer": {},
    }  # fmt: skip
    torch.save(state, path)
    return path


@pytest.fixture
def tool():
    """Run a file of tools/ from another folder, as a script."""

    def start(name, *arguments, **options):
        return run_warm([ROOT / "tools" / name, *arguments], **options)

    return start


@pytest.mark.parametrize("name", ["export.py", "inspect.py", "predict.py"])
def test_a_tool_starts_by_its_path(run, tmp_path, name):
    """In a folder of its own: tools/inspect.py must not hide the module of Python."""
    result = run([sys.executable, ROOT / "tools" / name, "-h"], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {name}")


def test_inspect_says_what_a_file_holds(tool, trained, tmp_path):
    """One of ours, and one of an old script: DataParallel's names, 164 layers, no arch."""
    model = create_model("resnet", depth=164, block_name="bottleneck", num_classes=100)
    old = tmp_path / "old.pth.tar"
    weights = OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items())
    torch.save({"epoch": 164, "state_dict": weights, "acc": 71.0, "best_acc": 71.14}, old)
    result = tool("inspect.py", trained, old, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = result.stdout.split(f"file       {old}")
    for words in ("alexnet", "2,472,266 parameters", "3 epochs", "62.25 %", "synthetic10"):
        assert words in ours
    for words in ("depth 164", "num_classes 100", "ResNet-110", "another script", "71.14 %"):
        assert words in theirs


TOOLS = [path for path in sorted((ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]
assert len(TOOLS) >= 9
FIRST_LINES = """\
import os
import sys

if not __package__:  # Started by its path, this folder would hide Python's own inspect.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))

"""


@pytest.mark.parametrize("path", TOOLS, ids=[path.stem for path in TOOLS])
def test_a_tool_finds_the_project_before_it_imports_anything(path):
    """Modules that every Python has imported already come before that."""
    source = path.read_text()
    docstring = ast.get_docstring(ast.parse(source), clean=False)
    assert source.startswith(f'"""{docstring}"""\n\n{FIRST_LINES}')


@pytest.mark.parametrize("name", ["results", "readme", "seeds"])
def test_a_tool_starts_by_its_path_and_as_a_module(run, tmp_path, name):
    """The others import torch, which takes long; they begin as these do."""
    command = [sys.executable, ROOT / "tools" / f"{name}.py", "-h"]
    outside = run(command, cwd=tmp_path)
    inside = run([sys.executable, "-m", f"tools.{name}", "-h"])
    for result in (outside, inside):
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("usage: ")


def test_inspect_refuses_what_is_no_checkpoint(tool, tmp_path):
    (tmp_path / "x").write_text("x")
    result = tool("inspect.py", tmp_path / "x")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


def test_predict_names_the_likeliest_classes(tool, trained, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(synthetic.generate(10, train=False, count=1)[0][0]).save(image)
    result = tool("predict.py", trained, image)
    assert result.returncode == 0, result.stderr
    about, name, *lines = result.stdout.splitlines()
    for words in (str(trained), "alexnet", "0.4989", "10 classes (of the file)"):
        assert words in about
    assert name == str(image)
    assert len(lines) == 5
    assert {line.split()[2] for line in lines} <= set(synthetic.class_names(10))
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True)
    assert tool("predict.py", trained, tmp_path / "none.png").returncode == 2


def test_what_a_file_does_not_say_is_assumed_and_not_exported_as_its_word(tool, tmp_path):
    """A file of another script, which needs trust, and what becomes of it as safetensors."""
    pytest.importorskip("safetensors")
    image, old, new = (tmp_path / name for name in ("image.png", "old.pth", "new.safetensors"))
    Image.new("RGB", (32, 32)).save(image)
    torch.save({"net": create_model("alexnet").state_dict(), "acc": np.float64(12)}, old)
    for name, words in (("predict.py", [image]), ("export.py", ["--safetensors", new])):
        result = tool(name, old, *words)
        assert result.returncode == 2
        assert "--trust-checkpoint" in result.stderr
        result = tool(name, old, *words, "--trust-checkpoint")
        assert result.returncode == 0, result.stderr
        about = result.stdout.splitlines()[0]
        for said in ("0.2023 0.1994 0.2010 (assumed", "numbers: it names none", "from 'net'"):
            assert said in about
    state = checkpoint.load(new)
    assert not state.keys() & {"classes", "mean", "std", "dataset"}
    assert "(assumed" in tool("predict.py", new, image).stdout


@pytest.mark.parametrize(
    ("flag", "package"), [("--safetensors", "safetensors"), ("--onnx", "onnx")]
)
def test_exported_networks_are_checked_on_images(tool, trained, tmp_path, flag, package):
    target = tmp_path / "exported"
    result = tool("export.py", trained, flag, target)
    if importlib.util.find_spec(package) is None:
        assert result.returncode == 2
        assert f"pip install {package}" in result.stderr
        return
    assert result.returncode == 0, result.stdout + result.stderr
    assert "same logits on 100 images" in result.stdout
    assert target.stat().st_size > 2_472_266 * 4 * 0.99


def test_the_hub_builds_and_loads(run, trained, tmp_path):
    program = (
        "import torch; "
        f"a = torch.hub.load({str(ROOT)!r}, 'resnet', source='local', depth=110); "
        "print(sum(p.numel() for p in a.parameters())); "
        f"b = torch.hub.load({str(ROOT)!r}, 'alexnet', source='local', "
        f"checkpoint={str(trained)!r}); "
        "print(float(b.classifier.weight.sum()))"
    )
    result = run([sys.executable, "-c", program], cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    count, total = result.stdout.split()
    assert count == "1730714"
    weight = checkpoint.load(trained)["state_dict"]["classifier.weight"]
    assert float(total) == pytest.approx(float(weight.sum()))


AGREE = (
    "-m alexnet -n 2 -d synthetic10 -- --epochs 1 --train-size 160 --train-batch 8 --test-size 64 "
    "--lr 0.01 --dtype float64"
).split()


def compare_in_this_process(monkeypatch, capfd, folder):
    """Run --compare as where Horovod is not installed; its trainings are real jobs."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["compare", *AGREE])
    monkeypatch.setattr(compare, "has_horovod", lambda: False)
    code = compare.main()
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert "Horovod is not installed" in shown.out
    return shown.out


@pytest.mark.timeout(240)  # five runs with Horovod, three without
@pytest.mark.parametrize(
    "engines",
    [
        {"one process", "dist"},
        pytest.param(
            {"one process", "dist", "horovod"}, marks=[pytest.mark.slow, pytest.mark.horovod]
        ),
    ],
    ids=len,
)
def test_engines_agree_in_every_parameter_after_twenty_steps(
    run, monkeypatch, capfd, tmp_path, engines
):
    """The report of --compare."""
    if "horovod" in engines:
        pytest.importorskip("horovod", reason="./setup.sh --horovod builds it")
        result = run([ROOT / "launcher.sh", "--compare", *AGREE], cwd=tmp_path, timeout=220)
        assert result.returncode == 0, result.stderr
        shown = result.stdout
    else:
        shown = compare_in_this_process(monkeypatch, capfd, tmp_path)
    report = json.loads((tmp_path / "compare" / "compare.json").read_text())["summary"]["engines"]
    assert set(report) == engines
    for engine, numbers in report.items():
        assert numbers["steps"] == 20
        assert numbers["workers"] == (1 if engine == "one process" else 2)
        assert numbers["largest_loss_difference"] < 1e-9
        assert numbers["largest_parameter_difference"] < 1e-9
        assert f"{numbers['images_per_second']:,.0f}" in shown
    assert (tmp_path / "compare" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare"]
