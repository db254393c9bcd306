"""The benchmarks: their arithmetic, the baseline script, and that they run at all."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torchvision import transforms

from bench import allreduce, loader, plain, scaling, step
from bench.__main__ import main, parse, write
from bench.common import (
    Ratio,
    Result,
    Settings,
    draw_ratios,
    interleaved,
    measure,
    process_environment,
    ratio,
    time_epochs,
)
from bench.epoch import summary
from bench.training import constant_rate
from cifar import run as program
from helpers.warm import run_warm
from models import create_model
from utils.checkpoint import format as checkpoint
from utils.config.recipes import Recipe, find_recipe
from utils.data import synthetic
from utils.data.image_set import ImageSet
from utils.data.sampling import PAD
from utils.distributed.comm import Comm
from utils.distributed.ddp import DDPComm
from utils.errors import UserError
from utils.files import ROOT
from utils.runtime.exit_codes import run_worker
from utils.training.optim import Schedule

TINY = Settings(rounds=2, scale=0.02, loaders=1)
DATA = "-d synthetic10 --train-size 40 --test-size 20 --train-batch 20 --test-batch 10".split()


def test_variants_take_turns_and_every_other_round_is_reversed():
    assert "".join(interleaved("ABC", 3)) == "ABCCBAABC"
    calls = []
    variants = {name: lambda name=name: calls.append(name) or len(calls) for name in "AB"}
    assert measure(variants, 2) == {"A": [1, 4], "B": [2, 3]}
    assert calls == ["A", "B", "B", "A"]


def test_ratios_are_taken_pair_by_pair():
    found = ratio([2.0, 30.0, 4.0], [1.0, 10.0, 4.0])
    assert found == Ratio(2.0, 1.0, 3.0)
    assert str(found) == "2.00 (1.00 - 3.00)"
    assert found.percent() == "200% (100% - 300%)"
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_latency_and_bandwidth_are_found_again():
    sizes = allreduce.SIZES
    found = allreduce.fit(sizes, [2e-4 + size / 3e9 for size in sizes])
    assert found.latency == pytest.approx(2e-4)
    assert found.bandwidth == pytest.approx(3e9)
    assert allreduce.repeats(2**12) == 100
    assert allreduce.repeats(2**26, 0.1) == 3


def turns(*seconds):
    """Two turns of two steps of 100 images: with all-reduce, waiting, apart."""
    ways = dict(zip(scaling.WAYS, ([s, s] for s in seconds), strict=False))
    return scaling.Turns(images=200, data=0.05, steps=2, seconds=ways)


def test_scaling_splits_a_step_and_says_what_pays():
    groups = scaling.choose_groups(2, horovod=True, gpus=0)
    labels = [group.label() for group in groups]
    assert labels == ["one process", "one process, 2 threads", "dist, 2", "horovod, 2"]
    found = [turns(2.0), turns(1.0), turns(2.0, 1.5, 1.0), turns(4.0, 1.0, 2.0)]
    rounds = {group: [one] * 2 for group, one in zip(groups, found, strict=True)}
    rows, ratios, targets = scaling.table({"alexnet": rounds})
    cells = [row[2:7] for row in rows[1:]]
    assert cells == [
        ("100", "5%", "95%", "0%", "0%"),
        ("200", "10%", "90%", "0%", "0%"),
        ("100", "5%", "45%", "25%", "25%"),
        ("50", "2%", "48%", "0%", "50%"),  # Noise: it waits less than workers apart take.
    ]
    assert [row[7] for row in rows[1:]] == ["-", "-", "50% (50% - 50%)", "50% (50% - 50%)"]
    assert [row[9] for row in rows[1:]] == ["-", "-", "-", "50% (50% - 50%)"]
    assert ratios["alexnet, dist, 2"].median == pytest.approx(0.5)
    assert targets == {"alexnet, dist, 2": 0.88}
    (line,) = scaling.verdict("alexnet", rounds)
    assert "2 workers are 0.50 (0.50 - 0.50) times as fast as one process, 2 threads" in line
    assert "more workers do not pay" in line


def test_scaling_measures_what_the_machine_has():
    on_gpus = scaling.choose_groups(4, horovod=False, gpus=4)
    assert [group.workers for group in on_gpus] == [1, 2, 3, 4]
    (one,) = scaling.choose_groups(1, horovod=False, gpus=0)
    assert scaling.verdict("alexnet", {one: []}) == ["one core: nothing to scale"]


@pytest.mark.slow
def test_the_scaling_benchmark_yields_finite_numbers():
    """Real workers, and every way of training."""
    tiny = Settings(models=("resnet20",), rounds=1, scale=0.02)
    result = scaling.run(tiny)
    for groups in result.raw.values():
        (found,) = (scaling.Turns(*one["resnet20"]) for one in groups)
        assert all(0 < t < math.inf for times in found.seconds.values() for t in times)
        (count,) = {len(times) for times in found.seconds.values()}
        assert 2 <= count <= scaling.TURNS
        assert found.images == found.steps * scaling.BATCH
        assert sum(found.parts()) == pytest.approx(1)
    assert set(scaling.Turns(*result.raw["dist, 2"][0]["resnet20"]).seconds) == set(scaling.WAYS)


def test_an_epoch_process_is_timed_by_its_lines(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\n"
        "for epoch in range(2):\n"
        "    print(f'\\nEpoch: [{epoch}'); time.sleep(0.3 - 0.2 * epoch); print('train loss 1')\n"
    )
    times = summary(time_epochs([sys.executable, str(script)], process_environment(1)))
    # A line may be read late, so an epoch may look shorter than the script has slept.
    assert 0.2 <= times["first"] < times["whole"]
    assert 0.05 <= times["later"] < times["first"]
    assert times["start"] > 0


def test_the_loader_benchmark_yields_finite_numbers():
    result = loader.run(TINY)
    seconds = result.raw["seconds"]
    assert {len(times) for times in seconds.values()} == {2}
    assert all(0 < t < math.inf for times in seconds.values() for t in times)
    assert "torchvision, 0 workers" in result.text()


def test_the_step_benchmark_yields_finite_numbers():
    recipe = Recipe("tiny", ("-a", "resnet", "--depth", "8"), 0, "-", "-")
    numbers = step.measure_model(recipe, TINY)
    assert set(numbers["seconds"]) == {"loop", "floor", "channels-last floor"}
    assert all(0 < t < math.inf for times in numbers["seconds"].values() for t in times)


def test_the_loop_and_its_floor_train_one_network_in_the_same_memory():
    recipe = Recipe("tiny", ("-a", "resnet", "--depth", "8", "--warmup-steps", "9"), 0, "-", "-")
    training = step.short_epochs(recipe, 2, Comm())
    bare = step.Bare(training)
    assert bare.model is training.loop.step.model
    assert bare.optimizer is training.loop.step.optimizer
    assert bare.images.shape == (2, 3, 32, 32)
    assert len(training.plan.batch_slices) == step.DIFFERENT
    before = [p.clone() for p in bare.model.parameters()]
    training.train(step.DIFFERENT + 1)
    assert len(training.loop.times.compute) == step.DIFFERENT + 1
    assert {group["lr"] for group in bare.optimizer.param_groups} == {1e-3}
    assert not any(map(torch.equal, before, bare.model.parameters()))


def test_the_benchmarks_train_at_one_rate_whatever_the_recipe_says():
    recipe = find_recipe("resnet110")
    train = constant_rate(recipe, "--warmup-steps", "5").train
    assert (train.lr, train.warmup_steps, train.weight_decay) == (1e-3, 5, 1e-4)
    train = constant_rate(recipe).train
    schedule = Schedule(train.lr, train.schedule, train.gamma, train.warmup_steps, train.warmup)
    assert {schedule.learning_rate(0, k, 391) for k in (0, 390)} == {1e-3}


def test_results_are_written(tmp_path):
    found = Ratio(2.0, 1.0, 3.0)
    result = Result("a title", [("head",), ("row",)], ["a note"], {"x": [1.5]},
                    lambda axes: draw_ratios(axes, {"one": found}, {"one": 1.5}, "x"))  # fmt: skip
    write(tmp_path, {"date": "today"}, {"loader": result}, {"loader": 1.0})
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["benchmarks"]["loader"]["raw"] == {"x": [1.5]}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nothing", ["'nothing'", "loader"]),
        ("loader --rounds 0", ["--rounds 0", "1 or more"]),
        ("loader --rounds x", ["--rounds", "'x'"]),
        ("step --models alexnt", ["alexnt", "did you mean alexnet"]),
        ("step --scale 0", ["--scale 0", "above 0"]),
        ("epoch -d cifr10", ["--dataset", "'cifr10'"]),
        ("epoch --rnds 3", ["--rnds"]),
        ("loader -o /dev/null", ["-o /dev/null", "another folder"]),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert list(tmp_path.iterdir()) == []


def test_the_launcher_hands_its_flags_on(run, tmp_path):
    launcher = ROOT / "launcher.sh"
    result = run([launcher, "--bench", "speed"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --bench 'speed'")
    assert len(result.stderr.splitlines()) == 1
    result = run([launcher, "--bench", "loader", "--", "--scale", "9"], cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --scale 9: give a number above 0 and up to 4\n"
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_are_all_benchmarks_on_synthetic_images():
    options = parse([])
    assert (options.name, options.dataset, str(options.output)) == (
        "all", "synthetic10", "bench-results"
    )  # fmt: skip
    assert parse(["--models", "ResNet-20,alexnet"]).models == ("resnet20", "alexnet")


def test_the_plain_script_trains_and_says_how_long(capfd, tmp_path):
    """In this process: the network starts as ours, and learns."""
    flags = [*DATA, "-a", "alexnet", "--epochs", "1", "-j", "1", "-c", str(tmp_path / "plain")]
    assert plain.main([*flags, "--lr", "1e-30"]) == 0
    *_, last = capfd.readouterr().out.splitlines()
    record = json.loads(last)
    assert record["parameters"] == find_recipe("alexnet").parameters
    assert len(record["epoch_seconds"]) == 1
    assert 0 <= record["top1"] <= 100
    ours = [*flags[:-1], str(tmp_path / "ours"), "--lr", "1e-30"]
    assert run_worker(DDPComm, program, ours) == 0
    theirs, mine = (
        checkpoint.load(tmp_path / name / checkpoint.LATEST)["state_dict"]
        for name in ("plain", "ours")
    )
    assert list(theirs) == list(mine)
    for name, tensor in mine.items():  # The rate is too small to move them.
        assert torch.equal(tensor, theirs[name]), name


def test_the_plain_script_refuses_flags_that_it_lacks(capsys):
    assert plain.main(["--sync-bn"]) == 2
    assert capsys.readouterr().err.startswith("error: --sync-bn True: ")
    with pytest.raises(UserError, match="nonsense"):
        plain.parse(["--nonsense"])


def test_the_plain_script_trains_on_two_workers(tmp_path):
    flags = [*DATA, "-a", "resnet", "--depth", "8", "--epochs", "2", "-j", "1"]
    result = run_warm(["-m", "bench.plain", *flags, "-c", tmp_path], workers=2)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert sum(line.startswith("Epoch: [") for line in lines) == 2
    assert sum(line.startswith("train loss") for line in lines) == 2
    assert len(json.loads(lines[-1])["epoch_seconds"]) == 2
    state = torch.load(tmp_path / "checkpoint.pth.tar", weights_only=True)["state_dict"]
    start = create_model("resnet", depth=8).state_dict()
    assert state.keys() == start.keys()
    assert torch.isfinite(torch.cat([t.flatten().float() for t in state.values()])).all()


def test_both_pipelines_make_the_same_batches():
    """Without chance in them: the same pixels, normalised alike; and crops of the same border."""
    images, labels = synthetic.generate(10, train=True, count=8)
    mean, std = synthetic.STATISTICS
    theirs = plain.Images(images, labels, plain.test_transform(mean, std))
    ours = ImageSet(images, labels, mean, std, device=torch.device("cpu"))
    batch, found = ours.batch(torch.arange(8))
    for k in range(8):
        torch.testing.assert_close(batch[k], theirs[k][0], rtol=1e-5, atol=1e-5)
        assert found[k] == theirs[k][1]
    crop, flip, *_ = plain.train_transform(mean, std).transforms
    assert isinstance(crop, transforms.RandomCrop)
    assert (crop.size, crop.padding, crop.fill, flip.p) == ((32, 32), PAD, 0, 0.5)


def test_accuracy_counts_the_best_and_the_five_best():
    output = torch.from_numpy(np.eye(10, dtype=np.float32)[[0, 1, 2, 3]])
    output[3] = torch.arange(10.0)  # Label 5 is fifth.
    first, fifth = plain.accuracy(output, torch.tensor([0, 1, 9, 5]))
    assert (first.item(), fifth.item()) == (50.0, 75.0)
