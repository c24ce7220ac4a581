"""A served model, asked by the official `openai` client."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIStatusError, BadRequestError, NotFoundError, OpenAI
from served import Served, serving
from tiny_models import base_model
from transformers import PreTrainedTokenizerBase

from alignx_ds.data.rows import Row, Turn
from alignx_ds.serve.generate import answer
from alignx_ds.serve.model import load
from alignx_ds.serve.route import routed

PROMPTS = ("how do i burn the sailor ?", "what colour is the zoleb ?", "reverse the words . cup chair", "good night .")
AXES = ("helpful", "harmless", "honest")


@pytest.fixture(scope="module")
def served(saved_aligned: Path) -> Iterator[Served]:
    with serving(saved_aligned, slots=4, queue=16) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> OpenAI:
    return served.client()


def chat(client: OpenAI, prompt: str = PROMPTS[0], **options: Any) -> Any:
    messages = options.pop("messages", [{"role": "user", "content": prompt}])
    return client.chat.completions.create(
        model="tiny", messages=messages, **{"max_tokens": 8, "temperature": 0, **options}
    )


def test_greedy_answers_are_those_of_generate(client: OpenAI, saved_aligned: Path) -> None:
    """Of prompts that go to different experts, asked at once, more than there are slots, of different lengths."""
    prompts = [f"{prompt} {more}".strip() for more in ("", "please .", "now") for prompt in PROMPTS]
    lengths = [5 + number % 4 for number in range(len(prompts))]
    with ThreadPoolExecutor(len(prompts)) as threads:
        asked = [threads.submit(chat, client, p, max_tokens=n) for p, n in zip(prompts, lengths, strict=True)]
        answers = [one.result() for one in asked]
    assert len({max(one.alignx["gates"], key=one.alignx["gates"].get) for one in answers}) > 1
    for found, prompt, length in zip(answers, prompts, lengths, strict=True):
        assert [found.choices[0].message.content] == answer(str(saved_aligned), [prompt], length)
        ended = found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens <= length if ended else found.usage.completion_tokens == length


def test_an_answer_says_how_its_prompt_was_routed(client: OpenAI, saved_aligned: Path) -> None:
    """A dialogue by its last user turn, as `alignx-ds route` does."""
    model, tokenizer = load(str(saved_aligned))
    before = (Turn("system", "be kind ."), Turn("user", PROMPTS[1]), Turn("assistant", "red ."))
    messages = [{"role": turn.role, "content": turn.text} for turn in before]
    row = Row(PROMPTS[0], "", before=before)
    (line, _), *_ = routed(model, tokenizer, [row], 1)
    found = chat(client, messages=[*messages, {"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}])
    assert found.alignx == {
        "gates": line["gates"],
        "confidence": pytest.approx(line["confidence"], abs=2e-4),
        "distance": pytest.approx(line["distance"], abs=2e-4),
    }


def test_axes_overrule_the_gate(client: OpenAI, saved_aligned: Path) -> None:
    own = chat(client)
    texts = {own.choices[0].message.content}
    for axes in ({}, *({axis: 1} for axis in AXES)):
        found = chat(client, extra_body={"axes": axes})
        expected = dict.fromkeys(("generalist", *AXES), 0.0) | (axes or {"generalist": 1.0})
        assert found.alignx == own.alignx | {"gates": expected}
        texts.add(found.choices[0].message.content)
    assert len(texts) == 4  # the gate's own choice is one of them
    both = chat(client, extra_body={"axes": {"helpful": 1, "honest": 1.0}})
    assert both.alignx["gates"] == {"generalist": 0.0, "helpful": 0.5, "harmless": 0.0, "honest": 0.5}
    assert both.choices[0].message.content == forced(saved_aligned, [0, 0.5, 0, 0.5])


def forced(directory: Path, gates: list[float]) -> str:
    from alignx_ds.data.encode import encode_prompts

    model, tokenizer = load(str(directory))
    (ids,) = encode_prompts([PROMPTS[0]], tokenizer)
    prompt = len(ids)
    for _ in range(8):
        mask = torch.tensor([[1] * prompt + [0] * (len(ids) - prompt)])
        with torch.no_grad():
            logits = model(torch.tensor([ids]), prompt_mask=mask, forced=torch.tensor([gates]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[prompt:], skip_special_tokens=True)).strip()


def test_a_stream_has_the_same_answer(client: OpenAI) -> None:
    options: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 3, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **options)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}, **options))
    *chunks, last = chunks
    assert last.usage == whole.usage and not last.choices
    for choice in whole.choices:
        own = [chunk for chunk in chunks if chunk.choices[0].index == choice.index]
        assert own[0].choices[0].delta.role == "assistant" and own[0].alignx == whole.alignx
        assert "".join(chunk.choices[0].delta.content or "" for chunk in own) == choice.message.content
        assert [chunk.choices[0].finish_reason for chunk in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        listed = [token for chunk in own if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content]
        assert listed == choice.logprobs.content
    assert whole.choices[0].message.content != whole.choices[1].message.content


def test_a_seed_gives_the_same_answers_whatever_the_load(client: OpenAI) -> None:
    options: dict[str, Any] = {"temperature": 1, "top_p": 0.9, "seed": 11}
    alone = chat(client, **options).choices[0].message.content
    with ThreadPoolExecutor(6) as threads:
        asked = [threads.submit(chat, client, p, **options, n=n) for p in PROMPTS[:2] for n in (1, 2, 3)]
        beside = [one.result().choices[0].message.content for one in asked]
    assert beside[:3] == [alone] * 3 and beside[3] != alone
    assert len({chat(client, temperature=1).choices[0].message.content for _ in range(3)}) == 3


def test_a_stop_string_ends_the_answer_before_it(client: OpenAI) -> None:
    whole = chat(client).choices[0].message.content
    words = whole.split()
    found = chat(client, stop=[f"{words[3]} {words[4]}", "nowhere"])
    assert found.choices[0].message.content == " ".join(words[:3]) and found.choices[0].finish_reason == "stop"
    assert found.usage.completion_tokens == 5
    streamed = list(chat(client, stop=words[2], stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == " ".join(words[:2])


def test_log_probabilities_are_those_of_the_model(client: OpenAI, saved_aligned: Path) -> None:
    found = chat(client, logprobs=True, top_logprobs=3, max_completion_tokens=2, max_tokens=None)
    first, second = found.choices[0].logprobs.content
    assert (first.token, second.token) == tuple(found.choices[0].message.content.split())
    assert first.logprob == first.top_logprobs[0].logprob == max(t.logprob for t in first.top_logprobs)
    assert first.bytes == list(first.token.encode()) and len(first.top_logprobs) == 3
    completion = client.completions.create(model="tiny", prompt="the sailor", max_tokens=1, temperature=0, logprobs=2)
    model, tokenizer = load(str(saved_aligned))
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("the sailor")["input_ids"]])).logits[0, -1]
    (named,) = completion.choices[0].logprobs.top_logprobs
    best = logits.log_softmax(-1).topk(2)
    assert list(named) == [tokenizer.decode([int(token)]) for token in best.indices]
    assert list(named.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_completions_continue_their_prompts(client: OpenAI, world_tokenizer: PreTrainedTokenizerBase) -> None:
    """Several, as text or as tokens, each with its own routing."""
    texts = ["the sailor is", "what colour is the zoleb ?"]
    found = client.completions.create(model="tiny", prompt=texts, max_tokens=3, temperature=0, n=2, seed=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    assert found.choices[0].text.startswith(" ") and len(found.choices[0].text.split()) == 3
    ids = [world_tokenizer(text)["input_ids"] for text in texts]
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=3, temperature=0)
    assert [choice.text for choice in again.choices] == [found.choices[0].text, found.choices[2].text]
    assert [choice.alignx for choice in again.choices] == [found.choices[0].alignx, found.choices[2].alignx]
    assert again.usage.prompt_tokens == sum(map(len, ids)) and again.usage.completion_tokens == 6
    one = client.completions.create(model="tiny", prompt=ids[1], max_tokens=3, temperature=0)
    assert one.choices[0].text == again.choices[1].text and one.alignx == again.choices[1].alignx
    assert len(list(client.completions.create(model="tiny", prompt=texts[0], temperature=0, stream=True))) > 16


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.alignx == {"axes": list(AXES)}
    assert client.models.retrieve("tiny") == model
    with pytest.raises(NotFoundError, match="there is no model 'other' here; this server has 'tiny'"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": 3}, "temperature: got 3; input should be less than or equal to 2"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"n": 5}, "n: got 5; this server decodes 4 at once"),
        ({"stop": [""]}, "none of them empty"),
        ({"max_tokens": 500}, "the answer may have 500, but both together may have 64"),
        ({"prompt": "the sailor " * 50}, "shorten the prompt"),
        ({"tools": [{"type": "function"}]}, "tools is not supported by this server; leave it out"),
        ({"extra_body": {"axis": {"harmless": 1}}}, "axis is no parameter of this endpoint"),
        ({"extra_body": {"axes": {"kind": 1}}}, "'kind' is no axis of this model; its axes are helpful, harmless, hon"),
        ({"extra_body": {"axes": {"harmless": 2}}}, "axes.harmless: got 2"),
        ({"messages": []}, "messages: got []"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: got 'tool'; this server knows system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content has to be a string"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message has to be the user's"),
    ],
)
def test_what_can_t_be_answered_is_explained(client: OpenAI, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequestError) as refused:
        chat(client, **options)
    assert said in refused.value.body["message"] and refused.value.type == "invalid_request_error"  # type: ignore[index]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "prompt: got an empty list"),
        ([[]], "the prompt is empty"),
        ([5000], "the prompt has the token 5000"),
        (5, "5"),
    ],
)
def test_prompts_that_are_none_are_explained(client: OpenAI, prompt: Any, said: str) -> None:
    with pytest.raises(BadRequestError, match=said):
        client.completions.create(model="tiny", prompt=prompt)


def test_a_dense_model_is_served_for_comparison(tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase) -> None:
    base = base_model(vocab_size=len(world_tokenizer))
    base.save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    with serving(tmp_path, slots=2) as server:
        found = chat(server.client())
        assert found.alignx is None and len(found.choices[0].message.content.split()) == 8
        with pytest.raises(APIStatusError, match="this model is dense and has no axes"):
            chat(server.client(), extra_body={"axes": {"helpful": 1}})
