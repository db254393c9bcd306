"""The configuration: six groups that hold every option once and never change."""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

from utils.config.args import build_parser, parse_args
from utils.config.schema import MODEL_FLAGS, Config, ModelConfig


def test_every_option_of_the_parser_is_a_field_of_one_group():
    """Names, order and values: the dictionary in checkpoints and args.json is argparse's own."""
    words = "-d cifar10 --data-url https://a/b --schedule 1 2 --drop 0.1 -a wrn --epochs 9".split()
    parsed, _ = build_parser().parse_known_args(words)
    config = parse_args(words)
    assert list(config.options().items()) == list(vars(parsed).items())
    assert Config.from_options(config.options()) == config
    # All that describes a network but its name goes to the factory.
    assert {"arch", *MODEL_FLAGS} == {field.name for field in fields(ModelConfig)}


def test_a_configuration_never_changes():
    config = parse_args([])
    for group in [config, *filter(is_dataclass, vars(config).values())]:
        with pytest.raises(FrozenInstanceError):
            setattr(group, fields(group)[0].name, None)
    hash(config)  # Nothing in it can be changed either.
