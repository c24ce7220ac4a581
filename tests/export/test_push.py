"""`--push`: the hub's own client against a stand-in of the hub over HTTP."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from hub_stand_in import TOKEN, Hub, served
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

from alignx_ds import cli
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.export.licences import LICENCES
from alignx_ds.export.publish import Repository
from alignx_ds.models.base import BaseModel

AXES = ("helpful", "harmless", "honest")
pytestmark = pytest.mark.usefixtures("no_launcher")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process's client, logged in."""
    hub = Hub()
    server = served(hub)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    (made / "helpful").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    (made / "helpful/weights.bin").write_bytes(bytes(range(256)) * 8)
    return made


def test_the_files_arrive_in_a_private_repository(
    hub: Hub, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = Repository("me/world", public=False, dry_run=False)
    target.check()
    target.push(directory)
    assert hub.private == {"me/world": True}
    assert hub.files["me/world"] == {
        ".gitattributes": b"",
        "README.md": (directory / "README.md").read_bytes(),
        "helpful/weights.bin": (directory / "helpful/weights.bin").read_bytes(),
    }
    assert hub.cards == [(directory / "README.md").read_text()], "the hub validates it"
    assert capsys.readouterr().out == f"pushed to {constants.ENDPOINT}/me/world (private): 2 files, 2.1 kB\n"


def test_an_export_that_is_there_is_pushed(
    hub: Hub, directory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["export", "push", str(directory), "me/world", "--public"]) == 0
    assert hub.private == {"me/world": False}
    assert "README.md" in hub.files["me/world"]
    capsys.readouterr()
    assert cli.main(["export", "push", str(tmp_path), "me/other"]) == 2
    assert "an export with its model card" in capsys.readouterr().err
    assert "me/other" not in hub.private


def test_a_second_push_replaces_the_files_and_a_public_one_is_public(hub: Hub, directory: Path) -> None:
    target = Repository("team/world", public=True, dry_run=False)
    target.push(directory)
    (directory / "helpful/weights.bin").unlink()
    (directory / "new.txt").write_text("new")
    target.check()
    target.push(directory)
    assert hub.private == {"team/world": False}
    assert set(hub.files["team/world"]) == {".gitattributes", "README.md", "new.txt"}


def test_a_dry_run_needs_neither_login_nor_network(
    hub: Hub, directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    target = Repository("me/world", public=False, dry_run=True)
    target.check()
    target.push(directory)
    first, *files, last = capsys.readouterr().out.splitlines()
    assert last == f"push it with `alignx-ds export push {directory} me/world`"
    assert first == f"would be pushed to {constants.ENDPOINT}/me/world (private): 2 files, 2.1 kB"
    assert [line.split() for line in files] == [["31", "B", "README.md"], ["2.0", "kB", "helpful/weights.bin"]]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("public", "made", "named"),
    [
        (False, {"private": {"me/world": False}}, "it exists and is public; give --public, or another name"),
        (True, {"private": {"me/world": True}}, "it exists and is private; leave --public out, or another name"),
        (False, {"role": "read"}, "this token may only read"),
        (False, {"refuses": "whoami"}, "the hub refuses"),
    ],
)
def test_what_can_not_be_pushed_is_refused_before_the_export(
    hub: Hub, public: bool, made: dict[str, object], named: str
) -> None:
    for name, value in made.items():
        setattr(hub, name, value)
    with pytest.raises(ConfigError, match=named) as refused:
        Repository("me/world", public, dry_run=False).check()
    assert len(refused.value.problems) == 1
    assert TOKEN not in str(refused.value)
    assert {method for method, _ in hub.requests} == {"GET"}, "nothing is changed"


@pytest.mark.parametrize("token", [None, "hf_" + "x" * 34])
def test_without_a_login_nothing_starts(
    hub: Hub, token: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=r"hf auth login|Invalid") as refused:
        Repository("me/world", public=False, dry_run=False).check()
    assert "x" * 34 not in str(refused.value)


@pytest.mark.parametrize(
    ("fault", "named"), [({"refuses": "commit"}, "403"), ({"invalid": '"license" must be one of'}, '"license" must be')]
)
def test_a_push_that_fails_says_how_to_repeat_it(hub: Hub, directory: Path, fault: dict[str, str], named: str) -> None:
    for name, value in fault.items():
        setattr(hub, name, value)
    with pytest.raises(DataError) as failed:
        Repository("me/world", public=False, dry_run=False).push(directory)
    (line,) = str(failed.value).splitlines()
    assert named in line and f"`alignx-ds export push {directory} me/world`" in line
    assert TOKEN not in line


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--push", "world"], "OWNER/NAME"),
        (["--push", "me/a b"], "OWNER/NAME"),
        (["--public"], "--push OWNER/NAME"),
        (["--push-dry-run"], "--push OWNER/NAME"),
        (["--license", "apache2"], "did you mean 'apache-2.0'?"),
        (["--base-model", "llama"], "--base-model"),
    ],
)
def test_wrong_options_are_refused_in_one_line(
    tmp_path: Path, options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", "hf", str(tmp_path), str(tmp_path / "out"), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_and_pushes(
    hub: Hub,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    world_base: BaseModel,
) -> None:
    """Adapters: every file with its mode, a card of all of them, and none with the token."""
    caplog.set_level(logging.DEBUG)
    said = ("--license", "mit", "--base-model", "me/base", "--rows", "1", "--push", "me/adapters")
    assert cli.main(["export", "adapters", str(finished_run), str(tmp_path / "out"), *said]) == 0
    printed = capsys.readouterr()
    sent, written = hub.files["me/adapters"], sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in written} == {
        name: data for name, data in sent.items() if name != ".gitattributes"
    }
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o644}
    everything = printed.out + printed.err + caplog.text
    assert TOKEN not in everything and not any(TOKEN.encode() in data for data in sent.values())
    card = ModelCard(sent["README.md"].decode())
    assert (card.data.license, card.data.base_model, card.data.base_model_relation) == ("mit", "me/base", "adapter")
    assert '"me/adapters", subfolder="helpful"' in card.text
    base = AutoModelForCausalLM.from_pretrained(world_base.path)
    for axis in AXES:
        assert f"[{axis}]({axis}/README.md)" in card.text
        PeftModel.from_pretrained(base, tmp_path / "out", subfolder=axis)


def test_a_card_has_what_the_run_measured(finished_run: Path, tmp_path: Path) -> None:
    said = ("--license", "apache-2.0", "--push", "me/world", "--push-dry-run")
    assert cli.main(["export", "hf", str(finished_run), str(tmp_path / "out"), *said]) == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "apache-2.0" in LICENCES and card.data.base_model is None
    results: Callable[[str], float] = {r.dataset_name: r.metric_value for r in card.data.eval_results}.get
    for axis in AXES:
        assert f"| {axis} |" in card.text
        assert results(f"{axis}, held-out rows") is not None
    for heading in ("harmless: truth", "gate before its temperature was fitted", "TF-IDF and logistic regression"):
        assert f"| {heading} |" in card.text
    assert 'from_pretrained("me/world"' in card.text
