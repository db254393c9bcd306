"""recipes.tsv and its reader."""

import subprocess
import sys

import pytest
import torch

from models import create_model
from utils.checkpoint.run_dir import run_name
from utils.config.args import parse_args
from utils.config.recipes import find_recipe, load_recipes
from utils.errors import UserError
from utils.files import ROOT

# The commands behind the published figures, as their users type them.
PUBLISHED = {
    "alexnet": "-a alexnet --epochs 164 --schedule 81 122 --gamma 0.1",
    "vgg19_bn": "-a vgg19_bn --epochs 164 --schedule 81 122 --gamma 0.1",
    "resnet110": "-a resnet --depth 110 --epochs 164 --schedule 81 122 --gamma 0.1 --wd 1e-4",
    "resnet1202": "-a resnet --depth 1202 --epochs 164 --schedule 81 122 --gamma 0.1 --wd 1e-4",
    "preresnet110": "-a preresnet --depth 110 --epochs 164 --schedule 81 122 --gamma 0.1 --wd 1e-4",
    "resnext29_8x64d": "-a resnext --depth 29 --cardinality 8 --widen-factor 4 "
    "--schedule 150 225 --wd 5e-4 --gamma 0.1",
    "resnext29_16x64d": "-a resnext --depth 29 --cardinality 16 --widen-factor 4 "
    "--schedule 150 225 --wd 5e-4 --gamma 0.1",
    "wrn28_10_drop": "-a wrn --depth 28 --depth 28 --widen-factor 10 --drop 0.3 --epochs 200 "
    "--schedule 60 120 160 --wd 5e-4 --gamma 0.2",
    "densenet_bc_100_12": "-a densenet --depth 100 --growthRate 12 --train-batch 64 --epochs 300 "
    "--schedule 150 225 --wd 1e-4 --gamma 0.1",
    "densenet_bc_190_40": "-a densenet --depth 190 --growthRate 40 --train-batch 64 --epochs 300 "
    "--schedule 150 225 --wd 1e-4 --gamma 0.1",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_what_the_published_command_trains(name):
    assert parse_args(find_recipe(name).flags) == parse_args(PUBLISHED[name].split())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet", ["resnet20, resnet110, resnet164, resnet1202"]),
        ("PreResNet", ["preresnet110, preresnet164"]),
        ("vgg", ["vgg11, vgg11_bn"]),
        ("wrn-28", ["wrn28_10, wrn28_10_drop"]),
        ("densenet-bc", ["densenet_bc_100_12, densenet_bc_190_40"]),
        ("resnet101", ["did you mean", "resnet110"]),
        ("alexnt", ["did you mean alexnet"]),
        ("transformer", ["--list"]),
        ("", ["--list"]),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_or_those_of_its_family(name, words):
    with pytest.raises(UserError) as error:
        find_recipe(name)
    for word in ["-m", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("alexnet\t-a alexnet\t1\t-", ["4 columns", "bearpaw"]),
        ("alexnet -a alexnet 1 - -", ["1 columns", "tab"]),
        ("AlexNet\t-a alexnet\t1\t-\t-", ["recipe", "'AlexNet'"]),
        ("alexnet\t--epochs 1\t1\t-\t-", ["flags", "'--epochs 1'"]),
        ("alexnet\t-a 'alexnet\t1\t-\t-", ["flags", "-a"]),
        ("alexnet\t-a alexnet\t2.5 M\t-\t-", ["parameters", "'2.5 M'"]),
        ("alexnet\t-a alexnet\t1\t\t-", ["authors", "''"]),
        ("alexnet\t-a alexnet\t1\t-\t22.78", ["bearpaw", "'22.78'"]),
        ("good\t-a alexnet\t1\t-\t-", ["good stands there twice"]),
    ],
)
def test_a_wrong_line_is_named_with_its_column(line, words, tmp_path):
    path = tmp_path / "recipes.tsv"
    path.write_text(f"# comment\n\ngood\t-a vgg11\t1\t8.75 / -\t6.11 / 28.86\n{line}\n")
    with pytest.raises(UserError, match="line 4: ") as error:
        load_recipes(path)
    for word in words:
        assert word in str(error.value)


def test_recipes_are_read_without_heavy_imports():
    """launcher.sh asks before anything is installed."""
    code = "import sys, utils.config.recipes; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


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


def test_a_network_without_recipe_gets_a_folder_of_its_own():
    assert run_name("resnet", {"depth": 26}) == "resnet_depth_26"
    assert run_name("resnet", {"depth": 20, "checkpoint_activations": True}) == "resnet20"
    assert run_name("resnet", {}) == "resnet20"
