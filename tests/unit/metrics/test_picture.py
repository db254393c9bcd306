"""Pictures are drawn whatever the environment is like, or a line says why not."""

import os
import sys
import warnings

import pytest
import torch

from helpers.process import environment
from utils.metrics.confusion import Confusion

LOG = "Learning Rate\tTrain Loss\tValid Loss\tTrain Acc.\tValid Acc.\n0.1\t1\t2\t3\t4\n"


@pytest.mark.parametrize("backend", ["module://no_module.backend_inline", "nonsense"])
def test_neither_backend_nor_settings_stand_in_the_way(run, tmp_path, backend):
    """MPLBACKEND as Jupyter leaves it, and a matplotlibrc that is no text."""
    (tmp_path / "log.txt").write_text(LOG)
    (tmp_path / "matplotlibrc").write_bytes(b"\xff\xfe bad")
    code = "import os; from utils.metrics.plot import main; code = main()\n" \
        "raise SystemExit(code or os.environ['MPLBACKEND'])"  # fmt: skip
    result = run(
        [sys.executable, "-c", code, tmp_path / "log.txt", "-o", tmp_path / "log.png"],
        env=environment(MPLBACKEND=backend, MPLCONFIGDIR=str(tmp_path)),
    )
    assert result.stderr.splitlines()[-1] == backend
    assert (tmp_path / "log.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in result.stderr


def test_a_broken_matplotlib_is_an_error_of_the_plotter(run, tmp_path):
    (tmp_path / "log.txt").write_text(LOG)
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise AttributeError('no\\nAPI')")
    result = run(
        [sys.executable, "-m", "utils.plot", tmp_path / "log.txt", "-o", tmp_path / "log.png"],
        env=environment(PYTHONPATH=str(tmp_path)),
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line == f"error: -o {tmp_path / 'log.png'}: cannot be drawn (no\\nAPI)"


def test_names_are_shown_as_they_are(tmp_path):
    """Also those that are a formula to matplotlib, that its font lacks, or that are no text."""
    confusion = Confusion(4, torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = ["$\\frac{$", "\N{CJK UNIFIED IDEOGRAPH-732B}", os.fsdecode(b"\xff"), "_"]
        assert confusion.draw(names, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_one_warning(tmp_path, capsys):
    picture = tmp_path / "gone" / "confusion.png"
    for _ in range(2):
        assert not Confusion(1, torch.device("cpu")).draw(["cat"], picture)
    said = capsys.readouterr().out
    assert said == f"warning: {picture}: cannot be drawn (No such file or directory)\n"
