"""What is read is data: no code of it runs, no path leaves its directory, no mark-up acts, and no secret is kept."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import ModelConfig
from alignx_ds.data.rows import Row
from alignx_ds.errors import HIDDEN, ConfigError, DataError, UserError, redact
from alignx_ds.evaluation import plots, report
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import console
from alignx_ds.serve.generate import answer

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "alignx_ds"
WORLD_BASE = PACKAGE / "models/assets/world-base"
SOURCES = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
HOSTILE = "<script>alert(1)</script>\" onload='x' ]]> --> </svg> [bold]b[/bold] [link=http://x]y[/link] &lt;"
HUB_TOKEN, API_KEY, PASSWORD = "hf_" + "aB3" * 11, "sk-proj-" + "Xy7" * 9, "hunter2-hunter2"
SECRETS = (HUB_TOKEN, API_KEY, PASSWORD)
WriteRecipe = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("no_launcher")


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a function or method of this name in the package, with the place that it stands at."""
    for path, tree in SOURCES.items():
        for node in ast.walk(tree):
            called = node.func if isinstance(node, ast.Call) else None
            if called is not None and name in (getattr(called, "attr", ""), getattr(called, "id", "")):
                assert isinstance(node, ast.Call)
                yield f"{path}:{node.lineno}", node


def options(call: ast.Call) -> set[str]:
    """Its keyword arguments; of `**NAME`, the name."""
    return {k.arg or ast.unparse(k.value) for k in call.keywords}


# --- code ---------------------------------------------------------------------------------------------------------


def foreign_names(tree: ast.Module) -> dict[str, str]:
    """Name in the module -> the package that it is imported from, where that is not this one."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: str(node.module).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                (alias.asname or alias.name).partition(".")[0]: alias.name.partition(".")[0] for alias in node.names
            }
    return {name: package for name, package in found.items() if package != "alignx_ds"}


def test_no_pickle_is_loaded_anywhere() -> None:
    """Other packages' `load` is called for JSON and YAML, and otherwise with `weights_only` alone."""
    for tree in SOURCES.values():
        found = foreign_names(tree)
        assert not {*found, *found.values()} & {
            "pickle",
            "cPickle",
            "dill",
            "cloudpickle",
            "joblib",
            "shelve",
            "marshal",
        }
    for name in ("load", "load_checkpoint", "load_state_dict_from_file", "read_pickle"):
        for place, call in calls(name):
            tensors_only = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            of = ast.unparse(call.func)
            package = foreign_names(SOURCES[place.partition(":")[0]]).get(of.partition(".")[0])
            from_memory = (package, of) == ("triton", "tl.load")  # reads the GPU's memory, no file
            plain = tensors_only or from_memory or of in ("json.load", "OmegaConf.load")
            assert plain or (name == "load" and package is None), place


def test_every_model_is_loaded_as_plain_data() -> None:
    """NO_PICKLE for weights of ours; a published judge may have no safetensors, and is read as tensors only."""
    found = list(calls("from_pretrained"))
    assert len(found) > 5
    for place, call in found:
        weights = "Model" in ast.unparse(call.func) or "ForCausalLM" in ast.unparse(call.func)
        allowed = [{"NO_PICKLE"}, {"NO_CODE", "weights_only"}, *([] if weights else [{"NO_CODE"}])]
        assert any(wanted <= options(call) for wanted in allowed), place
    assert not [place for name in ("eval", "exec") for place, call in calls(name) if isinstance(call.func, ast.Name)]


@pytest.fixture
def armed(tmp_path: Path) -> tuple[Path, Path]:
    """(a model directory whose own code would write a file, that file)."""
    directory, mark = tmp_path / "armed", tmp_path / "it-ran"
    shutil.copytree(WORLD_BASE, directory)
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for module in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (directory / module).write_text(code + "class OwnConfig: ...\nclass OwnModel: ...\nclass OwnTokenizer: ...\n")
    return directory, mark


@pytest.mark.parametrize("model_type", ["own", "llama"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_models_own_code_does_not_run(
    armed: tuple[Path, Path], write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str], name: str, model_type: str
) -> None:
    directory, mark = armed
    maps = {
        "config.json": {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    for file in ("config.json", name):
        content = json.loads((directory / file).read_text())
        content |= {"model_type": model_type} if file == "config.json" else {}
        (directory / file).write_text(json.dumps(content | ({"auto_map": maps[file]} if file == name else {})))
    arguments = ["run", str(write_recipe(f"model.path={directory}"))]
    assert cli.main(arguments) == cli.main([*arguments, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert f"model.path: got '{directory}', expected a model without code; its {name} names code" in said
    asked = ["answer", str(directory), "world", "--schema", "plain", "--out", str(directory / "a.jsonl"), "--rows", "1"]
    assert cli.main(asked) == 2
    with pytest.raises(ConfigError, match="auto_map"):
        answer(str(directory), ["hello"], 1)
    assert not mark.exists()
    assert not (directory / "a.jsonl").exists()


def test_a_data_sets_own_code_does_not_run(tmp_path: Path) -> None:
    from alignx_ds.data.sources import Source

    mark = tmp_path / "it-ran"
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    with pytest.raises(DataError):
        Source(str(tmp_path / "rows"), "plain", {}).records(held_out=False, count=1, seed=0)
    assert not mark.exists()


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", "./file", "link"])
def test_a_manifest_does_not_reach_out_of_its_directory(tmp_path: Path, name: str) -> None:
    directory, outside = tmp_path / "made", tmp_path / "outside"
    (directory / "sub").mkdir(parents=True)
    for path in (outside, directory / "sub" / "file", directory / "file"):
        path.write_text("x")
    (directory / "link").symlink_to(outside)
    content = {"fingerprint": manifest.fingerprint({}), "inputs": {}, "files": {name: manifest.file_hash(outside)}}
    (directory / manifest.NAME).write_text(manifest.sealed(content))
    with pytest.raises(DataError, match="leaves the directory"):
        manifest.is_current(directory, {})


@pytest.mark.parametrize("files", [None, [], "x", 3])
def test_a_manifest_without_files_is_damaged(tmp_path: Path, files: object) -> None:
    content = {"fingerprint": manifest.fingerprint({}), "files": files}
    (tmp_path / manifest.NAME).write_text(manifest.sealed(content))
    with pytest.raises(DataError, match="lists no files"):
        manifest.is_current(tmp_path, {})


@pytest.mark.parametrize("file", ["../weights.safetensors", "{outside}", "sub/weights.safetensors", ".."])
def test_weights_lie_beside_their_index(tmp_path: Path, write_recipe: WriteRecipe, file: str) -> None:
    outside, directory = tmp_path / "weights.safetensors", tmp_path / "model"
    shutil.copytree(WORLD_BASE, directory)
    shutil.copy(directory / "model.safetensors", outside)
    (directory / "model.safetensors").unlink()
    names = {"model.layers.0.mlp.up_proj.weight": file.replace("{outside}", str(outside))}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match="lies elsewhere"):
        BaseModel(ModelConfig(path=str(directory)))


@pytest.mark.parametrize("content", ["", "[", "[]", "3", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\xff"])
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, content: str) -> None:
    shutil.copytree(WORLD_BASE, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"model\.path"):
        BaseModel(ModelConfig(path=str(tmp_path / "model")))


# --- mark-up ------------------------------------------------------------------------------------------------------


def hostile(content: Any) -> Any:
    """Every text in it that is no key of the report's own and no number's name."""
    if isinstance(content, dict):
        return {k: hostile(v) for k, v in content.items()}
    return HOSTILE if isinstance(content, str) else content


def test_nothing_in_a_report_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts from data, settings, versions and hardware; and names of axes, of sets and of what they count."""
    monkeypatch.syspath_prepend(str(TESTS / "evaluation"))
    from reports import Page, finish

    made, _ = finish(tmp_path / "run")
    content = made.content
    for part in ("run", "config"):
        content[part] = hostile(content[part])
    content["run"] |= {"seconds": 1.0}
    content["experts"] = [HOSTILE] * 4
    content["judges"] = hostile(content["judges"])
    content["sets"] = {HOSTILE: {name: {HOSTILE: 1.0, f"judge_{HOSTILE}": 1.0} for name in content["systems"]}}
    content["judges"][HOSTILE] = HOSTILE
    content["router"]["ablations"] = {HOSTILE: next(iter(content["router"]["ablations"].values()))}
    content["rows"] = {HOSTILE: {**next(iter(content["rows"].values())), "not_trained_on": {HOSTILE: 1}}}
    for result in made.results.values():
        result.samples["honest"][:] = [(Row(HOSTILE, HOSTILE), HOSTILE)]
    made.losses[HOSTILE] = [1.0, 2.0]
    out = Outputs(tmp_path / "again", tmp_path / "none")
    report.write(made, out)
    page = Page.of(out)
    assert "script" not in page.tags
    text = (out.root / "report.html").read_text()
    assert text.count("alert(1)") > 20, "it is there to be read"
    assert text.count("<script") == 0
    assert text.count("</svg>") == text.count("<svg "), "no picture ends before its time"


def test_a_picture_holds_no_tag_but_its_own() -> None:
    from xml.etree import ElementTree

    drawn = [
        plots.scores({HOSTILE: {HOSTILE: 1.0}}, [HOSTILE]),
        plots.confusion([[1, 0], [0, 1]], [HOSTILE, HOSTILE]),
        plots.losses({HOSTILE: [1.0, 2.0]}),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(svg.replace("xlink:", ""))  # it is whole XML
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert "script" not in tags
        assert any("alert(1)" in (element.text or "") for element in root.iter())
        assert not [a for e in root.iter() for a in e.attrib if a.startswith("on")]


def test_brackets_and_control_characters_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]b[/bold] [link=http://x]y[/link] [/] [red] \x1b[31m\a"
    console._console.file, before = sys.stdout, console._console._file
    try:
        console.say(text)
        console.heading(text)
        console.table(text, [text], [[text]])
        with console.progress(text, 1):
            pass
    finally:
        console._console._file = before
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(r"[bold]b[/bold] [link=http://x]y[/link] [/] [red] \x1b[31m\x07") >= 4
    assert "\x1b" not in said


# --- secrets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{PASSWORD}@host/v1", f"http://{HIDDEN}@host/v1"),
        (f"http://me:p@{PASSWORD}@host", f"http://{HIDDEN}@host"),
        (f"https://{HUB_TOKEN}@huggingface.co/x", f"https://{HIDDEN}@huggingface.co/x"),
        (f"https://host/v1?api_key={PASSWORD}&v=1", f"https://host/v1?api_key={HIDDEN}&v=1"),
        (f"no access for {HUB_TOKEN}.", f"no access for {HIDDEN}."),
        (f"bad key '{API_KEY}'", f"bad key '{HIDDEN}'"),
        ("write to a@b.c, see http://host/v1 and sk-learn-is-a-library-of-models", None),
        ("owner/name:config:split", None),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str | None) -> None:
    assert redact(text) == (text if shown is None else shown)


def test_what_the_environment_keeps_is_hidden_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", PASSWORD)
    monkeypatch.setenv("HF_TOKEN", "none")
    assert redact(f"the key {PASSWORD} is bad; none is better") == f"the key {HIDDEN} is bad; none is better"


LEAKS = [
    f"judges.endpoint=http://me:{PASSWORD}@host/v1",
    f"judges.endpoint=https://host/v1?api_key={PASSWORD}",
    f"judges.endpoint_model={API_KEY}",
    f"model.path=https://me:{PASSWORD}@huggingface.co/owner/name",
    f"axes.helpful.train=https://{HUB_TOKEN}@huggingface.co/rows.json",
    f"axes.helpful.prompt=use {API_KEY}",
    "axes.helpful.prompt=${oc.env:OPENAI_API_KEY}",
    "output=runs/${oc.env:HF_TOKEN}",
    f"token={HUB_TOKEN}",
    f"seed={API_KEY}",
    f"train.lr=[{HUB_TOKEN}",
    f"{HUB_TOKEN}",
]


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize(("verb", "override"), [*(("run", leak) for leak in LEAKS), ("data preview", LEAKS[0])])
def test_a_config_with_a_secret_is_refused_unseen(
    write_recipe: WriteRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str, override: str
) -> None:
    recipe = str(write_recipe())
    assert cli.main([*verb.split(), recipe, override]) == 2
    said = "".join(capfd.readouterr())
    assert said.startswith("alignx-ds: error: ")
    assert not [secret for secret in SECRETS if secret in said]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("secrets")
def test_a_secret_in_the_recipe_is_refused_unseen(write_recipe: WriteRecipe) -> None:
    for override in LEAKS[:8]:
        with pytest.raises(UserError) as error:
            parse.load(write_recipe(override))
        assert not [secret for secret in SECRETS if secret in str(error.value)]


@pytest.mark.usefixtures("secrets")
def test_no_secret_is_left_behind_by_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real server that gets the key, and says it back: in an answer, and in its complaint."""
    monkeypatch.syspath_prepend(str(TESTS / "evaluation" / "judges"))
    from endpoint_server import ChatServer, failure

    asked = {
        "prompt": "What is it now?",
        "output": "I can't know.",
        "row": {"response": "", "category": "Self Identity Cognition"},
    }
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(asked | {"output": f"no {n}"}) + "\n" for n in range(3)))
    with ChatServer(reply=lambda prompt: f"yes, {API_KEY}") as server:
        settings = [f"endpoint={server.url}", "endpoint_model=m"]
        assert cli.main(["judge", str(answers), "honeset", *settings]) == 0
        assert server.received[0].headers["authorization"] == f"Bearer {API_KEY}", "the server did get it"
        (tmp_path / "answers.honeset.jsonl").unlink()
        for status in (400, 401, 404, 500):
            server.failures = [failure(status, f"{API_KEY} and {HUB_TOKEN} are bad")] * 20
            assert cli.main(["judge", str(answers), "honeset", *settings]) == 2
        server.failures = []
        assert cli.main(["judge", str(answers), "honeset", *settings]) == 0
    host = server.url.removeprefix("http://")
    for endpoint in (f"http://me:{PASSWORD}@{host}", f"http://{host}?key={PASSWORD}"):
        assert cli.main(["judge", str(answers), "honeset", f"endpoint={endpoint}", "endpoint_model=m"]) == 2
    assert cli.main(["judge", str(answers), "honeset", f"endpoint=http://{host}", f"endpoint_model={API_KEY}"]) == 2
    left = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file()) + "".join(capfd.readouterr())
    assert f"yes, {HIDDEN}" in left
    assert not [secret for secret in SECRETS if secret in left]


def test_an_error_of_data_hides_them_too() -> None:
    assert str(DataError(f"x: http://me:{PASSWORD}@host\nsaid no")) == rf"x: http://{HIDDEN}@host\nsaid no"


def test_weights_of_other_formats_are_not_read(tmp_path: Path, write_recipe: WriteRecipe) -> None:
    """A pickle beside the config is no model."""
    shutil.copytree(WORLD_BASE, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    save_file({}, tmp_path / "elsewhere.safetensors")
    assert cli.main(["run", str(write_recipe(f"model.path={tmp_path / 'model'}"))]) == 2
