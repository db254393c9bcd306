"""The contract of utils/comm.py on every engine, and the seam below the two scripts."""

import re
from pathlib import Path

import pytest

import engine_checks

ROOT = Path(__file__).resolve().parent.parent
CHECKS = [name for name in vars(engine_checks) if name.startswith("check_")]


@pytest.mark.parametrize(
    ("engine", "workers"),
    [
        ("serial", 1),
        ("dist", 2),
        ("horovod", 2),
        *(pytest.param(e, n, marks=pytest.mark.slow) for e in ("dist", "horovod") for n in (1, 3)),
    ],
)
def test_engine_keeps_its_promises(launch, engine, workers):
    result = launch([], workers=workers, script="tests/engine_checks.py")
    passed = re.findall(r"(check_\w+) passed", result.stdout)
    assert passed == CHECKS, result.stdout + result.stderr
    assert result.returncode == 0, result.stderr


def test_no_engine_is_known_below_the_two_scripts():
    """Messages may name an engine; code may not."""
    engine = re.compile(
        r"\bhvd\b|(import|from) (horovod|torch\.distributed)|torch\.distributed\.\w+\("
    )
    for path in [*ROOT.glob("models/*.py"), *ROOT.glob("utils/*.py")]:
        assert not engine.search(path.read_text()), path
