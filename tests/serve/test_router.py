"""A router before a server with an adapter for every axis, asked by the official `openai` client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import APIError, APIStatusError, BadRequestError, InternalServerError, NotFoundError, OpenAI
from tiny_models import FAMILIES, aligned, base_model, low_rank_experts
from vllm_stand_in import BASE, PIECES, StandIn, running, stand_in

from alignx_ds import cli
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.models.backbone import load_gate
from alignx_ds.serve.model import load, load_router
from alignx_ds.serve.route import routed
from alignx_ds.serve.server import Settings, proxy_of
from alignx_ds.serve.upstream import KEY_VARIABLE, Upstream

AXES = ("helpful", "harmless", "honest")
ASKED = ("how do i burn the sailor ?", "what colour is the zoleb ?", "reverse the words . cup chair", "good night .")
PROMPTS = [f"{prompt} {more}".strip() for more in ("", "please .", "now") for prompt in ASKED]
KEY = "a key of the tests"
EXPERTS = ["generalist", *AXES]


@pytest.fixture(scope="module")
def behind() -> Iterator[StandIn]:
    with stand_in(*AXES, "helpful+honest") as made:
        yield made


@pytest.fixture(scope="module")
def client(saved_aligned: Path, behind: StandIn) -> Iterator[OpenAI]:
    settings = Settings(str(saved_aligned), name="tiny", router_for=behind.url, queue=8, max_body=20_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(KEY_VARIABLE, "of the other server")
        proxy = proxy_of(settings, KEY)
    with running(proxy.app()) as port:
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60)


def chat(client: OpenAI, prompt: str = PROMPTS[0], **options: Any) -> Any:
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(**{"model": "tiny", "messages": messages, "max_tokens": 8, **options})


def test_the_adapter_of_the_gate_s_expert_answers(client: OpenAI, behind: StandIn, saved_aligned: Path) -> None:
    """The decision is that of the whole model; everything else of the request reaches the server as it was sent."""
    model, tokenizer = load(str(saved_aligned))
    lines = [line for line, _ in routed(model, tokenizer, [Row(prompt, "") for prompt in PROMPTS], 1)]
    expected = [BASE if line["expert"] == "generalist" else line["expert"] for line in lines]
    assert len(set(expected)) > 1
    for prompt, line, name in zip(PROMPTS, lines, expected, strict=True):
        found = chat(client, prompt, temperature=0.5, extra_body={"min_p": 0.1})
        assert found.choices[0].message.content == "".join(PIECES) + name
        assert found.model == "tiny" and found.alignx["served_by"] == name
        assert found.alignx["gates"] == pytest.approx(line["gates"], abs=2e-4)
        assert found.alignx["confidence"] == pytest.approx(line["confidence"], abs=2e-4)
        sent = {"model": name, "messages": [{"role": "user", "content": prompt}], "max_tokens": 8}
        assert behind.bodies[-1] == sent | {"temperature": 0.5, "min_p": 0.1}
        assert behind.keys[-1] == "Bearer of the other server"
        text = client.completions.create(model="tiny", prompt=prompt, max_tokens=8)
        assert text.choices[0].text.startswith("".join(PIECES)) and text.alignx["served_by"] in (BASE, *AXES)  # type: ignore[attr-defined]


def test_axes_overrule_the_gate_and_a_set_has_its_own_model(client: OpenAI, behind: StandIn) -> None:
    names = {"helpful": ("helpful",), "helpful+honest": ("helpful", "honest"), BASE: ()}
    for name, axes in names.items():
        found = chat(client, extra_body={"axes": dict.fromkeys(axes, 1)})
        assert found.alignx["served_by"] == name and "axes" not in behind.bodies[-1]
    unserved = chat(client, extra_body={"axes": {"harmless": 1, "honest": 0.9}})
    assert unserved.alignx["served_by"] == "harmless"


def test_a_stream_is_passed_on_as_it_comes(client: OpenAI) -> None:
    chunks = list(chat(client, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks).startswith("".join(PIECES))
    assert chunks[0].alignx["gates"].keys() == set(EXPERTS) and {chunk.model for chunk in chunks} == {"tiny"}
    assert all(getattr(chunk, "alignx", None) is None for chunk in chunks[1:])


def test_a_client_that_leaves_ends_its_stream_behind_the_router_too(client: OpenAI, behind: StandIn) -> None:
    left = behind.left
    stream = chat(client, stream=True, seed=1)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 20
    while behind.left == left:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_errors_say_who_made_them(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="max_tokens is too large"):  # the other server's own words
        chat(client, max_tokens=1000)
    for wrong, said in (
        ({"extra_body": {"axes": {"kind": 1}}}, "'kind' is no axis of this model"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last message has to be the user's"),
        ({"messages": []}, "messages"),
    ):
        with pytest.raises(BadRequestError, match=said):
            chat(client, **wrong)
    with pytest.raises(BadRequestError, match="the prompt has 70 tokens, of which 64 are read; shorten it"):
        client.completions.create(model="tiny", prompt=[5] * 70)
    with pytest.raises(NotFoundError, match="this server has 'tiny'"):
        chat(client, model="helpful")
    with pytest.raises(BadRequestError, match="one prompt a request"):
        client.completions.create(model="tiny", prompt=["a", "b"])
    with pytest.raises(APIStatusError, match="API key"):
        chat(client.with_options(api_key="another"))


def test_a_server_that_is_gone_is_said_to_be(saved_aligned: Path) -> None:
    with stand_in(*AXES) as made:
        proxy = proxy_of(Settings(str(saved_aligned), name="tiny", router_for=made.url), None)
    with running(proxy.app()) as port:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        with pytest.raises(InternalServerError, match="does not answer") as caught:
            chat(client)
        assert caught.value.status_code == 502 and caught.value.response.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reply", [b"[1]", b"\xff{", b'{"id": '])
def test_a_reply_that_is_no_json_object_is_said_to_be(saved_aligned: Path, reply: bytes, stream: bool) -> None:
    with stand_in(*AXES) as made:
        made.reply = reply
        proxy = proxy_of(Settings(str(saved_aligned), name="tiny", router_for=made.url), None)
        with running(proxy.app()) as port:
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            with pytest.raises((InternalServerError, APIError), match="broke off its answer"):
                list(chat(client, stream=stream))


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (("helpful", "honest"), "it has no model 'harmless'; serve that adapter under its axis's name"),
        ((*AXES, "another"), "it has 2 models that are no axes"),
    ],
)
def test_a_server_without_the_adapters_is_refused_at_the_start(models: tuple[str, ...], said: str) -> None:
    with stand_in(*models) as made, pytest.raises(ConfigError, match=said):
        Upstream(made.url, EXPERTS)


def test_nothing_at_the_address_is_one_line(saved_aligned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("http://127.0.0.1:9/v1", "somewhere"):
        assert cli.main(["serve", str(saved_aligned), "--port", "0", "--router-for", url]) == 2
        assert capsys.readouterr().err.startswith(f"alignx-ds: error: --router-for: got '{url}'")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lower_layers_decide_as_the_whole_model_does(family: str, tmp_path: Path) -> None:
    base = base_model(family=family)
    whole = aligned(base, low_rank_experts(base))
    whole.save_pretrained(tmp_path)
    lower = load_gate(tmp_path).eval()
    lowest = whole.config.layers[0]
    assert len(lower.config.layers) == 1 and lower.config.text_config.num_hidden_layers == lowest + 1
    ids = torch.randint(3, whole.config.text_config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for model in (whole.eval(), lower):
            model(ids, use_cache=False)
    assert torch.equal(whole.routing.decisions[lowest].logits, lower.routing.decisions[lowest].logits)
    assert list(gates_of(lower)) == [lowest]
    (layer,) = alignx_layers(lower)
    assert {id(p) for p in layer.parameters()} == {id(p) for p in gates_of(lower)[lowest].parameters()}


def test_gates_of_every_layer_can_t_choose_one_adapter(tmp_path: Path) -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base), scope="per_layer")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"gate\.scope: got 'per_layer', expected shared, for a router"):
        load_router(str(tmp_path))
