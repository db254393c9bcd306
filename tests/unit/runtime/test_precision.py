"""Mixed precision where a processor has it."""

from dataclasses import replace

import pytest

from utils.config.args import parse_args
from utils.distributed.comm import Comm
from utils.runtime import precision


class TestPrecision:
    @pytest.mark.parametrize("works", [True, False])
    def test_bf16_that_the_processor_cannot_compute_makes_a_new_configuration(
        self, monkeypatch, capsys, works
    ):
        monkeypatch.setattr(precision, "_cpu_runs_bf16", lambda: works)
        asked = parse_args(["--amp", "bf16"]).hardware
        found = precision.resolve_precision(asked, Comm())
        assert asked.amp == "bf16"
        assert found.amp == ("bf16" if works else "off")
        assert replace(found, amp="bf16") == asked
        assert capsys.readouterr().out.count("warning: --amp bf16: ") == (not works)

    def test_without_bf16_nothing_is_tried(self, monkeypatch):
        monkeypatch.setattr(precision, "_cpu_runs_bf16", lambda: pytest.fail("tried"))
        hardware = parse_args([]).hardware
        assert precision.resolve_precision(hardware, Comm()) is hardware
