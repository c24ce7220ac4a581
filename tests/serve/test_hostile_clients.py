"""Malformed, huge, slow and cut-off requests, clients that leave, too many of them, and the key."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AuthenticationError, InternalServerError, OpenAI, RateLimitError
from served import KEY, Served, serving

from alignx_ds.serve import requests, server

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20, "temperature": 0}
LIMIT = 3000  # bytes


@pytest.fixture(scope="module")
def served(saved_aligned: Path) -> Iterator[Served]:
    with serving(saved_aligned, slots=2, queue=2, max_body=LIMIT) as one:
        yield one


def ask(client: OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{**BODY, **options})


def connect(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.port), timeout=20)


def head(body: bytes, path: str = "/v1/chat/completions", **headers: str) -> bytes:
    named = {
        "Host": "127.0.0.1",
        "Authorization": f"Bearer {KEY}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return f"POST {path} HTTP/1.1\r\n{''.join(f'{n}: {v}' + chr(13) + chr(10) for n, v in named.items())}\r\n".encode()


def answer(connection: socket.socket) -> tuple[int, str]:
    """The status and what the answer says."""
    with connection, connection.makefile("rb") as file:
        status = int(file.readline().split()[1])
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(file.readline, b"\r\n") if line)
        text = file.read(int(headers["content-length"]) if "content-length" in headers else -1).decode()
    return status, json.loads(text)["error"]["message"] if text.startswith('{"error"') else text


def sent(served: Served, body: bytes, **headers: str) -> tuple[int, str]:
    connection = connect(served)
    connection.sendall(head(body, **headers) + body)
    return answer(connection)


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"{", {}, 400, "the body is not JSON"),
        (b"\xff\xfe{}", {}, 400, "the body is not JSON"),
        (b"[" * 2900, {}, 400, "the body is not JSON"),
        (b"[]", {}, 400, "the body is a JSON list; send one JSON object"),
        (b"{}", {}, 400, "model is missing; add it"),
        (json.dumps({**BODY, "temperature": "hot"}).encode(), {}, 400, "temperature: got 'hot'"),
        (json.dumps({**BODY, "max_tokens": True}).encode(), {}, 400, "max_tokens: got True"),
        (json.dumps({**BODY, "temperature": float("nan")}).encode(), {}, 400, "temperature: got nan"),
        (json.dumps({**BODY, "model": "m" * 2000}).encode(), {}, 404, "mmm…"),
        (json.dumps(BODY).encode(), {"Content_Type": "text/plain"}, 415, "send JSON with"),
        (b"x" * (LIMIT + 1), {}, 413, "more than 3000 bytes"),
        (b"", {"Content_Length": "99999999999"}, 413, "more than 3000 bytes"),
        (b"", {"Content_Length": "-1"}, 400, "Invalid HTTP request"),
        (json.dumps(BODY).encode(), {"Authorization": "Bearer x"}, 401, "this server needs its API key"),
        (json.dumps(BODY).encode(), {"Authorization": "Basic \xe4"}, 401, "this server needs its API key"),
        (json.dumps(BODY).encode(), {"path": "/v1/embeddings"}, 404, "there is no such endpoint"),
    ],
)
def test_what_is_malformed_or_huge_is_explained(
    served: Served, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    found = sent(served, body, **headers)
    assert found[0] == status and said in found[1] and KEY not in found[1]


def test_a_body_of_unknown_length_is_limited_too(served: Served) -> None:
    connection = connect(served)
    connection.sendall(head(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
    for _ in range(4):
        connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
    assert answer(connection)[0] == 413


def test_what_is_no_http_is_refused(served: Served) -> None:
    connection = connect(served)
    connection.sendall(b"\x16\x03\x01 what is this?\r\n\r\n")
    assert answer(connection) == (400, "Invalid HTTP request received.")


def test_slow_clients_are_not_waited_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.2)
    body = json.dumps(BODY).encode()
    silent, slow = connect(served), connect(served)
    slow.sendall(head(body) + body[:-1])
    assert answer(slow) == (408, "the body was not complete after 0.2 seconds; send it faster")
    status, said = answer(silent)
    assert status == 408 and "no request was complete in time" in said


def test_a_request_that_is_cut_off_is_dropped(served: Served) -> None:
    for part in (b"POST /v1/chat", head(b"x" * 100), head(b"x" * 100) + b"{"):
        connection = connect(served)
        connection.sendall(part)
        connection.close()
    assert ask(served.client()).usage.completion_tokens == 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(served: Served, stream: bool) -> None:
    """Whether it runs or waits: then its place in the queue."""
    body = json.dumps({**BODY, "stream": stream}).encode()
    with ThreadPoolExecutor(1) as threads, served.held():
        connections = [connect(served) for _ in range(3)]
        for number, connection in enumerate(connections):
            connection.sendall(head(body) + body)
            served.wait(running=1, waiting=number)
        for connection in connections:
            connection.close()
        end = time.monotonic() + 20
        while not all(job.cancelled for job in jobs(served)):
            assert time.monotonic() < end
            time.sleep(0.01)
        (running,) = served.api.scheduler._running
        threads.submit(ask, served.client())
        served.wait(running=1, waiting=1)
    served.wait(running=0)
    assert len(running.tokens) == 2  # of twenty: the step that was held is the last one


def jobs(served: Served) -> list[Any]:
    scheduler = served.api.scheduler
    return [*(running.job for running in scheduler._running), *scheduler._waiting]


def test_a_full_queue_is_said_at_once(served: Served) -> None:
    client = served.client()
    with ThreadPoolExecutor(4) as threads:
        with served.held():
            asked = []
            for number in range(3):
                asked.append(threads.submit(ask, client))
                served.wait(running=1, waiting=number)
            with pytest.raises(RateLimitError, match="2 prompts wait already; try again later") as refused:
                ask(client)
        assert refused.value.response.headers["retry-after"] == "5"
        assert len({one.result().choices[0].message.content for one in asked}) == 1


def test_a_failure_ends_its_requests_alone(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    slots = served.api.scheduler._slots

    def fail(tokens: list[int]) -> None:
        raise RuntimeError("a broken step")

    with monkeypatch.context() as broken:
        broken.setattr(slots, "step", fail)
        with pytest.raises(InternalServerError, match="its console says why"):
            ask(served.client())
        (*_, last) = ask(served.client(), stream=True, max_tokens=1)
        assert last.choices[0].finish_reason == "length"
    assert "a broken step" in capsys.readouterr().err
    assert ask(served.client()).usage.completion_tokens == 20
    served.wait(running=0)
    assert not len(slots)


def test_a_stream_that_fails_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its status was sent before."""
    scheduler = served.api.scheduler

    def fail(tokens: list[int]) -> None:
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(scheduler._slots, "step", fail)
        stream = ask(served.client(), stream=True)
        with pytest.raises(APIError, match="the server ran out of memory"):
            list(stream)
    served.wait(running=0)


def test_the_key_is_asked_for(served: Served) -> None:
    with pytest.raises(AuthenticationError):
        served.client(key="another").models.list()
    connection = connect(served)
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer(connection)[0] == 200


def test_without_a_key_other_sites_pages_can_t_use_the_server(saved_aligned: Path) -> None:
    """Whose name a browser has been told to be this machine's; nor can they send JSON without asking first."""
    with serving(saved_aligned, key=None, slots=1) as open_to_all:
        body = json.dumps({**BODY, "max_tokens": 1}).encode()
        assert sent(open_to_all, body)[0] == 200
        assert sent(open_to_all, body, Host="[::1]:80")[0] == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "[x"):
            status, said = sent(open_to_all, body, Host=host)
            assert status == 403 and "ask for localhost" in said
        assert sent(open_to_all, body, Content_Type="text/plain", Host="localhost")[0] == 415


def test_while_draining_requests_are_refused(served: Served) -> None:
    with ThreadPoolExecutor(1) as threads:
        with served.held():
            asked = threads.submit(ask, served.client())
            served.wait(running=1)
            served.api.draining = True
            with pytest.raises(InternalServerError, match="the server is shutting down") as refused:
                ask(served.client())
        assert refused.value.status_code == 503 and asked.result().usage.completion_tokens == 20
        served.api.draining = False


def test_the_metrics_count_what_was_answered(saved_aligned: Path) -> None:
    with serving(saved_aligned, slots=2) as served:
        found = [ask(served.client()), ask(served.client(), n=2, extra_body={"axes": {"honest": 1}})]
        sent(served, b"{")
        served.wait(running=0)
        connection = connect(served)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        status, metrics = answer(connection)
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    answered = 'alignx_requests_total{path="/v1/chat/completions",status='
    assert (values[f'{answered}"200"}}'], values[f'{answered}"400"}}']) == ("2.0", "1.0")
    assert values["alignx_answer_tokens_total"] == "60.0" and values["alignx_prompts_total"] == "2.0"
    assert float(values["alignx_prompt_tokens_total"]) == sum(one.usage.prompt_tokens for one in found)
    chosen = {name: gate for one in found for name, gate in one.alignx["gates"].items() if gate}
    for name in chosen:
        assert float(values[f'alignx_gate_total{{expert="{name}"}}']) >= 1
    assert values["alignx_gate_confidence_count"] == values["alignx_gate_distance_count"] == "2.0"
    assert values["alignx_running_answers"] == values["alignx_waiting_prompts"] == "0.0"
    assert float(values["alignx_step_seconds_count"]) >= 19 * 2
