"""Reads the tokenizer of a model directory. Every tokenizer but a judge's comes from here.

What a recipe sets for the chat template (`model.template_args`) is written into the template's text. So it is saved
with every model that is made from it, and whoever renders that template gets the prompts of training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.pretrained import LFS_FIX, NO_CODE, is_lfs_pointer, reading

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Read where there is no tokenizer.json, and converted.
VOCABULARIES = (
    *("tokenizer.model*", "tekken.json", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "merges.txt", "vocab.txt"),
)
SENTENCEPIECE = "tokenizer.model"
TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
DEFAULT = "default"  # of several templates, the one that transformers takes
WANTED = "a model with its tokenizer"
PROBES = ["a", "Hello, world!", "\u00e9 \u4f60\u597d \U0001f642"]  # users' texts hold anything


def load_tokenizer(
    directory: Path, key: str, given: str, args: Mapping[str, Any] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory, with these arguments in its chat template.

    Raises ConfigError, for the key and the value that was given, where there is none or it can't be read.
    """
    if not any(any(directory.glob(name)) for name in ("tokenizer.json", *VOCABULARIES)):
        fix = "it has no tokenizer.json; save the tokenizer beside the model (tokenizer.save_pretrained does)"
        raise ConfigError(Problem(key, given, WANTED, fix))
    for file in (directory / name for name in ("tokenizer.json", SENTENCEPIECE)):
        if file.is_file() and is_lfs_pointer(file):
            raise ConfigError(Problem(key, given, WANTED, f"its {file.name} is a Git LFS pointer; {LFS_FIX}"))
    with reading(key, given, "tokenizer", WANTED):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, **NO_CODE)
        if not any(tokenizer(PROBES, add_special_tokens=False)["input_ids"]):
            raise ValueError("it encodes texts as no token at all")
    templates = tokenizer.chat_template
    every = list(templates.values()) if isinstance(templates, dict) else [templates or ""]
    if not all(isinstance(text, str) for text in every):
        fix = f"its chat_template is {templates!r}; correct it in its tokenizer_config.json"
        raise ConfigError(Problem(key, given, "a chat template that is a text", fix))
    if isinstance(templates, dict) and templates and DEFAULT not in templates:
        fix = f"it has several ({', '.join(sorted(templates))}); save the one to be used as {TEMPLATE}"
        raise ConfigError(Problem(key, given, f"a chat template named {DEFAULT}", fix))
    if args and isinstance(templates, dict):
        tokenizer.chat_template = {name: with_arguments(text, args) for name, text in templates.items()}
    elif args and templates:
        tokenizer.chat_template = with_arguments(templates, args)
    return tokenizer


def save(tokenizer: PreTrainedTokenizerBase, directory: Path, source: Path) -> None:
    """Write it beside a model. `source` is the directory that it was read from.

    transformers writes no SentencePiece model, which has the scores that llama.cpp splits words by; so it is copied.
    """
    tokenizer.save_pretrained(directory)
    if (source / SENTENCEPIECE).is_file():
        shutil.copyfile(source / SENTENCEPIECE, directory / SENTENCEPIECE)


def falls_back_to_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it writes unknown characters as bytes: those that come from a SentencePiece model do (LLaMA 2, Gemma)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(getattr(getattr(backend, "model", None), "byte_fallback", False))


def vocabulary_problem(tokenizer: PreTrainedTokenizerBase, rows: int, key: str, given: str) -> Problem | None:
    """Every token id needs its row of the embedding, which has this many."""
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not beyond:
        return None
    number, token = beyond[0]
    more = f", and has {len(beyond) - 1} more of them" if len(beyond) > 1 else ""
    fix = f"its tokenizer writes {token!r} as {number}{more}; resize the embedding, or remove the token"
    return Problem(key, given, f"token ids below the embedding's {rows}", fix)


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that writes its dialogues; None where it has none."""
    found = tokenizer.chat_template
    text = found.get(DEFAULT) if isinstance(found, dict) else found
    return text if isinstance(text, str) and text.strip() else None


def with_arguments(template: str, args: Mapping[str, Any]) -> str:
    """The template with a default for each argument, which a caller's own value still overrules."""
    line = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in args.items()
    )
    return f"{line}\n{template}"  # transformers' environment removes the line break after a block


def _literal(value: Any) -> str:
    """A number, a truth value or a text as Jinja writes it; its escapes are JSON's, but for surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)
