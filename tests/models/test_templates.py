"""What a chat template does with a system prompt, with arguments, and where an answer ends."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from model_directories import ASK, DEFAULTING, DROPPING, LOOP, REFUSING, THINKING, model_directory
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from alignx_ds.data.encode import encode, encode_prompts
from alignx_ds.data.rows import Row
from alignx_ds.data.texts import train_tokenizer
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.models.ends import answer_end, end_tokens
from alignx_ds.models.templates import render, template_of
from alignx_ds.models.tokenizer import default_template, load_tokenizer, with_arguments

SYSTEM, QUESTION = "be well .", "hello , how are you ?"


def templated(tokenizer: PreTrainedTokenizerBase, template: str | dict[str, str] | None) -> PreTrainedTokenizerBase:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def prompt(tokenizer: PreTrainedTokenizerBase, system: str | None = SYSTEM) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(encode_prompts([QUESTION], tokenizer, system)[0]))


@pytest.mark.parametrize(("template", "seen"), [(REFUSING, "refused"), (DROPPING, "dropped")])
def test_a_system_prompt_that_is_not_written_goes_into_the_first_user_turn(
    world_tokenizer: PreTrainedTokenizerBase, template: str, seen: str
) -> None:
    tokenizer = templated(world_tokenizer, template)
    found = template_of(tokenizer)
    assert found is not None and found.system == seen
    assert prompt(tokenizer) == f"<bos> <user> {SYSTEM} {QUESTION} <assistant>"
    assert prompt(tokenizer, None) == f"<bos> <user> {QUESTION} <assistant>"
    turns = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]
    (text,) = render([turns], tokenizer)
    assert text.split() == "<bos> <user> system user <assistant> assistant <eos> <user> user <assistant>".split()


def test_a_default_system_prompt_is_seen_and_overruled(world_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = templated(world_tokenizer, DEFAULTING)
    found = template_of(tokenizer)
    assert found is not None and (found.system, found.default_system) == ("written", "be well .")
    assert prompt(tokenizer, None) == f"<bos> <system> be well . <user> {QUESTION} <assistant>"
    assert prompt(tokenizer, "good night .") == f"<bos> <system> good night . <user> {QUESTION} <assistant>"
    own = template_of(world_tokenizer)
    assert own is not None and (own.system, own.default_system, own.dated) == ("written", "", False)


def test_a_dialogue_that_the_template_refuses_is_named(world_tokenizer: PreTrainedTokenizerBase) -> None:
    alternating = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    alternating += "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    tokenizer = templated(world_tokenizer, alternating)
    good = [{"role": "user", "content": "good night ."}]
    twice = [*good, {"role": "user", "content": "hello again ."}]
    assert render([good], tokenizer) == ["good night ."]
    with pytest.raises(
        DataError, match=r"refuses a dialogue of user, user that ends 'hello again \.' .*must alternate"
    ):
        render([good, twice], tokenizer)


def test_the_date_in_a_template_is_the_same_on_every_day(world_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = templated(world_tokenizer, "{{ strftime_now('%d %b %Y') }}" + LOOP + ASK)
    found = template_of(tokenizer)
    assert found is not None and found.dated
    assert render([[{"role": "user", "content": "x"}]], tokenizer)[0].startswith("26 Jul 2024")


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ messages[5].content }}", "{{ 1 / 0 }}", "{{ messages() }}", "hi", "{{ 'a' * 10**8 }}"]
)
def test_a_template_that_cannot_be_rendered_is_one_line(
    world_tokenizer: PreTrainedTokenizerBase, template: str
) -> None:
    with pytest.raises(
        DataError,
        match=r"the chat template (can't be rendered|does not write the user's message|writes 100,000,000 char)",
    ):
        encode([Row("hello", "hi")], templated(world_tokenizer, template))


def test_arguments_become_part_of_the_template(tmp_path: Path) -> None:
    """So they are saved with the tokenizer, and hold for whoever renders the template."""
    directory = model_directory(tmp_path / "model", THINKING)
    plain = load_tokenizer(directory, "model.path", "m")
    assert prompt(plain) == f"<bos> <system> {SYSTEM} <user> {QUESTION} <assistant>"
    tokenizer = load_tokenizer(directory, "model.path", "m", {"enable_thinking": False})
    assert prompt(tokenizer) == f"<bos> <system> {SYSTEM} <user> {QUESTION} <assistant> not well ."
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    chat = [{"role": "user", "content": "hello"}]
    assert saved.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).endswith("not well . ")
    thinking = saved.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking.endswith("<assistant> ")


@pytest.mark.parametrize("value", ['it\'s "so"\n\\ {{ x }} %} 😀', 3, -0.5, True, ""])
def test_an_argument_of_any_kind_arrives(world_tokenizer: PreTrainedTokenizerBase, value: object) -> None:
    """And the template itself stays as it is, its leading white space too."""
    template = "\n  {% if true %}  [{{ given }}]{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    direct = templated(world_tokenizer, template)
    chat = [{"role": "user", "content": "x"}]
    expected = direct.apply_chat_template(chat, tokenize=False, given=value)
    written = templated(world_tokenizer, with_arguments(template, {"given": value}))
    assert render([chat], written, generation_prompt=False) == [expected]


@pytest.mark.parametrize(
    ("asked", "before", "lead"),
    [(" Bot:", " Bot: ", " "), (" Bot: ", " Bot: ", ""), (" Bot:", " Bot:\n", "\n"), (" Bot:", " Bot: so ", "")],
)
def test_white_space_before_an_answer_is_a_part_of_it(asked: str, before: str, lead: str) -> None:
    """So prompt and answer have the tokens of the whole dialogue in the template. A word between them stays out."""
    tokenizer = train_tokenizer([Row("good night", "sleep well")], 300)
    tokenizer.chat_template = (
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ BEFORE }}{{ m.content }}"
            "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ASKED }}{% endif %}"
        )
        .replace("BEFORE", repr(before))
        .replace("ASKED", repr(asked))
    )
    (example,) = encode([Row("good night", "sleep well")], tokenizer)
    assert tokenizer.decode(example.ids[example.prompt_length :]) == f"{lead}sleep well<|end|>"
    if before.strip() == asked.strip():
        chat = [{"role": "user", "content": "good night"}, {"role": "assistant", "content": "sleep well"}]
        assert list(example.ids) == tokenizer.apply_chat_template(chat, return_dict=False)


def test_an_open_thinking_block_is_seen(world_tokenizer: PreTrainedTokenizerBase) -> None:
    for tail, seen in (("<think>\\n", "<think>"), ("<think></think>", ""), ("<seed:think>", "<seed:think>"), ("", "")):
        template = template_of(templated(world_tokenizer, LOOP + "{{ '" + tail + "' }}"))
        assert template is not None and template.thinking == seen


def test_of_several_templates_the_default_one_writes(world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer = templated(world_tokenizer, {"default": REFUSING, "rag": DROPPING})
    assert default_template(tokenizer) == REFUSING
    assert prompt(tokenizer) == f"<bos> <user> {SYSTEM} {QUESTION} <assistant>"
    directory = model_directory(tmp_path / "model", None)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "rag.jinja").write_text(DROPPING)
    with pytest.raises(ConfigError, match=r"model\.path: got 'm', .*named default; it has several \(rag\)"):
        load_tokenizer(directory, "model.path", "m")


def test_a_prompt_has_one_beginning_and_no_end(world_tokenizer: PreTrainedTokenizerBase) -> None:
    """With a tokenizer that adds both, and with and without a template that writes its own beginning."""
    ids = [(token, world_tokenizer.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    for template in (world_tokenizer.chat_template, None):
        tokenizer = templated(world_tokenizer, template)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=ids)
        assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id
        (example,) = encode([Row(QUESTION, "i am well .")], tokenizer, SYSTEM)
        tokens = tokenizer.convert_ids_to_tokens(list(example.ids))
        assert (tokens.count("<bos>"), tokens.count("<eos>")) == (1, 1)
        assert (tokens[0], tokens[-1]) == ("<bos>", "<eos>")
        assert encode_prompts([QUESTION], tokenizer, SYSTEM)[0] == list(example.ids[: example.prompt_length])


def test_an_answer_ends_as_the_template_ends_it(world_tokenizer: PreTrainedTokenizerBase) -> None:
    """Base and chat model often have different end tokens; the tokenizer names one, the generation config others."""
    turn_end = LOOP.replace("<eos>", "<unk>") + ASK
    tokenizer = templated(world_tokenizer, turn_end)
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<unk>")
    assert answer_end(tokenizer) == end == encode([Row("hello", "hi")], tokenizer)[0].ids[-1]
    assert end_tokens(tokenizer, GenerationConfig(eos_token_id=7), 647) == [7, eos, end]
    for template in (None, "{% for m in messages %}{{ m.content }} {% endfor %}", world_tokenizer.chat_template):
        assert answer_end(templated(world_tokenizer, template)) == eos
    assert end_tokens(world_tokenizer, GenerationConfig(eos_token_id=[9, 2, 647, -1]), 647) == [9, eos]
    assert end_tokens(world_tokenizer, GenerationConfig(), 647) == [eos]
