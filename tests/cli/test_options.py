"""Options are the fields of a dataclass: names, values and help."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest

from draftdiff import DraftAttentionConfig
from draftdiff.cli.options import Parser, fields_of
from draftdiff.errors import UserError


@dataclass(frozen=True)
class Rule:
    """A rule.

    share: of the whole, in [0, 1]; 100% is all
        of it.  steps: a number (int) or a share (float).
    layers: the first n, or these.
    way: how.

    Raises ValueError that names: the value.
    """

    share: float = 0.5
    steps: int | float = 0.2
    layers: int | tuple[int, ...] = 1
    box: tuple[int, int, int] | None = None
    way: Literal["up", "down"] = "up"
    exact: bool = True
    other: object = None
    told: int = dataclasses.field(default=3, metadata={"help": "told by metadata"})


FIELDS = fields_of(Rule)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("share", "0.25", 0.25),
        ("steps", "2", 2),
        ("steps", "1.0", 1.0),
        ("layers", "3", 3),
        ("layers", "3,", (3,)),
        ("layers", "1,4,5", (1, 4, 5)),
        ("box", "1x8x16", (1, 8, 16)),
        ("box", "1,8", (1, 8)),  # the class knows how many there must be
        ("way", "down", "down"),
        ("exact", "False", False),
    ],
)
def test_text_becomes_a_value_of_the_fields_type(name, text, value):
    read = FIELDS[name].read(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("layers", text) for text in ("", ",", "1,,2", "x")),
        *(("box", text) for text in ("", "wide", "1x8x")),
        *(("share", ""), ("way", "left"), ("exact", "perhaps"), ("steps", "many")),
    ],
)
def test_text_that_is_no_such_value_is_refused(name, text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^cannot read '{text}'$"):
        FIELDS[name].read(text)


def test_a_field_of_which_no_text_can_be_written_is_left_out():
    assert list(FIELDS) == [field.name for field in dataclasses.fields(Rule) if field.name != "other"]


def test_help_is_what_the_class_says_with_its_default():
    assert FIELDS["share"].help == "of the whole, in [0, 1]; 100% is all of it"
    assert FIELDS["steps"].help == "a number (int) or a share (float)"
    assert FIELDS["way"].help == "how" and FIELDS["told"].help == "told by metadata"
    parser = Parser(prog="draftdiff")
    for field in FIELDS.values():
        field.add_to(parser)
    text = " ".join(parser.format_help().split())
    assert "100% is all of it (default: 0.5)" in text and "--steps N|X" in text and "--box N,N,N" in text
    assert "--exact, --no-exact" in text and "--way up|down" in text
    options = parser.parse_args(["--no-exact", "--box", "1,2,3"])
    assert options.exact is False and options.box == (1, 2, 3) and options.steps is None


def test_every_option_of_draft_attention_has_help_and_sets_its_field():
    fields = fields_of(DraftAttentionConfig)
    assert {"sparsity", "selection", "tail", "tile", "dense_steps", "dense_layers", "backend"} <= set(fields)
    for field in fields.values():
        assert field.help, field.name
    texts = {"sparsity": "0.5", "tail": "false", "tile": "1x8x8", "dense_steps": "0.1", "dense_layers": "0,2"}
    config = DraftAttentionConfig(**{name: fields[name].read(text) for name, text in texts.items()})
    assert config.tile == (1, 8, 8) and config.dense_layers == (0, 2) and config.tail is False


def test_a_parser_is_filled_when_its_command_is_chosen():
    filled = []

    def fill(name):
        return lambda parser: (filled.append(name), parser.add_argument(f"--{name}"))

    parser = Parser(prog="draftdiff")
    commands = parser.add_subparsers(required=True)
    for name in ("one", "two"):
        commands.add_parser(name, fill=fill(name))
    for value in ("a", "b"):
        assert vars(parser.parse_args(["two", "--two", value])) == {"two": value}
    assert filled == ["two"]
    with pytest.raises(UserError, match=r"unrecognized arguments: --two x \(see draftdiff --help\)"):
        parser.parse_args(["one", "--two", "x"])
