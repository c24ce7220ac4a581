"""A run whose answers come from a server: the same as its own, asked for once, and never mixed with others."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import in_this_process
from served import serving
from transformers import AutoModelForCausalLM
from vllm_stand_in import BASE, StandIn, running, stand_in

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.inputs import read_inputs
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.evaluation.compared import served_systems, system_names
from alignx_ds.evaluation.evaluate import Evaluation, System
from alignx_ds.models.base import BaseModel
from alignx_ds.runs.outputs import Outputs

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]

ROWS, AXES = 4, ("helpful", "harmless", "honest")
pytestmark = pytest.mark.usefixtures("no_launcher", "no_key")
Lines = list[dict[str, Any]]


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in("helpful") as made:
        yield made


@pytest.fixture
def evaluation(tiny_config: RunConfig, world_base: BaseModel) -> Evaluation:
    """Three judged axes of the world; nothing is served."""
    tiny_config.data.train_rows, tiny_config.data.held_out_rows = 8, ROWS
    tiny_config.evaluation.max_new_tokens, tiny_config.evaluation.batch = 12, 1
    inputs = read_inputs(tiny_config, world_base)
    return Evaluation(tiny_config, inputs.base, inputs.data, Outputs.of(tiny_config))


def by_server(evaluation: Evaluation, url: str, *served: str) -> Evaluation:
    """The same, in which the server at this address answers for these systems."""
    asking = replace(evaluation.config, evaluation=replace(evaluation.config.evaluation, endpoint=url))
    return replace(evaluation, config=asking, served=frozenset(served))


def system(evaluation: Evaluation, name: str) -> System:
    return System(name, {"weights": 1}, lambda: AutoModelForCausalLM.from_pretrained(evaluation.base.path))


def complete(evaluation: Evaluation, *names: str) -> dict[str, Lines]:
    """Evaluate these systems, which are all the base model; the lines of their answers."""
    systems = [system(evaluation, name) for name in names]
    evaluation.evaluate_all(systems)
    evaluation.ask_all(systems)
    return {name: stored(evaluation.out.root, name) for name in names}


def stored(run: Path, name: str) -> Lines:
    files = [file for axis in AXES if (file := run / "answers" / f"{name}.{axis}.jsonl").is_file()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def outputs(lines: Lines) -> list[str]:
    return [line["output"] for line in lines]


def test_a_run_gets_from_a_server_what_it_says_itself(
    finished_run: Path, small_run: tuple[str, ...], tmp_path: Path, snapshot: Snapshot
) -> None:
    """The other systems' answers stay as they are."""
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    before, own = snapshot(run / "answers"), stored(run, "alignx")
    with serving(run / "model", key=None, name="alignx") as served:
        url = f"{served.url}/v1"
        changes = (*small_run, f"output={run}", f"evaluation.endpoint={url}")
        done = in_this_process("run", "launch/recipes/world.yaml", *changes)
        assert done.returncode == 0, done.stderr
        assert f"alignx_prompts_total {float(len(own))}" in served.api.metrics.text().decode()
    assert f"answers from {url}: alignx" in done.stdout
    assert stored(run, "alignx") == [line | {"endpoint": url} for line in own] and any(outputs(own))
    after = snapshot(run / "answers")
    assert {n for n in before if before[n] != after[n]} == {f"alignx.{axis}.jsonl" for axis in AXES}
    report, first = (json.loads((place / "report.json").read_text()) for place in (run, finished_run))
    assert report["systems"] == first["systems"]
    assert (report["endpoints"], first["endpoints"]) == ({"alignx": url}, {})
    assert "Answers from a server" in (run / "report.html").read_text()
    assert {*report["systems"], *report["ablations"]} == {*system_names(parse.load(run / "config.yaml"))}


def test_what_is_listed_is_asked_there_and_the_rest_is_generated_here(evaluation: Evaluation, server: StandIn) -> None:
    asking = by_server(evaluation, server.url)
    asking = replace(asking, served=served_systems(asking.config))
    assert asking.served == {"helpful"}
    found = complete(asking, "base", "helpful")
    assert outputs(found["helpful"]) == ["an answer from helpful"] * ROWS * len(AXES)
    assert outputs(found["base"]) == outputs(complete(evaluation, "base")["base"])
    rows = [row for axis in AXES for row in evaluation.data.held_out[axis]]
    chats = [[{"role": turn.role, "content": turn.text} for turn in row.chat] for row in rows]
    assert server.bodies == [
        {"model": "helpful", "messages": chat, "temperature": 0, "max_tokens": 12} for chat in chats
    ]
    again = len(server.bodies)
    assert complete(asking, "helpful")["helpful"] == found["helpful"] and len(server.bodies) == again


def test_it_goes_on_where_the_server_left_it(evaluation: Evaluation, server: StandIn) -> None:
    server.most = 6
    asking = by_server(evaluation, server.url, "helpful")
    with pytest.raises(DataError, match="status 503"):
        complete(asking, "helpful")
    there = outputs(stored(asking.out.root, "helpful"))
    assert len(there) == 6
    asked, server.most = len(server.bodies), 1000
    complete(asking, "helpful")
    assert len(server.bodies) - asked == ROWS * len(AXES) - 6


def test_answers_of_the_run_and_of_servers_are_never_mixed(
    evaluation: Evaluation, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    own = complete(evaluation, "helpful")["helpful"]
    assert "endpoint" not in own[0] and len({*outputs(own)} - {"an answer from helpful"}) > 1
    with stand_in("helpful") as other:
        for number, url in enumerate((server.url, other.url), start=1):
            lines = complete(by_server(evaluation, url, "helpful"), "helpful")["helpful"]
            assert {line["endpoint"] for line in lines} == {url}
            assert outputs(lines) == ["an answer from helpful"] * len(own)
            assert len(server.bodies) + len(other.bodies) == number * len(own)
    assert complete(evaluation, "helpful")["helpful"] == own
    assert capsys.readouterr().out.count("12 of 12 answers are of another model, server or length") == 3


def refused(recipe: Path, url: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["run", str(recipe), f"evaluation.endpoint={url}", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_server_that_can_t_answer_is_one_line_before_anything_is_written(
    write_recipe: WriteRecipe, tmp_path: Path, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe("baselines.make=[ties]")
    before = snapshot(tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        for options in ((), ("--dry-run",)):
            line = refused(recipe, nobody, capsys, *options)
            assert f"evaluation.endpoint: got '{nobody}'" in line and "Connection refused" in line
        align = ["align", str(recipe), f"evaluation.endpoint={nobody}", "--dry-run"]
        assert cli.main(align) == 0, "it answers nothing"
    assert "expected an OpenAI-compatible server's address" in refused(recipe, "nowhere", capsys)
    with stand_in("polite", "brief") as server:
        listed = refused(recipe, server.url, capsys)
        assert f"it has {BASE}, polite, brief; serve one or more of base, helpful, harmless, honest" in listed
        assert "ties, alignx" in listed
        assert "404" in refused(recipe, f"{server.url}/v2", capsys)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("body", ["[]", '{"data": [1]}', '{"data": [{"id": []}]}', "<html>"])
def test_a_page_that_is_no_list_of_models(tiny_config: RunConfig, body: str) -> None:
    with running(_page(body)) as port:
        tiny_config.evaluation.endpoint = f"http://127.0.0.1:{port}/v1"
        with pytest.raises(ConfigError, match=r"evaluation\.endpoint.*can't be read") as error:
            served_systems(tiny_config)
    assert len(str(error.value).splitlines()) == 1


def _page(body: str) -> Callable[..., Any]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body.encode()})

    return app


def test_the_key_is_sent_and_not_shown(
    tiny_config: RunConfig, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.evaluation.endpoint = server.url
    for key in ("sk-not…to-be-seen", "sk-not\nto-be-seen"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY") as error:
            served_systems(tiny_config)
        assert "to-be-seen" not in str(error.value)
    with running(_echo) as port:
        tiny_config.evaluation.endpoint = f"http://127.0.0.1:{port}/v1"
        monkeypatch.setenv("OPENAI_API_KEY", "sk-helpful")
        assert served_systems(tiny_config) == {"helpful"}


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """Lists what comes after `sk-` in the key as a model."""
    key = dict(scope["headers"])[b"authorization"].decode()
    cards = [{"id": key.removeprefix("Bearer sk-")}]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"data": cards}).encode()})
