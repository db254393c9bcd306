"""Bad input on every flag: one line that names it, exit code 2, nothing written.

The flags come from the parser, so that a new one is tried without a line here.
"""

import contextlib
import io
import os
import re
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar import run as program
from helpers.process import environment, run
from utils.config.args import build_parser, parse_args
from utils.distributed.comm import Comm
from utils.errors import UserError, one_line
from utils.files import ROOT
from utils.launch.commands import has_horovod
from utils.runtime.exit_codes import run_worker

# The same cases every time; a slow machine is no failure.
settings.register_profile(
    "here",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("here")

# Were a bad value taken, then for a run of one step.
TINY = "-d synthetic10 -a alexnet --train-size 8 --test-size 8 --train-batch 8 --epochs 1".split()

PARSER = build_parser()
FLAGS = sorted(PARSER._option_string_actions)
VALUED = [action for action in PARSER._actions if action.nargs != 0]
SWITCHES = [a for a in PARSER._actions if a.nargs == 0 and a.dest not in ("help", "version")]

# Two good values of flags that take neither a number, nor any path, nor one of a printed list.
GOOD_WORDS = {
    "arch": ["alexnet", "resnet"],
    "dataset": ["cifar10", "synthetic10"],
    "data_url": ["https://host/folder/", "http://127.0.0.1:8000/"],
    "data_md5": ["0" * 32, "aBcDeF0123456789" * 2],
    "block_name": ["BasicBlock", "bottleneck"],
    "gpu_id": ["0", "0,1"],
}
# The letters of flags among them: a value may be one.
PATHS = [
    "some/folder",
    "bäume und 木",
    "checkpoint=1",
    *(flag[1] for flag in FLAGS if len(flag) == 2),
]

# int() or float() takes many of these.
NO_NUMBER = [
    "", " ", "x", "nan", "-nan", "inf", "-inf", "infinity", "1e999", "-1e999", "0x10", "1_000", "²",
    "\uff11\uff12", "\u0663", "1\u066b5", " 5", "5 ", "5\n", "\t5", "1,5", "1e", "e1", "--", "+-1",
    "1" + "0" * 30, "9" * 5000, "-1", "-0.5", "-" + "9" * 5000, "$(id)", "5;id", "True", "1\0",
]  # fmt: skip
NO_WHOLE_NUMBER = ["1.5", "1.0", "1e3", ".5"]
NO_PATH = [
    "", "a\0b", "a\nb", "a\rb", "a\x1b[31mb", "a\u2028b", os.fsdecode(b"a\xffb"), "x" * 300,
    "x/" * 5000, "x " * 5000, "--",
]  # fmt: skip
NO_WORD = [*NO_PATH, "no-such", "' or 1", "$(id)", "*", "-x", "é", "x" * 100_000]


def kind(action):
    """What a flag takes: "whole", "real", "word" or "path"."""
    if action.choices or action.dest in GOOD_WORDS:
        return "word"
    with contextlib.suppress(Exception):
        if isinstance(action.type("0.5"), float):
            return "real"
    return "whole" if _takes(action, "1", int) or _takes(action, "7", int) else "path"


def _takes(action, text, type_):
    with contextlib.suppress(Exception):
        return isinstance(action.type(text), type_)
    return False


def good_values(action):
    if action.choices:
        return list(action.choices)
    if action.dest in GOOD_WORDS:
        return GOOD_WORDS[action.dest]
    if kind(action) == "path":
        return PATHS
    numbers = ["1", "0.5", "7", "1e-3", "0"]
    return [text for text in numbers if _takes(action, text, int | float)]


def bad_values(action):
    """A strategy for values that the flag must refuse."""
    if kind(action) in ("whole", "real"):
        listed = NO_NUMBER + (NO_WHOLE_NUMBER if kind(action) == "whole" else [])
        words = st.text(min_size=1, max_size=20).filter(
            lambda text: not re.fullmatch(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?", text, re.ASCII)
        )
        return st.sampled_from(listed) | words | st.integers(10**10).map(str)
    if kind(action) == "word":
        return st.sampled_from(NO_WORD)
    unprintable = st.text(st.characters(categories=["Cc", "Cs"]), min_size=1, max_size=3)
    around = st.text(max_size=5)
    return st.sampled_from(NO_PATH) | st.tuples(around, unprintable, around).map("".join)


def words_for(flag, value):
    """The flag with its value, as one word where the value would pass for a flag."""
    if not value.startswith("-"):
        return [flag, value]
    return [f"{flag}={value}"] if flag.startswith("--") else [flag + value]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test stands in an empty folder and leaves it empty."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


def refused(argv, engine=Comm, patient=False):
    """The line with which the program refuses a command line."""
    started = time.process_time()
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown), mock.patch.dict(os.environ):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        code = run_worker(engine, program, argv)
    assert code == 2, f"taken: {argv}"
    assert time.process_time() - started < (20 if patient else 3)
    return the_line(shown.getvalue())


def the_line(text):
    """The one line of an error message."""
    (line,) = text.splitlines()
    assert line.startswith("error: "), line
    assert line.isprintable()
    assert len(line) < 420, "no line that a person can read"
    return line.removeprefix("error: ")


def names(line, value):
    """Whether a line shows a value, at least its beginning."""
    shown = value, one_line(value, 10**6), repr(value)[1:-1]
    return any(text[:40] in line for text in shown)


@settings(max_examples=250)
@given(st.data())
def test_bad_values(data):
    action = data.draw(st.sampled_from(VALUED))
    flag = data.draw(st.sampled_from(action.option_strings))
    value = data.draw(bad_values(action))
    line = refused([*TINY, *words_for(flag, value)])
    assert any(name in line for name in action.option_strings), line
    assert names(line, value), line


@pytest.mark.parametrize("action", VALUED, ids=lambda action: action.dest)
def test_every_listed_bad_value(action):
    listed = {"whole": NO_NUMBER + NO_WHOLE_NUMBER, "real": NO_NUMBER, "path": NO_PATH}
    for value in listed.get(kind(action), NO_WORD):
        line = refused([*TINY, *words_for(action.option_strings[-1], value)])
        assert any(name in line for name in action.option_strings), (value, line)
        assert names(line, value), (value, line)


@pytest.mark.parametrize("action", VALUED, ids=lambda action: action.dest)
def test_good_values_are_taken_and_the_last_one_wins(action):
    first, second = (good_values(action) * 2)[:2]
    for flag in action.option_strings:
        for value in good_values(action):
            parse_args([*EXTRA.get(action.dest, []), flag, value])
        both = [*EXTRA.get(action.dest, []), flag, first, flag, second]
        one = [*EXTRA.get(action.dest, []), flag, second]
        taken, wanted = (parse_args(words).options()[action.dest] for words in (both, one))
        assert taken == ([first, second] if action.dest == "data_url" else wanted)


PRINTABLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"])


@given(st.text(PRINTABLE, min_size=1, max_size=60), st.booleans())
def test_any_name_that_can_be_printed_is_a_path(name, together):
    words = [f"--checkpoint={name}"] if together or name.startswith("-") else ["-c", name]
    if name != "--":
        assert parse_args(words).run.checkpoint == name


# What a good value needs beside it.
EXTRA = {"start_epoch": ["--epochs", "9"]}


def test_a_flag_without_its_value():
    for action in VALUED:
        for flag in action.option_strings:
            for words in ([flag], [flag, "--deterministic"]):
                assert flag in refused([*TINY, *words])


def test_a_switch_with_a_value():
    for action in SWITCHES:
        for flag in action.option_strings:
            line = refused([*TINY, f"{flag}=1" if flag.startswith("--") else f"{flag}1"])
            assert flag in line


@given(st.sampled_from([flag for flag in FLAGS if len(flag) > 4]), st.data())
def test_a_misspelt_flag_leads_to_a_real_one(flag, data):
    place = data.draw(st.integers(2, len(flag) - 2))
    change = data.draw(st.sampled_from(["", flag[place + 1] + flag[place], flag[place] * 2]))
    typo = flag[:place] + change + flag[place + (2 if len(change) == 2 else 1) :]
    if typo in FLAGS:
        return
    line = refused([*TINY, typo, "5"])
    assert line.startswith(f"{typo}: no such flag; did you mean -"), line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--epoch 5", "--epoch: no such flag; did you mean --epochs?"),
        ("--epoch=5", "--epoch: no such flag; did you mean --epochs?"),
        ("-epochs 5", "-epochs: no such flag; did you mean --epochs?"),
        ("-checkpoint=x", "-checkpoint: no such flag; did you mean --checkpoint?"),
        ("--qqq", "--qqq: no such flag; python cifar.py -h lists the flags"),
        ("resnet", "'resnet': belongs to no flag; python cifar.py -h lists the flags"),
        ("--momentum 0.9 0.99", "'0.99': belongs to no flag; python cifar.py -h lists the flags"),
    ],
)
def test_what_is_no_flag(words, line):
    assert refused([*TINY, *words.split()]) == line


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--train-batch 8 --batch-per-worker 8", "--batch-per-worker --train-batch"),
        ("--overwrite --resume auto", "--overwrite --resume"),
        ("--evaluate", "--evaluate --resume"),
        ("--per-class", "--per-class --evaluate"),
        ("--start-epoch 9 --epochs 9", "--start-epoch --epochs"),
        ("--nesterov --momentum 0", "--nesterov --momentum"),
        ("--amp bf16 --dtype float64", "--amp --dtype"),
        ("-d cifar10 --data-url https://a/b --data-archive x", "--data-url --data-archive"),
        ("--data-archive x", "--data-archive synthetic10"),
        ("--lr 1e9 --gamma 1e9 --schedule 0 0 0 0", "--lr --gamma --schedule"),
        ("-d folder --data no/such", "--data no/such"),
        ("--train-size 999999", "--train-size 999999"),
        ("--test-size 999999", "--test-size 999999"),
        ("--val-split 8", "--val-split 8"),
        ("--backward-passes-per-step 9", "--train-batch --backward-passes-per-step"),
        ("--depth 20", "--depth alexnet"),
        ("--resume no/such", "--resume no/such"),
    ],
)
def test_what_cannot_go_together(words, named):
    line = refused([*TINY[:-2], *words.split()])
    for name in named.split():
        assert name in line


def test_the_largest_values_do_no_harm(empty_folder, capsys):
    """What is large and yet possible trains, for the one epoch that is left."""
    large = {a.option_strings[-1]: limit for a in VALUED if (limit := largest(a)) is not None}
    for flag in (
        # These must fit the data and the network.
        "--depth", "--cardinality", "--widen-factor", "--growth-rate", "--compression-rate",
        "--train-size", "--test-size", "--val-split", "--batch-per-worker", "--drop", "--dropout",
        "--backward-passes-per-step", "--start-epoch",
    ):  # fmt: skip
        large.pop(flag, None)
    large |= {"--lr": "1e-300", "--learning-rate": "1e-300", "--gamma": "1"}
    words = [word for flag, value in large.items() for word in (flag, value)]
    last = str(int(large["--epochs"]) - 1)
    folder = empty_folder.parent / "run"
    code = run_worker(Comm, program, [*TINY, *words, "--start-epoch", last, "-c", str(folder)])
    assert code == 0, capsys.readouterr().err
    assert (folder / "checkpoint.pth.tar").exists()


@pytest.mark.parametrize(
    "words",
    [
        "-a wrn --widen-factor 1000",
        "-a wrn --depth 2998 --widen-factor 100",
        "-a resnext --cardinality 1000 --widen-factor 1000",
        "-a densenet --depth 2002 --growthRate 1000",
        "-a resnet --depth 2990 --block-name bottleneck",
    ],
)
def test_a_network_that_no_machine_holds(words, monkeypatch):
    """Nothing hangs, and the machine is spared."""
    monkeypatch.setattr("utils.training.build.node_memory", lambda comm: 1 << 28)
    line = refused([*TINY, *words.split()], patient=True)
    assert words.split()[-1] in line
    assert "the network alone needs" in line


def test_a_trace_that_could_not_be_written(empty_folder):
    line = refused([*TINY, "-c", str(empty_folder.parent / "run"), "--trace", "no/such/file"])
    assert line.startswith("--trace no/such/file: cannot be written")


def largest(action):
    """The largest number that a flag takes, as it says itself; None for other flags."""
    if kind(action) not in ("whole", "real"):
        return None
    try:
        action.type("-1")
    except Exception as error:
        limit = re.search(r"\(at most ([\d.e+]+)\)", str(error))
        return limit[1] if limit else None


class TestProcess:
    """As users start it: a look at the exit code and at what reaches the terminal."""

    def start(self, script, words, **variables):
        command = [sys.executable, ROOT / script, *TINY, *words]
        return run(command, cwd=Path.cwd(), env=environment(**variables))

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("cifar.py", ["--epochs", "1" + "0" * 30]),
            pytest.param("cifar_horovod.py", ["--epoch", "3"], marks=pytest.mark.slow),
            pytest.param("cifar.py", ["--resume", "no such\u2014file"], marks=pytest.mark.slow),
            pytest.param("cifar_horovod.py", ["-c", b"\xff"], marks=pytest.mark.slow),
        ],
    )
    def test_bad_input(self, script, words):
        if "horovod" in script and not has_horovod():
            pytest.skip("Horovod is not installed: ./setup.sh --horovod builds it")
        result = self.start(script, [os.fsdecode(word) for word in words], LANG="C", LC_ALL="C")
        assert (result.returncode, result.stdout) == (2, "")
        line = the_line(result.stderr)
        assert words[0] in line

    @pytest.mark.slow
    @pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
    def test_bytes_that_are_no_text(self, encoding):
        name = os.fsdecode(b"no \xff\xc3")
        for flag in ("-c", "--resume", "--data", "--block-name", "--unknown\udcff"):
            result = self.start("cifar.py", [flag, name], PYTHONIOENCODING=encoding)
            assert result.returncode == 2
            assert flag.rstrip("\udcff") in the_line(result.stderr)


def test_a_message_stays_one_line_that_can_be_read():
    message = str(UserError("--data 'a\nb\x1b[2J\udcff': " + "x" * 10_000 + ": give another"))
    assert message.startswith(r"--data 'a\nb\x1b[2J\udcff': xxx")
    assert message.endswith("xxx: give another")
    assert message.isprintable()
    assert len(message) <= 400
