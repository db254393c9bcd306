"""The documentation says what is there."""

import re
import subprocess
import sys

import pytest
import torch

from models import create_model
from utils.checkpoint.run_dir import run_name
from utils.config.args import build_parser, parse_args
from utils.config.recipes import find_recipe, load_recipes
from utils.errors import UserError
from utils.files import ROOT

READMES = ("README.md", "README.zh-CN.md")


def test_the_tables_of_the_readmes_are_up_to_date():
    command = [sys.executable, "-m", "tools.readme", "--check"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", READMES)
def test_every_flag_and_every_file_is_documented(name):
    text = (ROOT / name).read_text()
    hidden = {"-h", "--help", "--local-rank", "--local_rank", "--no-exchange"}
    for action in build_parser()._actions:
        for flag in set(action.option_strings) - hidden:
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("cifar*.py")]:
        assert f"`{path.name}`" in text, path.name
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `utils/")}
    for path in (ROOT / "utils").rglob("*.py"):
        if path.name == "__init__.py" or path == ROOT / "utils" / "plot.py":
            continue
        wing = path.relative_to(ROOT).parts[1] + "/" if path.parent != ROOT / "utils" else ""
        name = path.relative_to(ROOT / "utils" / wing)
        assert f"`{name}`" in rows[f"utils/{wing}"], path


@pytest.mark.parametrize("name", READMES)
def test_both_readmes_show_the_same_commands(name):
    def commands(text):
        blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
        lines = "".join(blocks).splitlines()
        return [line.split("#")[0].strip() for line in lines]

    assert commands((ROOT / name).read_text()) == commands((ROOT / "README.md").read_text())


@pytest.mark.parametrize("name", READMES)
def test_the_example_of_a_model_passes_the_lint(name):
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "models/linear.py", "-"]
    result = subprocess.run(
        command, cwd=ROOT, input=example, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("recipe", load_recipes().values(), ids=lambda recipe: recipe.name)
def test_a_recipe_has_the_parameters_that_it_says_and_its_name_as_folder(recipe):
    config = parse_args(recipe.flags).model
    arguments = config.arguments()
    with torch.device("meta"):
        model = create_model(config.arch, **arguments)
    assert sum(p.numel() for p in model.parameters()) == recipe.parameters
    assert run_name(config.arch, arguments) == recipe.name


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("resnet-110", "resnet110"), ("ResNet-110", "resnet110"), ("wrn-28-10", "wrn28_10"),
        ("wrn-28-10-drop", "wrn28_10_drop"), ("resnext-29-8x64d", "resnext29_8x64d"),
        ("densenet-bc-100-12", "densenet_bc_100_12"), ("vgg19", "vgg19"),
    ],
)  # fmt: skip
def test_recipes_answer_to_the_names_that_people_type(spelling, name):
    assert find_recipe(spelling).name == name


@pytest.mark.parametrize(
    ("name", "words"),
    [("resnet", "resnet20, resnet110"), ("alexnt", "alexnet"), ("nonsense", "--list")],
)
def test_a_name_that_is_no_recipe_leads_to_one(name, words):
    with pytest.raises(UserError, match=words):
        find_recipe(name)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alexnet\t-a alexnet\t1\t-", "line 1: 4 columns"),
        ("alexnet\t-a alexnet\tmany\t-\t-", "line 1: parameters 'many'"),
        ("a\t-a alexnet\t1\t-\t-\na\t-a alexnet\t1\t-\t-", "line 2: a stands there twice"),
    ],
)
def test_a_wrong_line_of_recipes_is_named(tmp_path, line, words):
    path = tmp_path / "recipes.tsv"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=words):
        load_recipes(path)


def test_a_network_without_recipe_gets_a_folder_of_its_own():
    assert run_name("resnet", {"depth": 26}) == "resnet_depth_26"
    assert run_name("resnet", {"depth": 20, "checkpoint_activations": True}) == "resnet20"
    assert run_name("resnet", {}) == "resnet20"


def test_every_test_that_a_promise_names_exists():
    """docs/reliability.md names them as `file` or `file: part of a name`."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(test_\w+)(?::\s(\w+))?`", text)
    assert len(named) > 30
    for file, word in named:
        source = (ROOT / "tests" / f"{file}.py").read_text()
        names = re.findall(r"^ *(?:def|class) (\w+)", source, re.MULTILINE)
        assert any(word in name for name in names), (file, word)
