"""Published results: tools/results.py on a real run, the table, and runs within a time budget."""

import json
import re
import shlex
import shutil

import pytest
import torch

from tools import cost, results, weights
from tools.published import (
    FOLDER,
    NONE_YET,
    card,
    find_weights,
    load_results,
    runs_table,
    summary_table,
)
from utils.checkpoint import format as checkpoint
from utils.checkpoint import manager
from utils.config.args import parse_args
from utils.config.recipes import find_recipe
from utils.errors import UserError
from utils.files import ROOT
from utils.metrics.meter import Metrics
from utils.metrics.plot import read_log
from utils.training import build


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


UNFINISHED = sorted(FOLDER.glob("unfinished/*/*/seed*"))


@pytest.mark.parametrize(
    "folder", UNFINISHED, ids=[str(path.relative_to(FOLDER)) for path in UNFINISHED]
)
def test_an_unfinished_run_has_what_going_on_needs(folder):
    state = checkpoint.load(folder / checkpoint.LATEST)
    assert (folder / checkpoint.LATEST).stat().st_size < 4_000_000
    assert state["epoch"] == len(results.read_rows(folder)) > 0
    assert len(read_log(folder / "log.txt")["Valid Acc."]) == state["epoch"]
    assert state["optimizer"]["state"]
    options = results.read_args(folder)["options"]
    assert state["options"] == options
    assert state["epoch"] < options["epochs"], "publish it"
    assert folder.parts[-3:] == ("resnet20", options["dataset"], f"seed{options['seed']}")


def edit(run, **changes):
    """Change options in a run's args.json."""
    record = json.loads((run / "args.json").read_text())
    record["options"].update(changes)
    (run / "args.json").write_text(json.dumps(record))


def add(run, published, **options):
    """Publish a run whose images are drawn."""
    return results.add(run, published, {}, **options)


def read(folder):
    return json.loads((folder / "result.json").read_text())


def test_a_run_is_published_with_card_curves_and_weights(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)  # One of 20 images is five points.
    published = tmp_path / "results"
    assert summary_table([]) == runs_table({}) == NONE_YET
    record = json.loads((finished / "args.json").read_text())
    # As outside a clone.
    (finished / "args.json").write_text(json.dumps({**record, "git_commit": ""}))
    folder = add(finished, published, note="It was trained for a test.")
    name = "seed0-train-size-40-test-size-20-epochs-1-train-batch-20-gamma-0.5"
    assert folder == published / "alexnet" / "synthetic10" / name
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "best.safetensors", "log.png", "log.txt", "metrics.jsonl", "result.json",
    ]  # fmt: skip
    assert (folder / "log.txt").read_bytes() == (finished / "log.txt").read_bytes()
    result = read(folder)
    (row,) = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    assert result["last_accuracy"] == result["best_accuracy"] == row["valid_top1"]
    assert result["command"][0] == "cifar.py"
    assert "host" not in result["machine"]
    flags = "--train-size 40 --test-size 20 --epochs 1 --train-batch 20 --gamma 0.5"
    assert result["flags"] == flags.split()
    error = f"{100 - row['valid_top1']:.2f}"
    cpu = f"{result['machine']['processor']}, {result['machine']['cores']} cores"
    *_, line = summary_table([result]).splitlines()
    wanted = (
        f"| alexnet `{flags}` | synthetic10 | 1 | {error} | {error} | - | - | 1, dist | {cpu} |"
    )
    assert line == wanted
    command = f"./launcher.sh -m alexnet -n 1 -d synthetic10 -f dist -- {flags}"
    *_, line = runs_table({folder: result}, published).splitlines()
    start = f"| [alexnet, synthetic10, seed 0](alexnet/synthetic10/{name}/README.md)"
    assert line.startswith(f"{start} | {error} | {error} (1) | 1, dist | {cpu} | ")
    assert f"`{command}`" in line
    text = (folder / "README.md").read_text()
    assert text == card(folder, result)  # as tools/readme.py makes it
    kept = result["weights"]
    for words in (
        f"\n{command}\n", "It was trained for a test.", "commit unknown", kept["sha256"],
        result["images"]["train"],
        f"**{kept['accuracy']:.2f} %** ({kept['correct']} of 20 test images)",
    ):  # fmt: skip
        assert words in text

    with pytest.raises(UserError, match="--overwrite"):
        add(finished, published)
    add(finished, published, overwrite=True)
    assert "It was trained for a test." in (folder / "README.md").read_text()
    add(finished, published, overwrite=True, note="")
    assert "It was trained for a test." not in (folder / "README.md").read_text()


def test_published_weights_score_what_the_card_says(finished, tmp_path, monkeypatch, run_script):
    """By the card's own command."""
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)
    published = tmp_path / "results"
    folder = add(finished, published)
    (command,) = re.findall(r"^python cifar\.py (.*)$", (folder / "README.md").read_text(), re.M)
    before = sorted(path.name for path in folder.iterdir())
    result = run_script(command.split())
    assert result.returncode == 0, result.stderr
    kept = read(folder)["weights"]
    assert f"Test Acc: {kept['accuracy']:.2f} ({kept['correct']} of 20)" in result.stdout

    # Without -e it would be a training, which may not begin in this folder.
    words = [word for word in command.split() if word != "-e"]
    result = run_script([*words, "--epochs", "1"])
    assert result.returncode == 2
    assert "holds a run already" in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_weights_are_found_by_recipe_data_set_and_seed(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)
    published = tmp_path / "results"
    first = add(finished, published)
    edit(finished, seed=3)
    third = add(finished, published)
    path, about, content = find_weights("alexnet", "synthetic10", None, published)
    assert path == first / "best.safetensors"
    assert about == read(first)
    assert content == path.read_bytes()
    assert find_weights("alexnet", "synthetic10", 3, published)[0].parent == third
    # The same seed with the flags of the recipe alone goes first.
    plain = third.with_name("seed3")
    shutil.copytree(third, plain)
    assert find_weights("alexnet", "synthetic10", 3, published)[0].parent == plain
    for recipe, dataset, seed in (("alexnet", "synthetic10", 4), ("resnet20", "synthetic10", None)):
        with pytest.raises(UserError, match=f"no weights are published of {recipe} on {dataset}"):
            find_weights(recipe, dataset, seed, published)
    (plain / "result.json").write_text("{")  # Another run's file does not matter.
    assert find_weights("alexnet", "synthetic10", 0, published)[0] == path
    path.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="sha256"):
        find_weights("alexnet", "synthetic10", 0, published)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"recipe": "alexnet"}', "5"])
def test_a_damaged_result_is_named(tmp_path, text):
    folder = tmp_path / "alexnet" / "cifar10" / "seed0"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(text)
    with pytest.raises(UserError, match=re.escape(str(folder / "result.json"))):
        load_results(tmp_path)


def test_weights_that_rounding_changes_are_not_kept(finished, tmp_path, monkeypatch, capsys):
    """Here every difference is too large, even none."""
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", -1)
    folder = add(finished, tmp_path / "results")
    assert read(folder)["weights"] is None
    assert list(folder.glob("*.safetensors")) == []
    assert "## Weights" not in (folder / "README.md").read_text()
    assert capsys.readouterr().out.count("not kept") == 2  # the best ones and the last ones
    monkeypatch.setattr(weights, "MAX_BYTES", 4_000_000)
    add(finished, tmp_path / "results", overwrite=True)
    assert "too many to be kept" in capsys.readouterr().out


def test_weights_that_float16_cannot_hold_are_not_kept(finished, tmp_path, monkeypatch, capsys):
    """They are not mistaken for those of other images."""
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 0)
    # All images would be taken for one class, and this many of 20 are of it.
    scores = iter([50.0, 5.0, 50.0, 5.0])
    row = json.loads((finished / "metrics.jsonl").read_text())
    (finished / "metrics.jsonl").write_text(json.dumps({**row, "valid_top1": 50.0}))
    monkeypatch.setattr(weights.Scorer, "__call__", lambda *_: Metrics(0.0, next(scores), 0.0, 20))
    folder = add(finished, tmp_path / "results")
    assert read(folder)["weights"] is None
    assert capsys.readouterr().out.count("not kept") == 2


def test_a_card_scores_in_the_precision_of_its_score(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)
    edit(finished, amp="bf16", test_batch=10)
    folder = add(finished, tmp_path / "results")
    assert folder.name.endswith("-amp-bf16")
    (command,) = re.findall(r"^python cifar\.py (.*)$", (folder / "README.md").read_text(), re.M)
    config = parse_args(shlex.split(command))
    assert config.hardware.amp == "off"
    assert config.data.test_size == 20
    assert config.run.evaluate


def test_a_card_leaves_the_place_of_a_folder_of_images_to_the_reader(finished, tmp_path):
    result = read(add(finished, tmp_path / "results"))
    text = card(tmp_path, {**result, "dataset": "folder", "compared_with": "cifar10"})
    assert "-d folder -f dist -- --data DIR " in text
    with pytest.raises(UserError, match="--images cifar10"):
        add(finished, tmp_path / "more", compared_with="cifar10")


def test_weights_that_are_rounded_already_are_compared_with_the_log(
    finished, tmp_path, monkeypatch
):
    """A run folder that has come without its checkpoints."""
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)
    first = add(finished, tmp_path / "results")
    for path in finished.glob("*.pth.tar"):
        path.unlink()
    (finished / "best.safetensors").write_bytes((first / "best.safetensors").read_bytes())
    second = add(finished, tmp_path / "more")
    assert read(second)["weights"]["sha256"] == read(first)["weights"]["sha256"]
    assert read(first)["weights"]["accuracy_before"] is not None
    assert read(second)["weights"]["accuracy_before"] is None
    assert "before rounding" not in (second / "README.md").read_text()


def test_a_run_whose_weights_do_not_score_what_its_log_says_is_refused(finished, tmp_path):
    """As with the images of another set."""
    rows = (finished / "metrics.jsonl").read_text()
    row = json.loads(rows)
    row["valid_top1"] += 20
    (finished / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="its log says"):
        add(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_folder_that_lacks_something_is_refused(finished, tmp_path):
    args = (finished / "args.json").read_text()
    record = json.loads(args)
    for text, words in (
        ("{", "args.json: cannot be read"), ("[]", "args.json: has no options"),
        (json.dumps({**record, "options": {}}), "1 of 300 epochs"),
        (json.dumps({**record, "machine": None}), "lacks 'machine'"),
        (json.dumps({"options": record["options"]}), "lacks 'command'"),
        (json.dumps({**record, "earlier": [3]}), "args.json: has no options"),
        (json.dumps({**record, "earlier": 3}), "args.json: has no options"),
    ):  # fmt: skip
        (finished / "args.json").write_text(text)
        with pytest.raises(UserError, match=words):
            add(finished, tmp_path / "results")
    (finished / "args.json").write_text(args)
    edit(finished, arch="nothing")
    with pytest.raises(UserError, match="-a nothing"):
        add(finished, tmp_path / "results")
    edit(finished, arch="alexnet")
    header, row = (finished / "log.txt").read_text().splitlines()
    for text in (header, f"{header}\n{row}\n{row}", "x"):
        (finished / "log.txt").write_text(text)
        with pytest.raises(UserError, match=r"log\.txt"):
            add(finished, tmp_path / "results")
    (finished / "log.txt").unlink()
    with pytest.raises(UserError, match=r"log\.txt"):
        add(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_run_that_went_on_in_another_way_is_refused(finished, tmp_path):
    record = json.loads((finished / "args.json").read_text())

    def start(changes=None, **more):
        return {**record, "options": {**record["options"], **(changes or {})}, **more}

    begun = {"options": {}, "file": "weights.pth"}
    md5 = start({"data_md5": "d41d"}, images=None)
    for earlier, words in (
        ([start({"lr": 0.2})], r"with .*--lr 0\.2 .*first, then with"),
        ([start({"drop": 0.3}), start()], r"with --drop 0\.3 .*first, then with"),
        ([start(images=[1, 2, 3, 4]), start(git_commit="abc")], "other images first"),
        ([md5], "other images first"),
        ([start({"dataset": "cifar10"}, images=None)], "other images first"),
        ([start({"adasum": True}, workers=3), start({"adasum": True})], "--adasum .*-n 3 first"),
        ([start({"batch_per_worker": 10}, workers=2)], r"--batch-per-worker 10 .*-n 2 first"),
        ([start(), start({"start_epoch": 0})], "--start-epoch 0"),
        ([start({"start_epoch": 3})], "--start-epoch 3"),
        ([begun, start(workers=3)], r"has begun with the weights of weights\.pth"),
    ):
        (finished / "args.json").write_text(json.dumps({**record, "earlier": earlier}))
        with pytest.raises(UserError, match=words):
            add(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_card_says_where_a_run_has_been_before(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_BYTES", 0)
    record = json.loads((finished / "args.json").read_text())
    # It got more epochs, or began as bearpaw's scripts do: that is no news.
    for changes in ({"epochs": 9, "resume": "auto"}, {"start_epoch": 0}):
        earlier = {**record, "options": {**record["options"], **changes}}
        (finished / "args.json").write_text(json.dumps({**record, "earlier": [earlier]}))
        folder = add(finished, tmp_path / "results", overwrite=True)
        assert read(folder)["earlier"] == []
        text = (folder / "README.md").read_text()
        assert "earlier starts" not in text
        assert f"| memory format | {record['memory_format']} |" in text
    elsewhere = {**record, "engine": "Horovod", "workers": 3, "git_commit": "abc"}
    unknown = {"options": record["options"], "workers": 2}  # as an older version has left it
    earlier = [elsewhere, unknown]
    (finished / "args.json").write_text(json.dumps({**record, "earlier": earlier}))
    folder = add(finished, tmp_path / "results", overwrite=True)
    assert [one["workers"] for one in read(folder)["earlier"]] == [3, 2]
    (line,) = re.findall(r"^\| earlier starts \|.*$", (folder / "README.md").read_text(), re.M)
    assert "| 3 (Horovod), " in line
    assert "commit abc; " in line
    assert "; 2 (unknown engine), unknown machine, unknown memory format, commit unknown" in line


@pytest.mark.parametrize("name", [checkpoint.BEST, checkpoint.LATEST])
def test_a_run_whose_last_save_has_failed_is_refused(finished, tmp_path, monkeypatch, name):
    """Its log is whole, the newest weights are older than the last row or the best one."""
    monkeypatch.setattr(weights, "MAX_ROUNDING_CHANGE", 100)
    state = checkpoint.load(finished / name)
    manager.save(tmp_path, {**state, "epoch": 0}, is_best=False)
    shutil.copy(tmp_path / checkpoint.LATEST, finished / name)
    with pytest.raises(UserError, match=f"{name}: holds the weights after epoch 0, the "):
        add(finished, tmp_path / "results")


def test_a_log_that_lacks_epochs_is_refused(finished, tmp_path):
    """As of a run that has begun in another folder, and that --resume auto would not go on with."""
    edit(finished, epochs=2)
    row = json.loads((finished / "metrics.jsonl").read_text())
    for epochs in ([2], [2, 2], [1, 2, 2]):
        lines = [json.dumps({**row, "epoch": epoch}) + "\n" for epoch in epochs]
        (finished / "metrics.jsonl").write_text("".join(lines))
        with pytest.raises(UserError, match="has not each of 2 epochs once"):
            add(finished, tmp_path / "results")


def test_the_flags_of_a_model_may_say_what_it_is_by_default(finished):
    """cifar.py -a resnet is resnet20, whose recipe has --depth 20."""
    edit(finished, arch="resnet")
    run_options = {**parse_args([]).options(), **results.read_args(finished)["options"]}
    found = results.summary(finished, run_options)
    assert found["recipe"] == "resnet20"
    assert "--depth" not in found["flags"]


def test_a_card_names_the_archive_of_the_run(finished, tmp_path, monkeypatch):
    """Wherever the images come from when it is published."""
    monkeypatch.setattr(weights, "MAX_BYTES", 0)
    md5 = "d41d8cd98f00b204e9800998ecf8427e"
    folder = results.add(finished, tmp_path / "results", {"data_md5": md5})
    assert "archive_md5" not in read(folder)["images"]
    edit(finished, data_md5=md5)
    folder = add(finished, tmp_path / "results", overwrite=True)
    assert read(folder)["images"]["archive_md5"] == md5
    assert f"--data-md5 {md5}" in (folder / "README.md").read_text()


def test_a_recorded_address_is_neither_asked_nor_published_whole(finished, tmp_path, monkeypatch):
    record, asked = json.loads((finished / "args.json").read_text()), []
    address = "https://me:SECRET@host/a?key=SECRET"  # as an older version has left it
    record["command"] += ["--data-url", address]
    record["options"]["data_url"] = [address, "https://host/a?..."]
    (finished / "args.json").write_text(json.dumps(record))
    real = build.dataset
    monkeypatch.setattr(build, "dataset", lambda data: asked.extend(data.data_url) or real(data))
    folder = add(finished, tmp_path / "results")
    assert asked == []
    assert read(folder)["command"][-1] == "https://host/a?..."
    assert not [path for path in folder.iterdir() if b"SECRET" in path.read_bytes()]


def test_a_publication_that_cannot_be_written_leaves_the_old_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_BYTES", 0)
    folder = add(finished, tmp_path / "results")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.metrics.plot.draw", full)
    with pytest.raises(UserError, match="No space left"):
        add(finished, tmp_path / "results", overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_seeds_of_one_training_share_a_row(finished, tmp_path, monkeypatch):
    """Mean and sample deviation of 87.5, 90 and 92.5 % error, and another row for other flags."""
    monkeypatch.setattr(weights, "MAX_BYTES", 0)
    result = read(add(finished, tmp_path / "results"))
    seeds = []
    for seed, last in enumerate((12.5, 10.0, 7.5)):
        flags = [*result["flags"], *(["--seed", str(seed)] if seed else [])]
        workers = 2 if seed else 1
        more = {"seed": seed, "flags": flags, "last_accuracy": last, "workers": workers}
        seeds.append({**result, "best_accuracy": 12.5, **more})
    other = {**result, "flags": ["--lr", "0.2"]}
    _, _, row, other_row = summary_table([*seeds, other]).splitlines()
    assert " | 3 | 90.00 ± 2.50 | 87.50 ± 0.00 | - | - | 1, dist / 2, dist | " in row
    assert other_row.startswith("| alexnet `--lr 0.2` | synthetic10 | 1 | ")


def test_images_from_a_folder_are_compared_with_what_they_are_said_to_be(
    finished, tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "MAX_BYTES", 0)
    result = read(add(finished, tmp_path / "results"))
    folder = {**result, "dataset": "folder"}
    lines = summary_table(
        [
            {**result, "dataset": "cifar10", "compared_with": "cifar10"},
            {**folder, "compared_with": "cifar100"},
            {**folder, "compared_with": "folder"},
        ]
    ).splitlines()
    cells = [line.split(" | ") for line in lines[2:]]
    assert [(c[1], c[5], c[6]) for c in cells] == [
        ("cifar10", "-", "22.78"), ("folder", "-", "56.13"), ("folder", "-", "-"),
    ]  # fmt: skip


PUBLISHED = sorted(FOLDER.glob("*/*/seed*"))


def test_something_is_published():
    assert {folder.relative_to(FOLDER).parts[:2] for folder in PUBLISHED} >= {
        ("alexnet", "cifar10"), ("alexnet", "cifar100"),
    }  # fmt: skip
    assert load_results().keys() == set(PUBLISHED)


@pytest.mark.parametrize(
    "folder", PUBLISHED, ids=[str(path.relative_to(FOLDER)) for path in PUBLISHED]
)
def test_what_is_published_fits_together(folder):
    """Log, metrics, figures and weights are of one run; the accuracy needs the images to check."""
    result = read(folder)
    about = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(about) == result["epochs"]
    found = results.accuracies(about)
    assert {name: result[name] for name in found} == found
    accuracies = read_log(folder / "log.txt")["Valid Acc."]
    assert accuracies == pytest.approx([row["valid_top1"] for row in about], abs=1e-5)
    assert (folder / "log.png").stat().st_size > 10_000
    if not result["weights"]:
        return
    kept = result["weights"]
    name = kept["file"].removesuffix(".safetensors")
    logged = result[f"{name}_accuracy"]
    assert abs(kept["accuracy"] - logged) <= weights.MAX_DIFFERENCE_FROM_LOG
    before = logged if kept["accuracy_before"] is None else kept["accuracy_before"]
    assert abs(kept["accuracy"] - before) <= weights.MAX_ROUNDING_CHANGE + 1e-9
    assert kept["bytes"] == (folder / kept["file"]).stat().st_size <= weights.MAX_BYTES
    model = torch.hub.load(
        str(ROOT), kept["arch"], source="local", dataset=result["dataset"], trained=True,
        seed=result["seed"], **kept["arguments"],
    ).eval()  # fmt: skip
    assert model.pretrained_cfg["accuracy"] == kept["accuracy"]
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 32, 32)).shape == (2, len(kept["classes"]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"epochs": 2}, "1 of 2 epochs"), ({"val_split": 10}, "--val-split 10"),
     ({"start_epoch": 1}, "--start-epoch 1"),
     ({"arch": "resnet", "depth": 26}, "resnet_depth_26 is no recipe")],
)  # fmt: skip
def test_what_is_no_whole_run_of_a_recipe_is_not_published(finished, tmp_path, changes, words):
    edit(finished, **changes)
    with pytest.raises(UserError, match=words):
        add(finished, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_how_far_a_run_has_come(finished, tmp_path):
    text, whole = results.state(finished)
    assert text.startswith("1 of 1 epochs, last ")
    assert whole
    edit(finished, epochs=2)
    assert not results.state(finished)[1]
    assert results.state(tmp_path / "nothing") == ("not begun", False)
    with pytest.raises(UserError, match="name the folder of a run"):
        results.read_args(tmp_path)


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
