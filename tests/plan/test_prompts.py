"""A base model's tokenizer, template and end tokens: each trait that goes wrong is one line of the dry run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from model_directories import DEFAULTING, DROPPING, REFUSING, THINKING, model_directory
from transformers import PreTrainedTokenizerBase

from alignx_ds import cli

WriteRecipe = Callable[..., Path]
Say = Callable[..., str]
pytestmark = pytest.mark.usefixtures("no_launcher")
BAD = "{{ bos_token }}{% for m in messages %}{% if %}{% endfor %}"


@pytest.fixture
def said(write_recipe: WriteRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """What a dry run with a model of these traits says: the plan, or its one line of error."""

    def run(*overrides: str, template: str | None = "", remove: str = "", code: int = 0, **files: Any) -> str:
        directory = model_directory(tmp_path / "model", template, **files)
        if remove:
            (directory / remove).unlink()
        arguments = ["run", str(write_recipe(f"model.path={directory}", *overrides)), "--dry-run"]
        assert cli.main(arguments) == code
        printed = capsys.readouterr()
        if code:
            assert printed.out == ""
            (line,) = printed.err.splitlines()
            return line.replace(str(directory), "DIR")
        return " ".join(printed.out.split())

    return run


@pytest.mark.parametrize(
    ("traits", "line"),
    [
        ({"template": BAD}, "the chat template can't be rendered (TemplateSyntaxError: line 1: "),
        ({"template": "hello"}, "the chat template does not write the user's message"),
        ({"tokenizer_config": {"eos_token": None}}, "set eos_token in its tokenizer_config.json, e.g. to '<eos>'"),
        ({"remove": "tokenizer.json"}, "it has no tokenizer.json; save the tokenizer beside the model"),
        ({"remove": "tokenizer_config.json"}, "set eos_token in its tokenizer_config.json"),
        ({"tokenizer_config": {"eos_token": 5}}, "its tokenizer can't be read (TypeError: "),
        ({"tokenizer": {"added_tokens": 5}}, "its tokenizer can't be read ("),
        ({"tokenizer_config": {"eos_token": "</new>"}}, "its tokenizer writes '</new>' as 647; resize the embedding"),
        ({"tokenizer_config": {"pad_token": "[PAD]"}}, "its tokenizer writes '[PAD]' as 647; resize the embedding"),
        ({"generation_config": {"eos_token_id": "2"}}, "its generation_config.json has eos_token_id='2'; correct it"),
        ({"generation_config": {"eos_token_id": [[2]]}}, "its generation_config.json has eos_token_id=[[2]]"),
        ({"generation_config": {"cache_implementation": "mystery"}}, "its generation_config.json can't be read ("),
        ({"tokenizer_config": {"name": "\ud800"}}, "its tokenizer can't be read (UnicodeEncodeError: "),
        ({"template": None, "tokenizer_config": {"chat_template": 5}}, "its chat_template is 5; correct it"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(said: Say, traits: dict[str, Any], line: str) -> None:
    printed = said(code=2, **traits)
    assert printed.startswith("alignx-ds: error: model.path: got 'DIR', expected ")
    assert line in printed


@pytest.mark.parametrize(
    ("traits", "line"),
    [
        ({"template": REFUSING}, "system prompts in the first user turn: the template refuses a system message"),
        ({"template": DROPPING}, "system prompts in the first user turn: the template drops a system message"),
        ({"template": DEFAULTING}, "without a system prompt the template writes its own: 'be well .'"),
        ({"template": None}, "chat template none; prompts are written in the Alpaca format"),
        ({"template": THINKING + "{{ '<think>' }}"}, "answers stand inside <think>: the template opens it"),
        ({"generation_config": {"eos_token_id": 3}}, "answers end with <eos>; decoding also stops at <unk>"),
        ({"generation_config": {"eos_token_id": None}}, "answers end with <eos> rows"),
        ({"generation_config": {"eos_token_id": [2, 647, -1]}}, "answers end with <eos> rows"),
        ({"tokenizer_config": {"pad_token": "<eos>"}}, "answers end with <eos> rows"),
    ],
)
def test_what_a_user_should_know_is_said(said: Say, traits: dict[str, Any], line: str) -> None:
    assert line in said(**traits)


def test_arguments_of_the_template(said: Say, tmp_path: Path) -> None:
    printed = said("model.template_args.enable_thinking=false", template=THINKING)
    assert "chat template chat_template.jinja of the model, with enable_thinking=False" in printed


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("enable_thinkin=false", "got False, expected an argument that the model's chat template reads; did you mean"),
        ("fixed=true", "got True, expected an argument that the model's chat template reads; no value of it changes"),
        ("enable_thinking=[1]", "got [1], expected a text, a finite number or a truth value"),
        ("enable_thinking=.nan", "got nan, expected a text, a finite number or a truth value"),
        ("messages=x", "got 'x', expected an argument of the template's own; remove it: transformers sets messages"),
    ],
)
def test_an_argument_that_would_do_nothing_is_refused(said: Say, override: str, line: str) -> None:
    own = "{% set fixed = false %}{% if fixed %}never{% endif %}"
    printed = said(f"model.template_args.{override}", template=own + THINKING, code=2)
    assert f"model.template_args.{override.partition('=')[0]}: {line}" in printed


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused(
    said: Say, world_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aligned model would be asked in other tokens than it was trained on."""

    def save(self: PreTrainedTokenizerBase, directory: str, **options: Any) -> None:
        changed = copy.deepcopy(world_tokenizer)
        changed.chat_template = f"{changed.chat_template} again"
        monkeypatch.undo()
        changed.save_pretrained(directory)

    monkeypatch.setattr(type(world_tokenizer), "save_pretrained", save)
    assert "expected a tokenizer that is the same after it was saved; transformers writes another" in said(code=2)
