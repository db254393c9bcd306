"""Weights alone: what is written can be read, by others too, and damage is noticed."""

import json

import pytest
import torch
from safetensors.torch import load as load_by_the_library

from utils.checkpoint.format import load
from utils.checkpoint.weights import in_half_precision, is_safetensors, pack
from utils.errors import UserError

WEIGHTS = {
    "a.weight": torch.linspace(-2, 2, 12).reshape(3, 4).t(),
    "a.num_batches_tracked": torch.tensor(7),
}
ABOUT = {"classes": ["cat", "dog"], "mean": [0.5] * 3, "std": [0.25] * 3, "trained_epochs": 3}


def test_weights_come_back_with_what_was_said_of_them(tmp_path):
    path = tmp_path / "any.name"
    path.write_bytes(pack(WEIGHTS, ABOUT))
    state = load(path)
    assert {key: state[key] for key in ABOUT} == ABOUT
    assert state["state_dict"].keys() == WEIGHTS.keys()
    for name, tensor in state["state_dict"].items():
        assert torch.equal(tensor, WEIGHTS[name])


def test_half_precision_is_for_numbers_with_a_point_and_read_as_single(tmp_path):
    rounded = in_half_precision(WEIGHTS)
    assert [tensor.dtype for tensor in rounded.values()] == [torch.float16, torch.int64]
    (tmp_path / "x").write_bytes(pack(rounded, ABOUT))
    found = load(tmp_path / "x")["state_dict"]
    assert [found[name].dtype for name in WEIGHTS] == [torch.float32, torch.int64]
    assert torch.equal(found["a.weight"], WEIGHTS["a.weight"].half().float())


def test_other_programs_read_it_and_theirs_is_read():
    content = pack(WEIGHTS, ABOUT)
    assert load_by_the_library(content).keys() == WEIGHTS.keys()


def test_a_file_of_another_program_is_weights_without_words(tmp_path):
    from safetensors.torch import save_file

    save_file({name: t.contiguous() for name, t in WEIGHTS.items()}, tmp_path / "x")
    state = load(tmp_path / "x")
    assert state.keys() == {"state_dict", "weights_alone", "read_as"}
    save_file({"a": torch.ones(1)}, tmp_path / "x", metadata={"format": "pt"})
    assert "format" not in load(tmp_path / "x")


@pytest.mark.parametrize(
    "about",
    [{"epoch": 3}, {"trained_epochs": "x"}, {"memory_format": []},
     {"classes": "cat"}, {"classes": [1]}, {"mean": [0.5]}, {"std": [1.0, 1.0, 0.0]},
     {"mean": [0.5, 0.5, float("nan")]}, {"dataset": 3}],
)  # fmt: skip
def test_words_that_make_no_sense_are_refused(tmp_path, about):
    (tmp_path / "x").write_bytes(pack(WEIGHTS, about))
    with pytest.raises(UserError, match=r"not a readable checkpoint|its '\w+' is .*, which is no"):
        load(tmp_path / "x")


@pytest.mark.parametrize("place", [-1, 20, 300])
def test_a_flipped_bit_is_noticed(tmp_path, place):
    content = bytearray(pack(WEIGHTS, ABOUT))
    content[place] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load(tmp_path / "x")


def test_what_is_no_such_file_is_told_from_one():
    assert is_safetensors(pack(WEIGHTS, {}))
    header = json.dumps({}).encode()
    assert is_safetensors(len(header).to_bytes(8, "little") + header)
    for content in (b"", b"{", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(8) + b"["):
        assert not is_safetensors(content)
    assert not is_safetensors((1 << 40).to_bytes(8, "little") + header)


def test_where_the_package_is_missing_the_way_to_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(pack(WEIGHTS, ABOUT))
    monkeypatch.setattr("utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install safetensors"):
        load(tmp_path / "x")
