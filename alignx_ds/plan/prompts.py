"""How prompts and answers are written: what is wrong with a base model's tokenizer or template, and what to know of it.

A row of each axis is rendered and encoded for it, without any weights.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, encode, pad_token
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.models.base import GENERATION, BaseModel
from alignx_ds.models.ends import answer_end, end_tokens, vocabulary_of
from alignx_ds.models.pretrained import reading
from alignx_ds.models.templates import DAY, changes_what_is_written, template_of
from alignx_ds.models.tokenizer import MORE_TEMPLATES, TEMPLATE, load_tokenizer

SHOWN = 60  # characters of a default system prompt
# Set by transformers for every rendering, or bound to a function there.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "raise_exception"})
ROW = Row("How are you?", "I am well.")


def problems(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    """Every reason why rows can't be written as tokens, or answers ended."""
    wrong = list(_values(c))
    if wrong or c.from_scratch or not base.has_tokenizer:
        yield from wrong
        return
    try:
        template = template_of(base.tokenizer)
        yield from _arguments(c, base, "" if template is None else template.text)
        yield from _ends(c, base)
        if base.tokenizer.eos_token_id is not None:
            yield from _rows(c, base)
    except ConfigError as error:
        yield from error.problems
    except DataError as error:
        fix = f"{error} ({_where(base)})"
        yield Problem("model.path", c.model.path, "a chat template that writes the rows", fix)


def _values(c: RunConfig) -> Iterator[Problem]:
    if c.from_scratch and c.model.template_args:
        fix = "remove it: the template of a model from scratch takes no arguments"
        yield Problem("model.template_args", c.model.template_args, "nothing where model.path is 'scratch'", fix)
    for name, value in c.model.template_args.items():
        key = f"model.template_args.{name}"
        if name in RESERVED or name.endswith("_token"):
            yield Problem(key, value, "an argument of the template's own", f"remove it: transformers sets {name}")
        elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            yield Problem(key, value, "a text, a finite number or a truth value", "correct it")


def _arguments(c: RunConfig, base: BaseModel, template: str) -> Iterator[Problem]:
    """An argument that the template does not read would be ignored without a word."""
    if not c.model.template_args:
        return
    own = template.partition("\n")[2]  # without the line of the arguments
    read = {*re.findall(r"[A-Za-z_]\w*", own)}
    for name, value in c.model.template_args.items():
        key, what = f"model.template_args.{name}", "an argument that the model's chat template reads"
        if not template:
            yield Problem(key, value, "no argument", "the model has no chat template; remove it")
        elif name not in read:
            close = difflib.get_close_matches(name, read, n=1)
            yield Problem(key, value, what, f"did you mean {close[0]!r}?" if close else "remove it")
        elif not changes_what_is_written(name, value, own, base.tokenizer):
            yield Problem(key, value, what, "no value of it changes what the template writes here; remove it")


def _ends(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    given, tokenizer = c.model.path, base.tokenizer
    try:
        named = base.generation_config.eos_token_id
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        yield Problem("model.path", given, "a model", f"its {GENERATION} can't be read ({reason}); save it again")
        return
    ids = named if isinstance(named, (list, tuple)) else [named]
    if not all(i is None or (isinstance(i, int) and not isinstance(i, bool)) for i in ids):
        fix = f"its {GENERATION} has eos_token_id={named!r}; correct it to a token id or a list of them"
        yield Problem("model.path", given, "a model whose answers end", fix)
    elif tokenizer.eos_token_id is None:
        known = [tokenizer.convert_ids_to_tokens(i) for i in ids if i is not None and 0 <= i < len(tokenizer)]
        example = f", e.g. to {known[0]!r}, which its {GENERATION} names" if known else ""
        fix = f"its tokenizer has none; set eos_token in its tokenizer_config.json{example}"
        yield Problem("model.path", given, "a model with an end-of-sequence token", fix)


def _rows(c: RunConfig, base: BaseModel) -> Iterator[Problem]:
    """Encodes a row with each axis's system prompt. Raises DataError where the template refuses one."""
    size, tokenizer = vocabulary_of(base.config), base.tokenizer
    rows = _encoded(c, tokenizer)
    beyond = max(answer_end(tokenizer), int(tokenizer.eos_token_id), pad_token(tokenizer), *(max(r.ids) for r in rows))
    if beyond >= size:
        token = tokenizer.convert_ids_to_tokens(beyond)
        fix = f"its tokenizer writes {token!r} as {beyond}; resize the embedding, or remove the token"
        yield Problem("model.path", c.model.path, f"token ids below the embedding's {size}", fix)
    elif _encoded(c, _saved(c, tokenizer)) != rows:
        fix = "transformers writes another tokenizer than it reads; give a directory that this release of it has saved"
        yield Problem("model.path", c.model.path, "a tokenizer that is the same after it was saved", fix)


def _encoded(c: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    return [encode([ROW], tokenizer, prompt)[0] for prompt in (None, *(axis.prompt for axis in c.axes.values()))]


def _saved(c: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as it will be saved with the aligned model, which would otherwise fail after all the training."""
    with reading("model.path", c.model.path, "tokenizer"), TemporaryDirectory() as directory:
        try:
            tokenizer.save_pretrained(directory)
        except OSError:  # no room for temporary files: it stays unknown
            return tokenizer
        return load_tokenizer(Path(directory), "model.path", c.model.path)


def facts(base: BaseModel) -> dict[str, str]:
    """How prompts are written and answers ended, by name; raises DataError for a template that can't be rendered."""
    tokenizer, args = base.tokenizer, base.settings.template_args
    template = template_of(tokenizer)
    found = {"chat template": "none; prompts are written in the Alpaca format"}
    if template is not None:
        given = "".join(f", with {name}={value!r}" for name, value in args.items())
        found["chat template"] = f"{_where(base)}{given}"
        if template.system != "written":
            reason = "refuses" if template.system == "refused" else "drops"
            found["system prompts"] = f"in the first user turn: the template {reason} a system message"
        if template.default_system:
            text = template.default_system
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            found["without a system prompt"] = f"the template writes its own: {shown!r}"
        if template.thinking:
            found["answers stand inside"] = f"{template.thinking}: the template opens it and leaves it open"
        if template.dated:
            found["date in the template"] = f"{DAY:%Y-%m-%d} on every day, so that the rows stay the same"
    names = tokenizer.convert_ids_to_tokens(end_tokens(tokenizer, base.generation_config, vocabulary_of(base.config)))
    last = tokenizer.convert_ids_to_tokens(answer_end(tokenizer))
    others = ", ".join(name for name in names if name != last)
    found["answers end with"] = f"{last}{f'; decoding also stops at {others}' if others else ''}"
    return found


def _where(base: BaseModel) -> str:
    """Where the chat template is from."""
    if not (base.path / "tokenizer_config.json").is_file() and not (base.path / TEMPLATE).is_file():
        return "the run's own"
    if (base.path / TEMPLATE).is_file():
        return f"{TEMPLATE} of the model"
    more = (base.path / MORE_TEMPLATES).is_dir() or isinstance(base.tokenizer.chat_template, dict)
    return "the model's default one of several" if more else "tokenizer_config.json of the model"
