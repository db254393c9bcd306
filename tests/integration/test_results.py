"""Published results: tools/results.py on a real run, the table, and runs within a time budget."""

import json
import shutil

import pytest

from tools import cost, results
from utils.config.recipes import find_recipe
from utils.errors import UserError
from utils.files import ROOT


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """The folder of a run on the CPU, trained once."""
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture
def finished(shared_run, run_script, tmp_path):
    """A copy of the folder of a run that is trained to its end."""
    if not shared_run.exists():
        flags = (
            "-a alexnet -d synthetic10 --epochs 1 --train-size 40 --test-size 20 --train-batch 20"
        )
        more = ("--gamma", "0.5", "--schedule", "81", "122", "-c", str(shared_run))
        result = run_script([*flags.split(), *more])
        assert result.returncode == 0, result.stderr
    return shutil.copytree(shared_run, tmp_path / "run")


def edit(run, **changes):
    """Change options in a run's args.json."""
    record = json.loads((run / "args.json").read_text())
    record["options"].update(changes)
    (run / "args.json").write_text(json.dumps(record))


def test_a_run_is_published_and_stands_in_the_table(finished, tmp_path):
    published = tmp_path / "results"
    assert results.table(published) == results.NONE_YET
    folder = results.add(finished, published, None, overwrite=False)
    assert folder == published / "alexnet" / "synthetic10" / "seed0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.txt", "metrics.jsonl", "result.json",
    ]  # fmt: skip
    assert (folder / "log.txt").read_bytes() == (finished / "log.txt").read_bytes()
    result = json.loads((folder / "result.json").read_text())
    (row,) = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    assert result["last_accuracy"] == result["best_accuracy"] == row["valid_top1"]
    assert result["command"][0] == "cifar.py"
    assert "host" not in result["machine"]
    flags = "--train-size 40 --test-size 20 --epochs 1 --train-batch 20 --gamma 0.5"
    assert result["flags"] == flags.split()
    _, _, line, *_, legend = results.table(published).splitlines()
    error = f"{100 - row['valid_top1']:.2f}"
    assert line.startswith(f"| alexnet | synthetic10 | {error} | {error} | - | - | 0 | 0.0 (CPU) |")
    assert f"`-m alexnet -d synthetic10 -- {flags}`" in line
    assert legend == results.LEGEND

    with pytest.raises(UserError, match="--overwrite"):
        results.add(finished, published, None, overwrite=False)
    results.add(finished, published, None, overwrite=True)


def test_images_from_a_folder_are_compared_with_what_they_are_said_to_be(finished, tmp_path):
    published = tmp_path / "results"
    edit(finished, dataset="folder")
    results.add(finished, published, None, overwrite=False)
    edit(finished, dataset="folder", seed=3)
    results.add(finished, published, "cifar100", overwrite=False)
    edit(finished, dataset="cifar10", seed=0)
    results.add(finished, published, None, overwrite=False)
    lines = results.table(published).splitlines()
    cells = [line.split(" | ")[1:] for line in lines[2:5]]
    assert [(c[0], c[3], c[4], c[5]) for c in cells] == [
        ("cifar10", "-", "22.78", "0"), ("folder", "-", "-", "0"), ("folder", "-", "56.13", "3"),
    ]  # fmt: skip
    assert "--seed 3" in lines[4]
    assert lines[-1] == results.RE_ENCODED


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"epochs": 2}, "1 of 2 epochs"), ({"val_split": 10}, "--val-split 10"),
     ({"arch": "resnet", "depth": 26}, "resnet_depth_26 is no recipe")],
)  # fmt: skip
def test_what_is_no_whole_run_of_a_recipe_is_not_published(finished, tmp_path, changes, words):
    edit(finished, **changes)
    with pytest.raises(UserError, match=words):
        results.add(finished, tmp_path / "results", None, overwrite=False)
    assert not (tmp_path / "results").exists()


def test_how_far_a_run_has_come(finished, tmp_path):
    text, whole = results.state(finished)
    assert text.startswith("1 of 1 epochs, last ")
    assert whole
    edit(finished, epochs=2)
    assert not results.state(finished)[1]
    assert results.state(tmp_path / "nothing") == ("not begun", False)
    with pytest.raises(UserError, match="no run folder"):
        results.read_run(tmp_path)


def test_the_predicted_cost_puts_recipes_in_order():
    """Seconds an epoch on an H200, by two bounds: half and twice what is aimed at."""
    for name, aim in (("resnet110", 1.3), ("vgg19_bn", 0.3)):
        recipe = find_recipe(name)
        epochs = int(recipe.flags[recipe.flags.index("--epochs") + 1])
        assert aim / 2 < 60 * cost.minutes(recipe) / epochs < 2 * aim
    minutes = [cost.minutes(find_recipe(name)) for name in ("alexnet", "resnet20", "resnet110")]
    assert minutes == sorted(minutes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "name a recipe"), (["--budget", "x", "alexnet"], "--budget 'x'"),
     (["--bdget", "3"], "--bdget"), (["-d"], "-d: needs a value")],
)  # fmt: skip
def test_bad_input_of_the_launcher_of_runs_is_one_line(run, tmp_path, arguments, words):
    result = run([ROOT / "tools" / "accuracy.sh", *arguments], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recipes_are_trained_over_several_calls(run, tmp_path):
    """The first call has no time to end its first run, the second goes on with it."""
    command = [ROOT / "tools" / "accuracy.sh", "-d", "synthetic10", "-o", "runs"]
    small = ["--", "--train-size", "40", "--test-size", "20", "--lr", "0.01", "--epochs"]
    for budget in ("45", "90", "180"):  # a busy machine needs long to start
        whole = [*command, "--budget", budget, "resnet20", "alexnet", *small, "5000"]
        result = run(whole, cwd=tmp_path, timeout=250)
        assert result.returncode == 75, result.stderr
        first, second, last = result.stdout.splitlines()
        assert second == "resnet20: not begun"
        assert "run me again" in last
        if "of 5000" in first:
            break
    done = int(first.removeprefix("alexnet: ").split(" of 5000")[0])
    assert done > 0
    result = run([*command, "alexnet", *small, str(done + 2)], cwd=tmp_path, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"alexnet: {done + 2} of {done + 2} epochs")
    assert [path.name for path in (tmp_path / "runs" / "synthetic10").iterdir() if
            path.is_dir()] == ["alexnet"]  # fmt: skip
    assert run([*command, "alexnet", *small, str(done + 2)], cwd=tmp_path).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_run_that_fails_ends_the_call(run, tmp_path):
    command = [ROOT / "tools" / "accuracy.sh", "-d", "synthetic10", "-o", "runs", "alexnet"]
    result = run([*command, "--", "--train-size", "999999"], cwd=tmp_path, timeout=180)
    assert result.returncode == 2
    assert "error: --train-size 999999" in result.stderr
    assert "alexnet has failed with exit code 2" in result.stderr
