"""The load of a server: some seconds of the benchmark, and that it notices what it is there to notice."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import load as benchmark
import psutil
import pytest
from served import Served, serving
from suite import growth, served_models
from suite.growth import Growth, Sample, Watch
from suite.hostile import Hostile, hostile
from suite.questions import Client, Question, Reply, questions

from alignx_ds.serve.answers import CompletionForm

SHAPE = {"shape": "tiny", "layers": 1, "vocabulary": 647, "rank": 4, "device": "cpu", "dtype": None}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    args: Any = SimpleNamespace(**SHAPE)
    path = served_models.save(args, tmp_path_factory.mktemp("models"))[served_models.OURS]
    limits = {"slots": benchmark.SLOTS, "queue": benchmark.QUEUE, "context": benchmark.CONTEXT}
    with serving(path, key=None, name=served_models.NAME, **limits) as one:
        yield one


@pytest.fixture(scope="module")
def asked(served: Served) -> list[Question]:
    return questions(Client(served.port), Random(1), 12, 8)


def answered(served: Served, asked: list[Question]) -> benchmark.Tally:
    tally = benchmark.Tally()
    benchmark.good(served.port, asked, tally, Random(2), time.monotonic() + 1)
    return tally


def test_some_seconds_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--minutes", "0.1", "--shape", "tiny", "--layers", "1", "--device", "cpu", "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["load.py", *options])
    monkeypatch.setattr(benchmark, "MOST_MEGABYTES", 100)  # some seconds are all warm-up
    monkeypatch.setattr(benchmark, "PAUSE", 0.01)  # so that every kind has its turn
    assert benchmark.main() == 0
    found = json.loads((tmp_path / "load-tiny-cpu.json").read_text())
    assert len(found["targets"]) == 8 and all(target["met"] for target in found["targets"])
    kinds = {(row["sent"], row["status"]) for row in found["replies"]}
    assert {status for _, status in kinds} >= {0, 200, 400, 404, 413, 415}
    assert {sent for sent, _ in kinds} >= {"good: /v1/completions", "good: /v1/chat/completions, streamed"}
    assert len(found["growth"]["samples"]) >= 3


def test_questions_are_of_every_kind_and_have_one_answer(served: Served, asked: list[Question]) -> None:
    assert {len(question.right.texts) for question in asked} == {1, 2}
    assert {"stop", "length"} <= {end for question in asked for end in question.right.ends}
    assert {question.path for question in asked} == {"/v1/completions", "/v1/chat/completions"}
    assert {"axes" in question.body for question in asked} == {True, False}
    client = Client(served.port)
    for question in asked:
        assert client.ask(question) == client.ask(question, stream=True) == question.right
    assert len({question.right.texts for question in asked}) > 8
    assert answered(served, asked).wrong(good=True) == 0


def test_another_answer_is_noticed(served: Served, asked: list[Question], monkeypatch: pytest.MonkeyPatch) -> None:
    choice = CompletionForm.choice

    def shortened(self: Any, names: Any, text: str, *rest: Any) -> Any:
        return choice(self, names, text[:-1], *rest)

    monkeypatch.setattr(CompletionForm, "choice", shortened)
    tally = answered(served, [question for question in asked if question.path == "/v1/completions"])
    assert tally.wrong(good=True) == sum(row["count"] for row in tally.rows())


def test_a_failure_and_a_lost_reply_are_noticed(
    served: Served, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(tokens: list[int]) -> None:
        raise RuntimeError("a broken step")

    monkeypatch.setattr(served.api.scheduler._slots, "step", fail)
    tally = answered(served, asked)
    assert {row["status"] for row in tally.rows()} == {200, 500}  # a stream has its status before it fails
    assert tally.wrong(good=True) == sum(row["count"] for row in tally.rows())
    nobody = benchmark.Tally()
    benchmark.good(1, asked[:1], nobody, Random(0), time.monotonic() + 0.1)
    assert nobody.wrong(good=True) and "ConnectionRefusedError" in nobody.rows()[0]["said"]


def test_every_broken_request_is_explained(served: Served) -> None:
    kinds = hostile(benchmark.CONTEXT, benchmark.SLOTS, benchmark.QUEUE, benchmark.MAX_BODY)
    for kind in kinds:
        reply = kind.send(served.port)
        assert kind.explained(reply), (kind.name, reply)
    served.wait(running=0)


def test_what_explains_nothing_is_noticed() -> None:
    kind = Hostile("one", lambda port: Reply(0), (200, 400), Reply(200, texts=("right",)))
    assert kind.explained(Reply(400, "why")) and kind.explained(Reply(200, texts=("right",)))
    for reply in (Reply(400), Reply(500, "why"), Reply(0, "reset"), Reply(200, texts=("wrong",))):
        assert not kind.explained(reply)


def test_growth_is_the_slope_after_the_warm_up() -> None:
    warming = [Sample(second, 10**9 + second * 10**8, 40 + second) for second in range(30)]
    steady = [Sample(second, 5 * 10**9 + (second - 30) * 10**5, 80) for second in range(30, 101)]
    found = Growth(warming + steady)
    assert found.megabytes == pytest.approx(7, rel=0.01) and found.files_a_minute == 0
    assert found.megabytes_a_minute == pytest.approx(6, rel=0.01)


KEEPS = """
import sys, tempfile
kept = []
for line in sys.stdin:
    kept += [b"x" * 10**6, tempfile.TemporaryFile()]
    print("kept", flush=True)
"""


def test_a_process_that_keeps_memory_and_files_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: this one may have room in its heap for all of it."""
    monkeypatch.setattr(growth, "EVERY", 0.02)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with subprocess.Popen([sys.executable, "-c", KEEPS], **pipes) as process:
        assert process.stdin and process.stdout
        with Watch(psutil.Process(process.pid)) as watch:
            for _ in range(30):
                process.stdin.write("\n")
                assert process.stdout.readline() == "kept\n"
                time.sleep(0.02)
    assert watch.growth().megabytes > 5 and watch.growth().files_a_minute > 60
