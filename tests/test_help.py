"""``--help`` of every command: flags that exist, examples that are understood, defaults."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from tests.flags import COMMANDS, unknown_flags

# without them nothing is done, compared or limited
_NO_DEFAULT = {
    "against",
    "calibration",
    "eval_text",
    "html",
    "include_path",
    "keep",
    "kl_target",
    "kv_budget",
    "plot",
    "rank",
    "rope_dims",
    "set_",
    "tasks",
    "text",
    "to",
}
# sizes of a model without a source
_BARE = {"layers", "heads", "head_dim"}


def _options(command: str) -> Iterator[Any]:
    for option in COMMANDS[command].params:
        if option.name != "help":
            yield option


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_flags_that_exist(command: str) -> None:
    texts = [COMMANDS[command].help, *(option.help for option in _options(command))]
    assert all(texts)
    assert not set[str]().union(*(unknown_flags(command, text) for text in texts))


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_are_understood(command: str) -> None:
    """They are of the command, and every flag has a value of its type."""
    examples = re.findall(r"^ *kvpatch (.*)", COMMANDS[command].help, re.MULTILINE)
    assert bool(examples) == (command != "demo")
    for name, *words in map(shlex.split, examples):
        assert name == command
        COMMANDS[name].make_context(name, list(words))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_holds_without_an_option(command: str) -> None:
    for option in _options(command):
        takes_value = option.param_type_name == "option" and not option.is_flag
        if takes_value and not option.required and option.default is None:
            bare = command == "inspect" and option.name in _BARE
            purely_more = option.name in _NO_DEFAULT or bare
            assert ("default" in option.help) != purely_more, option.name
